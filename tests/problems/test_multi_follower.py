"""One bonus for several followers: its hyper-gradient by hand, what one or equal followers reduce to, congestion."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import densify, solve_numpy

import bilevel_jax as bj

KEY = jax.random.key(0)


@functools.cache
def make(**options):
    return bj.problems.make("multi_follower", **options)


def by_hand(problem, bonus):
    """(objective, its gradient in the bonus [S, A], load) by the implicit function theorem, all in numpy.

    Derivatives of all S A entries at once, along a last axis.
    """
    kernel = densify(np.asarray(problem.transition.successor), np.asarray(problem.transition.probability))
    states, actions = bonus.shape
    eye, dr = np.eye(states), np.eye(bonus.size).reshape(states, actions, -1)
    far = float(problem.designer_discount)
    load, dload = np.zeros_like(bonus), np.zeros_like(dr)
    for base, weight, discount, temperature in zip(
        *(np.asarray(leaf) for leaf in (problem.base, problem.weight, problem.discount, problem.temperature)),
        strict=True,
    ):
        _, _, policy = solve_numpy("shannon", kernel, base + bonus, discount, temperature, None)
        flow = np.einsum("sa,saj->sj", policy, kernel)
        dv = np.linalg.solve(eye - discount * flow, np.einsum("sa,sax->sx", policy, dr))
        dq = dr + discount * np.einsum("saj,jx->sax", kernel, dv)
        dpolicy = policy[..., None] / temperature * (dq - dv[:, None])
        visits = (1 - far) * np.linalg.solve(eye - far * flow.T, np.full(states, 1 / states))
        moved = np.einsum("s,sax,saj->jx", visits, dpolicy, kernel)
        dvisits = far * np.linalg.solve(eye - far * flow.T, moved)
        load += weight * visits[:, None] * policy
        dload += weight * (dvisits[:, None] * policy[..., None] + visits[:, None, None] * dpolicy)
    congestion, price = float(problem.congestion), float(problem.price)
    value = (congestion / 2 * load**2 + price / 2 * load * bonus**2).sum()
    gradient = np.einsum("sa,sax->x", congestion * load + price / 2 * bonus**2, dload).reshape(bonus.shape)
    return value, gradient + price * load * bonus, load


@pytest.mark.slow
def test_hypergradient_by_hand_and_panels():
    problem = make(seed=1)
    np.testing.assert_allclose(problem.discount, [0.9, 0.72, 0.54])
    np.testing.assert_allclose(problem.temperature, [0.5, 0.4, 0.3])
    np.testing.assert_allclose(np.sum(problem.weight), 1)
    x = 5 * problem.start(KEY)
    made = bj.check(bj.hypergradient(problem, x, with_error=False))
    value, gradient, load = by_hand(problem, np.asarray(x))
    np.testing.assert_allclose(made.value, value, rtol=1e-12)
    np.testing.assert_allclose(made.gradient, gradient, rtol=1e-9, atol=1e-12)
    bonus, loads, *policies = problem.panels(x, made.solution)
    np.testing.assert_array_equal(bonus.values, x)
    np.testing.assert_allclose(loads.values, load, rtol=1e-11)
    for policy, want in zip(policies, made.solution.policy, strict=True):
        np.testing.assert_array_equal(policy.values, want)


@pytest.mark.slow
def test_one_follower_is_a_plain_problem():
    """Whose congestion is of its own occupancy; the rest is what its payments are worth, by `policy_value`."""
    problem = make(followers=1, features=4)
    x = 5 * problem.start(KEY)
    (base,), (discount,), (temperature,) = problem.base, problem.discount, problem.temperature

    def objective(x, solution):
        payments = bj.MDP(problem.transition, problem.price / 2 * (problem.features @ x) ** 2, 0.9)
        congestion = problem.congestion / 2 * jnp.sum(bj.occupancy(payments, solution.policy, normalized=True) ** 2)
        return congestion + 0.1 * bj.policy_value(payments, solution.policy) @ payments.initial

    plain = bj.BilevelProblem(
        lambda x: bj.MDP(problem.transition, base + problem.features @ x, discount),
        bj.ShannonEntropy(temperature),
        objective,
    )
    one, other = (bj.check(bj.hypergradient(p, x, with_error=False)) for p in (problem, plain))
    np.testing.assert_allclose(one.value, other.value, rtol=1e-12)
    np.testing.assert_allclose(one.gradient, other.gradient, rtol=1e-10)
    # The same number by the chain rule, by hand.
    gradient = by_hand(problem, np.asarray(problem.bonus(x)))[1]
    np.testing.assert_allclose(one.gradient, np.einsum("sa,saf->f", gradient, problem.features), rtol=1e-9)


@pytest.mark.slow
def test_followers_meet_in_the_objective_alone():
    """Three alike are one; different ones cost less than the mean of what each would cost alone (Jensen)."""
    bonus = np.asarray(5 * make().start(KEY))
    alike, one = (by_hand(make(followers=n, spread=0.0, variety=0.0), bonus) for n in (3, 1))
    for of_alike, of_one in zip(alike, one, strict=True):
        np.testing.assert_allclose(of_alike, of_one, rtol=1e-12)

    problem = make()
    alone = []
    for i in range(3):
        only = problem.base[i : i + 1], jnp.ones(1), problem.discount[i : i + 1], problem.temperature[i : i + 1]
        lone = eqx.tree_at(lambda p: (p.base, p.weight, p.discount, p.temperature), problem, only)
        alone.append(by_hand(lone, bonus)[0])
    assert by_hand(problem, bonus)[0] < 0.95 * np.dot(problem.weight, alone)


@jax.jit
def descend(congestion):
    """20 steps of Adam: objectives [steps] and the load before and after."""
    problem = bj.problems.make("multi_follower", congestion=congestion)
    algorithm = bj.algorithms.implicit(problem, optax.adam(0.1))
    state = algorithm.init(KEY, problem.start(KEY))
    state, info = jax.lax.scan(lambda state, _: algorithm.step(KEY, state), state, length=20)
    return info.objective, problem.load(bj.solve(problem.mdp(state.x), problem.regularizer(state.x)).policy)


@pytest.mark.slow
def test_twenty_steps_of_adam_relieve_congestion():
    objective, load = jax.vmap(descend)(jnp.asarray([0.0, 3.0, 30.0]))
    assert (objective[:, -1] < 0.9 * objective[:, 0]).all()
    uneven = np.sum(np.asarray(load) ** 2, (1, 2))
    assert uneven[2] < uneven[1] < uneven[0]
    assert uneven[2] < 1.1 / load[0].size  # 1 / (S A) were no congestion at all: a tenth more is left


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("followers", 0, "followers must be a whole number from 1 to 10000, got 0"),
        ("actions", 20_000, "actions must be a whole number from 1 to 10000, got 20000"),
        ("branching", 7, r"branching must be a whole number from 1 to 6 \(the number of states\), got 7"),
        ("features", -1, "features must be a whole number from 0 to 10000, got -1"),
        ("spread", 1.0, "spread must be at least 0 and below 1, got 1; 0 makes all alike"),
        ("variety", 1.5, "variety must be at most 1, got 1.5; 0 is one reward for all, 1 independent ones"),
        ("congestion", -1.0, "congestion must be at least 0, got -1; 0 is none"),
        ("price", float("nan"), "price is nan"),
        ("discount", 1.0, "discount must be at least 0 and below 1, got 1; for patient followers use"),
        ("designer_discount", -0.1, "designer_discount must be at least 0 and below 1, got -0.1; for a patient"),
        ("temperature", 0.0, "temperature must be above 0, got 0"),
        ("seed", 2**32, "seed must be at least 0 and below"),
    ],
)
def test_options_are_refused(option, value, message):
    with pytest.raises(bj.InputError, match=f"^{message}"):
        bj.problems.make("multi_follower", **{option: value})
