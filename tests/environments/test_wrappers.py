"""Wrappers: resets and time limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environment_helpers import KEY, Walk, assert_law, ended, rollout, tabular, walk_policy
from helpers import ACTIONS

import bilevel_jax as bj
from bilevel_jax.environments import (
    AutoReset,
    TimeLimit,
)


@pytest.mark.slow
def test_auto_reset_reports_the_end_and_goes_on_from_a_fresh_state():
    t = rollout(KEY, AutoReset(Walk()), walk_policy, batch=200, horizon=40)
    place, noise = np.asarray(t.state[0]), np.asarray(t.state[1]["noise"])
    assert np.asarray(t.valid).all()
    over = ended(t)
    assert over.any()
    reported = np.asarray(t.next_observation)
    assert (np.abs(reported[over][:, 0]) == 3).all()  # of the end, not of the start after it
    assert (np.abs(reported[~over][:, 0]) < 3).all()
    assert (np.abs(place[:, 1:][over[:, :-1]]) <= 1).all()
    np.testing.assert_array_equal(reported[:, :-1, 0][~over[:, :-1]], place[:, 1:][~over[:, :-1]])
    assert_law(np.bincount(place[:, 1:][over[:, :-1]] + 1), np.full(3, 1 / 3))
    # The whole state is exchanged, its arrays and its key: each fits the place drawn from that key.
    keys = t.state[1]["key"][:, 1:][over[:, :-1]]
    np.testing.assert_array_equal(jax.vmap(lambda key: Walk().reset(key)[0])(keys), place[:, 1:][over[:, :-1]])
    np.testing.assert_array_equal(jax.vmap(lambda key: Walk().reset(key)[1]["noise"])(keys), noise[:, 1:][over[:, :-1]])
    assert not np.asarray(t.truncated).any()


def test_without_reset_the_state_stays_where_it_ended():
    t = rollout(KEY, Walk(), walk_policy, batch=50, horizon=60)
    place, valid = np.asarray(t.state[0]), np.asarray(t.valid)
    assert (np.abs(place[valid]) < 3).all()
    assert (np.abs(place[~valid]) == 3).all()
    np.testing.assert_array_equal((np.asarray(t.reward) * valid).sum(1), (ended(t) & valid).any(1))


@pytest.mark.parametrize("steps", [1, 4])
def test_time_limit(steps):
    t = rollout(KEY, TimeLimit(Walk(), steps), walk_policy, batch=100, horizon=8)
    valid, truncated, terminated = (np.asarray(x) for x in (t.valid, t.truncated, t.terminated))
    assert (valid.sum(1) <= steps).all()
    assert not valid[:, steps:].any()
    last = valid[:, steps - 1]
    assert (truncated | terminated)[:, steps - 1][last].all()
    assert not (truncated & terminated)[valid].any()
    assert not truncated[:, : steps - 1][valid[:, : steps - 1]].any()
    if steps == 4:
        assert terminated[:, 3][last].any(), "some end by themselves in the last step: not truncated"
    np.testing.assert_array_equal(np.asarray(t.state[1])[valid], np.nonzero(valid)[1])


@pytest.mark.slow
def test_time_limits_may_be_traced_and_mapped():
    def lengths(steps):
        t = rollout(KEY, TimeLimit(Walk(100), steps), walk_policy, batch=3, horizon=9)
        return jnp.sum(t.valid, 1)

    np.testing.assert_array_equal(jax.jit(jax.vmap(lengths))(jnp.asarray([1, 4, 20])), [[1] * 3, [4] * 3, [9] * 3])


@pytest.mark.slow
def test_auto_reset_of_a_time_limit_starts_the_clock_again():
    t = rollout(KEY, AutoReset(TimeLimit(Walk(100), 3)), walk_policy, batch=7, horizon=10)
    np.testing.assert_array_equal(t.truncated, np.broadcast_to(np.arange(10) % 3 == 2, (7, 10)))
    np.testing.assert_array_equal(t.state[1], np.broadcast_to(np.arange(10) % 3, (7, 10)))
    assert np.asarray(t.valid).all()
    mixed = rollout(KEY, AutoReset(TimeLimit(Walk(), 6)), walk_policy, batch=100, horizon=30)
    assert np.asarray(mixed.terminated).any()
    assert np.asarray(mixed.truncated).any()
    np.testing.assert_array_equal(np.asarray(mixed.state[1])[:, 1:] == 0, ended(mixed)[:, :-1])


def test_wrappers_pass_on_what_they_wrap():
    environment = AutoReset(TimeLimit(tabular(), 3))
    assert environment.num_actions == ACTIONS
    assert environment.resets
    assert not TimeLimit(tabular(), 3).resets


def test_the_other_order_is_refused():
    with pytest.raises(bj.InputError, match=r"AutoReset\(TimeLimit"):
        TimeLimit(AutoReset(tabular()), 3)


@pytest.mark.parametrize("steps", [0, -1, 2.5, "3", None])
def test_time_limit_refuses(steps):
    with pytest.raises(bj.InputError, match="steps"):
        TimeLimit(tabular(), steps)
