"""Rounds of steps and looks end, whatever a compiler makes of the same number in two places."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from bilevel_jax.core.rounds import PATIENCE, Found, in_rounds


class Walk(NamedTuple):
    iterations: Any


def rounds(in_condition, in_look, asked=lambda asked: asked, tolerance=True):
    """Run rounds whose looks never accept; `going` is traced once for the steps and once for the look."""
    answers = iter((in_condition, in_look))

    def going(walk, found):
        del walk, found
        return jnp.asarray(next(answers))

    def find(walk, found):
        return found._replace(answer=walk.iterations, finite=jnp.asarray(True), asked=asked(found.asked))

    def run():
        walk = Walk(jnp.asarray(1, jnp.int32))
        limit = jnp.asarray(50, jnp.int32)
        return in_rounds(
            walk,
            walk.iterations,
            jnp.asarray(1.0),
            limit,
            going=going,
            step=lambda walk, found, unseen: Walk(walk.iterations + 1),
            find=find,
            to_working_precision=not tolerance,
        )

    return jax.jit(run)()


@pytest.mark.parametrize(
    ("in_condition", "in_look", "steps"), [(False, True, 50), (True, False, 50), (False, False, 1), (True, True, 50)]
)
def test_a_reason_that_is_seen_in_one_place_only(in_condition, in_look, steps):
    walk, found = rounds(in_condition, in_look)
    assert isinstance(found, Found)
    assert int(walk.iterations) == steps


def test_looks_that_ask_for_ever_less():
    walk, found = rounds(False, False, asked=lambda asked: asked / 2)
    assert int(walk.iterations) == 1
    assert bool(found.limited)
    assert float(found.asked) == 2.0**-PATIENCE


@pytest.mark.slow
@pytest.mark.parametrize("solver", [bj.AndersonIteration, bj.ValueIteration, bj.PolicyIteration, bj.NewtonKrylov])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_nothing_to_collect_and_a_start_that_is_far_off(solver, count):
    """No bound can be below what is collected, 0: the tolerance is not met, and that is told."""
    starts = 0.153 * np.arange(1, count + 1)[:, None]
    discounts = 0.97 + 0.001 * np.arange(count)
    mdp = bj.MDP(np.ones((1, 3, 1)), np.zeros((count, 1, 3)), discounts)
    made = bj.solve(mdp, bj.Unregularized(), solver=solver(9.0, max_iterations=200), initial_value=starts)
    assert (np.abs(np.asarray(made.value))[:, 0] <= np.asarray(made.stats.error_bound)).all()
    for code, bound in zip(np.asarray(made.result), np.asarray(made.stats.error_bound), strict=True):
        assert code != bj.Result.CONVERGED or bound < 1e-300
