"""Policies as distributions, spaces of actions, and rewards of pairs."""

from types import SimpleNamespace

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ACTIONS, STATES

import bilevel_jax as bj
from bilevel_jax.agents import ExactAgent, SoftQLearning
from bilevel_jax.core.functions import OfPair, tabulate
from bilevel_jax.environments import (
    Box,
    Categorical,
    Discrete,
    Distribution,
    Environment,
    Policy,
    PolicyFunction,
    TabularEnvironment,
    TabularPolicy,
    TimeStep,
    as_policy,
    as_space,
    policy_table,
    rollout,
    rollout_from,
    trajectory_keys,
)
from bilevel_jax.environments.policies import finite
from bilevel_jax.estimators import NestedRollouts, OneStep, estimate, importance_weights

KEY = jax.random.key(3)
P = np.array([0.2, 0.0, 0.5, 0.3])


class Normal(Distribution):
    """A policy over reals, as one of continuous actions would be written."""

    mean: jax.Array
    deviation: jax.Array

    def sample(self, key):
        return self.mean + self.deviation * jax.random.normal(key, self.mean.shape, self.mean.dtype)

    def log_prob(self, action):
        return jnp.sum(jax.scipy.stats.norm.logpdf(action, self.mean, self.deviation))

    def entropy(self):
        return self.mean.size * (0.5 * jnp.log(2 * jnp.pi * jnp.e) + jnp.log(self.deviation))


class Push(Policy):
    """Towards 0 by a gain."""

    gain: jax.Array

    def distribution(self, observation):
        return Normal(-self.gain * observation.astype(self.gain.dtype), jnp.full((), 0.5, self.gain.dtype))


class PushOneWay(Push):
    """A number where the environment asks for two."""

    def distribution(self, observation):
        return super().distribution(observation[0])


class Cart(Environment):
    """A point of the plane, moved by the action; ends far out."""

    @property
    def action_space(self):
        return Box(-1.0, 1.0, (2,))

    def reset(self, key):
        return jax.random.uniform(key, (2,), minval=-1, maxval=1)

    def observe(self, state):
        return state

    def step(self, key, state, action):
        following = state + 0.1 * jnp.clip(action, -1, 1) + 0.01 * jax.random.normal(key, (2,))
        far = jnp.max(jnp.abs(following)) > 1.2
        return following, TimeStep(following, -jnp.sum(following**2), far, jnp.zeros_like(far))


# Distributions


def test_categorical_against_numpy():
    """log_prob, entropy and derivatives, an impossible action among them."""
    one = Categorical(jnp.asarray(P))
    np.testing.assert_allclose([one.log_prob(a) for a in (0, 2, 3)], np.log(P[[0, 2, 3]]), rtol=1e-14)
    assert one.log_prob(1) == -np.inf
    assert one.probability(2) == 0.5
    possible = P[P > 0]
    np.testing.assert_allclose(one.entropy(), -np.sum(possible * np.log(possible)), rtol=1e-14)
    gradient = jax.grad(lambda p: Categorical(p).entropy())(jnp.asarray(P))
    np.testing.assert_allclose(gradient, np.where(P > 0, -np.log(np.where(P > 0, P, 1)) - 1, 0), rtol=1e-14)


