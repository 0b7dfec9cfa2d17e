"""`bilevel-jax compare`: methods on problems over seeds, tuned and drawn."""
