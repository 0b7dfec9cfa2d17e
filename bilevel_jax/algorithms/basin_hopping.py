"""Basin hopping: descents from many starts, some of them near the best x so far, of which the best end is kept."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from bilevel_jax.algorithms.protocol import ModelInfo, jit_step
from bilevel_jax.algorithms.upper import Cooling
from bilevel_jax.errors import InputError
from bilevel_jax.hypergradient import Problem, as_upper_variable, lower_level
from bilevel_jax.results import Result
from bilevel_jax.solvers import solve
from bilevel_jax.validation import as_float, as_size, require_positive, require_probability


class BasinHoppingState(eqx.Module):
    """What one descent hands to the next.

    `x`: the best end so far (the start until there is one), and its exact `objective`. `origin`: where the first
    descent starts, around which others do. `iteration`: how many descents were made.
    """

    x: Any
    objective: jax.Array
    origin: Any
    iteration: jax.Array


class BasinHopping(eqx.Module):
    """See `basin_hopping`."""

    algorithm: Any
    descent: int = eqx.field(static=True)
    spread: jax.Array
    fresh: jax.Array

    @property
    def problem(self) -> Problem:
        """The problem of the descents."""
        return self.algorithm.problem

    def init(self, key: jax.Array, x: Any) -> BasinHoppingState:
        """The state at x, nothing solved yet. Raises InputError as the algorithm of the descents does."""
        x = self.algorithm.init(key, as_upper_variable(x)).x
        dtype = lower_level(self.problem, x)[0].reward.dtype
        return BasinHoppingState(x, jnp.asarray(jnp.inf, dtype), x, jnp.asarray(0, jnp.int32))

    def step(self, key: jax.Array, state: BasinHoppingState) -> tuple[BasinHoppingState, ModelInfo]:
        """One whole descent from a new start."""
        return _step(self, key, state)


def basin_hopping(algorithm: Any, *, descent: int = 300, spread: Any = 3.0, fresh: Any = 0.5) -> BasinHopping:
    """Basin hopping (Wales and Doye 1997, J. Phys. Chem. A 101) over descents of any algorithm that knows the model.

    For objectives with many local optima, as those of agents at low temperature have. A step draws a start, lets the
    algorithm make `descent` iterations from there, and keeps the end if phi is lower there than at any end before.
    The first start is the given x; the others are

      base + spread u z,   u uniform on [0, 1], z normal,

    base being the given x with probability `fresh`, and the best x so far otherwise. The acceptance is greedy: of
    the original Metropolis rule, the temperature 0. A descent begins with a new state of the algorithm, so that
    schedules of its step size and of the problem's temperature (`UpperLevel`) start anew.

    Args:
      algorithm: e.g. `implicit(problem, UpperLevel(optimizer, temperature=Cooling(5, 100)))`, or `m_sobirl`.
      descent: its iterations a step (static).
      spread: standard deviation of the perturbation at most, in units of x.
      fresh: probability of a start around the given x.

    Returns:
      An `Algorithm` whose step is a descent: `state.x` is the best x, `info` the algorithm's report of the last
      iteration, with the best exact phi as `objective` and the counts of the whole descent in its stats.

    Raises:
      InputError: an algorithm that learns from samples, sizes or numbers out of range.
    """
    if not isinstance(getattr(algorithm, "problem", None), Problem) or hasattr(algorithm, "agent"):
        raise InputError(
            f"algorithm: {type(algorithm).__name__} does not know the model, ends could not be compared; take e.g. "
            f"bilevel_jax.algorithms.implicit"
        )
    descent = as_size("descent", descent)
    spread, fresh = as_float("spread", spread), as_float("fresh", fresh)
    require_positive("spread", spread, "3 is usual for logits")
    require_probability("fresh", fresh, "0.5 is usual, 1 starts all descents around the given x")
    return BasinHopping(algorithm, descent, spread, fresh)


@jit_step
def _step(hopping, key, state):
    problem = hopping.problem
    for_start, for_heat, for_descent = jax.random.split(key, 3)
    algorithm = _reheated(hopping.algorithm, for_heat, state)
    inner = algorithm.init(for_descent, _start(hopping, for_start, state))

    def iterate(inner, i):
        return algorithm.step(jax.random.fold_in(for_descent, i), inner)

    inner, infos = lax.scan(iterate, inner, jnp.arange(hopping.descent))
    solution = solve(*lower_level(problem, inner.x))
    found = problem.objective(inner.x, solution).astype(state.objective.dtype)
    found = jnp.where(jnp.all(solution.result == Result.CONVERGED), found, jnp.nan)
    better = found < state.objective  # False also for NaN: an end whose phi is not known is not kept
    best = jax.tree.map(lambda new, old: jnp.where(better, new, old), inner.x, state.x)
    objective = jnp.where(better, found, state.objective)
    return BasinHoppingState(best, objective, state.origin, state.iteration + 1), _summed(infos, objective)


def _reheated(algorithm, key, state):
    """The algorithm, with another start of its cooling after the first descent."""
    if not isinstance(algorithm.upper.temperature, Cooling):
        return algorithm
    share = jnp.where(state.iteration == 0, 1, jax.random.uniform(key))
    start = algorithm.upper.temperature.start
    return eqx.tree_at(lambda a: a.upper.temperature.start, algorithm, start ** share.astype(start.dtype))


def _start(hopping, key, state):
    """Where the next descent starts."""
    for_base, for_size, for_direction = jax.random.split(key, 3)
    afresh = jax.random.bernoulli(for_base, hopping.fresh)
    size = jnp.where(state.iteration == 0, 0, hopping.spread * jax.random.uniform(for_size))
    leaves, structure = jax.tree.flatten(state.x)
    keys = jax.tree.unflatten(structure, list(jax.random.split(for_direction, len(leaves))))

    def move(near, origin, key):
        base = jnp.where(afresh, origin, near)
        return base + size.astype(base.dtype) * jax.random.normal(key, base.shape, base.dtype)

    return jax.tree.map(move, state.x, state.origin, keys)


def _summed(infos: ModelInfo, objective: jax.Array) -> ModelInfo:
    """The report of the last iteration, with the counts of all."""
    last = jax.tree.map(lambda leaf: leaf[-1], infos)
    counts = [(lambda i: i.objective, objective)]
    for where in (lambda i: i.lower_stats.steps, lambda i: i.lower_stats.products):
        counts.append((where, jnp.sum(where(infos), 0)))
    if infos.adjoint_stats is not None:
        counts.append((lambda i: i.adjoint_stats.steps, jnp.sum(infos.adjoint_stats.steps, 0)))
    for where, value in counts:
        last = eqx.tree_at(where, last, value)
    return last
