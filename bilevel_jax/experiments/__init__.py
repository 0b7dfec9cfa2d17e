"""Experiments from YAML configs: `bilevel-jax run | list | plot`. Needs the extra `bilevel_jax[cli]`."""
