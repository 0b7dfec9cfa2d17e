"""Studies: experiments that compare, each with a config, tables and pictures. `bilevel-jax study CONFIG`."""
