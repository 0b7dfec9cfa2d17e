"""Inverse RL by maximum causal entropy, against soft value iteration, occupancies and a dual of their own in numpy."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import random_like
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax

import bilevel_jax as bj
from bilevel_jax.problems.inverse_rl import ROWS

KEY = jax.random.key(0)
CELLS = [(i, j) for i, row in enumerate(ROWS) for j, letter in enumerate(row) if letter != "x"]
LETTERS = [ROWS[i][j].replace("s", ".") for i, j in CELLS]
START = [ROWS[i][j] for i, j in CELLS].index("s")
REWARD = np.array([{".": 0.0, "~": -2.0, "g": 3.0}[letter] for letter in LETTERS])
DISCOUNT, SLIP = 0.9, 0.1


def kernel():
    """P[s, a, s'] with a = up, right, down, left, cell by cell."""
    made = np.zeros((len(CELLS), 4, len(CELLS)))
    for s, (i, j) in enumerate(CELLS):
        for chosen in range(4):
            for move, (down, right) in enumerate([(-1, 0), (0, 1), (1, 0), (0, -1)]):
                to = (i + down, j + right)
                made[s, chosen, CELLS.index(to) if to in CELLS else s] += 1 - SLIP if move == chosen else SLIP / 3
    return made


P = kernel()


def soft_optimal(reward):
    """V[S] and the policy [S, A] at a reward [S] or [S, A], temperature 1, by sweeps."""
    value = np.zeros(len(CELLS))
    for _ in range(600):
        q = reward.reshape(len(CELLS), -1) + DISCOUNT * P @ value
        value = logsumexp(q, -1)
    return value, softmax(q, -1)


def visits_of(policy):
    """Discounted occupancy [S, A] from the start, by one linear solve."""
    flow = np.eye(len(CELLS)) - DISCOUNT * np.einsum("sa,saj->sj", policy, P)
    return np.linalg.solve(flow.T, np.arange(len(CELLS)) == START)[:, None] * policy


EXPERT = visits_of(soft_optimal(REWARD)[1])
# Nobody's optimum for a reward that depends on the ground alone.
WANDERER = visits_of(np.random.default_rng(0).dirichlet(np.ones(4), len(CELLS)))


@functools.cache
def make(**options):
    return bj.problems.make("inverse_rl", **options)


def descend(problem, steps):
    """x, and the model's policy there, after some steps of L-BFGS."""
    algorithm = bj.algorithms.implicit(problem, LBFGS)
    state = algorithm.init(KEY, problem.start(KEY))
    for _ in range(steps):
        state, info = algorithm.step(KEY, state)
    assert info.gradient_norm < 1e-7
    solution = bj.check(bj.solve(problem.mdp(state.x), problem.regularizer(state.x)))
    return np.asarray(state.x), np.asarray(solution.policy)


LBFGS = optax.lbfgs()


def test_expert_is_as_the_map_says():
    np.testing.assert_allclose(make().visits, EXPERT, rtol=1e-9, atol=1e-12)
    assert EXPERT.sum(-1)[LETTERS.index("g")] > 10 * EXPERT.sum(-1)[LETTERS.index("~")]


@pytest.mark.slow
@pytest.mark.parametrize("features", ["ground", "state", "pair"])
def test_gradient_matches_visits(features):
    """(features' (d_x - visits)) / temperature + ridge x, whoever made the visits."""
    problem = eqx.tree_at(lambda p: p.visits, make(features=features, ridge=0.3), jnp.asarray(WANDERER))
    x = random_like(1, problem.start(KEY))
    table = {
        "ground": np.repeat((np.array(LETTERS)[:, None] == np.array(list(".~g")))[:, None], 4, 1).astype(float),
        "state": np.repeat(np.eye(len(CELLS))[:, None], 4, 1),
        "pair": np.eye(4 * len(CELLS)).reshape(len(CELLS), 4, -1),
    }[features]
    value, policy = soft_optimal(table @ x)
    got = bj.check(bj.hypergradient(problem, x, with_error=False))
    want = np.einsum("sa,saf->f", visits_of(policy) - WANDERER, table) + 0.3 * x
    np.testing.assert_allclose(got.gradient, want, rtol=1e-9, atol=1e-10)
    # -sum visits log pi telescopes to V at the start minus the visits' reward.
    np.testing.assert_allclose(got.value, value[START] - np.sum(WANDERER * (table @ x)) + 0.15 * x @ x, rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(("features", "steps"), [("ground", 30), ("state", 150)])
def test_descent_recovers_the_expert(features, steps):
    x, policy = descend(make(features=features), steps)
    assert np.abs(visits_of(policy) - EXPERT).max() < 1e-6
    reward = make(features=features).mdp(jnp.asarray(x)).reward[:, 0]
    # Its reward too, but for a constant: elsewhere in this map no other one has the same policy.
    np.testing.assert_allclose(reward - reward.max(), REWARD - REWARD.max(), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("visits", [EXPERT, WANDERER], ids=["expert", "wanderer"])
def test_agrees_with_the_dual_of_maximum_causal_entropy(visits):
    """min V_w(start) - w' (features of the visits), by scipy's BFGS, all in numpy."""
    table = (np.array(LETTERS)[:, None] == np.array(list(".~g"))).astype(float)
    features = visits.sum(-1) @ table

    def dual(w):
        value, policy = soft_optimal(table @ w)
        return value[START] - w @ features, visits_of(policy).sum(-1) @ table - features

    weights = minimize(dual, np.zeros(3), jac=True, method="BFGS", options={"gtol": 1e-10}).x
    want = soft_optimal(table @ weights)[1]
    problem = eqx.tree_at(lambda p: p.visits, make(), jnp.asarray(visits))
    policy = descend(problem, 30)[1]
    np.testing.assert_allclose(policy, want, atol=1e-6)
    np.testing.assert_allclose(visits_of(policy), visits_of(want), atol=1e-6)
    np.testing.assert_allclose(visits_of(policy).sum(-1) @ table, features, atol=1e-6)
    unlike = np.abs(visits_of(policy) - visits).max()
    assert unlike < 1e-6 if visits is EXPERT else unlike > 0.1


@pytest.mark.slow
def test_drawn_demonstrations():
    few, many = (make(demonstrations=n, length=80, seed=seed).visits for n, seed in ((20, 0), (5000, 0)))
    total = (1 - DISCOUNT**80) / (1 - DISCOUNT)
    np.testing.assert_allclose([few.sum(), many.sum()], total, rtol=1e-12)
    assert few[START].sum() >= 1 - 1e-12  # where all of them start
    errors = [np.abs(np.asarray(visits) - EXPERT).max() for visits in (few, many)]
    assert errors[1] < 0.03 < errors[0]
    assert not np.array_equal(few, make(demonstrations=20, length=80, seed=1).visits)
    x = make().start(KEY)
    expert, model, _ = make(demonstrations=1).panels(x, bj.solve(make().mdp(x), make().regularizer(x)))
    assert np.isnan(expert.arrows).sum() > np.isnan(model.arrows).sum()  # no arrow where it never was


WRONG = {
    "ground without a kind": ({"rows": ("s.?",)}, r"grounds: '.~g' lacks '\?' of the map"),
    "a kind twice": ({"grounds": "..g"}, "grounds: expected different letters"),
    "too few rewards": ({"expert": (1.0,)}, r"expert: expected shape \[3\], got \[1\]"),
    "two starts": ({"rows": ("ss",)}, "rows: expected one start 's', got 2"),
    "features": ({"features": "cells"}, "features: expected 'ground', 'state' or 'pair', got 'cells'"),
    "demonstrations": ({"demonstrations": -1}, "demonstrations must be a whole number from 0"),
    "ridge": ({"ridge": -1.0}, "ridge must be at least 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_options(case):
    options, message = WRONG[case]
    with pytest.raises(bj.InputError, match=message):
        bj.problems.make("inverse_rl", **options)


@pytest.mark.slow
def test_without_a_start_it_is_anywhere():
    problem = bj.problems.make("inverse_rl", rows=("..g", ".~."))
    np.testing.assert_allclose(problem.initial, 1 / 6)
