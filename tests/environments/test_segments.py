"""Segments of trajectories.

Statistical tests compare with exact laws at a false alarm rate of 1e-6 each; keys are fixed, so that a test that
passes goes on passing.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environment_helpers import FALSE_ALARM, KEY, Walk, assert_law, assert_same, chi_square, plain, rollout, walk_policy

import bilevel_jax as bj
from bilevel_jax.environments import (
    TabularEnvironment,
    TimeLimit,
    Trajectory,
    random_segments,
    segments,
)


@pytest.mark.slow
def test_segments_are_slices():
    t = rollout(KEY, TimeLimit(Walk(), 6), walk_policy, batch=4, horizon=9)
    cut = segments(t, jnp.asarray([0, 3, 5, 2]), 4)
    for whole, part in zip(plain(t), plain(cut), strict=True):
        assert part.shape == (4, 4, *whole.shape[2:])
        for b, start in enumerate([0, 3, 5, 2]):
            np.testing.assert_array_equal(part[b], whole[b, start : start + 4])
    assert_same(segments(t, jnp.asarray([-5, 100, 6, 5]), 4), segments(t, jnp.asarray([0, 5, 5, 5]), 4))
    assert_same(segments(t, jnp.zeros(4, int), 9), t)


def test_random_segments_start_anywhere_alike():
    time = jnp.broadcast_to(jnp.arange(7), (6000, 7))
    cut = random_segments(KEY, Trajectory(*[time] * 9), 3)
    np.testing.assert_array_equal(np.diff(cut.action), 1)
    assert_law(np.bincount(cut.action[:, 0], minlength=5), np.full(5, 1 / 5))
    assert_same(random_segments(KEY, Trajectory(*[time] * 9), 7), Trajectory(*[time] * 9))


def trajectories_that_end(lengths, horizon):
    """Trajectories whose first lengths[B] steps are valid; `action` counts steps."""
    time = jnp.broadcast_to(jnp.arange(horizon), (len(lengths), horizon))
    return Trajectory(*[time] * 8, time < np.asarray(lengths)[:, None])


def test_random_segments_hold_valid_steps_alone():
    """Uniform over starts 0 to N - length: a chi-square test at 1e-6, which a start that is a twentieth rarer than it
    should be fails with probability 0.999."""
    lengths = np.repeat([5, 6, 9, 12], 20_000)
    cut = random_segments(KEY, trajectories_that_end(lengths, 12), 5)
    assert np.asarray(cut.valid).all()
    start = np.asarray(cut.action)[:, 0]
    for length in (5, 6, 9, 12):
        starts = length - 5 + 1
        law = np.full(starts, 1 / starts)
        counts = np.bincount(start[lengths == length], minlength=starts)
        assert counts.size == starts
        if starts > 1:
            assert_law(counts, law)
            skewed = law * (1 + 0.1 * np.where(np.arange(starts) < starts / 2, 1, -1))
            assert chi_square(np.round(20_000 * skewed / skewed.sum()), law) < FALSE_ALARM  # the test's power


def test_random_segments_of_short_episodes_are_the_episodes():
    lengths = np.array([1, 2, 3, 4])
    cut = random_segments(KEY, trajectories_that_end(lengths, 12), 4)
    np.testing.assert_array_equal(cut.action, np.broadcast_to(np.arange(4), (4, 4)))
    np.testing.assert_array_equal(np.asarray(cut.valid).sum(1), lengths)


@pytest.mark.slow
def test_random_segments_of_a_process_that_ends_are_never_empty():
    """Mean length 12 in 100 steps: seven in eight segments of 10 had no valid step."""
    ends = np.full((1, 1), 1 / 12)
    simulator = TabularEnvironment(bj.MDP(np.ones((1, 1, 1)), np.zeros((1, 1)), 0.9), ends=ends)
    t = rollout(KEY, simulator, bj.Table([[1.0]]), batch=4000, horizon=100)
    lengths = np.asarray(t.valid).sum(1)
    assert abs(lengths.mean() - 12) < 1.2
    cut = random_segments(KEY, t, 10)
    np.testing.assert_array_equal(np.asarray(cut.valid).sum(1), np.minimum(lengths, 10))
    jitted = jax.jit(random_segments, static_argnums=2)(KEY, t, 10)
    assert_same(cut, jitted)


@pytest.mark.parametrize("length", [0, -1, 8, 2.0, True, None])
@pytest.mark.parametrize(
    "cut", [lambda t, n: segments(t, jnp.zeros(2, int), n), lambda t, n: random_segments(KEY, t, n)]
)
def test_segments_refuse(cut, length):
    with pytest.raises(bj.InputError, match="length"):
        cut(Trajectory(*[jnp.zeros((2, 7), int)] * 9), length)
