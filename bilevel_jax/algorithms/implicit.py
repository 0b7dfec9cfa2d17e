"""Descent on phi(x) = f(x, pi*(x)) with its hyper-gradient by any method: the exact counterpart of M-SoBiRL."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from bilevel_jax.algorithms.protocol import ModelInfo, jit_step
from bilevel_jax.algorithms.upper import UpperLevel, as_upper_level, at_iteration
from bilevel_jax.captures import jit
from bilevel_jax.hypergradient import (
    Implicit,
    Method,
    Problem,
    hypergradient,
    lower_level,
    require_problem,
)
from bilevel_jax.solvers import Solver, solve
from bilevel_jax.validation import require_instance


class ImplicitDescentState(eqx.Module):
    """What one iteration hands to the next.

    `x`: upper variable. `value` V[S] and `adjoint` w[S] (None from methods without one) of the last
    hyper-gradient, from which the next one starts. `iteration`: how many were made.
    """

    x: Any
    value: jax.Array
    adjoint: jax.Array | None
    optimizer_state: Any
    iteration: jax.Array


class ImplicitDescent(eqx.Module):
    """See `implicit`."""

    problem: Problem
    upper: UpperLevel = eqx.field(converter=as_upper_level)
    method: Method
    search: Solver | None

    def init(self, key: jax.Array, x: Any) -> ImplicitDescentState:
        """The state at x (projected), nothing solved yet. The key is not used.

        Raises:
          InputError: x is not floating point; outside jit, if the MDP or the regularizer at x is not valid.
        """
        del key
        x, *_ = self.upper.start(self.problem, x)
        return _init(self, x)

    def step(self, key: jax.Array, state: ImplicitDescentState) -> tuple[ImplicitDescentState, ModelInfo]:
        """One upper iteration: the hyper-gradient at x, warm-started, and the optimizer's update."""
        del key
        return _step(self, state)


def implicit(
    problem: Problem,
    optimizer: optax.GradientTransformation | UpperLevel,
    *,
    method: Method | None = None,
    search: Solver | None = None,
) -> ImplicitDescent:
    """Any optax optimizer on phi, its gradient from `hypergradient` with V and w carried over as starts.

    With `optax.lbfgs()` a quasi-Newton method with a line search on phi: each of its trial points solves
    the lower level from the current V, and its slope there.

    Args:
      problem: a `Problem`; its numbers are leaves and may be changed or vmapped.
      optimizer: an optax transformation, or an `UpperLevel` with projection or schedule of the temperature. A line
        search sees phi without the projection; give it one or the other.
      method: of the hyper-gradient; None is `Implicit()`, exact. With inexact ones, `check(info)` raises.
      search: lower-level solver of a line search's trial points; None is `Auto()`.

    Returns:
      An `Algorithm`: `init(key, x)`, `step(key, state)`, both compiled.

    Raises:
      InputError: an argument of another type.
    """
    require_problem(problem)
    require_instance("method", method, Method | None)
    require_instance("search", search, Solver | None)
    return ImplicitDescent(problem, optimizer, Implicit() if method is None else method, search)


def _any_value(x: Any) -> jax.Array:
    """Of the types of phi."""
    return sum((jnp.sum(leaf) for leaf in jax.tree.leaves(x)), start=jnp.zeros(()))


@jit
def _init(algorithm, x):
    mdp, _ = lower_level(algorithm.problem, x)
    shapes = jax.eval_shape(lambda x: hypergradient(algorithm.problem, x, method=algorithm.method).adjoint, x)
    adjoint = None if shapes is None else jnp.zeros(shapes.shape, shapes.dtype)
    start = jnp.asarray(0, jnp.int32)
    # As `step` returns it: of another type it would compile twice.
    x = jax.tree.map(lambda leaf: leaf.astype(leaf.dtype), x)
    value = jnp.zeros_like(mdp.reward[..., 0])
    return ImplicitDescentState(x, value, adjoint, algorithm.upper.init(x, _any_value), start)


@jit_step
def _step(algorithm, state):
    problem = at_iteration(algorithm, state.iteration).problem
    made = hypergradient(
        problem,
        state.x,
        method=algorithm.method,
        initial_value=state.value,
        initial_adjoint=state.adjoint,
        with_error=False,
    )
    value = made.solution.value

    def phi(x):
        return problem.objective(x, solve(*lower_level(problem, x), solver=algorithm.search, initial_value=value))

    x, optimizer_state, stationarity = algorithm.upper.update(
        made.gradient, state.optimizer_state, state.x, made.value, phi
    )
    info = ModelInfo(
        made.value,
        made.gradient,
        optax.tree.norm(made.gradient),
        stationarity,
        made.solution.result,
        made.solution.stats,
        made.stats,
    )
    return ImplicitDescentState(x, value, made.adjoint, optimizer_state, state.iteration + 1), info
