"""Basin hopping: descents from many starts, some near the best x so far. The best end of all descents is kept."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from bilevel_jax.algorithms.base import Algorithm, Info, Report, State, jit_step
from bilevel_jax.algorithms.model.base import ModelAlgorithm
from bilevel_jax.algorithms.model.implicit import implicit
from bilevel_jax.algorithms.registry import register_algorithm
from bilevel_jax.algorithms.upper import UpperLevel
from bilevel_jax.bilevel import Problem, as_upper_variable, lower_level
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.results import Result
from bilevel_jax.core.schedules import Cooling
from bilevel_jax.core.validation import as_float, as_size, require_positive, require_probability
from bilevel_jax.solvers import solve


class Best(eqx.Module):
    """`objective`: the exact objective of the best end so far.

    `origin`: the start of the first descent; some later starts are near it.
    """

    objective: Float[Array, ""]
    origin: Any


class BasinHopping(eqx.Module):
    """See `basin_hopping`. The state's x is the best end so far, the start until there is one; its memory is `Best`."""

    algorithm: Algorithm
    descent: int = eqx.field(static=True)
    spread: Float[Array, ""]
    fresh: Float[Array, ""]

    @classmethod
    def requires(cls, problem: Any) -> str | None:
        """None where the problem has a model, or else the reason why not."""
        return ModelAlgorithm.requires(problem)

    @property
    def problem(self) -> Problem:
        """The problem of the descents."""
        return self.algorithm.problem

    @property
    def upper(self) -> UpperLevel:
        """The upper level of the descents, which projects x."""
        return self.algorithm.upper

    def init(self, key: PRNGKeyArray, x: Any) -> State:
        """The state at x, nothing solved yet. Raises InputError as the algorithm of the descents does."""
        x = self.algorithm.init(key, as_upper_variable(x)).x
        dtype = lower_level(self.problem, x)[0].reward.dtype
        return State(x, Best(jnp.asarray(jnp.inf, dtype), x), None, jnp.asarray(0, jnp.int32))

    def step(self, key: PRNGKeyArray, state: State) -> tuple[State, Info]:
        """One whole descent from a new start."""
        return _step(self, key, state)


def basin_hopping(algorithm: Any, *, descent: int = 300, spread: Any = 3.0, fresh: Any = 0.5) -> BasinHopping:
    """Basin hopping (Wales and Doye 1997, J. Phys. Chem. A 101) over descents of any algorithm that knows the model.

    It is for objectives with many local optima, such as those of agents at low temperature. A step draws a start, lets
    the algorithm make `descent` iterations from there, and keeps the end if phi is lower there than at any end before.
    The first start is the given x; the others are

      base + spread u z,   u uniform on [0, 1], z normal.

    base is the given x with probability `fresh`, and the best x so far otherwise. The acceptance is greedy, which is
    the original Metropolis rule at temperature 0. Each descent begins with a new state of the algorithm, so that
    schedules of its step size and of the problem's temperature (`UpperLevel`) start again.

    Args:
      algorithm: e.g. `implicit(problem, UpperLevel(optimizer, temperature=Cooling(5, 100)))`, or `m_sobirl`.
      descent: the number of its iterations per step (static).
      spread: the largest standard deviation of the perturbation, in units of x.
      fresh: the probability of a start near the given x.

    Returns:
      `init` and `step` as an `Algorithm` has them, a step being a descent: `state.x` is the best x, `info` the
      algorithm's report of the last iteration, with the best exact phi as `objective` and the counts of the whole
      descent in its stats.

    Raises:
      InputError: an algorithm that learns from samples, sizes or numbers out of range.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> algorithm = bj.algorithms.basin_hopping(bj.algorithms.implicit(problem, optax.adam(0.1)), descent=5)
      >>> state = algorithm.init(jax.random.key(0), problem.start(jax.random.key(1)))
      >>> state, info = algorithm.step(jax.random.key(2), state)
      >>> state.x.shape, info.objective.shape
      ((8, 3), ())
    """
    if isinstance(algorithm, BasinHopping):
        raise InputError("algorithm: BasinHopping is descents already; give it more steps, or the algorithm within it")
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
    found = problem.objective(inner.x, solution).astype(state.memory.objective.dtype)
    found = jnp.where(jnp.all(solution.result == Result.CONVERGED), found, jnp.nan)
    better = found < state.memory.objective  # False also for NaN: an end whose phi is not known is not kept
    best = jax.tree.map(lambda new, old: jnp.where(better, new, old), inner.x, state.x)
    objective = jnp.where(better, found, state.memory.objective)
    following = State(best, Best(objective, state.memory.origin), None, state.iteration + 1)
    return following, _summed(infos, objective)


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

    return jax.tree.map(move, state.x, state.memory.origin, keys)


def _summed(infos: Info, objective: Float[Array, ""]) -> Info:
    """The report of the last iteration, with the counts of all."""
    last = jax.tree.map(lambda leaf: leaf[-1], infos)
    reports = dict(last.reports)
    for name, report in last.reports.items():
        if isinstance(report, Report) and report.stats is not None:
            counted = {f.name for f in dataclasses.fields(report.stats)} & {"iterations", "products"}
            sums = {field: jnp.sum(getattr(infos.reports[name].stats, field), 0) for field in counted}
            reports[name] = Report(report.result, dataclasses.replace(report.stats, **sums))
    transitions = jnp.sum(infos.transitions, 0)
    return dataclasses.replace(last, objective=objective, transitions=transitions, reports=reports)


def basin_hopping_on(
    problem: Problem,
    upper: UpperLevel | optax.GradientTransformation,
    *,
    algorithm: Algorithm | None = None,
    descent: int = 300,
    spread: Any = 3.0,
    fresh: Any = 0.5,
) -> BasinHopping:
    """Basin hopping (Wales and Doye 1997): descents from many starts, of which the best end is kept.

    Args:
      algorithm: of the descents; None is `implicit(problem, upper)`.
      descent, spread, fresh: see `basin_hopping`.
    """
    algorithm = implicit(problem, upper) if algorithm is None else algorithm
    return basin_hopping(algorithm, descent=descent, spread=spread, fresh=fresh)


register_algorithm("basin_hopping", basin_hopping_on)
