"""The cost of a computation: the number of the lower level's transitions that it uses.

All algorithms share this measure.

A Bellman sweep, a product with a policy's transitions, and a step of an iterative linear solver each use every pair of
every context once: that is contexts S A transitions. A factorization counts as many as have its number of operations.
The counts are floats, because a long run exceeds an int32. The work of the objective itself is not counted.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from bilevel_jax.linear import Direct, LinearSolver, LinearStats, default_linear_solver
from bilevel_jax.mdp.process import MDP
from bilevel_jax.solvers import PolicyIteration, Solver, SolveStats


def solve_sweeps(solver: Solver, mdp: MDP, stats: SolveStats) -> Float[Array, ""]:
    """Return the cost of a solve of the lower level, in sweeps, all contexts together."""
    last = solver.resolve(mdp)[-1]
    # Policy iteration counts each of its linear solves' steps as a product.
    each = linear_step_sweeps(last.linear_solver, mdp) if isinstance(last, PolicyIteration) else 1.0
    return total(stats.iterations) + each * total(stats.products)


def linear_sweeps(linear_solver: LinearSolver | None, mdp: MDP, stats: LinearStats) -> Float[Array, ""]:
    """Return the cost of a linear solve, in sweeps, all contexts together; None is the default solver."""
    return linear_step_sweeps(linear_solver, mdp) * total(stats.products)


def linear_step_sweeps(linear_solver: LinearSolver | None, mdp: MDP) -> float:
    """Return the cost of one step of a linear solver, in sweeps. The one step of `Direct` is a factorization."""
    solver = default_linear_solver(mdp.num_states) if linear_solver is None else linear_solver
    return factorization_sweeps(mdp) if isinstance(solver, Direct) else 1.0


def factorization_sweeps(mdp: MDP) -> float:
    """Return the 2/3 S^3 operations of an LU factorization divided by the 2 S A K of a sweep with K successors per
    pair.
    """
    return mdp.num_states**2 / (3 * mdp.num_actions * mdp.transition.terms)


def pairs(mdp: MDP) -> int:
    """Return the number of transitions that a sweep of one context uses."""
    return mdp.num_states * mdp.num_actions


def total(counts: Integer[Array, "*contexts"]) -> Float[Array, ""]:
    """Of all contexts, as a float."""
    return jnp.sum(counts).astype(float)
