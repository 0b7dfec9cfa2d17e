"""Bilevel problems by name: `make("four_rooms", beta=3.0)`, `names()`. One problem per file."""

from bilevel_jax.problems import (
    environment_design,
    four_rooms,
    garnet,
    incentives,
    inverse_rl,
    multi_follower,
    preference_learning,
    reward_shaping,
    stackelberg,
    synthetic,
    tabular_rlhf,
    tax_design,
)
from bilevel_jax.problems.registry import ProblemSpec, make, names, register, spec
from bilevel_jax.problems.task import Task

__all__ = [
    "ProblemSpec",
    "Task",
    "environment_design",
    "four_rooms",
    "garnet",
    "incentives",
    "inverse_rl",
    "make",
    "multi_follower",
    "names",
    "preference_learning",
    "register",
    "reward_shaping",
    "spec",
    "stackelberg",
    "synthetic",
    "tabular_rlhf",
    "tax_design",
]
