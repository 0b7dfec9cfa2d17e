"""Occupancy measures and stationary distributions: identities, closed forms, derivatives, simulation."""

import functools

import equinox as eqx
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ACTIONS, STATES
from hypothesis import given, settings
from hypothesis import strategies as st

import bilevel_jax as bj

PROCESS = helpers.random_process(0)
POLICY = np.random.default_rng(1).dirichlet(np.ones(ACTIONS), STATES)
ENDS = np.zeros((STATES, ACTIONS), bool)
ENDS[1, 1] = ENDS[5, 0] = True
MASK = np.ones((STATES, ACTIONS), bool)
MASK[0, 0] = MASK[3, 1:] = False

occupancy, stationary, value = jax.jit(bj.occupancy), jax.jit(bj.stationary_distribution), jax.jit(bj.policy_value)


def chain(process, policy):
    return np.einsum("sa,saj->sj", policy, process.dense)


def stationary_numpy(matrix):
    """By least squares on mu' P = mu', sum mu = 1."""
    system = np.vstack([matrix.T - np.eye(len(matrix)), np.ones(len(matrix))])
    return np.linalg.lstsq(system, np.append(np.zeros(len(matrix)), 1.0), rcond=None)[0]


@pytest.mark.slow
@settings(deadline=None, max_examples=25, derandomize=True)
@given(seed=st.integers(0, 10_000), discount=st.floats(0, 0.999), per_pair=st.booleans())
def test_identities(seed, discount, per_pair):
    rng = np.random.default_rng(seed)
    process, policy = helpers.random_process(seed), rng.dirichlet(np.ones(ACTIONS), STATES)
    discounts = discount * (rng.uniform(size=(STATES, ACTIONS)) if per_pair else np.ones((STATES, ACTIONS)))
    mdp = helpers.make_mdp(process, discounts)
    visits = np.asarray(occupancy(mdp, policy))
    length = 1 / (1 - discounts.max())
    # Flow into each state, the value, and the expected discounted length, V of reward 1.
    flow = process.initial + np.einsum("sa,saj->j", visits * discounts, process.dense)
    np.testing.assert_allclose(visits.sum(1), flow, rtol=0, atol=1e-13 * length)
    np.testing.assert_allclose(
        (visits * process.reward).sum(), process.initial @ value(mdp, policy), atol=1e-11 * length
    )
    ones = mdp.replace(reward=np.ones((STATES, ACTIONS)))
    np.testing.assert_allclose(visits.sum(), process.initial @ value(ones, policy), rtol=1e-11)
    assert (visits >= 0).all()
    mu = np.asarray(stationary(mdp, policy))
    np.testing.assert_allclose(mu @ chain(process, policy), mu, atol=1e-13)
    np.testing.assert_allclose(mu, stationary_numpy(chain(process, policy)), atol=1e-12)


def test_normalized_occupancies_are_distributions():
    mdp = helpers.make_mdp(PROCESS, 0.9)
    normal = bj.occupancy(mdp, POLICY, normalized=True)
    np.testing.assert_allclose(normal, 0.1 * bj.occupancy(mdp, POLICY), atol=1e-14)
    ends = helpers.make_mdp(PROCESS, np.where(ENDS, 0, 0.9))
    np.testing.assert_allclose(bj.occupancy(ends, POLICY, normalized=True).sum(), 1, rtol=1e-14)
    # As the discount goes to 1 they are the stationary distribution.
    late = bj.occupancy(helpers.make_mdp(PROCESS, 1 - 1e-7), POLICY, normalized=True)
    np.testing.assert_allclose(late.sum(1), bj.stationary_distribution(mdp, POLICY), atol=1e-6)


@pytest.mark.slow
def test_occupancy_agrees_with_simulation():
    """Discounted visits of 20,000 rollouts of 100 steps, ends included: within 5 standard errors of each entry.

    5 standard errors over 18 entries are a false alarm in 1e-5; what comes after 100 steps is 0.8^100 / 0.2 = 1e-9.
    """
    discount, batch, horizon = 0.8, 20_000, 100
    mdp = helpers.make_mdp(PROCESS, np.where(ENDS, 0, discount))
    simulator = bj.environments.TabularEnvironment(mdp)
    simulate = eqx.filter_jit(bj.environments.rollout)
    trajectory = simulate(jax.random.key(3), simulator, bj.Table(POLICY), batch=batch, horizon=horizon)
    pair = np.asarray(trajectory.state * ACTIONS + trajectory.action)
    weight = np.where(trajectory.valid, discount ** np.arange(horizon), 0)
    each = np.zeros((batch, STATES * ACTIONS))
    np.add.at(each, (np.arange(batch)[:, None], pair), weight)
    error = each.std(0, ddof=1) / np.sqrt(batch)
    expected = np.asarray(bj.occupancy(mdp, POLICY)).ravel()
    assert (np.abs(each.mean(0) - expected) <= 5 * error + 1e-8).all()
    assert (error < 0.05 * expected).all()  # so that this could fail


