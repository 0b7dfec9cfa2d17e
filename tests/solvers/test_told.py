"""Right, or told: what a search over hard problems and readers found called CONVERGED, or called what it was not."""

from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
from rounding_helpers import chain, exact

import bilevel_jax as bj
from bilevel_jax.core import rounding
from bilevel_jax.linear import linear_solve
from bilevel_jax.mdp.bellman import discounted_operator

DTYPES = [np.float32, np.float64]
NONE = bj.Unregularized()


def apart(states=2, batch=()):
    """States that stay where they are; the first one collects 10^14 a step at discount 0.5, the others 1 at 0.99."""
    p = np.eye(states)[:, None]
    reward, discount = np.ones((states, 1)), np.full((states, 1), 0.99)
    reward[0], discount[0] = 1e14, 0.5
    return bj.MDP(p, np.broadcast_to(reward, (*batch, states, 1)), discount)


def test_a_limit_of_steps_is_told_as_one():
    for steps, code in ((100, bj.Result.MAX_ITERATIONS), (10_000, bj.Result.CONVERGED)):
        solution = bj.solve(apart(), NONE, solver=bj.ValueIteration(max_iterations=steps))
        assert int(solution.result) == code
        assert abs(float(solution.value[1]) - 100) <= float(solution.stats.error_bound)
    np.testing.assert_allclose(solution.value[1], 100, rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [(), (16,)])
def test_what_sweeps_of_a_batch_leave_is_gone_on_with(batch):
    solution = bj.check(bj.solve(apart(66, batch), NONE))
    np.testing.assert_allclose(np.asarray(solution.value)[..., 1:], 100, rtol=1e-10)


@pytest.mark.parametrize("tolerance", [1e7, 1e3, 1e-3])
@pytest.mark.parametrize("centred", [True, False])
def test_a_policy_on_the_way_that_collects_nothing(tolerance, centred):
    p = np.array([[[1.0, 0], [0, 1]], [[0.1, 0.9], [0.1, 0.9]]])
    mdp = bj.MDP(p, np.array([[0.0, 1], [0, 0]]), 0.9)
    solver = bj.ValueIteration(tolerance=tolerance, centred=centred)
    solution = bj.check(bj.solve(mdp, NONE, solver=solver, initial_value=np.array([0.0, -1e5])))
    error = np.abs(np.asarray(solution.value) - exact(mdp).astype(float)).max()
    assert error <= float(solution.stats.error_bound) <= tolerance


def test_rows_that_sum_to_more_than_one():
    p, discount = np.full((2, 1, 2), 0.5 * (1 + 4e-9)), 1 - 1e-8
    mdp = bj.MDP(p, np.ones((2, 1)), discount)
    operator = discounted_operator(mdp, jnp.ones((2, 1)))
    x, stats = linear_solve(bj.Neumann(10), operator, mdp.modulus, jnp.ones(2))
    right = 1 / (1 - discount * (1 + 4e-9))
    assert abs(float(x[0]) - right) <= float(stats.error_bound) < 1.1 * right
    last = bj.solve(mdp, NONE, solver=bj.ValueIteration(1e8, centred=False))
    assert np.abs(np.asarray(last.value) - right).max() <= float(last.stats.error_bound)
    horizon = bj.solve_finite_horizon(mdp, NONE, 10)
    assert float(np.max(horizon.error_bound)) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_high_temperatures_keep_the_digits_of_small_rewards(dtype):
    q = np.array([[1e-3, -2e-3, 5e-4]], dtype)
    for temperature in (1e3, 1e6):
        tsallis, kl = bj.TsallisEntropy(temperature), bj.KLDivergence(temperature, np.array([0.2, 0.3, 0.5], dtype))
        wide = q.astype(np.longdouble)[0]
        policy = (wide - wide.mean()) / temperature + np.longdouble(1) / 3
        right = policy @ wide + temperature / 2 * (1 - policy @ policy)
        np.testing.assert_allclose(
            float(tsallis.conjugate(jnp.asarray(q))[0]), float(right), rtol=4 * np.finfo(dtype).eps
        )
        share = np.array([0.2, 0.3, 0.5], np.longdouble)
        weight = share * np.exp(wide / temperature)
        right = temperature * np.log1p((share * np.expm1(wide / temperature)).sum())
        scale = np.abs(q).max() * np.finfo(dtype).eps
        np.testing.assert_allclose(float(kl.conjugate(jnp.asarray(q))[0]), float(right), atol=8 * scale)
        right = weight @ wide / weight.sum() - right  # Omega = <pi, Q> - Omega*
        np.testing.assert_allclose(float(kl.penalty_at(jnp.asarray(q))[0]), float(right), atol=8 * scale)


