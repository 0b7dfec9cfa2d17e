"""Batches: one vmapped call over as many calls one at a time, for solves and for hyper-gradients.

Solves are those of `benchmarks.solvers.batches`: MDPs of 100 states and 5 actions, each with transitions of its own, to
1e-6 of the least max |V*|, V* by numpy. Hyper-gradients are of one Garnet problem of 100 states at many x. Singles are
timed on a sample, and scaled up.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import bilevel_jax as bj
from benchmarks.common.timing import summary
from benchmarks.solvers import batches

PROBLEMS, SAMPLE, REPEATS = 256, 16, 5
SOLVES = (
    ("dense", np.float64, "vi"),
    ("successors", np.float64, "vi"),
    ("dense", np.float32, "vi"),
    ("dense", np.float64, "auto"),
    ("successors", np.float64, "auto"),
)
METHODS = {"value iteration": bj.Implicit(solver=bj.ValueIteration()), "default": bj.Implicit()}


def cases(toy: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """A case per kind of batch; the toy has two."""
    problems, repeats = (4, 1) if toy else (PROBLEMS, REPEATS)
    made: dict[str, Callable[[], dict[str, Any]]] = {}
    for form, dtype, solver in SOLVES:
        made[f"solve, {form}, {dtype.__name__}, {solver}"] = functools.partial(
            solves, form, dtype, solver, problems, repeats
        )
    for name in METHODS:
        made[f"hyper-gradient, {name}"] = functools.partial(hypergradients, name, problems, repeats)
    return dict([*made.items()][:1] + [*made.items()][-2:-1]) if toy else made


def solves(form: str, dtype: Any, solver: str, problems: int, repeats: int) -> dict[str, Any]:
    """Problems a second in one call and one at a time, with the error of the batch's values."""
    batch, right = _batch(form, problems)
    scale = float(np.abs(right).max(-1).min())
    made = batches.solvers(batches.ACCURACY * scale)[solver]
    ours = batches.ours(batch, dtype, made, min(SAMPLE, problems), own=True)
    value = np.asarray(ours["batch"].run().value, float)
    rates = _rates({name: ours[name] for name in ("batch", "loop")}, problems, repeats)
    return {**rates, "relative_error": float(np.abs(value - right).max()) / scale}


def hypergradients(method: str, problems: int, repeats: int) -> dict[str, Any]:
    """Hyper-gradients a second in one call and one at a time, without estimates of their errors."""
    problem = bj.problems.make("garnet", states=100)
    xs = jax.vmap(problem.start)(jax.random.split(jax.random.key(0), problems))
    sample = min(SAMPLE, problems)
    ones = [jax.tree.map(lambda leaf, i=i: leaf[i], xs) for i in range(sample)]

    def one(problem, x):
        return bj.hypergradient(problem, x, method=METHODS[method], with_error=False)

    single, together = jax.jit(one), jax.jit(jax.vmap(one, (None, 0)))
    results = np.asarray(together(problem, xs).solution.result)
    runs = {
        "batch": batches.Ours(lambda: together(problem, xs), problems),
        "loop": batches.Ours(lambda: [single(problem, x) for x in ones], sample),
    }
    return {**_rates(runs, problems, repeats), "converged": float(np.mean(results == bj.Result.CONVERGED))}


@functools.lru_cache(maxsize=1)
def _batch(form: str, problems: int) -> tuple[batches.Batch, np.ndarray]:
    batch = batches.make(form, problems, 100, 5, 5 if form == "successors" else 100, batches.TEMPERATURE)
    return batch, batch.reference()


def _rates(runs: dict[str, batches.Ours], problems: int, repeats: int) -> dict[str, Any]:
    taken = batches.turns({name: batches.clock(run.run) for name, run in runs.items()}, repeats)
    each = {name: summary(taken[name])["median"] / run.sample for name, run in runs.items()}
    return {
        "problems": problems,
        "per_s": 1 / each["batch"],
        "singles_per_s": 1 / each["loop"],
        "batch_times_faster": each["loop"] / each["batch"],
    }
