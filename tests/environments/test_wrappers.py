"""Wrappers: resets, time limits, processes that never end, and other rewards."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environment_helpers import (
    KEY,
    PROCESS,
    Walk,
    assert_law,
    assert_same,
    ended,
    rollout,
    tabular,
    walk_policy,
)
from helpers import ACTIONS

import bilevel_jax as bj
from bilevel_jax.environments import (
    AutoReset,
    Continuing,
    Discrete,
    Environment,
    Rewarded,
    TabularEnvironment,
    TimeLimit,
    TimeStep,
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


# Processes that never end.


def test_an_end_is_a_state_like_others_that_leads_to_a_fresh_start():
    t = rollout(KEY, Continuing(Walk()), walk_policy, batch=300, horizon=40)
    (place, parts), over = t.state
    place, over = np.asarray(place), np.asarray(over)
    assert np.asarray(t.valid).all()
    assert not ended(t).any()
    # It is seen, by who acts and by what is recorded, and nothing happens between two steps.
    np.testing.assert_array_equal(over, np.abs(place) == 3)
    assert over.any()
    np.testing.assert_array_equal(t.observation[..., 0], place)
    np.testing.assert_array_equal(t.next_observation[:, :-1], t.observation[:, 1:])
    assert (np.abs(place[:, 1:][over[:, :-1]]) <= 1).all()
    # It paid when it was reached; the step out of it pays nothing.
    np.testing.assert_array_equal(np.asarray(t.reward)[:, :-1], over[:, 1:])
    # Starts have the law of `reset` (a right program fails once in a million) whatever is done at the end.
    action = np.asarray(t.action)[:, :-1]
    for chosen in (0, 1):
        assert_law(np.bincount(place[:, 1:][over[:, :-1] & (action == chosen)] + 1), np.full(3, 1 / 3))
    # The whole state is exchanged, its arrays and its key: each fits the place drawn from that key.
    keys = parts["key"][:, 1:][over[:, :-1]]
    fresh_place, fresh = jax.vmap(lambda key: Walk().reset(key))(keys)
    np.testing.assert_array_equal(fresh_place, place[:, 1:][over[:, :-1]])
    np.testing.assert_array_equal(fresh["noise"], parts["noise"][:, 1:][over[:, :-1]])


def test_what_is_cut_short_goes_on_as_well():
    """Three steps to the limit, and one out of it: the clock and the mark of the end have the period four."""
    t = rollout(KEY, Continuing(TimeLimit(Walk(100), 3)), walk_policy, batch=5, horizon=10)
    clock, over = t.state[0][1], t.state[1]
    np.testing.assert_array_equal(clock, np.broadcast_to(np.arange(10) % 4, (5, 10)))
    np.testing.assert_array_equal(over, np.broadcast_to(np.arange(10) % 4 == 3, (5, 10)))
    assert not ended(t).any()
    assert (np.abs(np.asarray(t.observation)[:, [0, 4, 8], 0]) <= 1).all()


class Corridor(Environment):
    """Five places, of which both ends end the process: deterministic. A step from an end is not a number."""

    start: int = eqx.field(static=True, default=1)

    @property
    def action_space(self):
        return Discrete(2)

    def reset(self, key):
        return jnp.asarray(self.start, jnp.int32)

    def observe(self, state):
        return state

    def step(self, key, state, action):
        place = jnp.clip(state + 2 * action.astype(jnp.int32) - 1, 0, 4)
        end = (place == 0) | (place == 4)
        reward = jnp.where((state == 0) | (state == 4), jnp.nan, 0.0)
        return place, TimeStep(place, reward, end, jnp.zeros_like(end))


ARRIVALS = np.array([0.3, 0.0, -0.2, 0.1, 1.0])


def arrival(constant):
    return lambda before, action, after: jnp.asarray(ARRIVALS)[after] + constant


def chain(environment):
    """The MDP [5, 2] of the corridor, from the steps that it makes; a place is marked as an end where it is one."""
    dense, reward, goes_on = np.zeros((5, 2, 5)), np.zeros((5, 2)), np.zeros((5, 2))
    for place in range(5):
        for action in range(2):
            state = jnp.asarray(place, jnp.int32)
            if isinstance(environment.reset(KEY), tuple):
                state = state, jnp.asarray(place in (0, 4))
            _, made = environment.step(KEY, state, jnp.asarray(action))
            dense[place, action, int(made.observation)] = 1
            reward[place, action], goes_on[place, action] = made.reward, not made.terminated
    return bj.MDP(dense, reward, 0.9 * goes_on, np.eye(5)[1])


def policy_of(environment):
    return np.asarray(bj.check(bj.solve(chain(environment), bj.ShannonEntropy(0.1))).policy)


def test_a_constant_changes_no_policy_of_a_process_that_never_ends():
    """Solved exactly. With ends, or with steps out of an end that earn nothing, it changes them a lot."""
    ways = {
        "all states": lambda constant: Rewarded(Continuing(Corridor()), arrival(constant)),
        "ends earn nothing": lambda constant: Continuing(Rewarded(Corridor(), arrival(constant))),
        "it ends": lambda constant: Rewarded(Corridor(), arrival(constant)),
    }
    for name, way in ways.items():
        usual = policy_of(way(0.0))[1:4]
        assert usual.min() < 0.1, "no decisions that could change"
        # One who gets much for each step stays, one who pays for it hurries to an end.
        for constant in (-2.0, 5.0):
            change = np.abs(policy_of(way(constant))[1:4] - usual).max()
            assert change < 1e-10 if name == "all states" else change > 0.2, (name, constant, change)


def test_nothing_of_a_step_from_an_end_is_kept():
    """The corridor's reward there is no number."""
    t = rollout(KEY, Continuing(Corridor(2)), lambda place: jnp.full(2, 0.5), batch=20, horizon=30)
    assert np.asarray(t.state[1]).any()
    assert np.isfinite(np.asarray(t.reward)).all()