@functools.cache
def measures(layout):
    def function(a):
        transition = (
            bj.DenseTransition(a["p"]) if layout == "dense" else bj.SuccessorTransition(PROCESS.successor, a["p"])
        )
        mdp = bj.MDP(transition, a["reward"], a["discount"], a["initial"])
        regularizer = bj.KLDivergence(a["temperature"], PROCESS.reference)
        return (
            bj.occupancy(mdp, a["policy"]),
            bj.stationary_distribution(mdp, a["policy"]),
            bj.regularized_policy_value(mdp, regularizer, a["policy"]),
        )

    return jax.jit(function)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["successor", "dense"])
def test_derivatives_agree_with_finite_differences(layout):
    axis = 0 if layout == "successor" else -1
    arguments = {
        "p": PROCESS.probability if layout == "successor" else 0.9 * PROCESS.dense + 0.1 / STATES,
        "policy": POLICY,
        "reward": PROCESS.reward,
        "discount": np.full((STATES, ACTIONS), 0.7),
        "temperature": np.array(0.5),
        "initial": PROCESS.initial,
    }
    direction = jax.tree.map(lambda leaf: 0.01 * leaf, helpers.random_like(2, arguments))
    for name, along in (("p", axis), ("policy", -1), ("initial", -1)):
        direction[name] = direction[name] - direction[name].mean(along, keepdims=True)
    function = measures(layout)
    out, tangent = jax.jvp(function, (arguments,), (direction,))
    assert all(np.abs(leaf).max() > 1e-4 for leaf in tangent)
    np.testing.assert_allclose(
        helpers.flat(tangent), helpers.central_difference(function, arguments, direction, 0.05), atol=1e-9
    )
    cotangent = helpers.random_like(3, out)
    pull = jax.jit(lambda a: jax.vjp(function, a)[1](jax.tree.map(jnp.asarray, cotangent))[0])
    np.testing.assert_allclose(
        helpers.flat(pull(arguments)) @ helpers.flat(direction),
        helpers.flat(cotangent) @ helpers.flat(tangent),
        rtol=1e-9,
    )
    if layout == "successor":  # second order in the slow tests
        return
    _, second = jax.jvp(pull, (arguments,), (direction,))
    differences = helpers.central_difference(pull, arguments, direction, 0.05)
    np.testing.assert_allclose(helpers.flat(second), differences, atol=1e-7 * np.abs(differences).max())


@pytest.mark.slow
def test_batches_are_single_problems():
    rewards, discounts = np.stack([PROCESS.reward] * 2), np.array([0.5, 0.9])
    policies = np.random.default_rng(5).dirichlet(np.ones(ACTIONS), (2, STATES))
    batch = bj.MDP(PROCESS.dense, rewards, discounts, PROCESS.initial)
    regularizer = bj.ShannonEntropy(0.3)
    together = (
        occupancy(batch, policies),
        stationary(batch, policies),
        bj.regularized_policy_value(batch, regularizer, policies),
    )
    for i in range(2):
        one = helpers.make_mdp(PROCESS, discounts[i])
        np.testing.assert_allclose(together[0][i], bj.occupancy(one, policies[i]), atol=1e-13)
        np.testing.assert_allclose(together[1][i], bj.stationary_distribution(one, policies[i]), atol=1e-13)
        single = bj.regularized_policy_value(one, regularizer, policies[i])
        np.testing.assert_allclose(together[2][i], single, atol=1e-13)


