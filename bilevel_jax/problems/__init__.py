"""Bilevel problems by name: `make("four_rooms", beta=3.0)`, `names()`. One problem a file."""

from bilevel_jax.problems import four_rooms, garnet, reward_shaping, synthetic, tabular_rlhf
from bilevel_jax.problems.registry import ProblemSpec, make, names, register, spec

__all__ = [
    "ProblemSpec",
    "four_rooms",
    "garnet",
    "make",
    "names",
    "register",
    "reward_shaping",
    "spec",
    "synthetic",
    "tabular_rlhf",
]
