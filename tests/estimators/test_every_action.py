"""`NestedRollouts(every_action=True)`: a rollout of every action in place of one that is drawn."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environment_helpers import Anything
from helpers import flat
from sampled_helpers import KEY, EndingGarnet, draws, garnet, quick_jit, require_mean, setting

import bilevel_jax as bj
from bilevel_jax.core.functions import Table
from bilevel_jax.estimators import Exact, NestedRollouts, sample_groups

LENGTH = 10
SIZES = {"states": 6, "actions": 3, "seed": 5}
VARIANTS = {
    "coupled": NestedRollouts(LENGTH, every_action=True),
    "uncoupled": NestedRollouts(LENGTH, coupled=False, every_action=True),
    "two copies": NestedRollouts(LENGTH, copies=2, every_action=True),
    "two visits": NestedRollouts(LENGTH, visits=2, every_action=True),
    "all": NestedRollouts(LENGTH, copies=2, visits=3, coupled=False, every_action=True),
}


class Batch(eqx.Module):
    """A fixed batch of four trajectories with credits, and what the response answers to them exactly."""

    trajectories: bj.environments.Trajectory
    credit: jax.Array
    exact: jax.Array


@functools.cache
def batch_of(kind=None):
    at = setting(**SIZES) if kind is None else setting(kind, **SIZES)

    @quick_jit
    def make(key):
        groups = sample_groups(key, at.problem, at.policy, 4)
        trajectories = jax.tree.map(lambda leaf: leaf[:, 0], groups)
        credit = jnp.where(trajectories.valid, jax.random.normal(key, trajectories.action.shape), 0)
        exact = jax.grad(lambda x: Exact().surrogate(KEY, None, at.problem, x, at.policy, trajectories, credit))(at.x)
        return Batch(trajectories, credit, exact)

    return at, make(jax.random.key(3))


@functools.cache
def answers(response, kind=None, count=1500):
    """The response's gradients for the fixed batch with `count` keys: all that is random is its rollouts."""
    at, batch = batch_of(kind)

    @quick_jit
    def one(keys):
        def answer(key):
            return jax.grad(
                lambda x: response.surrogate(key, None, at.problem, x, at.policy, batch.trajectories, batch.credit)
            )(at.x)

        return jax.lax.map(answer, keys, batch_size=50)

    return np.asarray(one(jax.random.split(KEY, count))).reshape(count, -1)


@pytest.mark.parametrize("name", VARIANTS)
def test_rollouts_of_every_action_have_the_exact_mean(name):
    """Hotelling's T^2: a right program fails once in two million; the standard error along the answer is below 4
    percent of it, so that a missing action or a wrong weight is seen.
    """
    require_mean(answers(VARIANTS[name]), flat(batch_of()[1].exact), 0.04, name)


@pytest.mark.slow
def test_it_is_unbiased_with_ends_and_a_reference():
    require_mean(answers(VARIANTS["coupled"], EndingGarnet), flat(batch_of(EndingGarnet)[1].exact), 0.04)


@pytest.mark.parametrize("kind", [None, EndingGarnet], ids=["garnet", "ends"])
def test_estimates_have_the_mean_of_the_hyper_gradient(kind):
    """As the other responses in test_estimators.py: once in two million."""
    at = setting(**SIZES) if kind is None else setting(kind, **SIZES)
    seen = draws(at, NestedRollouts(LENGTH, visits=2, every_action=True), batches=800)
    require_mean(seen.gradient, at.gradient, 0.05)
    require_mean(seen.value, at.value, 0.06, "value")


def test_every_action_is_less_noisy_than_one_that_is_drawn():
    """On the same visits of a random MDP. 1500 draws give each variance to about 4 percent."""

    def variance(**options):
        return answers(NestedRollouts(LENGTH, **options)).var(0).sum()

    for options in ({}, {"coupled": False}):
        drawn, every = variance(**options), variance(**options, every_action=True)
        print(f"{options}: variance {every:.4f} of every action, {drawn:.4f} of one drawn")
        assert every < 0.2 * drawn
    assert variance(every_action=True) < 0.9 * variance(coupled=False, every_action=True)
    assert 0.4 < variance(copies=2, every_action=True) / variance(every_action=True) < 0.6


