"""Learned dQ/dw of a reward's last layer against the model's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import flat
from sampled_helpers import KEY, EndingGarnet, garnet, quick_jit, setting

import bilevel_jax as bj
from bilevel_jax.core.functions import Table
from bilevel_jax.environments import Discrete
from bilevel_jax.estimators import Exact, estimate_from, sample_groups
from bilevel_jax.estimators.responses.successor_features import SuccessorFeatures, last_layer
from bilevel_jax.networks import MLP, OneHot, RewardNetwork


def learn(response, problem, x, policy, batches, batch=32, key=KEY):
    """The state after some batches."""

    def one(state, key):
        groups = sample_groups(key, problem, policy, batch)
        return response.update(state, problem, x, policy, groups), None

    return jax.lax.scan(one, response.init(problem, x), jax.random.split(key, batches))[0]


def answers(response, state, at, groups):
    credit = jax.random.normal(KEY, groups.action[:, 0].shape)
    credit = jnp.where(groups.valid[:, 0], credit, 0)
    seen = jax.tree.map(lambda leaf: leaf[:, 0], groups)
    return jax.grad(lambda x: response.surrogate(KEY, state, at.problem, x, at.policy, seen, credit))(at.x)


@pytest.mark.slow
@pytest.mark.parametrize("trace", [0.0, 0.9])
@pytest.mark.parametrize("kind", [None, EndingGarnet], ids=["goes on", "ends"])
def test_a_table_learns_the_exact_answer(kind, trace):
    """x[S, A] is the reward's table: psi is dQ/dx. After 10 batches, and after 400."""
    at = setting(discount=0.8, horizon=30) if kind is None else setting(kind, discount=0.8, horizon=30)
    response = SuccessorFeatures(OneHot(5), trace=trace)
    groups = quick_jit(lambda key: sample_groups(key, at.problem, at.policy, 32))(jax.random.key(99))
    exact = flat(quick_jit(lambda: answers(Exact(), None, at, groups))())
    errors = []
    for batches in (10, 400):
        state = quick_jit(learn, static_argnums=4)(response, at.problem, at.x, at.policy, batches)
        made = flat(quick_jit(answers)(response, state, at, groups))
        errors.append(np.linalg.norm(made - exact) / np.linalg.norm(exact))
    print(f"trace {trace}: relative errors {np.round(errors, 3)}")
    assert errors[1] < 0.1
    assert errors[1] < 0.7 * errors[0]


def linear_problem(features, scale=1.0):
    """Rewards features(s) . w[:, a]; x is the weights, or holds them."""
    inner = garnet(price=0.0, horizon=20, discount=0.7)

    def loss(key, x, trajectories):
        del key, x
        return inner.cost[trajectories.observation[0], trajectories.action[0]]

    return bj.SampledBilevelProblem(
        inner.environment,
        lambda x: bj.Linear(features * scale, x["weights"]),
        bj.ShannonEntropy(0.5),
        loss,
        discount=0.7,
        loss_discount=0.7,
        horizon=20,
    )


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_linear_rewards(scale):
    """Fewer numbers than pairs, of any size; what `where` leaves out has no answer."""
    features = jnp.asarray(np.random.default_rng(1).normal(size=(5, 2)))
    problem = linear_problem(features, scale)
    x = {"weights": jnp.asarray(np.random.default_rng(2).normal(size=(2, 2))) / scale, "other": jnp.ones(3)}
    policy = Table(np.random.default_rng(3).dirichlet(np.ones(2), 5))
    response = SuccessorFeatures(OneHot(5), lambda x: x["weights"])
    state = quick_jit(learn, static_argnums=4)(response, problem, x, policy, 300)
    assert state.shift.shape == (4,)
    groups = quick_jit(lambda key: sample_groups(key, problem, policy, 64))(jax.random.key(5))

    @quick_jit
    def run(state):
        return estimate_from(KEY, problem, x, policy, groups, response, state).gradient

    # psi of the model, in numpy.
    made = run(state)
    kernel = np.zeros((5, 2, 5))
    inner = garnet(price=0.0, horizon=20, discount=0.7)
    for k, s, a in np.ndindex(inner.transition.successor.shape):
        kernel[s, a, inner.transition.successor[k, s, a]] += inner.transition.probability[k, s, a]
    phi = np.einsum("sf,ab->safb", np.asarray(features) * scale, np.eye(2)).reshape(5, 2, 4)
    pi = np.asarray(policy.values)
    value = np.linalg.solve(np.eye(5) - 0.7 * np.einsum("sa,sat->st", pi, kernel), np.einsum("sa,saf->sf", pi, phi))
    psi = phi + 0.7 * kernel @ value
    got = np.asarray(jax.vmap(lambda s: response.critic.values(state, s))(jnp.arange(5)))
    centre = lambda q: q - np.einsum("sa,saf->sf", pi, q)[:, None]  # noqa: E731
    error = np.linalg.norm(centre(got) - centre(psi)) / np.linalg.norm(centre(psi))
    print(f"scale {scale}: error of psi {error:.3f}")
    assert error < 0.15
    assert np.linalg.norm(made["weights"]) > 0
    assert np.all(np.asarray(made["other"]) == 0)


