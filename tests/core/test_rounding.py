"""CONVERGED is said of right values only: rounding excuses no more than the numbers that an answer is made of allow."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rounding_helpers import chain, exact

import bilevel_jax as bj
from bilevel_jax.core import rounding

DTYPES = [np.float32, np.float64]
NONE = bj.Unregularized()
SOLVERS = {
    "auto": bj.Auto(),
    "PI": bj.PolicyIteration(),
    "VI": bj.ValueIteration(),
    "anderson": bj.AndersonIteration(),
    "newton-krylov": bj.NewtonKrylov(),
    "modified": bj.ModifiedPolicyIteration(),
    "adaptive": bj.AdaptivePolicyIteration(),
}


def check_right(solution, value, relative):
    """CONVERGED, every state right to `relative` of the largest value, and the bound holds."""
    bj.check(solution)
    error = np.abs(np.asarray(solution.value, np.longdouble) - value)
    assert error.max() <= float(solution.stats.error_bound)
    np.testing.assert_array_less(error, relative * np.abs(value).max() + 1e-300)


def maze(side, discount, wall, dtype, density=0.25):
    """Steps cost 1, steps into a wall `wall` and nothing else; the last cell is the goal, which holds."""
    walls = np.random.default_rng(0).random((side, side)) < density
    walls[0, 0] = walls[-1, -1] = False
    reward = np.full((side * side, 4), -1.0)
    successor = np.zeros((1, side * side, 4), np.int32)
    for cell in range(side * side):
        for action, (down, right) in enumerate([(0, 1), (1, 0), (0, -1), (-1, 0)]):
            to = np.clip((cell // side + down, cell % side + right), 0, side - 1)
            if walls[tuple(to)]:
                reward[cell, action], to = -wall, divmod(cell, side)
            successor[0, cell, action] = to[0] * side + to[1]
    successor[0, -1], reward[-1] = side * side - 1, 0
    transition = bj.SuccessorTransition(successor, np.ones(successor.shape, dtype))
    return bj.MDP(transition, reward.astype(dtype), np.asarray(discount, dtype))


# Nothing to collect.


@pytest.mark.often(3)
@pytest.mark.few(2)
@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_to_collect_is_zero(solver, dtype):
    mdp = bj.MDP(np.eye(2, dtype=dtype)[:, None], np.zeros((2, 1), dtype), dtype(0.9))
    solution = bj.check(bj.solve(mdp, NONE, solver=SOLVERS[solver]))
    assert (np.asarray(solution.value) == 0).all()
    assert 0 <= float(solution.stats.error_bound) < 1e-30


@pytest.mark.slow
def test_nothing_to_collect_under_regularizers():
    p = chain((0, 1), (1, 0))
    for regularizer in (bj.KLDivergence(1.0, [0.3, 0.7]), bj.KLDivergence(1e6, [0.5, 0.5]), bj.TsallisEntropy(1e-6)):
        solution = bj.check(bj.solve(bj.MDP(p, np.zeros((2, 2)), 0.9), regularizer))
        assert np.isfinite(solution.value).all()
    one = bj.check(bj.solve(bj.MDP(p[:, :1], np.zeros((2, 1)), 0.9), bj.ShannonEntropy(1.0)))
    assert (np.asarray(one.value) == 0).all()


def test_rewards_below_the_smallest_normal_number():
    p = np.eye(2, dtype=np.float32)[:, None]
    for reward in (1e-39, 1e-38, 3e-38):
        solution = bj.check(bj.solve(bj.MDP(p, np.full((2, 1), reward, np.float32), np.float32(0.9)), NONE))
        assert np.abs(np.asarray(solution.value, float) - 10 * reward).max() <= float(solution.stats.error_bound)


@pytest.mark.slow
def test_one_zero_element_of_a_batch():
    p = chain((0, 1), (1, 0))
    reward = np.stack([np.zeros((2, 2)), np.array([[0.0, 1], [2, 3]])])
    for solver in SOLVERS.values():
        solution = bj.check(bj.solve(bj.MDP(p, reward, np.full(2, 0.9)), NONE, solver=solver))
        assert (np.asarray(solution.value[0]) == 0).all()
        np.testing.assert_allclose(solution.value[1], exact(bj.MDP(p, reward[1], 0.9)).astype(float), rtol=1e-10)


@pytest.mark.slow
def test_gradients_at_nothing_to_collect():
    reference = np.array([0.2, 0.8])
    problem = bj.BilevelProblem(
        lambda x: bj.MDP(chain((0, 1), (1, 0)), jnp.stack([x, 2 * x]), 0.9),
        bj.KLDivergence(0.5, reference),
        lambda x, solution: solution.value[0],
    )
    hg = bj.check(bj.hypergradient(problem, jnp.zeros(2)))
    assert np.abs(np.asarray(hg.gradient)).max() > 0.1
    assert float(hg.error) < 1e-10
    algorithm = bj.algorithms.m_sobirl(
        problem, bj.algorithms.UpperLevel(optax.sgd(0.1)), solver=bj.PolicyIteration(), adjoint=bj.Direct()
    )
    _, info = algorithm.step(jax.random.key(0), algorithm.init(jax.random.key(0), jnp.zeros(2)))
    bj.check(info)


# An end that pins the level, at discounts near 1.

ENDED = chain((0, 1), (0, 2), (2, 2))
COSTS = np.array([[-1.0, -1], [-1, -1], [0, 0]])


@pytest.mark.slow
@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_costs_until_an_absorbing_end(solver):
    mdp = bj.MDP(ENDED.astype(np.float32), COSTS.astype(np.float32), np.float32(0.99999))
    check_right(bj.solve(mdp, NONE, solver=SOLVERS[solver]), exact(mdp), 3e-7)


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["auto", "VI", "modified", "anderson"])
@pytest.mark.parametrize(("side", "discount"), [(6, 0.99999), (12, 0.9999)])
def test_mazes(solver, side, discount):
    # No walls: where a cell has no way out, value iteration takes 1 / (1 - discount) sweeps.
    mdp = maze(side, discount, 1.0, np.float32, density=0)
    check_right(bj.solve(mdp, NONE, solver=SOLVERS[solver]), exact(mdp), 1e-6)


@pytest.mark.slow
def test_ends_by_discounts_of_zero():
    discount = np.full((3, 2), 0.99999, np.float32)
    discount[2] = 0
    mdp = bj.MDP(ENDED.astype(np.float32), COSTS.astype(np.float32) - 1, discount)
    for solver in SOLVERS.values():
        check_right(bj.solve(mdp, NONE, solver=solver), exact(mdp), 3e-7)


@pytest.mark.often(3)
@pytest.mark.slow
@pytest.mark.parametrize("distance", [1e-6, 1e-8, 1e-10, 1e-12])
@pytest.mark.parametrize("solver", ["auto", "VI", "modified"])
def test_the_level_at_discounts_near_one(distance, solver):
    # Total cost to the goal, with entropy: V is from -115 to 0, whatever the discount.
    mdp = maze(8, 1 - distance, 5.0, np.float64, density=0)
    one_at_the_end = (np.arange(64)[:, None] < 63) | (np.arange(4) == 0)
    masked = mdp.replace(reward=3 * mdp.reward, available=one_at_the_end)
    solution = bj.solve(masked, bj.ShannonEntropy(0.5), solver=SOLVERS[solver])
    check_right(solution, exact(masked, 0.5), 1e-11)


@pytest.mark.slow
def test_hypergradient_of_a_corridor_that_ends():
    p = chain(*[(max(i - 1, 0), min(i + 1, 9)) for i in range(9)], (9, 9)).astype(np.float32)
    cost = np.where(np.arange(10)[:, None] < 9, -1, 0) * np.ones((10, 2))
    problem = bj.BilevelProblem(
        lambda x: bj.MDP(p, x * cost.astype(np.float32), np.float32(0.99999)), NONE, lambda x, s: s.value[0]
    )
    hg = bj.check(bj.hypergradient(problem, jnp.float32(1)))
    right = -sum(0.99999**t for t in range(9))
    assert abs(float(hg.gradient) - right) <= max(float(hg.error), 1e-6)
    assert abs(float(hg.gradient) - right) < 1e-4
    assert float(hg.error) < 1


# Numbers that the answer is not made of.


@pytest.mark.often(5)
@pytest.mark.few(1)
@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize(
    ("dtype", "cost"), [(np.float32, 1e6), (np.float32, 1e12), (np.float64, 1e12), (np.float64, 1e18)]
)
def test_rewards_that_nobody_collects(solver, dtype, cost):
    mdp = bj.MDP(chain((1, 0), (0, 1)).astype(dtype), np.array([[0, -cost], [1, -cost]], dtype), dtype(0.9))
    solution = bj.solve(mdp, NONE, solver=SOLVERS[solver])
    check_right(solution, exact(mdp), 100 * np.finfo(dtype).eps)
    assert float(solution.stats.error_bound) < 2000 * np.finfo(dtype).eps
    masked = mdp.replace(available=np.array([[True, False]] * 2))
    check_right(bj.solve(masked, NONE, solver=SOLVERS[solver]), exact(masked), 100 * np.finfo(dtype).eps)
    asked = bj.solve(mdp, NONE, solver=type(SOLVERS[solver])(tolerance=500 * np.finfo(dtype).eps))
    check_right(asked, exact(mdp), 200 * np.finfo(dtype).eps)


@pytest.mark.few(1)
@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_walls_that_cost_a_million(solver):
    mdp = maze(6, 0.99, 1e6, np.float32)
    solution = bj.solve(mdp, NONE, solver=SOLVERS[solver])
    check_right(solution, exact(mdp), 1e-5)
    cell = 0
    for _ in range(20):  # the policy reaches its goal
        cell = int(mdp.transition.successor[0, cell, int(jnp.argmax(solution.policy[cell]))])
    assert cell == 35


@pytest.mark.often(3)
@pytest.mark.few(2)
@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("ratio", [1e3, 1e6, 1e12])
def test_parts_of_different_scale(solver, ratio):
    p = chain((1,), (0,), (3,), (2,)).astype(np.float32)
    mdp = bj.MDP(p, np.array([[0], [ratio], [0], [1]], np.float32), np.float32(0.9))
    solution, value = bj.check(bj.solve(mdp, NONE, solver=SOLVERS[solver])), exact(mdp)
    np.testing.assert_allclose(np.asarray(solution.value, float), value.astype(float), rtol=3e-5)


@pytest.mark.slow
def test_a_part_of_another_scale_that_is_left_behind():
    # From the costly state one leaves at once; its value is -1e6, the others' are about 1.
    p = chain((1, 1), (2, 0), (1, 0)).astype(np.float32)
    mdp = bj.MDP(p, np.array([[-1e6, -1e6], [0, -1e6], [1, -1e6]], np.float32), np.float32(0.9))
    for solver in SOLVERS.values():
        solution, value = bj.check(bj.solve(mdp, NONE, solver=solver)), exact(mdp)
        np.testing.assert_allclose(np.asarray(solution.value, float), value.astype(float), rtol=3e-5)


def test_a_bound_that_says_nothing_is_not_converged():
    # Collects 1 for ever: V = 1 / (1 - discount), and rounding of V over 1 - discount is more than that.
    distance = np.float32(2.0**-22)
    mdp = bj.MDP(np.full((4, 1, 4), 0.25, np.float32), np.ones((4, 1), np.float32), 1 - distance)
    for solver in ("PI", "VI", "auto"):
        solution = bj.solve(mdp, NONE, solver=SOLVERS[solver])
        assert int(solution.result) == bj.Result.PRECISION_LIMIT
        assert abs(float(solution.value[0]) - 1 / float(distance)) <= float(solution.stats.error_bound)
    loose = bj.solve(mdp, NONE, solver=bj.ValueIteration(1e9))  # a tolerance above what can be collected at all
    assert float(loose.stats.error_bound) <= 1.01 / float(distance) or int(loose.result) != bj.Result.CONVERGED


# Average reward and finite horizons.

CLASSES = {
    "two holds": (np.eye(2)[:, None], [[0.0], [1]]),
    "two rings": (chain((1,), (0,), (3,), (2,)), [[0.0], [0], [1], [1]]),
    "gains of .3 and .7": (chain((1,), (0,), (3,), (2,)), [[0.0], [0.6], [1], [0.4]]),
    "with a way in": (chain((0,), (1,), (0,)), [[0.0], [1], [5]]),
}


@pytest.mark.often(3)
@pytest.mark.few(4)
@pytest.mark.parametrize("name", sorted(CLASSES))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "solver", [bj.RelativePolicyIteration(max_iterations=3000), bj.RelativeValueIteration(max_iterations=9000)]
)
def test_several_classes_have_no_gain(name, dtype, solver):
    p, reward = CLASSES[name]
    solution = bj.solve_average_reward(bj.MDP(p.astype(dtype), np.array(reward, dtype), 0.9), NONE, solver=solver)
    assert int(solution.result) != bj.Result.CONVERGED
    gains = (0.3, 0.7) if name.startswith("gains") else (0, 1)
    assert solution.stats.lower <= gains[0] + 1e-6
    assert solution.stats.upper >= gains[1] - 1e-6


def test_drifting_apart_for_as_long_as_one_likes_is_not_a_gain():
    solver = bj.RelativeValueIteration(max_iterations=3_000_000)
    mdp = bj.MDP(np.eye(2, dtype=np.float32)[:, None], np.array([[0.3], [0.7]], np.float32), 0.9)
    assert int(bj.solve_average_reward(mdp, NONE, solver=solver).result) != bj.Result.CONVERGED


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("solver", [bj.RelativePolicyIteration(), bj.RelativeValueIteration()])
def test_gains_beside_rewards_that_nobody_collects(dtype, solver):
    ring = chain(*[((i + 1) % 9, i) for i in range(9)]).astype(dtype)
    reward = np.full((9, 2), -1e6, dtype)
    reward[:, 0] = np.arange(9) == 0
    for regularizer in (NONE, bj.ShannonEntropy(0.1), bj.KLDivergence(1.0, [0.5, 0.5])):
        solution = bj.check(bj.solve_average_reward(bj.MDP(ring, reward, 0.9), regularizer, solver=solver))
        kl = np.log(0.5) if isinstance(regularizer, bj.KLDivergence) else 0
        assert abs(float(solution.gain) - (1 / 9 + kl)) <= float(solution.stats.error_bound)
        assert float(solution.stats.error_bound) < 200 * np.finfo(dtype).eps


def test_a_gain_of_nothing_and_of_one_reward():
    ring = chain((1,), (2,), (0,)).astype(np.float32)
    for reward in (0.0, 1.0, -1e-30, 1e12):
        mdp = bj.MDP(ring, np.full((3, 1), reward, np.float32), 0.9)
        solution = bj.check(bj.solve_average_reward(mdp, NONE))
        np.testing.assert_allclose(solution.gain, np.float32(reward), rtol=1e-6)


def test_finite_horizons_count_what_is_collected():
    reward = np.array([[0, -1e6], [1, -1e6]], np.float32)
    mdp = bj.MDP(chain((1, 0), (0, 1)).astype(np.float32), reward, np.float32(0.9))
    solution = bj.check(bj.solve_finite_horizon(mdp, NONE, 60))
    value = np.zeros(2, np.longdouble)
    for _ in range(60):
        value = np.array([0, 1]) + np.longdouble(np.float32(0.9)) * value[::-1]
    error = np.abs(np.asarray(solution.value[0], np.longdouble) - value).max()
    assert error <= float(solution.error_bound) < 1e-4
    nothing = bj.check(bj.solve_finite_horizon(mdp.replace(reward=0 * reward), NONE, 60))
    assert float(nothing.error_bound) < 1e-30


@pytest.mark.slow
def test_a_finite_horizon_whose_rounding_is_all_there_is():
    mdp = bj.MDP(np.ones((1, 1, 1), np.float32), np.ones((1, 1), np.float32), 0.5)
    long = bj.solve_finite_horizon(mdp, NONE, 8_000_000, discount=1)
    assert int(long.result) == bj.Result.PRECISION_LIMIT
    assert abs(float(long.value[0, 0]) - 8e6) <= float(long.error_bound)
    assert int(bj.solve_finite_horizon(mdp, NONE, 1_000_000, discount=1).result) == bj.Result.CONVERGED


# Two computations of one number.


@pytest.mark.often(3)
@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("kind", ["shannon", "kl", "tsallis", "none"])
def test_a_best_action_has_weight_by_construction(kind, temperature):
    # At 1e6, one unit in the last place is 60,000 temperatures: a Q that is computed twice and rounded differently
    # used to leave no action any weight.
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.ones(5), (5, 3)).astype(np.float32)
    reward = (1e6 * rng.random((5, 3))).astype(np.float32)
    regularizer = {
        "shannon": bj.ShannonEntropy(np.float32(temperature)),
        "kl": bj.KLDivergence(np.float32(temperature), np.full(3, 1 / 3, np.float32)),
        "tsallis": bj.TsallisEntropy(np.float32(temperature)),
        "none": NONE,
    }[kind]
    for solver in ("VI", "PI", "auto"):
        solution = bj.check(bj.solve(bj.MDP(p, reward, np.float32(0.9)), regularizer, solver=SOLVERS[solver]))
        assert np.isfinite(np.asarray(solution.value)).all()
        np.testing.assert_allclose(np.asarray(solution.policy).sum(1), 1, rtol=1e-5)
        value = exact(bj.MDP(p, reward, np.float32(0.9)))
        assert np.abs(np.asarray(solution.value, np.longdouble) - value).max() <= (
            float(solution.stats.error_bound) + 10 * temperature * np.log(3)
        )


@pytest.mark.slow
def test_ties_share_or_go_to_the_first():
    q = jnp.array([[1e6, 1e6, 0.0], [0.0, 1e6, 1e6]], jnp.float32)
    half = [[0.5, 0.5, 0], [0, 0.5, 0.5]]
    for regularizer in (bj.ShannonEntropy(1e-6), bj.TsallisEntropy(1e-6), bj.KLDivergence(1e-6, np.full(3, 1 / 3))):
        np.testing.assert_array_equal(regularizer.policy(q), half)
    np.testing.assert_array_equal(NONE.policy(q), [[1, 0, 0], [0, 1, 0]])


def test_the_log_of_one_and_little_keeps_its_digits():
    # Omega* - max Q is temperature log(1 + exp(-30)): of one sign and small, and not lost beside 1.
    q = jnp.array([[0.0, -30.0]], jnp.float32)
    np.testing.assert_allclose(bj.ShannonEntropy(np.float32(1)).conjugate(q), np.log1p(np.exp(-30.0)), rtol=1e-5)


def test_rounding_of_a_sweep_is_within_its_allowance():
    # Float32 sweeps against the same numbers in double, over sizes and kinds: within the allowance, and not far below.
    rng = np.random.default_rng(2)
    worst = 0
    for states, scale in [(3, 1.0), (40, 1e6), (300, 1e-6)]:
        p = rng.dirichlet(np.ones(states), (states, 3)).astype(np.float32)
        reward, value = (scale * rng.normal(size=shape).astype(np.float32) for shape in ((states, 3), (states,)))
        narrow = np.asarray(jnp.max(reward + np.float32(0.9) * bj.DenseTransition(p).expect(value), 1), float)
        q = reward.astype(float) + float(np.float32(0.9)) * (p.astype(float) @ value.astype(float))
        chosen = q.argmax(1)
        expected = 0.9 * (p.astype(float) @ np.abs(value.astype(float)))[np.arange(states), chosen]
        size = np.float32(2 * np.abs(q.max(1)))
        allowed = rounding.of_sweep(
            rounding.of_groups(states), jnp.asarray(expected, jnp.float32), jnp.asarray(size), jnp.zeros_like(size)
        )
        ratio = np.abs(narrow - q.max(1)) / np.asarray(allowed, float)
        assert ratio.max() <= 1
        worst = max(worst, ratio.max())
    assert worst > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shannon", "kl", "tsallis", "none"])
def test_second_derivatives_in_a_scan_with_checkpoints(kind):
    # Custom rules lose a part of them there: forward over reverse mode is compared with forward over forward.
    rng = np.random.default_rng(3)
    mdp = bj.MDP(rng.dirichlet(np.ones(3), (3, 2)), rng.normal(size=(3, 2)), 0.9)
    regularizer = {
        "shannon": bj.ShannonEntropy(0.4),
        "kl": bj.KLDivergence(0.4, [0.3, 0.7]),
        "tsallis": bj.TsallisEntropy(2.0),
        "none": NONE,
    }[kind]

    def f(x):
        solution = bj.solve_finite_horizon(mdp.replace(reward=mdp.reward * x**2), regularizer, 3)
        return jnp.sum(solution.value**2)

    over_reverse = jax.jvp(jax.grad(f), (jnp.asarray(1.3),), (jnp.asarray(1.0),))[1]
    over_forward = jax.jvp(
        lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),))[1], (jnp.asarray(1.3),), (jnp.asarray(1.0),)
    )[1]
    np.testing.assert_allclose(over_reverse, over_forward, rtol=1e-10)
