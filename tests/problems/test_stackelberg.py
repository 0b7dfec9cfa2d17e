"""Stackelberg games: against brute force over the leader's policies, with the follower solved in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import central_difference, densify
from scipy.special import logsumexp, softmax

import bilevel_jax as bj

KEY = jax.random.key(0)
TINY = {"states": 2, "leader_actions": 2, "actions": 2, "branching": 2, "discount": 0.8, "leader_discount": 0.6}
SEEDS, STARTS, STEPS = 4, 3, 150
POINTS = np.linspace(0, 1, 21)


@functools.cache
def make(**options):
    return bj.problems.make("stackelberg", **options)


def leader_return(problem, mixture):
    """What policies [..., S, L] of the leader earn it, the follower solved by value iteration, all in numpy."""
    probability, successor = np.asarray(problem.probability), np.asarray(problem.successor)
    kernel = np.stack([densify(successor[:, b], probability[:, b]) for b in range(probability.shape[1])])
    transition = np.einsum("...sb,bsaj->...saj", mixture, kernel)
    mine, other = (
        np.einsum("...sb,bsa->...sa", mixture, np.asarray(reward))
        for reward in (problem.leader_reward, problem.follower_reward)
    )
    value, q, cold = np.zeros(other.shape[:-1]), other, float(problem.temperature)
    for _ in range(int(np.log(1e-16) / np.log(float(problem.discount)))):
        q = other + float(problem.discount) * np.einsum("...saj,...j->...sa", transition, value)
        value = cold * np.asarray(logsumexp(q / cold, -1))
    policy = softmax(q / cold, -1)
    flow = np.einsum("...sa,...saj->...sj", policy, transition)
    system = np.eye(value.shape[-1]) - float(problem.leader_discount) * flow
    return np.linalg.solve(system, (policy * mine).sum(-1)[..., None])[..., 0].mean(-1)


@functools.partial(jax.jit, static_argnames="options")
def descend(seeds, keys, options):
    """Adam from several starts in several games: objectives [seeds, starts, STEPS] and the last x."""

    def one(seed, key):
        problem = bj.problems.make("stackelberg", **dict(options), seed=seed)
        algorithm = bj.algorithms.implicit(problem, optax.adam(0.3))
        state = algorithm.init(key, 10 * problem.start(key))
        state, info = jax.lax.scan(lambda state, _: algorithm.step(key, state), state, length=STEPS)
        return info.objective, state.x

    return jax.vmap(lambda seed: jax.vmap(lambda key: one(seed, key))(keys))(seeds)


@pytest.mark.slow
def test_descent_finds_what_brute_force_finds():
    """Over all policies of the leader on a grid of steps of 0.05, in four games; in one of them it has to mix."""
    first, second = np.meshgrid(POINTS, POINTS, indexing="ij")
    mixtures = np.stack([np.stack([p, 1 - p], -1) for p in (first, second)], -2)
    objective, x = descend(jnp.arange(SEEDS), jax.random.split(KEY, STARTS), tuple(TINY.items()))
    assert (objective[..., 20] < objective[..., 0] - 0.1).all()
    gains = []
    for seed in range(SEEDS):
        problem = make(**TINY, seed=seed)
        table = leader_return(problem, mixtures)
        reached = leader_return(problem, jax.nn.softmax(x[seed]))
        np.testing.assert_allclose(reached, -objective[seed, :, -1], atol=1e-2)  # one step later
        assert table.max() - 1e-3 < reached.max() < table.max() + 1e-2  # between the grid's points
        gains.append(table.max() - table[:: len(POINTS) - 1, :: len(POINTS) - 1].max())
    np.testing.assert_allclose(gains, [0, 0, 0.4917, 0], atol=1e-4)  # of mixing, over the four pure policies


@pytest.mark.slow
def test_hypergradient_against_differences_of_brute_force_and_panels():
    problem = make(seed=3, alignment=-0.5)
    x = 10 * problem.start(KEY)
    made = bj.check(bj.hypergradient(problem, x, with_error=False))
    np.testing.assert_allclose(made.value, -leader_return(problem, softmax(np.asarray(x), -1)), rtol=1e-12)
    directions = np.random.default_rng(0).normal(size=(3, *x.shape))
    for direction in directions:
        slope = central_difference(lambda y: -leader_return(problem, softmax(np.asarray(y), -1)), x, direction)[0]
        np.testing.assert_allclose(np.vdot(made.gradient, direction), slope, rtol=1e-10)
    leader, follower = problem.panels(x, made.solution)
    assert leader.values.shape == (6, 3)
    for panel in (leader, follower):
        np.testing.assert_allclose(panel.values.sum(-1), 1, rtol=1e-13)


def test_rewards_are_aligned_as_asked():
    zero_sum, common, apart = (make(alignment=alignment, states=40) for alignment in (-1.0, 1.0, 0.5))
    np.testing.assert_array_equal(zero_sum.leader_reward, -zero_sum.follower_reward)
    np.testing.assert_array_equal(common.leader_reward, common.follower_reward)
    both = np.stack([apart.leader_reward.ravel(), apart.follower_reward.ravel()])
    assert abs(np.corrcoef(both)[0, 1] - 0.5) < 0.16  # 360 pairs: 4 standard errors
    np.testing.assert_allclose(both.std(1), 1, atol=0.15)


@pytest.mark.slow
def test_common_interest_is_one_decision_problem():
    """Of both players' actions together, of which a cold follower and a committed leader find the optimum."""
    options = {"alignment": 1.0, "temperature": 0.01, "states": 4}
    objective, _ = descend(jnp.arange(2), jax.random.split(KEY, 8), tuple(options.items()))
    for seed in range(2):
        problem = make(**options, seed=seed)
        successor, probability = np.asarray(problem.successor), np.asarray(problem.probability)
        kernel = np.stack([densify(successor[:, b], probability[:, b]) for b in range(probability.shape[1])])
        value = np.zeros(4)
        for _ in range(400):
            value = (np.asarray(problem.leader_reward) + 0.9 * kernel @ value).max((0, 2))
        best = -np.asarray(objective[seed]).min()
        assert value.mean() - 0.01 < best < value.mean() + 1e-9


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("states", 0, "states must be a whole number from 1 to 10000, got 0"),
        ("leader_actions", 2.0, "leader_actions must be a whole number from 1 to 10000, got 2.0"),
        ("branching", 7, r"branching must be a whole number from 1 to 6 \(the number of states\), got 7"),
        ("alignment", 1.5, "alignment must be at most 1, got 1.5; -1 is zero-sum, 1 is common interest"),
        ("alignment", -2.0, "alignment must be at least -1, got -2; -1 is zero-sum"),
        ("discount", 1.0, "discount must be at least 0 and below 1, got 1; for a patient follower use"),
        ("leader_discount", 1.0, "leader_discount must be at least 0 and below 1, got 1; for a patient leader use"),
        ("temperature", 0.0, "temperature must be above 0, got 0"),
        ("seed", -1, "seed must be at least 0 and below"),
    ],
)
def test_options_are_refused(option, value, message):
    with pytest.raises(bj.InputError, match=f"^{message}"):
        bj.problems.make("stackelberg", **{option: value})