def test_working_precision_near_discount_one():
    assert float(rounding.working_precision(jnp.asarray(0.9), np.float64)) == rounding.AT_WORKING_PRECISION
    near = rounding.working_precision(jnp.asarray(1 - 1e-6, np.float32), np.float32)
    assert float(near) == rounding.LEAST_WORKING_PRECISION
    # A state that collects next to nothing beside one that collects much, from a start that is far off.
    mdp = bj.MDP(np.eye(2, dtype=np.float32)[:, None], np.array([[1e5], [1e-10]], np.float32), np.float32(1 - 1e-6))
    start = np.array([7e4, -9e4], np.float32)
    solution = bj.solve(mdp, NONE, solver=bj.PolicyIteration(), initial_value=start)
    if int(solution.result) == bj.Result.CONVERGED:
        assert abs(float(solution.value[1])) < 1


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tolerance", [10.0, 1e3, 1e6])
def test_a_tolerance_above_all_that_there_is(dtype, tolerance):
    """The bound says something nevertheless: the middle of the bracket is added where the value is far below it."""
    mdp = bj.MDP(np.ones((1, 1, 1), dtype), np.full((1, 1), 0.1, dtype), dtype(1 - 2**-14))
    for solver in (bj.Auto(tolerance), bj.ValueIteration(tolerance), bj.NewtonKrylov(tolerance)):
        solution = bj.check(bj.solve(mdp, NONE, solver=solver))
        error = abs(float(solution.value[0]) - float(exact(mdp)[0]))
        assert error <= float(solution.stats.error_bound) <= min(tolerance, 1.001 * 0.1 * 2**14)


@pytest.mark.parametrize("cost", [1e2, 1e6, 1e9])
def test_what_is_collected_once_is_no_part_of_a_gain(cost):
    p = chain((1,), (0,), (0,))  # a ring of two, and a state that is left for ever
    reward = np.array([[0], [1], [-cost]], np.float32)
    solution = bj.solve_average_reward(bj.MDP(p.astype(np.float32), reward, np.float32(0.5)), NONE)
    assert abs(float(solution.gain) - 0.5) <= float(solution.stats.error_bound)
    if int(solution.result) == bj.Result.CONVERGED:
        assert float(solution.stats.error_bound) < 0.01
    else:
        assert cost > 1e2


@pytest.mark.parametrize("cost", [1e3, 1e7])
def test_two_gains_behind_a_state_that_is_left(cost):
    p = np.zeros((3, 1, 3), np.float32)
    p[0, 0, 0] = p[1, 0, 1] = 1
    p[2, 0, :2] = 0.5
    mdp = bj.MDP(p, np.array([[0], [1], [-cost]], np.float32), np.float32(0.5))
    for solver in (None, bj.RelativeValueIteration()):
        assert int(bj.solve_average_reward(mdp, NONE, solver=solver).result) != bj.Result.CONVERGED


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tolerance", [None, 1e-3])
def test_differences_beyond_what_the_temperature_can_divide(dtype, tolerance):
    """(Q - max Q) / temperature is minus infinity: the action has no weight, and nothing is NaN or goes on for ever."""
    tiny = float(np.finfo(dtype).tiny)
    mdp = bj.MDP(np.full((2, 2, 2), 0.5, dtype), np.array([[1e4, -1e5], [2e4, 1e-3]], dtype), dtype(0.5))
    reference = np.array([0.25, 0.75], dtype)
    for regularizer in (bj.ShannonEntropy(10 * tiny), bj.KLDivergence(10 * tiny, reference), NONE):
        assert np.isfinite(regularizer.penalty_at(jnp.asarray(mdp.reward))).all()
        solver = bj.Auto(None if tolerance is None else tolerance * 1e5, max_iterations=500)
        solution = bj.check(bj.solve(mdp, regularizer, solver=solver))
        assert int(solution.stats.iterations) < 50
        error = np.abs(np.asarray(solution.value) - exact(mdp).astype(float)).max()
        assert error <= float(solution.stats.error_bound)


def tsallis_conjugate(q, temperature):
    """Omega* of one state in exact fractions, by the definition: the maximum of <p, q> - Omega(p)."""
    q, temperature = [Fraction(float(entry)) for entry in q], Fraction(float(temperature))
    scaled = [(entry - max(q)) / temperature for entry in q]
    total, threshold = Fraction(0), Fraction(0)
    for rank, entry in enumerate(sorted(scaled, reverse=True), 1):
        total += entry
        if 1 + rank * entry > total:
            threshold = (total - 1) / rank
    p = [max(entry - threshold, 0) for entry in scaled]
    earned = sum(weight * entry for weight, entry in zip(p, q, strict=True))
    return earned + temperature / 2 * (1 - sum(weight**2 for weight in p))


