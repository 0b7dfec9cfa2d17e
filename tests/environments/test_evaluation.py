"""Whole episodes of a policy, against exact returns and against a loop in Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import bilevel_jax as bj
from bilevel_jax.environments import AutoReset, Discrete, Environment, Greedy, TimeLimit, TimeStep, evaluate

KEY = jax.random.key(0)


class Walk(Environment):
    """From 0 up by one with probability of the action, ends at 3; each step costs 1. NaN after the end."""

    @property
    def action_space(self):
        return Discrete(2)

    def reset(self, key):
        return jnp.zeros((), jnp.int32)

    def observe(self, state):
        return state

    def step(self, key, state, action):
        up = jax.random.uniform(key) < jnp.where(action == 1, 0.9, 0.2)
        moved = state + up.astype(jnp.int32)
        reward = jnp.where(state >= 3, jnp.nan, -1.0)
        return moved, TimeStep(moved, reward, moved >= 3, jnp.asarray(False))


def act(probability):
    return lambda observation: jnp.array([1 - probability, probability])


def test_the_mean_is_the_expected_return_within_its_interval():
    """Sums of three geometric times. Of 40 intervals of 95%, 32 or fewer hold with probability 7e-4."""
    steps = 3 / (0.5 * 0.9 + 0.5 * 0.2)
    holds = 0
    run = jax.jit(lambda key: evaluate(key, Walk(), act(0.5), episodes=200, steps=200))
    for key in jax.random.split(KEY, 40):
        made = run(key)
        holds += bool((made.low <= -steps) & (-steps <= made.high))
        assert bool(made.finished.all())
    assert holds >= 33


@pytest.mark.slow
def test_against_a_loop_in_python():
    made = evaluate(KEY, Walk(), act(0.7), episodes=5, steps=6)
    for b, key in enumerate(bj.environments.trajectory_keys(KEY, 5)):
        state, total, length, finished = jnp.zeros((), jnp.int32), 0.0, 0, False
        for h in range(6):
            for_action, for_step = jax.random.split(jax.random.fold_in(key, h + 1))
            action = bj.environments.as_policy(act(0.7)).distribution(state).sample(for_action)
            state, step = Walk().step(for_step, state, action)
            total, length, finished = total + float(step.reward), length + 1, bool(step.terminated)
            if finished:
                break
        assert (float(made.returns[b]), int(made.lengths[b]), bool(made.finished[b])) == (total, length, finished)
    error = np.std(np.asarray(made.returns), ddof=1) / np.sqrt(5)
    np.testing.assert_allclose(made.high - made.mean, 1.96 * error)


def test_greedy():
    fast = evaluate(KEY, Walk(), act(0.6), episodes=200, steps=100, greedy=True)
    np.testing.assert_allclose(fast.mean, -3 / 0.9, atol=0.2)  # 4.6 standard errors of 200 sums of geometric times


def test_an_automatic_reset_is_left_out():
    one = evaluate(KEY, Walk(), act(0.5), episodes=3, steps=20)
    other = evaluate(KEY, AutoReset(Walk()), act(0.5), episodes=3, steps=20)
    np.testing.assert_array_equal(one.returns, other.returns)


def test_episodes_that_are_cut_say_so():
    made = evaluate(KEY, Walk(), act(0.0), episodes=4, steps=2)
    assert (made.lengths.tolist(), made.finished.any()) == ([2] * 4, False)
    limited = evaluate(KEY, TimeLimit(Walk(), 2), act(0.0), episodes=4, steps=9)
    assert (limited.lengths.tolist(), bool(limited.finished.all())) == ([2] * 4, True)


@pytest.mark.slow
def test_under_jit_vmap_and_scan():
    keys = jax.random.split(KEY, 3)
    many = jax.jit(jax.vmap(lambda key: evaluate(key, Walk(), act(0.5), episodes=4, steps=50).returns))(keys)
    for key, returns in zip(keys, many, strict=True):
        np.testing.assert_array_equal(returns, evaluate(key, Walk(), act(0.5), episodes=4, steps=50).returns)
    scanned = lax.scan(
        lambda _, key: (None, evaluate(key, Walk(), act(0.5), episodes=4, steps=50).returns), None, keys
    )[1]
    np.testing.assert_array_equal(scanned, many)


def test_one_episode_has_no_interval():
    made = evaluate(KEY, Walk(), act(0.5), episodes=1, steps=50)
    assert float(made.high) == np.inf
    assert float(made.low) == -np.inf


def test_wrong_arguments_are_refused():
    for argument in ({"episodes": 0, "steps": 5}, {"episodes": 5, "steps": 0}):
        with pytest.raises(bj.InputError, match="expected"):
            evaluate(KEY, Walk(), act(0.5), **argument)
    with pytest.raises(bj.InputError, match="policy: expected probabilities of shape"):
        evaluate(KEY, Walk(), lambda observation: jnp.full(3, 1 / 3), episodes=2, steps=5)
    with pytest.raises(bj.InputError, match="has no mode"):
        evaluate(KEY, Walk(), _Odd(), episodes=2, steps=5, greedy=True)


class _Odd(bj.environments.Policy):
    def distribution(self, observation):
        return _Other()


class _Other(bj.environments.Distribution):
    def sample(self, key):
        return jnp.zeros((), jnp.int32)

    def log_prob(self, action):
        return jnp.zeros(())

    def entropy(self):
        return jnp.zeros(())


def test_greedy_takes_the_most_probable():
    table = jnp.array([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]])
    greedy = Greedy(bj.environments.TabularPolicy(table))
    np.testing.assert_array_equal(bj.environments.policy_table(greedy, 2), [[0, 1, 0], [1, 0, 0]])
    assert int(bj.environments.Categorical(table[0]).mode()) == 1
