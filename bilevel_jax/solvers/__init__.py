"""Solvers of V = T V: one loop, and one small stepper per file."""

from bilevel_jax.solvers.adaptive import AdaptivePolicyIteration
from bilevel_jax.solvers.anderson import AndersonIteration
from bilevel_jax.solvers.auto import Auto
from bilevel_jax.solvers.loop import Solver, SolveStats
from bilevel_jax.solvers.modified_policy_iteration import ModifiedPolicyIteration
from bilevel_jax.solvers.newton_krylov import NewtonKrylov
from bilevel_jax.solvers.policy_iteration import PolicyIteration
from bilevel_jax.solvers.solve import Solution, solution_at, solve
from bilevel_jax.solvers.value_iteration import ValueIteration

__all__ = [
    "AdaptivePolicyIteration",
    "AndersonIteration",
    "Auto",
    "ModifiedPolicyIteration",
    "NewtonKrylov",
    "PolicyIteration",
    "Solution",
    "SolveStats",
    "Solver",
    "ValueIteration",
    "solution_at",
    "solve",
]
