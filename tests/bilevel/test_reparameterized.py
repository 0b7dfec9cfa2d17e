"""A problem in the weights of a network: the chain rule, for every way to a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import bilevel_jax as bj
from bilevel_jax.bilevel import Problem, SampledProblem, at_temperature, reparameterized

KEY = jax.random.key(0)
NETWORK = bj.networks.OneHot(8, bj.networks.MLP(width=6, output_scale=1.0))
STATES = jnp.arange(8)


def table(weights):
    return jax.vmap(lambda state: NETWORK.apply(weights, state))(STATES)


def through(problem):
    return reparameterized(problem, table, lambda key: NETWORK.init(key, STATES[0], 3))


def flat(tree):
    return ravel_pytree(tree)[0]


@pytest.mark.slow
def test_hypergradients_are_the_chain_rules():
    problem = bj.problems.make("garnet")
    network = through(problem)
    weights = network.start(KEY)
    x, pullback = jax.vjp(table, weights)
    inner, made = bj.check(bj.hypergradient(problem, x)), bj.check(bj.hypergradient(network, weights))
    np.testing.assert_allclose(made.value, inner.value, rtol=1e-12)
    np.testing.assert_allclose(flat(made.gradient), flat(pullback(inner.gradient)[0]), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_against_differences():
    network = through(bj.problems.make("garnet"))
    bj.check_gradient(network, network.start(KEY))


@pytest.mark.slow
@pytest.mark.parametrize("response", [bj.estimators.OneStep(), bj.estimators.NestedRollouts(4)])
def test_estimates_are_the_chain_rules(response):
    """With the same keys, to rounding."""
    problem = bj.problems.make("garnet", horizon=10)
    network = through(problem)
    weights = network.start(KEY)
    x, pullback = jax.vjp(table, weights)
    policy = bj.solve(problem.mdp(x), problem.regularizer(x)).policy
    settings = {"batch": 8, "response": response}
    inner = bj.estimators.estimate(KEY, problem, x, policy, **settings)
    made = bj.estimators.estimate(KEY, network, weights, policy, **settings)
    np.testing.assert_allclose(flat(made.gradient), flat(pullback(inner.gradient)[0]), rtol=1e-9, atol=1e-12)


def test_it_is_what_the_problem_is():
    garnet, synthetic = through(bj.problems.make("garnet")), through(bj.problems.make("synthetic"))
    assert (isinstance(garnet, Problem), isinstance(garnet, SampledProblem)) == (True, True)
    assert (isinstance(synthetic, Problem), isinstance(synthetic, SampledProblem)) == (True, False)


def test_other_arguments_are_refused():
    with pytest.raises(bj.InputError, match="problem: expected a Problem or a SampledProblem, got int"):
        reparameterized(3, table, table)
    with pytest.raises(bj.InputError, match="function: expected a function"):
        reparameterized(bj.problems.make("garnet"), 3, table)


class Features(bj.SampledBilevelProblem):
    def features(self, observation):
        return jax.nn.one_hot(observation, 8)

    def environment_reward_weight(self):
        return None


@pytest.mark.parametrize(
    "wrap", [lambda p: at_temperature(p, 2.0), lambda p: reparameterized(p, lambda w: w, lambda k: k)]
)
def test_wrappers_pass_on_what_they_do_not_change(wrap):
    """Features, too, without which agents with linear values cannot learn under a schedule of the temperature."""
    garnet = bj.problems.make("garnet", horizon=7)
    plain = Features(
        environment=garnet.environment,
        reward=lambda x: x,
        regularizer=bj.ShannonEntropy(0.5),
        loss=lambda key, x, trajectories: jnp.sum(x**2),
        discount=0.9,
        loss_discount=0.8,
        horizon=7,
        trajectories=2,
    )
    wrapped = wrap(plain)
    for name in ("horizon", "trajectories", "discount", "loss_discount", "action_space"):
        assert getattr(wrapped, name) == getattr(plain, name)
    np.testing.assert_array_equal(wrapped.features(3), plain.features(3))
    assert wrapped.environment_reward_weight() is None
    assert wrap(garnet).features is None
    x = jnp.ones((8, 3))
    np.testing.assert_array_equal(wrapped.reward(x).all(2), plain.reward(x).all(2))


class Line(bj.environments.Environment):
    """Two actions move a point along a line."""

    @property
    def action_space(self):
        return bj.environments.Discrete(2)

    def reset(self, key):
        return jax.random.uniform(key)

    def observe(self, state):
        return state

    def step(self, key, state, action):
        moved = jnp.clip(state + 0.1 * (2 * action - 1).astype(state.dtype), 0, 1)
        none = jnp.asarray(False)
        return moved, bj.environments.TimeStep(moved, jnp.zeros_like(moved), none, none)


class LineFeatures(bj.SampledBilevelProblem):
    def features(self, observation):
        return jnp.stack([observation, 1 - observation])


@pytest.mark.slow
def test_agents_with_features_learn_under_a_schedule_of_the_temperature():
    """The wrapper of the schedule used to lose the problem's features."""
    problem = LineFeatures(
        environment=Line(),
        reward=lambda x: bj.PerAction(lambda observation: x * observation),
        regularizer=bj.ShannonEntropy(0.5),
        loss=lambda key, x, trajectories: jnp.sum(x**2),
        discount=0.9,
        horizon=7,
    )
    upper = bj.algorithms.UpperLevel(optax.adam(0.1), temperature=bj.algorithms.Cooling(4.0, 10))
    algorithm = bj.algorithms.naive(problem, upper, batch=4)
    state = algorithm.init(KEY, jnp.ones(2))
    _, info = algorithm.step(KEY, state)
    assert np.isfinite(info.objective)