def test_categorical_samples_by_its_probabilities():
    keys = jax.random.split(KEY, 40_000)
    drawn = jax.jit(jax.vmap(Categorical(jnp.asarray(P)).sample))(keys)
    assert drawn.dtype == np.int32
    counts = np.bincount(drawn, minlength=4)
    assert counts[1] == 0
    # Five standard deviations of a frequency.
    np.testing.assert_allclose(counts / 40_000, P, atol=5 * 0.5 / 200)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_logits(dtype):
    """Logarithms keep their digits where probabilities are too small for the dtype; -inf forbids."""
    logits = jnp.array([0.0, -200.0, 1.0, -jnp.inf], dtype)
    one = Categorical.from_logits(logits)
    assert one.probabilities.dtype == one.log_prob(1).dtype == dtype
    exact = np.array([0.0, -200.0, 1.0]) - np.log(1 + np.e)
    np.testing.assert_allclose([one.log_prob(a) for a in range(3)], exact, rtol=10 * np.finfo(dtype).eps)
    np.testing.assert_allclose(one.probabilities, [1 / (1 + np.e), 0, np.e / (1 + np.e), 0], atol=1e-7)
    assert one.log_prob(3) == -np.inf
    gradient = jax.grad(lambda z: Categorical.from_logits(z).log_prob(1))(logits[:3])
    np.testing.assert_allclose(gradient, np.eye(3)[1] - np.asarray(one.probabilities)[:3], atol=1e-7)


# Policies


def test_what_becomes_a_policy():
    table = np.random.default_rng(0).dirichlet(np.ones(3), 5)
    given = (table, jnp.asarray(table), bj.Table(table), TabularPolicy(table))
    given += (lambda s: jnp.asarray(table)[s], bj.Linear(jnp.eye(5), table), PolicyFunction(bj.Table(table)))
    for one in given:
        policy = as_policy(one)
        assert isinstance(policy, Policy)
        np.testing.assert_array_equal(policy_table(policy, 5), table)
        np.testing.assert_array_equal(policy.distribution(jnp.int32(2)).probabilities, table[2])
    assert as_policy(policy) is policy


@pytest.mark.parametrize("wrong", [None, 0.5, np.ones(3), "uniform", [[0.5, 0.5]]])
def test_what_does_not(wrong):
    with pytest.raises(bj.InputError, match="policy: expected a Policy"):
        as_policy(wrong)


def test_a_policy_of_reals_has_no_table():
    with pytest.raises(bj.InputError, match="distributions are Normal"):
        policy_table(Push(jnp.ones(())), 3)
    with pytest.raises(bj.InputError, match=r"probabilities: expected shape \[S, A\]"):
        TabularPolicy(np.ones(3))
    assert isinstance(finite(Categorical(jnp.asarray(P))), Categorical)


# Spaces


def test_spaces():
    assert (Discrete(4).n, Discrete(4).shape, Discrete(4).dtype) == (4, (), np.int32)
    box = Box(np.array([-1.0, -2.0]), 3.0)
    assert (box.shape, box.dtype) == ((2,), np.float64)
    np.testing.assert_array_equal(box.high, [3, 3])
    assert Box(0.0, 1.0, (3,), np.float32).low.dtype == np.float32
    assert jax.jit(lambda b: b.high - b.low)(box).tolist() == [4, 5]
    with jax.enable_x64(False):
        assert Box(0.0, 1.0, (3,), np.float64).dtype == np.float32


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Discrete(0), "n: "),
        (lambda: Discrete(2.0), "n: "),
        (lambda: Box(1.0, 0.0, ()), "low: expected at most high"),
        (lambda: Box(0.0, np.nan, ()), "low: expected at most high, got 0.0 and nan"),
        (lambda: Box(np.zeros(3), 1.0, (2,)), r"low: expected an array that broadcasts to \[2\]"),
        (lambda: Box(0.0, 1.0, (), np.int32), "dtype: expected a floating-point type"),
        (lambda: as_space("a", SimpleNamespace(low=0, high=1)), "a: its actions are a SimpleNamespace"),
        (lambda: as_space("a", SimpleNamespace(n=3, start=1)), "a: its actions start from 1"),
    ],
)
def test_bad_spaces(make, match):
    with pytest.raises(bj.InputError, match=match):
        make()


