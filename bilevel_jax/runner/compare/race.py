"""The runs of one method on one problem as vmapped programs: advanced within a budget, evaluated exactly."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from bilevel_jax.estimators import paid, sample_groups
from bilevel_jax.runner.chunks import Cut, cut
from bilevel_jax.runner.methods import Method
from bilevel_jax.runner.parts import build_optimizer, optimizer_numbers, with_numbers

# Seconds between two looks at the clock.
BLOCK = 1.0


class Progress(NamedTuple):
    """A run under way: the algorithm's state, transitions so far and in the last iteration, whether all is finite."""

    state: Any
    transitions: jax.Array
    last: jax.Array
    finite: jax.Array


class Curves(NamedTuple):
    """Of R runs at P points: iterations and transitions [P, R], seconds a run [P], exact objective [P, R] and
    norm of its gradient (NaN where it is not known); and x at the last point, leaves [R, ...]."""

    iterations: np.ndarray
    transitions: np.ndarray
    seconds: np.ndarray
    objective: np.ndarray
    gradient_norm: np.ndarray
    x: Any


class Entry(NamedTuple):
    """A run to be made: the method's options, its optimizer's section and the seed."""

    options: Any
    optimizer: dict[str, Any]
    seed: int


class Race:
    """A method on a problem: `entries` differ in numbers only, so that all are one program.

    The start depends on the seed alone: all methods have the same. An iteration begins only if one like the last
    would end within the budget; a run whose objective or x is not finite ends.
    """

    def __init__(
        self,
        method: Method,
        problem: Any,
        entries: Sequence[Entry],
        transitions: int | None = None,
        samples: int = 1000,
    ):
        self._method = method
        self._samples = samples
        optimizer = build_optimizer(entries[0].optimizer)
        made: dict[str, Any] = {}
        for entry in entries:
            if repr(entry.options) not in made:
                made[repr(entry.options)] = method.build(problem, optimizer, entry.options, transitions)
        self._algorithms = [made[repr(entry.options)] for entry in entries]
        self._entries = entries
        first, *others = made.values()
        # Only what differs between the runs gets a batch axis: what they share, such as the model, is there once.
        self._varies = jax.tree.map(lambda leaf, *rest: any(not np.array_equal(leaf, r) for r in rest), first, *others)
        self._start = jax.jit(self._start_all)
        self._advance: Any = jax.jit(self._advance_all)

    def cuts(self, runs: Sequence[int], limit_mb: float) -> list[Cut]:
        """Compile for the largest even chunks of `runs`, places in `entries`, that fit into the memory limit."""

        def compile_for(runs: list[int]) -> Any:
            inputs = self._inputs(runs)
            progress = jax.eval_shape(self._start_all, *inputs)
            target = jnp.asarray(jnp.inf)
            return jax.jit(self._advance_all).lower(*inputs[:3], progress, target, np.int32(1)).compile()

        self._advance, cuts = cut(runs, limit_mb, compile_for)
        return cuts

    def run(self, chunk: Cut, targets: np.ndarray, deadlines: np.ndarray) -> Curves:
        """Run a chunk. At each point the run has spent targets[p] transitions or deadlines[p] seconds."""
        inputs = self._inputs(chunk.padded)
        progress = self._start(*inputs)
        endless = jnp.asarray(jnp.inf)
        self._timed(inputs, progress, endless, 1)  # warm-up, thrown away
        seconds, most = 0.0, 8
        rate = self._timed(inputs, progress, endless, most)[1] / most
        points = [(progress, 0.0, self._evaluated(progress))]
        for target, deadline in zip(targets, deadlines, strict=True):
            while seconds < deadline and self._open(progress, target):
                left = (deadline - seconds) * len(chunk.padded)
                most = int(np.clip(min(BLOCK, left) / rate, 1, 2**30))
                before = _most_iterations(progress)
                progress, took = self._timed(inputs, progress, jnp.asarray(float(target)), most)
                seconds += took / len(chunk.padded)
                rate = max(took / max(1, _most_iterations(progress) - before), 1e-9)
            points.append((progress, seconds, self._evaluated(progress)))
        made = slice(len(chunk.runs))
        return Curves(
            np.stack([np.asarray(now.state.iteration)[made] for now, _, _ in points]),
            np.stack([np.asarray(now.transitions)[made] for now, _, _ in points]),
            np.array([seconds for _, seconds, _ in points]),
            np.stack([objective[made] for _, _, (objective, _) in points]),
            np.stack([norm[made] for _, _, (_, norm) in points]),
            jax.tree.map(lambda leaf: np.asarray(leaf)[made], progress.state.x),
        )

    def _inputs(self, runs: Sequence[int]) -> tuple[Any, Any, jax.Array, Any]:
        """Algorithms' leaves that vary, stacked, and those that do not; keys; optimizers' numbers."""
        algorithms = [self._algorithms[i] for i in runs]
        split = [eqx.partition(algorithm, self._varies) for algorithm in algorithms]
        varying = jax.tree.map(
            lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *(v for v, _ in split)
        )
        keys = jax.vmap(jax.random.key)(jnp.asarray([self._entries[i].seed for i in runs], jnp.uint32))
        numbers = [optimizer_numbers(self._entries[i].optimizer) for i in runs]
        numbers = {
            k: jnp.asarray([row[k] for row in numbers], float) for k, v in numbers[0].items() if type(v) is float
        }
        return varying, split[0][1], keys, numbers

    def _timed(self, inputs: Any, progress: Progress, target: jax.Array, most: int) -> tuple[Progress, float]:
        started = time.perf_counter()
        progress = jax.block_until_ready(self._advance(*inputs[:3], progress, target, np.int32(most)))
        return progress, time.perf_counter() - started

    def _open(self, progress: Progress, target: float) -> bool:
        return bool(np.any(np.asarray(_goes_on(progress, target))))

    def _evaluated(self, progress: Progress) -> tuple[np.ndarray, np.ndarray]:
        """phi(x) and |grad phi(x)| on the model, run by run; or the mean loss of a batch, and no norm: numpy's NaN."""
        algorithm = self._algorithms[0]
        if isinstance(algorithm.problem, bj.Problem):
            value, norm = _exact(algorithm.problem, progress.state.x)
            return np.asarray(value), np.asarray(norm)
        value = np.asarray(_sampled(algorithm, progress.state, self._samples))
        return value, np.full_like(value, np.nan)

    def _start_all(self, varying, shared, keys, numbers):
        def one(varying, key, numbers):
            algorithm = eqx.combine(varying, shared)
            state = algorithm.init(jax.random.fold_in(key, 0), algorithm.problem.start(key))
            cost = jnp.asarray(getattr(algorithm, "environment_steps", 0), float)
            return Progress(with_numbers(state, numbers), jnp.asarray(0.0), cost, jnp.asarray(True))

        return jax.vmap(one)(varying, keys, numbers)

    def _advance_all(self, varying, shared, keys, progress, target, most):
        def one(varying, key, progress):
            algorithm = eqx.combine(varying, shared)

            def step(carry):
                progress, made = carry
                state, info = algorithm.step(jax.random.fold_in(key, 1 + progress.state.iteration), progress.state)
                spent = self._method.count(algorithm, state, info)
                finite = jnp.isfinite(info.objective) & jnp.isfinite(optax.tree.norm(state.x))
                return Progress(state, progress.transitions + spent, spent, finite), made + 1

            def goes_on(carry):
                progress, made = carry
                return _goes_on(progress, target) & (made < most)

            return jax.lax.while_loop(goes_on, step, (progress, jnp.asarray(0, jnp.int32)))[0]

        return jax.vmap(one)(varying, keys, progress)


@jax.jit
def _exact(problem, xs):
    # Of its own, so that all methods on a problem share what is compiled.
    def one(x):
        made = bj.hypergradient(problem, x, with_error=False)
        # A curve has no place for result codes.
        value = jnp.where(jnp.all(made.solution.result == bj.Result.CONVERGED), made.value, jnp.nan)
        adjoint = jnp.all(made.stats.result == bj.Result.CONVERGED)
        return value, jnp.where(adjoint, optax.tree.norm(made.gradient), jnp.nan)

    return jax.lax.map(one, xs)


@partial(jax.jit, static_argnames="samples")
def _sampled(algorithm, states, samples):
    problem = algorithm.problem

    def one(state):
        for_groups, for_loss = jax.random.split(jax.random.key(0))
        groups = sample_groups(for_groups, problem, algorithm.policy(state), samples)
        costs = paid(for_loss, problem, state.x, groups)
        return jnp.sum(costs.factors[None] * costs.each) / samples

    return jax.lax.map(one, states)


def _most_iterations(progress: Progress) -> int:
    return int(np.max(np.asarray(progress.state.iteration)))


def _goes_on(progress: Progress, target: Any) -> Any:
    return progress.finite & (progress.transitions + progress.last <= target)