@pytest.mark.few(1)
@pytest.mark.often(5)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("others", [1, 3, 50, 200])
@pytest.mark.parametrize("margin", [1e-1, 1e-3, 1e-6])
def test_many_actions_just_within_the_support(others, margin, dtype):
    """Their probabilities are small differences, and the same in all of them are their errors."""
    rng = np.random.default_rng(others)
    for spread in (0, 0.1):
        reward = np.zeros((1, others + 1), dtype)
        reward[0, 1:] = -(1 - margin * 1.0123 * (1 + spread * rng.random(others)))
        mdp = bj.MDP(np.ones((1, others + 1, 1), dtype), reward, dtype(0.5))
        entropy = bj.TsallisEntropy(dtype(1))
        true = tsallis_conjugate(reward[0], 1)
        made = bj.check(bj.solve(mdp, entropy))
        assert abs(Fraction(float(made.value[0])) - 2 * true) <= Fraction(float(made.stats.error_bound))
        gained = bj.check(bj.solve_average_reward(mdp, entropy))
        assert abs(Fraction(float(gained.gain)) - true) <= Fraction(float(gained.stats.error_bound))
        ahead = bj.check(bj.solve_finite_horizon(mdp, entropy, 1))
        bound = Fraction(float(np.max(ahead.error_bound)))
        assert abs(Fraction(float(ahead.value[0, 0])) - true) <= bound


@pytest.mark.parametrize("temperature", [1e-2, 1.0, 1e2])
def test_a_reference_that_was_normalized_in_float32(temperature):
    rng = np.random.default_rng(1)
    states, actions = 5, 4
    p, reward = rng.dirichlet(np.ones(states), (states, actions)), rng.normal(size=(states, actions)) * 0.3
    narrow = rng.dirichlet(np.ones(actions), states).astype(np.float32)
    reference = (narrow / narrow.sum(-1, keepdims=True)).astype(np.float64)
    assert (reference.sum(-1) != 1).any()
    made = bj.check(bj.solve(bj.MDP(p, reward, 0.9), bj.KLDivergence(temperature, reference)))
    meant = np.asarray(reference, np.longdouble)
    meant /= meant.sum(-1, keepdims=True)
    value = np.zeros(states, np.longdouble)
    for _ in range(600):
        q = (reward + np.longdouble(0.9) * np.einsum("sat,t->sa", p.astype(np.longdouble), value)) / temperature
        top = q.max(-1, keepdims=True)
        value = temperature * (top[:, 0] + np.log((meant * np.exp(q - top)).sum(-1)))
    assert abs(np.asarray(made.value, np.longdouble) - value).max() <= float(made.stats.error_bound)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("regularizer", "entropy", "times"),
    [(bj.ShannonEntropy, np.log(2), 1.4), (bj.TsallisEntropy, 0.25, 3.9)],
    ids=["shannon", "tsallis"],
)
@pytest.mark.parametrize("discount", [0.9, 0.999])
def test_an_entropy_below_the_smallest_normal_number(regularizer, entropy, times, discount, dtype):
    """Rewards 0, two actions: temperature * entropy is taken for 0 in each step, and is not 0."""
    temperature = dtype(times) * np.finfo(dtype).tiny
    mdp = bj.MDP(jnp.ones((1, 2, 1), dtype), jnp.zeros((1, 2), dtype), dtype(discount))
    right = entropy * float(temperature) / (1 - float(dtype(discount)))
    found = bj.solve(mdp, regularizer(jnp.asarray(temperature)))
    assert abs(float(found.value[0]) - right) <= float(found.stats.error_bound)
    right *= 1 - float(dtype(discount)) ** 500
    ended = bj.solve_finite_horizon(mdp, regularizer(jnp.asarray(temperature)), 500)
    assert abs(float(ended.value[0, 0]) - right) <= float(ended.error_bound)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nothing_at_all_is_exact(dtype):
    """Rewards 0 and no entropy: V is 0, whatever the temperature."""
    one = bj.MDP(jnp.ones((1, 1, 1), dtype), jnp.zeros((1, 1), dtype), dtype(0.9))
    for regularizer in (bj.ShannonEntropy(dtype(1)), bj.KLDivergence(dtype(1e-9), np.ones(1, dtype))):
        found = bj.check(bj.solve(one, regularizer))
        assert float(found.value[0]) == float(found.stats.error_bound) == 0


