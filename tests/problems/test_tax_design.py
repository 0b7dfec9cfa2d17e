"""Tax design: the published formulas in numpy, smoothness in the rates, and the simulator of the same economy."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import central_difference
from scipy.special import logit
from scipy.stats import norm

import bilevel_jax as bj
from bilevel_jax.environments import rollout

KEY = jax.random.key(0)
INCOME, ADDED = 0.375, np.array([0.2, 0.5, 1.5])
# At this income tax eight hours of work and no spending save 5: onto the border of two cells of the default grid.
X = jnp.asarray(logit(np.array([INCOME, *ADDED]) / 2))
ACTIONS = list(itertools.product([0, 4, 8], [0, 2.5, 5], [0, 2.5, 5], [0, 2.5, 5]))


@functools.cache
def make(**options):
    return bj.problems.make("tax_design", **options)


class Exact(NamedTuple):
    """What the problem is at X, and what is found there."""

    rates: tuple[jax.Array, jax.Array]
    mdp: bj.MDP
    welfare: jax.Array  # [A]
    saving: jax.Array  # [A]
    made: bj.Hypergradient
    reward: jax.Array  # the households' mean discounted one


@jax.jit
def at_x(problem):
    mdp, made = problem.mdp(X), bj.hypergradient(problem, X, with_error=False)
    reward = problem.share @ (bj.policy_value(mdp, made.solution.policy) @ mdp.initial[0])
    return Exact(problem.rates(X), mdp, problem.welfare(X), problem.saving(X), made, reward)


@functools.cache
def exact(**options):
    found = at_x(make(**options))
    bj.check(found.made)
    return found


@pytest.mark.slow
def test_is_the_published_economy():
    problem = make()
    rates, mdp, welfare = exact()[:3]
    np.testing.assert_allclose(rates[0], INCOME)
    np.testing.assert_allclose(rates[1], ADDED)
    np.testing.assert_allclose(problem.rates(problem.start(KEY))[1], 0.3, atol=0.1)
    np.testing.assert_array_equal(np.column_stack([problem.hours, problem.spending]), ACTIONS)
    assert mdp.batch_shape == (2,)
    reward = []
    for preference, assets in itertools.product([(0.6, 0.3, 0.1), (0.1, 0.7, 0.2)], np.linspace(-100, 100, 21)):
        worth = np.log(assets / 20 + 1) if assets > 0 else assets
        for hours, *spent in ACTIONS:
            bought = np.array(spent) / (1 + ADDED)
            reward.append(worth - 0.1 * hours**2 + np.prod(bought ** np.array(preference)))
    np.testing.assert_allclose(mdp.reward.ravel(), reward, rtol=1e-12, atol=1e-12)
    for paid, (hours, *spent) in zip(welfare, ACTIONS, strict=True):
        bought = np.array(spent) / (1 + ADDED)
        np.testing.assert_allclose(paid, 15 * bought.mean() / 5 + 5 * np.log(1 + bought @ ADDED + INCOME * hours))


@pytest.mark.slow
def test_assets_move_by_saving_and_noise():
    mdp, grid = exact().mdp, np.linspace(-100, 100, 21)
    edges = np.array([-np.inf, *(grid[1:] - 5), np.inf])
    saved = np.array([(1 - INCOME) * hours - sum(spent) for hours, *spent in ACTIONS])
    cells = np.diff(norm.cdf(edges, loc=(grid[:, None] + saved)[..., None], scale=5))
    np.testing.assert_allclose(mdp.transition.probability, cells, atol=1e-15)
    np.testing.assert_allclose(mdp.initial, np.tile(np.diff(norm.cdf(edges, scale=np.sqrt(2))), (2, 1)), atol=1e-15)


@pytest.mark.slow
def test_hypergradient_has_no_kink_where_assets_cross_a_border():
    problem, made = make(), exact().made
    assert np.min(np.abs(exact().saving - 5)) < 1e-12
    f = jax.jit(lambda x: problem.objective(x, bj.solve(problem.mdp(x), problem.regularizer(x))))
    for direction in np.eye(4):
        slope = central_difference(f, X, direction)[0]
        np.testing.assert_allclose(made.gradient @ direction, slope, rtol=1e-8)  # 1e-10 was seen


@functools.partial(jax.jit, static_argnames=("rounded", "batch"))
def simulate(key, problem, policy, rounded, batch):
    """Discounted reward of households and discounted welfare, of each trajectory; [2, B]."""
    simulator = problem.simulator(X, rounded=rounded)
    made = rollout(key, simulator, problem.behaviour(policy), batch=batch, horizon=120)
    paid = jnp.stack([made.reward, problem.welfare(X)[made.action]])
    return paid @ problem.discount ** jnp.arange(120, dtype=paid.dtype)


def require_means(returns, found, slack=0.0):
    """Within 4 standard errors, and a slack relative to the exact numbers; prints what it saw."""
    expected = {"reward": float(found.reward), "welfare": -float(found.made.value)}
    for (name, mean), each in zip(expected.items(), np.asarray(returns), strict=True):
        error = each.std() / each.size**0.5
        print(f"{name}: {each.mean():.4f} +- {error:.4f}, exact {mean:.4f}, z {(each.mean() - mean) / error:+.2f}")
        assert abs(each.mean() - mean) < 4 * error + slack * abs(mean)
        assert error < 0.05 * abs(mean)  # else it could not tell


@pytest.mark.slow
def test_simulator_with_rounded_assets_earns_the_exact_value():
    """2,000 households for 120 periods (what is cut weighs 3e-6). A false alarm for one key in 8,000."""
    found = exact()
    require_means(simulate(KEY, make(), found.made.solution.policy, rounded=True, batch=2000), found)


@pytest.mark.slow
def test_continuous_assets_are_the_limit_of_fine_grids():
    """4,000 households; a false alarm for one key in 8,000 if 81 points were exact, for whose error 0.5% are given."""
    found = exact(grid=81)
    policy = found.made.solution.policy
    require_means(simulate(KEY, make(grid=81), policy, rounded=False, batch=4000), found, slack=5e-3)
    coarse, finer = (abs(exact(**options).made.value / found.made.value - 1) for options in ({}, {"grid": 41}))
    assert finer < 0.004
    assert finer < coarse / 5 < 0.006  # the errors that the docstring states


@jax.jit
def descend(weight):
    """20 steps of Adam: objectives [steps] and the rates after them, income tax first."""
    problem = bj.problems.make("tax_design", revenue_weight=weight)
    algorithm = bj.algorithms.implicit(problem, optax.adam(0.1))
    state = algorithm.init(KEY, problem.start(KEY))
    state, info = jax.lax.scan(lambda state, _: algorithm.step(KEY, state), state, length=20)
    return info.objective, problem.max_rate * jax.nn.sigmoid(state.x)


@pytest.mark.slow
def test_twenty_steps_of_adam_raise_welfare():
    objective, rates = jax.vmap(descend)(jnp.asarray([0.0, 5.0, 20.0]))
    assert (objective[:, -1] < objective[:, 0] - 5).all()
    assert rates[0].max() < 0.1  # revenue counts nothing: consumption shall be cheap
    assert rates[1:, 0].min() > 0.5


def test_single_precision_stays_single():
    """Under strict promotion, which the tests have on. Nothing is computed."""
    problem = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), make())

    def everything(problem, x, policy):
        simulator, behaviour = problem.simulator(x), problem.behaviour(policy)
        simulated = rollout(KEY, simulator, behaviour, batch=2, horizon=3)
        return problem.mdp(x), problem.welfare(x), simulated.state[1], simulated.reward

    made = jax.eval_shape(everything, problem, X.astype(jnp.float32), jnp.ones((2, 21, 81), jnp.float32))
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype("float32")}


@pytest.mark.slow
def test_panels():
    problem, solution = make(), exact().made.solution
    work, *goods = problem.panels(X, solution)
    assert [panel.title for panel in (work, *goods)] == [
        "work, 38% income tax",
        "good 1, 20% VAT",
        "good 2, 50% VAT",
        "good 3, 150% VAT",
    ]
    policy = np.asarray(solution.policy)
    np.testing.assert_allclose(work.curves["type 2"], policy[1] @ [hours for hours, *_ in ACTIONS], rtol=1e-12)
    np.testing.assert_allclose(goods[2].curves["type 1"], policy[0] @ [spent for *_, spent in ACTIONS], rtol=1e-12)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("households", (), r"households: expected at least one row .share, preference of each good., .* lengths \[\]"),
        ("households", ((1.0,),), r"households: expected .* got lengths \[1\]"),
        ("households", ((0.5, 0.1), (0.5, 0.1, 0.2)), r"households: expected .* got lengths \[2, 3\]"),
        ("households", ((0.5, 0.1), (0.2, 0.1)), r"households .shares.: probabilities sum to 0.7, not 1"),
        ("households", ((1.0, 0.0),), r"households .preferences. must be above 0, got 0; leave out a good"),
        ("hours_levels", 1, "hours_levels must be a whole number from 2 to 10000, got 1"),
        ("grid", 1, "grid must be a whole number from 2 to 10000, got 1"),
        ("grid", 2000, "grid: 2000 points make a transition of 324000000 entries"),
        ("noise", 0.0, "noise must be above 0, got 0; 5 is usual; without it"),
        ("largest_assets", -1.0, "largest_assets must be above 0, got -1; 100 is usual"),
        ("max_rate", 0.0, "max_rate must be above 0, got 0; 2 is usual"),
        ("wage", -1.0, "wage must be at least 0, got -1; 1 is usual"),
        ("revenue_weight", float("inf"), "revenue_weight is inf"),
        ("discount", 1.0, "discount must be at least 0 and below 1, got 1; 0.9 is usual"),
        ("temperature", 0.0, "temperature must be above 0, got 0"),
    ],
)
def test_options_are_refused(option, value, message):
    with pytest.raises(bj.InputError, match=f"^{message}"):
        bj.problems.make("tax_design", **{option: value})