def test_a_policy_that_is_certain_leaves_nothing():
    """Where the action that was taken has probability 1, dQ - dV is 0, without any noise."""
    problem = garnet(states=6, actions=3)
    policy = Table(jnp.eye(3)[jnp.array([0, 2, 1, 1, 0, 2])])
    groups = quick_jit(lambda key: sample_groups(key, problem, policy, 3))(KEY)
    trajectories = jax.tree.map(lambda leaf: leaf[:, 0], groups)
    x, credit = jnp.ones((6, 3)), jnp.ones(trajectories.action.shape)
    answer = jax.grad(lambda x: VARIANTS["all"].surrogate(KEY, None, problem, x, policy, trajectories, credit))(x)
    np.testing.assert_array_equal(answer, 0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 3 * 7 * 20 * 5), ({"copies": 2}, 3 * 7 * 20 * 2 * 5), ({"visits": 4, "copies": 3}, 3 * 7 * 4 * 3 * 5)],
)
def test_steps_of_all_rollouts_count(options, expected):
    """The number of actions, in place of two, times those of a batch of 7 trajectories with a horizon of 20."""
    problem = garnet(states=6, actions=3)
    drawn, every = NestedRollouts(5, **options), NestedRollouts(5, **options, every_action=True)
    assert every.environment_steps(problem, 7) == expected
    assert drawn.environment_steps(problem, 7) == expected * 2 // 3


def test_what_runs_is_what_is_counted(monkeypatch):
    from bilevel_jax.estimators.responses import nested_rollouts

    made = []

    def count(keys, *arguments, horizon, **options):
        made.append(keys.shape[0] * horizon)
        return bj.environments.rollout_from(keys, *arguments, horizon=horizon, **options)

    monkeypatch.setattr(nested_rollouts, "rollout_from", count)
    at, batch = batch_of()
    for response in VARIANTS.values():
        made.clear()
        jax.eval_shape(
            lambda x, response=response: response.surrogate(
                KEY, None, at.problem, x, at.policy, batch.trajectories, batch.credit
            ),
            at.x,
        )
        assert sum(made) == response.environment_steps(at.problem, 4)


def test_in_float32():
    at, batch = batch_of()
    narrow = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, (at, batch)
    )

    def answer(at, batch):
        return jax.grad(
            lambda x: VARIANTS["two copies"].surrogate(
                KEY, None, at.problem, x, at.policy, batch.trajectories, batch.credit
            )
        )(at.x)

    got, wide = quick_jit(answer)(*narrow), quick_jit(answer)(at, batch)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wide, rtol=1e-4, atol=1e-5)


def test_points_of_a_box_are_refused():
    environment = bj.environments.classic.Pendulum()
    model = bj.networks.RewardNetwork.of(environment, bj.networks.MLP(width=2, depth=0), "state")
    problem = bj.SampledBilevelProblem(
        environment,
        model,
        bj.ShannonEntropy(0.5),
        lambda key, x, trajectories: jnp.sum(trajectories.reward),
        discount=0.5,
        horizon=4,
    )
    response = NestedRollouts(3, every_action=True)
    message = r"every_action: the actions of Pendulum are a Box of shape \[1\], no finite set; leave every_action=False"
    with pytest.raises(bj.InputError, match=message):
        response.environment_steps(problem, 2)
    x = model.init(KEY, environment.observation_space)
    policy = Anything(environment.action_space)
    for every in (False, True):
        made = NestedRollouts(3, every_action=every)

        def run(made=made):
            jax.eval_shape(lambda: bj.estimators.estimate(KEY, problem, x, policy, batch=2, response=made))

        if every:
            with pytest.raises(bj.InputError, match=message):
                run()
        else:
            run()