def test_spaces_of_gymnasium():
    spaces = pytest.importorskip("gymnasium").spaces
    assert as_space("a", spaces.Discrete(5)).n == 5
    low = np.array([-1, -np.inf], np.float32)
    box = as_space("a", spaces.Box(low, np.array([1, 2], np.float32)))
    assert (box.shape, box.dtype) == ((2,), np.float32)
    np.testing.assert_array_equal(box.low, low)
    with pytest.raises(bj.InputError, match="a: its actions start from 2"):
        as_space("a", spaces.Discrete(5, start=2))
    for several in (spaces.MultiBinary(3), spaces.MultiDiscrete([2, 3])):
        with pytest.raises(bj.InputError, match="a: its actions are a Multi"):
            as_space("a", several)
    assert as_space("a", box) is box


@pytest.mark.parametrize("name", ["garnet", "four_rooms", "tabular_rlhf", "reward_shaping"])
def test_problems_say_their_spaces(name):
    problem = bj.problems.make(name)
    space, shape = problem.action_space, problem.observation_space
    assert isinstance(space, Discrete)
    assert space.n == problem.environment.num_actions
    assert (shape.shape, shape.dtype) == ((), np.int32)
    hot = bj.bilevel.at_temperature(problem, 2.0)
    assert (hot.action_space.n, hot.observation_space) == (space.n, shape)


def test_observations_are_trees():
    household = bj.problems.make("tax_design").simulator(bj.problems.make("tax_design").start(KEY))
    kind, assets = household.observation_space
    assert (kind.dtype, kind.shape, assets.shape) == (np.int32, (), ())


# Rewards


@pytest.mark.slow
def test_rewards_of_pairs():
    values = np.random.default_rng(1).normal(size=(STATES, ACTIONS))
    table = bj.Table(values)
    rewards = (
        table,
        bj.Linear(jnp.eye(STATES), values),
        bj.PerAction(lambda s: jnp.asarray(values)[s]),
        OfPair("reward", lambda s, a: jnp.asarray(values)[s, a], ACTIONS),
    )
    for reward in rewards:
        assert isinstance(reward, bj.ActionFunction)
        assert float(reward(jnp.int32(2), jnp.int32(1))) == values[2, 1]
        np.testing.assert_array_equal(reward.all(jnp.int32(2)), values[2])
        np.testing.assert_array_equal(tabulate(reward, STATES).values, values)
    gradient = jax.grad(lambda v: jnp.sum(jax.vmap(bj.Table(v))(jnp.array([2, 2, 0]), jnp.array([1, 1, 0]))))(values)
    assert gradient[2, 1] == 2
    assert gradient[0, 0] == 1
    assert np.sum(np.abs(gradient)) == 3


def problem_with(reward):
    environment = TabularEnvironment(helpers.make_mdp(helpers.random_process(0), 0.9))
    return bj.SampledBilevelProblem(
        environment, reward, bj.ShannonEntropy(0.5), lambda k, x, d: jnp.zeros(()), discount=0.9, horizon=5
    )


def test_rewards_of_a_sampled_problem():
    """An array, a function of the pair, and one of the observation: one reward."""
    x = jnp.asarray(np.random.default_rng(2).normal(size=(STATES, ACTIONS)))
    ways = (lambda x: x, lambda x: lambda s, a: x[s, a], lambda x: bj.PerAction(lambda s: x[s]))
    for way in ways:
        reward = problem_with(way).reward(x)
        np.testing.assert_array_equal(reward.all(3), x[3])
        assert float(reward(3, 2)) == float(x[3, 2])
    with pytest.raises(bj.InputError, match=r"reward: .* wrapped, bj.PerAction\(function\)"):
        problem_with(lambda x: lambda s: x[s]).reward(x)


# Continuous actions


def cart_problem():
    return bj.SampledBilevelProblem(
        Cart(),
        lambda x: lambda state, action: -x * jnp.sum(action**2) - jnp.sum(state**2),
        bj.ShannonEntropy(0.5),
        lambda key, x, d: jnp.where(d.valid[0], jnp.sum(d.observation[0] ** 2, -1), 0) + 0 * x,
        discount=0.8,
        horizon=4,
    )