@pytest.mark.slow
def test_regularized_values_are_largest_at_the_solution():
    mdp, regularizer = helpers.make_mdp(PROCESS, 0.9), bj.ShannonEntropy(0.3)
    solution = bj.solve(mdp, regularizer)
    best = bj.regularized_policy_value(mdp, regularizer, solution.policy)
    np.testing.assert_allclose(best, solution.value, atol=1e-12)
    assert (np.asarray(bj.regularized_policy_value(mdp, regularizer, POLICY)) < best).all()
    bare = bj.regularized_policy_value(mdp, bj.Unregularized(), POLICY)
    np.testing.assert_allclose(bare, bj.policy_value(mdp, POLICY), atol=1e-13)


@pytest.mark.parametrize(
    "adjoint", [bj.Direct(), pytest.param(bj.GMRES(), marks=pytest.mark.slow)], ids=["direct", "gmres"]
)
def test_stationary_distributions_that_are_not_unique_are_nan(adjoint):
    """Two classes: NaN, though each solver finds a solution of the singular system. One, with transient states: not."""
    solve = jax.jit(functools.partial(bj.stationary_distribution, linear_solver=adjoint))
    split = np.zeros((6, 1, 6))
    split[:3, 0, :3] = helpers.normalize(np.arange(1.0, 10).reshape(3, 3), -1)
    split[3:, 0, 3:] = helpers.normalize(np.arange(2.0, 11).reshape(3, 3) ** 2, -1)
    one_action = np.ones((6, 1))
    assert np.isnan(solve(bj.MDP(split, one_action, 0.5), one_action)).all()
    joined = split.copy()
    joined[0, 0] = [0, 0, 0, 0.5, 0.5, 0]
    mu = solve(bj.MDP(joined, one_action, 0.5), one_action)
    np.testing.assert_allclose(mu, stationary_numpy(joined[:, 0]), atol=1e-9)
    np.testing.assert_allclose(mu[:3], 0, atol=1e-9)
    # A cycle is periodic, and as unique as others.
    cycle = np.roll(np.eye(6), 1, 1)[:, None]
    np.testing.assert_allclose(solve(bj.MDP(cycle, one_action, 0.5), one_action), 1 / 6, atol=1e-9)


@pytest.mark.slow
def test_many_states():
    """Without a factorization, against numpy."""
    process = helpers.random_process(3, states=600, actions=1)
    mu = bj.stationary_distribution(helpers.make_mdp(process, layout="successor"), np.ones((600, 1)))
    np.testing.assert_allclose(mu, stationary_numpy(process.dense[:, 0]), atol=1e-9)


def test_float32():
    single = bj.MDP(PROCESS.dense.astype(np.float32), PROCESS.reward.astype(np.float32), np.float32(0.9))
    policy = POLICY.astype(np.float32)
    mu = stationary(single, policy)
    assert mu.dtype == jnp.float32
    np.testing.assert_allclose(mu, stationary_numpy(chain(PROCESS, POLICY)), atol=1e-6)
    assert bj.occupancy(single, policy, normalized=True).dtype == jnp.float32


def test_policies_on_unavailable_actions():
    mdp = bj.MDP(PROCESS.dense, PROCESS.reward, 0.9, available=MASK)
    allowed = helpers.normalize(POLICY * MASK, -1)
    for function in (bj.occupancy, bj.stationary_distribution):
        with pytest.raises(bj.InputError, match="not available"):
            function(mdp, POLICY)
    assert np.isnan(occupancy(mdp, POLICY)).any()
    assert np.isnan(stationary(mdp, POLICY)).any()
    np.testing.assert_allclose(occupancy(mdp, allowed), occupancy(mdp.replace(available=None), allowed), atol=1e-13)
    np.testing.assert_allclose(stationary(mdp, allowed), stationary_numpy(chain(PROCESS, allowed)), atol=1e-13)


@pytest.mark.parametrize(
    "function", [bj.occupancy, bj.stationary_distribution, lambda m, p: bj.regularized_policy_value(m, None, p)]
)
def test_bad_input_is_named(function):
    with pytest.raises(bj.InputError, match=r"policy: expected shape|regularizer: expected"):
        function(helpers.make_mdp(PROCESS), POLICY[1:])
    with pytest.raises(bj.InputError, match=r"mdp: expected MDP|regularizer: expected"):
        function(PROCESS.dense, POLICY)
    with pytest.raises(bj.InputError, match="normalized: expected bool"):
        bj.occupancy(helpers.make_mdp(PROCESS), POLICY, normalized=1)  # type: ignore[arg-type]