@pytest.mark.slow
def test_the_last_layer_of_a_network():
    """Only the last layer's numbers have an answer, and phi is the activation below it."""
    inner = garnet(horizon=6)
    model = RewardNetwork(OneHot(5, MLP(width=4, depth=1)), "state_action", Discrete(2))

    def loss(key, x, trajectories):
        del key, x
        return inner.cost[trajectories.observation[0], trajectories.action[0]]

    problem = bj.SampledBilevelProblem(
        inner.environment, model, bj.ShannonEntropy(0.5), loss, discount=0.5, loss_discount=0.5, horizon=6
    )
    x = model.init(KEY, jnp.asarray(0))
    response = SuccessorFeatures(OneHot(5), last_layer, steps=3)
    policy = Table(np.full((5, 2), 0.5))

    @quick_jit
    def run(x):
        groups = sample_groups(KEY, problem, policy, 4)
        state = response.update(response.init(problem, x), problem, x, policy, groups)
        phi = response._features(problem, x, jax.tree.map(lambda leaf: leaf[:, 0], groups))
        return estimate_from(KEY, problem, x, policy, groups, response, state).gradient, phi, groups

    made, phi, groups = run(x)
    assert phi.shape == (4, 6, 2 * 4 + 2)
    weight, bias = last_layer(made)
    assert np.any(weight != 0)
    whole, last = flat(made), np.concatenate([flat(weight), flat(bias)])
    np.testing.assert_allclose(np.linalg.norm(whole), np.linalg.norm(last), rtol=1e-12)
    numbers = np.concatenate([flat(part) for part in last_layer(x)])
    rewards = jax.vmap(jax.vmap(model(x)))(groups.observation[:, 0], groups.action[:, 0])
    np.testing.assert_allclose(phi @ numbers, rewards, rtol=1e-10)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_first_answer_is_zero_and_dtypes_stay(dtype):
    at = setting(horizon=20)
    if dtype == jnp.float32:
        at = jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, at)
    response = SuccessorFeatures(OneHot(5), steps=2)

    @quick_jit
    def run(at):
        groups = sample_groups(KEY, at.problem, at.policy, 4)
        state = response.init(at.problem, at.x)
        later = response.update(state, at.problem, at.x, at.policy, groups)
        return [answers(response, learned, at, groups) for learned in (state, later)]

    first, second = run(at)
    assert first.dtype == second.dtype == dtype
    assert np.all(np.asarray(first) == 0)
    assert np.any(np.asarray(second) != 0)


def test_input_errors():
    with pytest.raises(bj.InputError, match="trace must be from 0 to 1"):
        SuccessorFeatures(trace=-1.0)
    with pytest.raises(bj.InputError, match=r"steps: .*at least 1"):
        SuccessorFeatures(steps=0)
    with pytest.raises(bj.InputError, match=r"x: expected the parameters of an MLP, got dict"):
        last_layer({})
    with pytest.raises(bj.InputError, match="where: expected a function, got int"):
        SuccessorFeatures(where=3)
