"""How many lower-level transitions an iteration of an algorithm looks at: the budget that all methods share."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from bilevel_jax.adjoint import LinearSolver, default_linear_solver
from bilevel_jax.solvers import Solver


def sampled_transitions(algorithm: Any, state: Any, info: Any) -> jax.Array:
    """Steps of the simulator, as the iteration reports them. What an exact agent solves is not counted."""
    del algorithm, state
    return info.environment_steps.astype(float)


def model_transitions(algorithm: Any, state: Any, info: Any) -> jax.Array:
    """Transitions that an iteration which knows the model looks at, `state` the one after it.

    A Bellman sweep, a product with a policy's transitions and a step of the adjoint each look at every pair
    of every context once: contexts S A transitions. The hyper-gradient formula is one more sweep, a
    factorization as many as have its operations, see `factorization_sweeps`. Each trial point of a line
    search solves for a value and a slope of its own and counts as much as the iteration's hyper-gradient.
    The objective's own work is not counted.
    """
    mdp = jax.eval_shape(algorithm.problem.mdp, state.x)
    lower, adjoint = solvers_of(algorithm)
    sweeps = _lower_sweeps(lower, mdp, info) + 1
    if info.adjoint_stats is not None:
        sweeps += solve_sweeps(adjoint, mdp) * _total(info.adjoint_stats.steps)
    trials = optax.tree_utils.tree_get(state.optimizer_state, "num_linesearch_steps")
    repeats = 1.0 if trials is None else 1 + _total(trials)
    return sweeps * repeats * (mdp.num_states * mdp.num_actions)


def amd_transitions(algorithm: Any, state: Any, info: Any) -> jax.Array:
    """Transitions that an iteration of `amd` looks at: each sweep is one of V and one of every entry of dV/dx."""
    del info
    mdp = jax.eval_shape(algorithm.problem.mdp, state.x)
    entries = sum(leaf.size for leaf in jax.tree.leaves(state.x))
    return jnp.asarray(float(algorithm.sweeps * (1 + entries) * mdp.reward.size))


def pbrl_transitions(algorithm: Any, state: Any, info: Any) -> jax.Array:
    """Transitions that an iteration of `pbrl` looks at: the inner policy's solve, and evaluations of policies.

    A step of the penalized policy evaluates it and the inner one, and finds its visits where the penalty is of
    values; the gradient in x evaluates both once more. An evaluation is a factorization where that is the default,
    else as many products as the inner solve made, its own not being reported.
    """
    mdp = jax.eval_shape(algorithm.problem.mdp, state.x)
    evaluations = algorithm.steps * (3 if algorithm.penalty == "value" else 2) + 2
    contexts = mdp.reward.size // (mdp.num_states * mdp.num_actions)
    direct = isinstance(default_linear_solver(mdp.num_states), bj.Direct)
    each = contexts * factorization_sweeps(mdp) if direct else _total(info.lower_stats.products)
    sweeps = _lower_sweeps(algorithm.lower, mdp, info) + evaluations * each
    return sweeps * (mdp.num_states * mdp.num_actions)


def _lower_sweeps(solver: Solver, mdp: Any, info: Any) -> jax.Array:
    """What the lower level's solve took, all contexts together."""
    stats = info.lower_stats
    return _total(stats.steps) + product_sweeps(solver.resolve(mdp)[-1], mdp) * _total(stats.products)


def _total(counts: jax.Array) -> jax.Array:
    """Of all contexts, as a float: more than an int32 holds, in a long run."""
    return jnp.sum(counts).astype(float)


def solvers_of(algorithm: Any) -> tuple[Solver, LinearSolver | None]:
    """Lower-level solver and linear solver of `m_sobirl` or `implicit`; None is the default of that size."""
    if hasattr(algorithm, "lower"):
        return algorithm.lower, algorithm.adjoint
    method = algorithm.method
    return bj.Auto(method.tolerance) if method.solver is None else method.solver, method.adjoint


def product_sweeps(solver: Any, mdp: Any) -> float:
    """What one of a solver's products costs, in sweeps: policy iteration counts each of its linear solves' steps."""
    return solve_sweeps(solver.linear_solver, mdp) if isinstance(solver, bj.PolicyIteration) else 1.0


def solve_sweeps(solver: LinearSolver | None, mdp: Any) -> float:
    """What one step of a linear solver costs, in sweeps; the one step of `Direct` is a factorization."""
    solver = default_linear_solver(mdp.num_states) if solver is None else solver
    return factorization_sweeps(mdp) if isinstance(solver, bj.Direct) else 1.0


def factorization_sweeps(mdp: Any) -> float:
    """2/3 S^3 operations of an LU factorization over the 2 S A K of a sweep with K successors a pair."""
    return mdp.num_states**2 / (3 * mdp.num_actions * mdp.transition.terms)