@pytest.mark.parametrize("x64", [False, True])
def test_a_cart_goes_on_in_both_precisions(x64):
    with jax.enable_x64(x64):
        environment = Continuing(bj.environments.classic.CartPole(interval=0.1))
        t = jax.jit(lambda key: rollout(key, environment, lambda seen: jnp.full(2, 0.5), batch=4, horizon=40))(KEY)
        assert t.reward.dtype == t.observation.dtype == jnp.result_type(float)
        assert not ended(t).any()
        assert np.asarray(t.state[1]).any()
        low = np.asarray(jnp.abs(t.observation).max(-1))[:, 1:][np.asarray(t.state[1])[:, :-1]]
        assert (low < 0.05).all()


def test_continuing_passes_on_what_it_wraps():
    environment = Continuing(tabular())
    assert environment.num_actions == ACTIONS
    assert environment.available is None
    assert not environment.resets
    mask = np.array([[True, True, False]] + [[True] * 3] * 5)
    masked = TabularEnvironment(bj.MDP(PROCESS.dense, PROCESS.reward, 0.9, PROCESS.initial, available=mask))
    for wrapped in (Continuing(masked), Rewarded(masked, arrival(0.0))):
        np.testing.assert_array_equal(wrapped.available, mask)


@pytest.mark.parametrize(
    "environment",
    [AutoReset(Walk()), AutoReset(TimeLimit(Walk(), 3)), Rewarded(AutoReset(Walk()), lambda *step: jnp.ones(()))],
)
def test_continuing_refuses_what_resets(environment):
    with pytest.raises(bj.InputError, match=r"environment: it resets by itself; .*Continuing\(environment\)"):
        Continuing(environment)


# Other rewards.


def of_step(before, action, after):
    return 10 * before[0] + action.astype(float) + 100 * after[0]


@pytest.mark.parametrize("wrapped", [Walk(), AutoReset(Walk()), Continuing(Walk())], ids=["ends", "resets", "goes on"])
def test_rewards_are_those_of_the_function(wrapped):
    """Of what was seen before the step, and after it before any reset; nothing else changes."""
    plain = rollout(KEY, wrapped, walk_policy, batch=30, horizon=20)
    t = rollout(KEY, Rewarded(wrapped, of_step), walk_policy, batch=30, horizon=20)
    before, after = np.asarray(t.observation)[..., 0], np.asarray(t.next_observation)[..., 0]
    np.testing.assert_allclose(t.reward, 10 * before + np.asarray(t.action) + 100 * after, rtol=1e-14)
    assert (np.abs(after) == 3).any()
    assert_same(t._replace(reward=plain.reward), plain)
    assert Rewarded(wrapped, of_step).resets == wrapped.resets


class Weighted(eqx.Module):
    """A reward that is a pytree."""

    weight: jax.Array

    def __call__(self, before, action, after):
        return self.weight * after[0]


def test_a_function_keeps_its_leaves():
    """They can be traced, mapped over and derived; a plain function is no leaf."""

    def rewards(weight):
        return rollout(KEY, Rewarded(Walk(), Weighted(weight)), walk_policy, batch=3, horizon=5).reward

    weights = jnp.array([0.0, 1.0, -2.5])
    each = np.asarray(jax.jit(jax.vmap(rewards))(weights))
    assert np.abs(each[1]).max() > 0
    np.testing.assert_allclose(each, np.asarray(weights)[:, None, None] * each[1], rtol=1e-14)
    np.testing.assert_allclose(jax.grad(lambda weight: rewards(weight).sum())(3.0), each[1].sum(), rtol=1e-12)
    environment = Rewarded(Walk(), Weighted(jnp.asarray(2.0)))
    assert len(jax.tree.leaves(environment)) == len(jax.tree.leaves(Walk())) + 1
    assert len(jax.tree.leaves(Rewarded(Walk(), of_step))) == len(jax.tree.leaves(Walk()))
    step = jax.jit(lambda environment: environment.step(KEY, environment.reset(KEY), jnp.asarray(1))[1].reward)
    assert float(step(environment)) == 2 * float(step(Rewarded(Walk(), Weighted(jnp.asarray(1.0)))))
    assert step._cache_size() == 1


def test_rewards_that_are_no_numbers():
    """Whole numbers and truth values become floating-point ones; others are refused."""
    state = Walk().reset(KEY)
    for given in (3, True, jnp.asarray(2, jnp.int32), np.float64(0.5)):
        _, made = Rewarded(Walk(), lambda *step, given=given: given).step(KEY, state, jnp.asarray(1))
        assert (made.reward.dtype, float(made.reward)) == (jnp.float64, float(given))
    with pytest.raises(bj.InputError, match="function: expected a function, got float"):
        Rewarded(Walk(), 1.0)
    with pytest.raises(bj.InputError, match=r"function: expected shape \[\], got \[2\]"):
        Rewarded(Walk(), lambda before, action, after: after).step(KEY, state, jnp.asarray(1))