@pytest.mark.slow
@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_continuous_actions_in_rollouts(dtype):
    """Actions and densities are those of the policy's distributions, from the steps' keys."""
    with jax.enable_x64(dtype == np.float64):
        policy, cart = Push(jnp.asarray(0.7, dtype)), Cart()
        made = jax.jit(lambda key: rollout(key, cart, policy, batch=3, horizon=4))(KEY)
        assert made.action.shape == (3, 4, 2)
        assert made.action.dtype == made.probability.dtype == dtype
        keys = trajectory_keys(KEY, 3)
        for b, h in ((0, 0), (2, 3)):
            one = policy.distribution(made.observation[b, h])
            for_action = jax.random.split(jax.random.fold_in(keys[b], h + 1))[0]
            np.testing.assert_allclose(made.action[b, h], one.sample(for_action), rtol=1e-5)
            density = np.prod(np.exp(-(((made.action[b, h] - one.mean) / 0.5) ** 2) / 2) / (0.5 * np.sqrt(2 * np.pi)))
            np.testing.assert_allclose(made.probability[b, h], density, rtol=1e-4)
        pushed, _ = rollout_from(
            keys, cart, policy, jnp.zeros((3, 2), dtype), horizon=2, actions=jnp.ones((3, 2), dtype)
        )
        np.testing.assert_array_equal(pushed.action[:, 0], 1)
        assert not np.any(np.asarray(pushed.action[:, 1]) == 1)


def test_policies_of_another_space_are_refused():
    with pytest.raises(bj.InputError, match=r"actions of shape \[2\] \(the space is a Box\), got numbered actions"):
        rollout(KEY, Cart(), lambda o: jnp.array([0.5, 0.5]), batch=2, horizon=2)
    with pytest.raises(bj.InputError, match=r"got shape \[\]"):
        rollout(KEY, Cart(), PushOneWay(jnp.ones(())), batch=2, horizon=2)
    with pytest.raises(bj.InputError, match=r"actions: expected shape \[2, 2\], got \[2\]"):
        rollout_from(
            trajectory_keys(KEY, 2), Cart(), Push(jnp.ones(())), jnp.zeros((2, 2)), horizon=2, actions=jnp.zeros(2)
        )
    environment = problem_with(lambda x: x).environment
    with pytest.raises(bj.InputError, match="distributions are Normal"):
        rollout(KEY, environment, Push(jnp.ones(())), batch=2, horizon=2)


@pytest.mark.slow
def test_continuous_actions_in_estimates():
    """Nested rollouts and importance weights ask for no table; what does says so."""
    problem, policy, x = cart_problem(), Push(jnp.asarray(0.7)), jnp.asarray(0.3)
    assert isinstance(problem.action_space, Box)
    made = jax.jit(lambda k: estimate(k, problem, x, policy, batch=8, response=NestedRollouts(3)))(KEY)
    assert np.isfinite(made.gradient)
    assert made.gradient != 0
    np.testing.assert_allclose(importance_weights(policy, made.groups).weights, 1, rtol=1e-12)
    other = importance_weights(Push(jnp.asarray(0.4)), made.groups)
    one = made.groups.observation, made.groups.action, made.groups.valid
    logs = [-((np.asarray(one[1]) + gain * np.asarray(one[0])) ** 2).sum(-1) / 2 / 0.25 for gain in (0.4, 0.7)]
    expected = np.exp(np.sum(np.where(one[2], logs[0] - logs[1], 0), (1, 2)))
    np.testing.assert_allclose(other.weights, expected, rtol=1e-10)
    with pytest.raises(bj.InputError, match="reward: it is asked for all actions"):
        estimate(KEY, problem, x, policy, batch=2, response=OneStep())
    with pytest.raises(bj.InputError, match="environment: the actions of Cart are a Box"):
        SoftQLearning(features=lambda o: o).init(KEY, problem, x)
    with pytest.raises(bj.InputError, match="ExactAgent needs the model"):
        ExactAgent().init(KEY, problem, x)
