"""What every algorithm is, and what those that know the model report."""

import functools
from typing import Any, Protocol

import equinox as eqx
import jax

from bilevel_jax.adjoint import LinearStats
from bilevel_jax.captures import jit
from bilevel_jax.results import Outcome, finite_outcome
from bilevel_jax.solvers import SolveStats

# Of an algorithm's step(algorithm, ..., state): of the state, only x may hold functions.
jit_step = functools.partial(jit, watched=lambda algorithm, *rest: (algorithm, rest[-1].x))


class Algorithm(Protocol):
    """A pytree with two pure methods, compiled once for each structure of algorithm and state.

    The state is what an iteration needs of the last one, with `state.x` the upper variable and
    `state.iteration` how many were made; the info is what it reports: at least `objective`,
    `gradient_norm`, `stationarity` and `outcomes()`.
    """

    def init(self, key: jax.Array, x: Any) -> Any: ...

    def step(self, key: jax.Array, state: Any) -> tuple[Any, Any]: ...


class ModelInfo(eqx.Module):
    """What one iteration of an algorithm that knows the model reports, all at the x it started from.

    `objective` f(x, pi); `gradient`, the estimate of the hyper-gradient, and its 2-norm; `stationarity`, the
    same without a projection, see `UpperLevel`; result and stats of the lower level and of the adjoint (None
    where the method has none). An inexact lower level reports `MAX_STEPS`: as asked.
    """

    objective: jax.Array
    gradient: Any
    gradient_norm: jax.Array
    stationarity: jax.Array
    lower_result: jax.Array
    lower_stats: SolveStats
    adjoint_stats: LinearStats | None

    def outcomes(self) -> tuple[Outcome, ...]:
        lower = Outcome("lower level", self.lower_result, self.lower_stats.error_bound)
        adjoint = self.adjoint_stats
        solved = (lower,) if adjoint is None else (lower, Outcome("adjoint", adjoint.result, adjoint.error_bound))
        return (*solved, finite_outcome(self.objective, self.gradient_norm))
