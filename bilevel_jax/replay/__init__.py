"""A replay buffer: it keeps the last items, pytrees of any structure, for use in later iterations."""

from bilevel_jax.replay.ring import Ring, add, init, latest, sample

__all__ = ["Ring", "add", "init", "latest", "sample"]
