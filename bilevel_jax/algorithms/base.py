"""The base of every algorithm for the upper level: one state, one report, one loop."""

import abc
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float, Int32, PRNGKeyArray, Real

from bilevel_jax.algorithms.upper import UpperLevel, at_iteration
from bilevel_jax.bilevel import as_upper_variable
from bilevel_jax.core.captures import jit
from bilevel_jax.core.results import Outcome, finite_outcome

# Of an algorithm's step(algorithm, ..., state): of the state, only x may hold functions.
jit_step = functools.partial(jit, watched=lambda algorithm, *rest: (algorithm, rest[-1].x))


class State(eqx.Module):
    """The state that one iteration gives to the next.

    `x` is the upper variable. `memory` is what the method carries, such as a value function or an agent; each algorithm
    documents it. `iteration` is the number of iterations made.
    """

    x: Any
    memory: Any
    optimizer_state: Any
    iteration: Int32[Array, ""]


class Report(eqx.Module):
    """The end of an iteration within an iteration: its result code, and its stats (`SolveStats`, `LinearStats` or
    None).
    """

    result: Int32[Array, "*batch"]
    stats: Any = None


class Info(eqx.Module):
    """The report of one iteration, at the x it started from.

    `objective` is f(x, policy), or an estimate of it. `gradient` is the estimate of the hyper-gradient, `gradient_norm`
    its 2-norm, and `stationarity` is the same number unless there is a projection, see `UpperLevel`. `transitions` is
    the number of the lower level's transitions that the iteration used, simulated or in the model. `reports` holds by
    name the `Report`s of inner iterations, and numbers that only this algorithm has.
    """

    objective: Float[Array, ""]
    gradient: Any
    gradient_norm: Float[Array, ""]
    stationarity: Float[Array, ""]
    transitions: Float[Array, ""]
    reports: dict[str, Any]

    def outcomes(self) -> tuple[Outcome, ...]:
        within = {name: report for name, report in self.reports.items() if isinstance(report, Report)}
        solved = (
            Outcome(name, report.result, None if report.stats is None else report.stats.error_bound)
            for name, report in within.items()
        )
        return (*solved, finite_outcome(self.objective, self.gradient_norm))


class Estimate(eqx.Module):
    """The result of an algorithm's `estimate`.

    `objective`, `gradient`, `transitions` and `reports` are as in `Info`. `memory` is that of the next state, before
    `after_update`. `value` is the value of the function whose gradient it is, where that is not the objective.
    `value_fn` is that function of x where it is known, for optimizers that search along a line.
    """

    objective: Float[Array, ""]
    gradient: Any
    memory: Any
    transitions: Real[ArrayLike, ""]
    reports: dict[str, Any]
    value: Float[Array, ""] | None = None
    value_fn: Callable | None = eqx.field(default=None, static=True)


class Algorithm(eqx.Module):
    """The base class of an algorithm: a pytree with two pure methods, compiled once per structure of algorithm and
    state.

    A subclass has the fields `problem` and `upper` (an `UpperLevel`, by the converter `as_upper_level`). It writes
    `init_memory` and `estimate`, and `after_update` if something is to be done at the new x. In these methods
    `self.problem` is the problem of the iteration, at the temperature that the schedule of `upper` has for it.
    `searches` says whether its estimates have a `value_fn`.
    """

    problem: eqx.AbstractVar[Any]
    upper: eqx.AbstractVar[UpperLevel]
    searches: ClassVar[bool] = False

    @classmethod
    def requires(cls, problem: Any) -> str | None:
        """Return None if the algorithm can run on the problem, or else the reason why it cannot, as a phrase after
        "it".
        """
        del problem
        return None

    def init(self, key: PRNGKeyArray, x: Any) -> State:
        """Return the state at x (projected), before any iteration.

        Raises:
          InputError: x is not floating point, or the algorithm refuses the problem.
        """
        return initial_state(self, key, self.start(x), {})

    def step(self, key: PRNGKeyArray, state: State) -> tuple[State, Info]:
        """One upper iteration. Give each one a key of its own, e.g. `jax.random.fold_in(key, iteration)`."""
        return _step(self, key, state)

    def start(self, x: Any) -> Any:
        """Return x as arrays and projected.

        Checks that need the values at x belong here, outside jit. Raises InputError.
        """
        return self.upper.project(as_upper_variable(x))

    @abc.abstractmethod
    def init_memory(self, key: PRNGKeyArray, x: Any) -> Any:
        """Return what the method carries, at the start."""

    @abc.abstractmethod
    def estimate(self, key: PRNGKeyArray, state: State) -> Estimate:
        """The hyper-gradient at `state.x`, and the memory that comes with it."""

    def after_update(self, memory: Any, x: Any) -> Any:
        """Return the memory after x has moved; `self.problem` is the problem of the next iteration."""
        del x
        return memory


def regularizer_of(problem: Any) -> Any:
    """The regularizer at the problem's start, with shapes for arrays; None where it has no start."""
    if not hasattr(problem, "start"):
        return None
    return jax.eval_shape(lambda: problem.regularizer(problem.start(jax.random.key(0))))


@jit
def initial_state(algorithm: Algorithm, key: PRNGKeyArray, x: Any, starts: dict[str, Any]) -> State:
    """Return the state at an x that `start` returned; `starts` are further arguments of `init_memory`."""
    x = jax.tree.map(lambda leaf: leaf.astype(leaf.dtype), x)  # as `step` returns it: of another type it compiles twice
    first = jnp.asarray(0, jnp.int32)
    memory = at_iteration(algorithm, first).init_memory(key, x, **starts)
    return State(x, memory, algorithm.upper.init(x, _any_value if algorithm.searches else None), first)


def _any_value(x: Any) -> Float[Array, ""]:
    """Of the types of phi."""
    return sum((jnp.sum(leaf) for leaf in jax.tree.leaves(x)), start=jnp.zeros(()))


@jit_step
def _step(algorithm, key, state):
    made = at_iteration(algorithm, state.iteration).estimate(key, state)
    x, optimizer_state, stationarity = algorithm.upper.update(
        made.gradient,
        state.optimizer_state,
        state.x,
        made.objective if made.value is None else made.value,
        made.value_fn,
    )
    memory = at_iteration(algorithm, state.iteration + 1).after_update(made.memory, x)
    # Each trial point of a line search costs as much as the estimate.
    trials = optax.tree_utils.tree_get(optimizer_state, "num_linesearch_steps")
    repeats = 1.0 if trials is None else 1 + jnp.sum(trials)
    dtype = made.objective.dtype
    info = Info(
        objective=made.objective,
        gradient=made.gradient,
        gradient_norm=optax.tree.norm(made.gradient),
        stationarity=stationarity,
        transitions=jnp.asarray(made.transitions, dtype) * jnp.asarray(repeats, dtype),
        reports=made.reports,
    )
    return State(x, memory, optimizer_state, state.iteration + 1), info