@pytest.mark.parametrize("actions", [2, 64])
@pytest.mark.parametrize("gap", [87.5, 88.0, 90.0])
@pytest.mark.parametrize("kind", ["shannon", "kl"])
def test_weights_that_a_device_takes_for_0_are_in_the_bound(kind, gap, actions):
    """Rewards of 0, and others so far below that exp(gap) is under the smallest normal number: V* is the temperature
    times their sum, not 0. Sparsemax takes such actions with probability 0 exactly.
    """
    temperature, tiny = 1e6, float(np.finfo(np.float32).tiny)
    reward = jnp.zeros((2, actions), jnp.float32).at[:, 1:].set(-gap * temperature)
    mdp = bj.MDP(jnp.full((2, actions, 2), 0.5, jnp.float32), reward, jnp.float32(0.5))
    reference = jnp.full(actions, 1 / actions, jnp.float32)
    regularizer = bj.ShannonEntropy(jnp.float32(temperature))
    if kind == "kl":
        regularizer = bj.KLDivergence(jnp.float32(temperature), reference)
    solution = bj.solve(mdp, regularizer)
    scaled = -np.float64(reward[0, 1]) / -temperature
    others = (actions - 1) * np.exp(scaled)
    exact = 2 * temperature * (np.log1p(others) if kind == "shannon" else np.log(1 / actions) + np.log1p(others))
    off = np.abs(np.asarray(solution.value, np.float64) - exact).max()
    assert off <= float(solution.stats.error_bound)
    if kind == "shannon":
        assert exact > 100 * tiny
        assert float(solution.stats.error_bound) < 1e4 * actions * temperature * tiny
    sparse = bj.solve(mdp, bj.TsallisEntropy(jnp.float32(temperature)))
    assert (int(sparse.result), float(sparse.stats.error_bound)) == (bj.Result.CONVERGED, 0)


@pytest.mark.few(1)
@pytest.mark.often(4)
@pytest.mark.parametrize("kind", ["none", "shannon", "tsallis", "kl"])
@pytest.mark.parametrize("states", [1, 65])
def test_a_value_that_is_out_of_range(kind, states):
    """V* is 1e39, more than float32 has. The numbers on the way may all be finite, and the bound is infinite."""
    ring = np.zeros((states, 2, states), np.float32)
    ring[np.arange(states), :, (np.arange(states) + 1) % states] = 1
    mdp = bj.MDP(ring, np.full((states, 2), 1e36, np.float32), np.float32(0.999))
    regularizer = {
        "none": bj.Unregularized(),
        "shannon": bj.ShannonEntropy(np.float32(1)),
        "tsallis": bj.TsallisEntropy(np.float32(1)),
        "kl": bj.KLDivergence(np.float32(1), np.full(2, 0.5, np.float32)),
    }[kind]
    solvers = [None, bj.ValueIteration(), bj.AndersonIteration(), bj.NewtonKrylov(), bj.ModifiedPolicyIteration()]
    solvers += [bj.ValueIteration(tolerance=1e30), bj.AdaptivePolicyIteration(), bj.PolicyIteration()]
    for solver in solvers:
        solution = bj.solve(mdp, regularizer, solver=solver)
        assert int(solution.result) != bj.Result.CONVERGED, solver
        with pytest.raises(bj.ConvergenceError):
            bj.check(solution)
    assert int(bj.solve_finite_horizon(mdp, regularizer, 2_000).result) != bj.Result.CONVERGED


@pytest.mark.parametrize(("temperature", "share", "discount"), [(1e-25, 2.7e-14, 0.9995), (1e-28, 1e-10, 0.9999)])
def test_the_share_of_an_action_that_is_not_available(temperature, share, discount):
    """Rewards are 0, and the reference gives some probability to an action that is masked: T log(1 - share) is lost."""
    single = np.float32
    mdp = bj.MDP(
        np.ones((1, 2, 1), single), np.zeros((1, 2), single), single(discount), available=np.array([[False, True]])
    )
    regularizer = bj.KLDivergence(single(temperature), np.array([share, 1], single))
    solution = bj.solve(mdp, regularizer)
    right = -temperature * share / (1 - discount)
    assert abs(float(solution.value[0]) - right) <= float(solution.stats.error_bound)
    finite = bj.solve_finite_horizon(mdp, regularizer, 2_000, discount=single(1))
    assert abs(float(finite.value[0, 0]) + 2_000 * temperature * share) <= float(finite.error_bound)
