"""Four Rooms: iterations a second with the exact hyper-gradient, and of M-SoBiRL as published.

`hyper-gradient` is `benchmarks.gradients.four_rooms_hypergradient` with shorter loops: a cold one, one in a
warm-started loop inside one program (an upper iteration), a batch of 32. `m_sobirl` is a loop of M-SoBiRL
with its defaults, ten sweeps and one step of the adjoint per iteration, alone and as a vmapped batch of 32 runs.
Float64, temperature 0.005.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

import bilevel_jax as bj
from benchmarks.common.timing import seconds, summary
from benchmarks.gradients import four_rooms_hypergradient

TEMPERATURE = 0.005


def cases(toy: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """The toy has M-SoBiRL alone: the exact hyper-gradient compiles for long."""
    repeats, steps, count = (1, 2, 2) if toy else (5, 20, 32)
    forms = ("dense",) if toy else ("dense", "successor")
    made = {f"m_sobirl, {form}": functools.partial(m_sobirl, form, repeats, 10 * steps, count) for form in forms}
    exact = {f"hyper-gradient, {form}": functools.partial(hypergradient, form, repeats, steps, count) for form in forms}
    return made if toy else made | exact


def hypergradient(form: str, repeats: int, steps: int, count: int) -> dict[str, Any]:
    """Milliseconds, and upper iterations a second."""
    made = four_rooms_hypergradient.measure(_problem(form), repeats, steps, count)
    faster = 1 / made.pop("batch_over_singles")
    return {"iterations_per_s": 1e3 / made["warm_ms"], "batch_times_faster": faster, **made}


def m_sobirl(form: str, repeats: int, steps: int, count: int) -> dict[str, Any]:
    """Iterations a second of one run, and of `count` runs together."""
    problem = _problem(form)
    algorithm = bj.algorithms.m_sobirl(problem, optax.adam(0.05))
    key = jax.random.key(0)
    state = algorithm.init(key, problem.start(key))
    states = jax.vmap(lambda key: algorithm.init(key, problem.start(key)))(jax.random.split(key, count))

    def run(algorithm, state):
        return jax.lax.scan(lambda state, _: (algorithm.step(key, state)[0], None), state, length=steps)[0]

    single, together = jax.jit(run), jax.jit(jax.vmap(run, (None, 0)))
    one, many = (
        summary(seconds(functools.partial(program, algorithm, start), repeats, 1))["median"] / steps
        for program, start in ((single, state), (together, states))
    )
    return {
        "iterations_per_s": 1 / one,
        "runs": count,
        "iterations_per_s_of_all_runs": count / many,
        "batch_times_faster": count * one / many,
    }


def _problem(form: str) -> Any:
    return bj.problems.make("four_rooms", temperature=TEMPERATURE, transition=form)
