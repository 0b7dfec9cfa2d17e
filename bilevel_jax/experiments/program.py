"""The runs of one algorithm that differ only in numbers, as one vmapped, compiled program."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax.algorithms import Info, Report
from bilevel_jax.experiments.chunks import Cut, cut
from bilevel_jax.replay import Ring


class Progress(NamedTuple):
    """A run under way.

    It has the algorithm's state; the transitions so far, and in the last iteration; whether everything is finite; and
    the best objective that an iteration reported, with its x.
    """

    state: Any
    transitions: jax.Array
    last: jax.Array
    finite: jax.Array
    best_objective: jax.Array
    best_x: Any


class Inputs(NamedTuple):
    """The leaves of the algorithms that vary between the runs, stacked; those that all share; and the runs' keys."""

    varying: Any
    shared: Any
    keys: jax.Array


class Limits(NamedTuple):
    """What a run may have spent: iterations, int32, and transitions, infinite where nothing limits them."""

    iterations: Any
    transitions: Any

    @classmethod
    def of(cls, iterations: float, transitions: float) -> "Limits":
        """The limits of two numbers, which may be infinite."""
        return cls(np.int32(min(iterations, np.iinfo(np.int32).max)), jnp.asarray(float(transitions)))


class Program:
    """Algorithms of one structure, one per run. The start depends on the seed alone: all algorithms have the same.

    An iteration begins only if one like the last would end within the limits; a run whose objective or x is not
    finite ends.
    """

    def __init__(self, algorithms: Sequence[Any], seeds: Sequence[int]):
        self.algorithms, self.seeds = algorithms, seeds
        distinct = list({id(algorithm): algorithm for algorithm in algorithms}.values())
        first, *others = distinct
        # Only what differs between the runs gets a batch axis: what they share, such as the model, is there once.
        self.varies = jax.tree.map(lambda leaf, *rest: any(not _same(leaf, r) for r in rest), first, *others)
        self.start: Any = jax.jit(_start_all)
        self.advance: Any = jax.jit(_advance_all)

    def cuts(self, runs: Sequence[int], limit_mb: float) -> list[Cut]:
        """Compile for the largest even chunks of `runs`, places in `algorithms`, that fit into the memory limit.

        Raises:
          InputError: a single run does not fit.
        """

        def compile_for(runs: list[int]) -> Any:
            inputs = self.inputs(runs)
            progress = jax.eval_shape(_start_all, inputs)
            limits = Limits.of(np.inf, np.inf)
            return jax.jit(_advance_all).lower(inputs, progress, limits, np.int32(1)).compile()

        self.advance, cuts = cut(runs, limit_mb, compile_for)
        return cuts

    def inputs(self, runs: Sequence[int]) -> Inputs:
        """What the program of a chunk takes."""
        split = [eqx.partition(self.algorithms[i], self.varies) for i in runs]
        varying = jax.tree.map(
            lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *(varying for varying, _ in split)
        )
        keys = jax.vmap(jax.random.key)(jnp.asarray([self.seeds[i] for i in runs], jnp.uint32))
        return Inputs(varying, split[0][1], keys)


def structure_of(algorithm: Any) -> tuple[Any, ...]:
    """Return the structure of an algorithm. Algorithms with equal structures differ only in numbers."""
    leaves, structure = jax.tree.flatten(algorithm)
    return (structure, *((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves))


def _same(leaf: Any, other: Any) -> bool:
    if leaf is other:
        return True
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf, other = jax.random.key_data(leaf), jax.random.key_data(other)
    return np.array_equal(np.asarray(leaf), np.asarray(other), equal_nan=np.asarray(leaf).dtype.kind == "f")


def goes_on(progress: Progress, limits: Limits) -> Any:
    """Return whether another iteration of each run begins."""
    within = progress.transitions + progress.last <= limits.transitions
    return progress.finite & within & (progress.state.iteration < limits.iterations)


def _start_all(inputs: Inputs) -> Progress:
    def one(varying, key):
        algorithm = eqx.combine(varying, inputs.shared)
        state = algorithm.init(jax.random.fold_in(key, 0), algorithm.problem.start(key))
        cost = jnp.asarray(getattr(algorithm, "environment_steps", 0), float)
        nothing, infinite = jnp.asarray(0.0, float), jnp.asarray(jnp.inf, float)
        return Progress(state, nothing, cost, jnp.asarray(True), infinite, state.x)

    return jax.vmap(one)(inputs.varying, inputs.keys)


def _advance_all(inputs: Inputs, progress: Progress, limits: Limits, most: Any) -> tuple[Progress, dict, jax.Array]:
    """Make at most `most` iterations within the limits; return the record of each run's first one, and the number of
    iterations.
    """

    def one(varying, key, before):
        algorithm = eqx.combine(varying, inputs.shared)
        state, info = algorithm.step(jax.random.fold_in(key, 1 + before.state.iteration), before.state)
        spent = info.transitions.astype(before.transitions.dtype)
        objective = info.objective.astype(before.best_objective.dtype)
        better = objective < before.best_objective
        after = Progress(
            state=state,
            transitions=before.transitions + spent,
            last=spent,
            finite=jnp.isfinite(info.objective) & jnp.isfinite(optax.tree.norm(state.x)),
            best_objective=jnp.where(better, objective, before.best_objective),
            best_x=_where(better, before.state.x, before.best_x),
        )
        return after, record(info)

    def step(carry):
        before, first, made = carry
        goes = open_runs(before, made)
        after, recorded = jax.vmap(one)(inputs.varying, inputs.keys, before)
        first = jax.vmap(_where)(goes & (made == 0), recorded, first)
        return jax.vmap(_after)(goes, after, before), first, made + goes.astype(made.dtype)

    def open_runs(now, made):
        return goes_on(now, limits) & (made < most)

    shapes = jax.eval_shape(jax.vmap(one), inputs.varying, inputs.keys, progress)[1]
    blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    nothing = jnp.zeros(progress.last.shape, jnp.int32)
    return jax.lax.while_loop(lambda carry: jnp.any(open_runs(carry[0], carry[2])), step, (progress, blank, nothing))


def _after(goes: jax.Array, after: Any, before: Any) -> Any:
    """The state of a run after an iteration if it goes on, else as it was.

    The items of a replay are not put back: nothing reads them once a run has ended, and to copy them would cost more
    than the iteration.
    """

    def one(new: Any, old: Any) -> Any:
        if not isinstance(new, Ring):
            return jnp.where(goes, new, old)
        return Ring(new.items, jnp.where(goes, new.next, old.next), jnp.where(goes, new.size, old.size))

    return jax.tree.map(one, after, before, is_leaf=lambda leaf: isinstance(leaf, Ring))


def record(info: Info) -> dict[str, jax.Array]:
    """What one iteration reported, as columns of a table: numbers [], the worst over the lower levels of one run."""
    columns = {
        "objective": info.objective,
        "gradient_norm": info.gradient_norm,
        "stationarity": info.stationarity,
    }
    for name, report in info.reports.items():
        column = name.replace(" ", "_").replace("-", "_")
        if isinstance(report, dict):
            columns |= {f"{column}_{key}": jnp.max(number) for key, number in report.items()}
            continue
        if not isinstance(report, Report):
            columns[column] = jnp.max(report)
            continue
        columns[f"{column}_result"] = jnp.max(report.result)
        if getattr(report.stats, "error_bound", None) is not None:
            columns[f"{column}_error_bound"] = jnp.max(report.stats.error_bound)
    return columns


def _where(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)
