"""Bilevel problems by name: `make("four_rooms", beta=3.0)`, `names()`. One problem a file."""

from bilevel_jax.problems import (
    four_rooms,
    garnet,
    multi_follower,
    reward_shaping,
    stackelberg,
    synthetic,
    tabular_rlhf,
    tax_design,
)
from bilevel_jax.problems.registry import ProblemSpec, make, names, register, spec

__all__ = [
    "ProblemSpec",
    "four_rooms",
    "garnet",
    "make",
    "multi_follower",
    "names",
    "register",
    "reward_shaping",
    "spec",
    "stackelberg",
    "synthetic",
    "tabular_rlhf",
    "tax_design",
]
