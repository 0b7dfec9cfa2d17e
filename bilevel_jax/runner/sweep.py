"""The runs of a sweep as one vmapped, jitted program, cut into chunks that fit a memory limit."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from bilevel_jax.runner.chunks import cut
from bilevel_jax.runner.config import Config
from bilevel_jax.runner.parts import ADJOINT, LOWER, build_optimizer, named, with_numbers

Numbers = dict[str, jax.Array]


class Progress(NamedTuple):
    """A run under way: the algorithm's state and the best objective seen, with the x that gave it."""

    state: Any
    best_objective: jax.Array
    best_x: Any


class Record(NamedTuple):
    """One row of the metrics, at the start of an iteration; one array entry a run."""

    objective: Any
    gradient_norm: Any
    lower_result: Any
    lower_error_bound: Any
    adjoint_result: Any
    adjoint_error_bound: Any

    @classmethod
    def of(cls, info: Any) -> "Record":
        """The worst over the lower levels of one run."""
        return cls(
            info.objective,
            info.gradient_norm,
            jnp.max(info.lower_result),
            jnp.max(info.lower_stats.error_bound),
            jnp.max(info.adjoint_stats.result),
            jnp.max(info.adjoint_stats.error_bound),
        )


class Final(NamedTuple):
    """The exact evaluation at the end of a run: hyper-gradient at its last x, and its best x."""

    x: Any
    hypergradient: bj.Hypergradient
    best_objective: jax.Array
    best_x: Any


def build_problem(section: dict[str, Any]) -> Any:
    """The problem of a config section; its floats may be traced."""
    return bj.problems.make(section["name"], **{k: v for k, v in section.items() if k != "name"})


class Program:
    """The three compiled pieces of a config, each vmapped over the runs of a chunk.

    `start(numbers)`, `advance(numbers, progress, steps)` and `finish(numbers, progress)`, where `numbers`
    has an array [runs] for the seed and each swept key. `advance` is compiled for one size of chunk,
    when the chunks are made.
    """

    def __init__(self, config: Config):
        self._config = config
        # One optimizer for all runs; which of its numbers exist may depend on what is swept.
        self._optimizer = build_optimizer(config.at(config.grid[0])["optimizer"])
        self.start = jax.jit(jax.vmap(self._start))
        self.finish = jax.jit(jax.vmap(self._finish))
        self.advance: Callable[[Numbers, Progress, Any], tuple[Progress, Record]] = jax.jit(
            jax.vmap(self._advance, in_axes=(0, 0, None))
        )

    def chunks(self) -> list["Chunk"]:
        """Cut the grid so that the compiled program stays under the config's memory limit.

        Raises:
          InputError: a single run does not fit.
        """
        grid = self._config.grid

        def compile_for(runs: list[int]) -> Any:
            numbers = _numbers([grid[i] for i in runs])
            shapes = jax.eval_shape(self.start, numbers)
            return jax.jit(jax.vmap(self._advance, in_axes=(0, 0, None))).lower(numbers, shapes, np.int32(1)).compile()

        self.advance, cuts = cut(range(len(grid)), self._config.values["memory_limit_mb"], compile_for)
        return [Chunk(runs, _numbers([grid[i] for i in padded])) for runs, padded in cuts]

    def _algorithm(self, numbers: Numbers):
        values = self._config.at(numbers)
        section = values["algorithm"]
        return values, bj.algorithms.m_sobirl(
            build_problem(values["problem"]),
            self._optimizer,
            lower=named(LOWER, section["lower"]),
            adjoint=named(ADJOINT, section["adjoint"]),
        )

    def _start(self, numbers: Numbers) -> Progress:
        values, algorithm = self._algorithm(numbers)
        key = jax.random.key(numbers["seed"])
        problem: Any = algorithm.problem
        state = algorithm.init(key, problem.start(key))
        state = with_numbers(state, values["optimizer"])
        return Progress(state, jnp.asarray(jnp.inf, state.solution.value.dtype), state.x)

    def _advance(self, numbers: Numbers, progress: Progress, steps: jax.Array) -> tuple[Progress, Record]:
        """`steps` iterations, with the record of the first."""
        _, algorithm = self._algorithm(numbers)
        key = jax.random.key(0)  # M-SoBiRL draws nothing

        def step(i, carry):
            progress, first = carry
            state, info = algorithm.step(key, progress.state)
            better = info.objective < progress.best_objective
            best_x = _where(better, progress.state.x, progress.best_x)
            best = jnp.where(better, info.objective, progress.best_objective)
            return Progress(state, best, best_x), _where(i == 0, Record.of(info), first)

        _, info = jax.eval_shape(algorithm.step, key, progress.state)
        blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(Record.of, info))
        return jax.lax.fori_loop(0, steps, step, (progress, blank))

    def _finish(self, numbers: Numbers, progress: Progress) -> Final:
        _, algorithm = self._algorithm(numbers)
        x = progress.state.x
        value = progress.state.solution.value
        exact = bj.hypergradient(algorithm.problem, x, initial_value=value, with_error=False)
        better = exact.value < progress.best_objective
        best = jnp.where(better, exact.value, progress.best_objective)
        return Final(x, exact, best, _where(better, x, progress.best_x))


class Chunk(NamedTuple):
    """Runs that go through the program together: their places in the grid, and their numbers.

    The last chunk's numbers are padded with copies of its last run, so that one program serves all.
    """

    runs: list[int]
    numbers: Numbers


def _numbers(points: list[dict[str, float]]) -> Numbers:
    def column(key: str) -> jax.Array:
        kind = np.uint32 if isinstance(points[0][key], int) else jnp.result_type(float)
        return jnp.asarray(np.array([point[key] for point in points], kind))

    return {key: column(key) for key in points[0]}


def _where(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)
