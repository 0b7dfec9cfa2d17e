"""Solvers of V = T V: one loop, one small stepper a file."""

from bilevel_jax.solvers.loop import Solver, SolveStats, default_solver
from bilevel_jax.solvers.policy_iteration import PolicyIteration
from bilevel_jax.solvers.solve import Solution, read_out, solve
from bilevel_jax.solvers.value_iteration import ValueIteration

__all__ = [
    "PolicyIteration",
    "Solution",
    "SolveStats",
    "Solver",
    "ValueIteration",
    "default_solver",
    "read_out",
    "solve",
]
