"""Weights near the smallest normal number, in a divergence from a reference: right, or in the bound, or refused.

The problems have one state, to which every action returns. What the agent gets per step is temperature * log sum
reference exp(reward / temperature), which mpmath computes from the numbers as they are.
"""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import bilevel_jax as bj

TINY = {dtype: float(np.finfo(dtype).tiny) for dtype in (np.float32, np.float64)}
DISCOUNT = 0.5


def made(reward, reference, temperature, dtype):
    reward, reference = np.asarray([reward], dtype), np.asarray(reference, dtype)
    mdp = bj.MDP(np.ones((1, reward.size, 1), dtype), reward, dtype(DISCOUNT))
    return mdp, bj.KLDivergence(dtype(temperature), reference)


def exact(mdp, regularizer):
    """What is collected per step, and the policy, in 400 digits."""
    with mpmath.workdps(400):
        temperature = mpmath.mpf(float(regularizer.temperature))
        reference = [mpmath.mpf(float(p)) for p in np.asarray(regularizer.reference)]
        weights = [
            p * mpmath.exp(mpmath.mpf(float(r)) / temperature)
            for p, r in zip(reference, np.asarray(mdp.reward)[0], strict=True)
        ]
        total = mpmath.fsum(weights)
        per_step = temperature * mpmath.log(total / mpmath.fsum(reference))
        return float(per_step), np.array([float(weight / total) for weight in weights])


BEST_IS_RARE = {
    "two, near the end of float32": ([0, -87.4], [2e-38, 1], 1.0, np.float32),
    "the other one is small": ([0, -87.4], [1e-36, 1], 1.0, np.float32),
    "another temperature": ([0, -874.0], [2e-38, 1], 10.0, np.float32),
    "near the end of float64": ([0, -708.5], [3e-308, 1], 1.0, np.float64),
    "products that are subnormal, of factors that are not": (
        [0, *[-45.0] * 50, -100],
        [2e-38, *[5e-20] * 50, 1],
        1.0,
        np.float32,
    ),
    "half of the exponents": ([0, -40.0, -60.0], [1e-20, 1e-3, 0.999], 1.0, np.float32),
    "just not shifted": ([0, -43.0, -60.0], [3e-19, 0.5, 0.5], 1.0, np.float32),
    "never taken: above all others": ([0, -87.4, 50.0], [2e-38, 1, 0], 1.0, np.float32),
}


def within(value, want, bound):
    return abs(float(value) - want) <= float(bound)


@pytest.mark.parametrize("case", BEST_IS_RARE)
def test_an_action_that_the_reference_hardly_ever_takes_may_be_the_best(case):
    mdp, regularizer = made(*BEST_IS_RARE[case])
    per_step, policy = exact(mdp, regularizer)
    value = per_step / (1 - DISCOUNT)
    solution = bj.check(bj.solve(mdp, regularizer))
    assert within(solution.value[0], value, solution.stats.error_bound)
    assert float(solution.stats.error_bound) < 1e-4 * abs(value)
    tolerance = 100 * float(np.finfo(mdp.reward.dtype).eps)
    np.testing.assert_allclose(solution.policy[0], policy, atol=tolerance)
    average = bj.solve_average_reward(mdp, regularizer)
    assert within(average.gain, per_step, average.stats.error_bound)
    finite = bj.solve_finite_horizon(mdp, regularizer, 1)
    assert within(np.asarray(finite.value)[0, 0], per_step, finite.error_bound)


def test_in_a_batch_only_the_one_that_has_it_is_another():
    rows = jnp.asarray([[0, -87.4], [0, 1]], jnp.float32)
    reference = jnp.asarray([2e-38, 1], jnp.float32)

    @jax.jit
    @jax.vmap
    def solve(row):
        mdp = bj.MDP(jnp.ones((1, 2, 1), jnp.float32), row[None], jnp.float32(DISCOUNT))
        return bj.solve(mdp, bj.KLDivergence(jnp.float32(1), reference))

    solutions = solve(rows)
    for place, row in enumerate(np.asarray(rows)):
        per_step, policy = exact(*made(row, reference, 1.0, np.float32))
        assert within(solutions.value[place, 0], 2 * per_step, solutions.stats.error_bound[place])
        np.testing.assert_allclose(solutions.policy[place, 0], policy, atol=2e-5)


def test_derivatives_where_the_best_is_rare():
    """In rewards and in the reference, against central differences of mpmath's numbers."""
    reward, reference = np.array([0, -86.0], np.float32), np.array([2e-38, 1], np.float32)

    def value(reward, reference):
        mdp = bj.MDP(jnp.ones((1, 2, 1), jnp.float32), reward[None], jnp.float32(DISCOUNT))
        return bj.solve(mdp, bj.KLDivergence(jnp.float32(1), reference)).value[0]

    of_reward = jax.grad(value)(jnp.asarray(reward), jnp.asarray(reference))
    policy = exact(*made(reward, reference, 1.0, np.float32))[1]
    np.testing.assert_allclose(of_reward, policy / (1 - DISCOUNT), rtol=1e-4)
    of_reference = np.asarray(jax.grad(value, 1)(jnp.asarray(reward), jnp.asarray(reference)), float)
    want = policy / reference.astype(float) / (1 - DISCOUNT)
    along = np.array([-1.0, 1.0])  # a direction in the simplex
    np.testing.assert_allclose(of_reference @ along, want @ along, rtol=1e-3)


@pytest.mark.few(4)
@pytest.mark.often(5)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("actions", [4, 20, 1000])
@pytest.mark.parametrize("below", [0.9, 3.6, 18.0])
def test_parts_of_a_sum_that_are_lost_one_by_one(below, actions, dtype):
    """Each action's part is below the smallest normal number, and all of them together are not."""
    temperature = 1e30 if dtype is np.float32 else 1e300
    costs = [0] + [-below * TINY[dtype] * temperature] * (actions - 1)
    mdp, regularizer = made(costs, [1 / actions] * actions, temperature, dtype)
    per_step, _ = exact(mdp, regularizer)
    solution = bj.solve(mdp, regularizer)
    assert within(solution.value[0], per_step / (1 - DISCOUNT), solution.stats.error_bound)
    assert float(solution.stats.error_bound) < 100 * actions * TINY[dtype] * temperature
    average = bj.solve_average_reward(mdp, regularizer)
    assert within(average.gain, per_step, average.stats.error_bound)
    finite = bj.solve_finite_horizon(mdp, regularizer, 1)
    assert within(np.asarray(finite.value)[0, 0], per_step, finite.error_bound)


SUBNORMAL = [
    ([100.0, 0], [1e-40, 1], np.float32),
    ([80.0, 0], [1e-40, 1], np.float32),
    ([720.0, 0], [1e-310, 1], np.float64),
]


@pytest.mark.parametrize(("reward", "reference", "dtype"), SUBNORMAL)
def test_a_subnormal_reference_is_refused_where_it_is_known(reward, reference, dtype):
    with pytest.raises(bj.InputError, match=r"reference\[0\] is .* which devices take for 0"):
        made(reward, reference, 1.0, dtype)


@pytest.mark.parametrize(("reward", "reference", "dtype"), SUBNORMAL)
def test_a_subnormal_reference_is_in_the_bound_where_it_is_traced(reward, reference, dtype):
    @jax.jit
    def solve(reward, reference):
        mdp = bj.MDP(jnp.ones((1, 2, 1), dtype), reward[None], dtype(DISCOUNT))
        regularizer = bj.KLDivergence(dtype(1), reference)
        average = bj.solve_average_reward(mdp, regularizer)
        finite = bj.solve_finite_horizon(mdp, regularizer, 1)
        return bj.solve(mdp, regularizer), average, finite

    solution, average, finite = solve(np.asarray(reward, dtype), np.asarray(reference, dtype))
    with mpmath.workdps(400):
        per_step = float(mpmath.log(mpmath.mpf(float(dtype(reference[0]))) * mpmath.exp(reward[0]) + 1))
    assert within(solution.value[0], 2 * per_step, solution.stats.error_bound)
    assert within(average.gain, per_step, average.stats.error_bound)
    assert within(np.asarray(finite.value)[0, 0], per_step, finite.error_bound)


def test_a_reference_of_float64_that_float32_cannot_hold():
    mdp = bj.MDP(np.ones((1, 2, 1), np.float32), np.array([[100, 0]], np.float32), np.float32(DISCOUNT))
    solution = bj.solve(mdp, bj.KLDivergence(1.0, np.array([1e-40, 1])))
    with mpmath.workdps(50):
        right = 2 * float(mpmath.log(mpmath.mpf("1e-40") * mpmath.exp(100) + 1))
    assert within(solution.value[0], right, solution.stats.error_bound)
    assert int(solution.result) != bj.Result.CONVERGED


SCALES = {np.float32: [62, 65, 100, -65, -100], np.float64: [510, 515, 900, -515, -900]}
NEAR_THE_SMALLEST = {np.float32: range(-124, -104), np.float64: range(-1020, -988, 3)}
KINDS = {
    "shannon": bj.ShannonEntropy,
    "kl": lambda x: bj.KLDivergence(x, jnp.asarray([0.3, 0.7], x.dtype)),
    "tsallis": bj.TsallisEntropy,
}
OBJECTIVES = {"value": lambda x, s: s.value[0], "policy": lambda x, s: s.policy[0, 0]}


@pytest.mark.often(5)
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("of", OBJECTIVES)
def test_derivatives_in_a_temperature_whose_square_is_out_of_range(of, kind, dtype):
    """Rewards and temperature are multiplied by powers of two. That of the value stays, of the policy is divided."""
    transition = np.random.default_rng(0).dirichlet(np.ones(3), (3, 2)).astype(dtype)
    reward = np.random.default_rng(1).normal(size=(3, 2)).astype(dtype)

    @jax.jit
    def gradient(scale):
        problem = bj.BilevelProblem(
            lambda x: bj.MDP(transition, jnp.asarray(reward) * scale + 0 * x, dtype(DISCOUNT)),
            KINDS[kind],
            OBJECTIVES[of],
        )
        hyper = bj.hypergradient(problem, scale)
        size = 1 if of == "value" else scale
        return hyper.gradient * size, hyper.error * size, jnp.stack([o.result for o in hyper.outcomes()])

    want, _, _ = gradient(dtype(1))
    assert abs(float(want)) > 0.05
    for power in SCALES[dtype]:
        made, error, codes = gradient(dtype(2.0**power))
        np.testing.assert_allclose(made, want, rtol=1e-5 if dtype is np.float32 else 1e-13)
        assert not np.isnan(error)
        assert not codes.any()
    for power in NEAR_THE_SMALLEST[dtype]:  # here digits of what the temperature multiplies are lost
        made, error, codes = gradient(dtype(2.0**power))
        assert abs(made - want) <= error or codes.any()


@pytest.mark.parametrize("kind", KINDS)
def test_other_criteria_and_second_derivatives_at_such_temperatures(kind):
    q = jnp.asarray([[0.3, -0.2]], jnp.float32)

    def all_of(scale, factor):
        regularizer, mdp = (
            KINDS[kind](scale * factor),
            bj.MDP(jnp.ones((1, 2, 1), jnp.float32), scale * q, jnp.float32(0.5)),
        )
        finite = bj.solve_finite_horizon(mdp, regularizer, 2).value
        return jnp.stack([bj.solve_average_reward(mdp, regularizer).gain, finite[0, 0]]) / scale

    first, second = jax.jacfwd(all_of, 1), jax.jit(jax.jacfwd(jax.jacfwd(all_of, 1), 1))
    one = jnp.float32(1)
    for scale in (jnp.float32(2.0**70), jnp.float32(2.0**-70)):
        np.testing.assert_allclose(first(scale, one), first(one, one), rtol=1e-5)
        np.testing.assert_allclose(second(scale, one), second(one, one), rtol=1e-4)


@pytest.mark.few(4)
@pytest.mark.often(5)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["shannon", "kl"])
@pytest.mark.parametrize("of", ["value", "policy"])
@pytest.mark.parametrize(("actions", "discount"), [(2, 0.5), (64, 0.99), (500, 0.9)])
@pytest.mark.parametrize("past", [-2.0, 0.2, 1.0, 6.0])
def test_the_error_of_a_gradient_knows_of_weights_that_are_lost(past, actions, discount, of, kind, dtype):
    """x moves the other actions' reward and the temperature, both in units of a huge one. `past` says by how many
    temperatures the weight is below the smallest normal number.
    """
    unit = dtype(1e30 if dtype is np.float32 else 1e300)
    gap = dtype(past - np.log(TINY[dtype]))

    def mdp(x):
        reward = jnp.zeros((2, actions), dtype).at[:, 1:].set(x["reward"] * unit)
        return bj.MDP(jnp.full((2, actions, 2), 0.5, dtype), reward, dtype(discount))

    reference = jnp.full(actions, 1 / actions, dtype)

    def regularizer(x):
        temperature = x["temperature"] * unit
        return bj.ShannonEntropy(temperature) if kind == "shannon" else bj.KLDivergence(temperature, reference)

    objective = {"value": lambda x, s: s.value[0], "policy": lambda x, s: s.policy[0, 1] * unit}[of]
    x = {"reward": jnp.asarray(-gap), "temperature": jnp.asarray(1, dtype)}
    hyper = jax.jit(functools.partial(bj.hypergradient, bj.BilevelProblem(mdp, regularizer, objective)))(x)
    with mpmath.workdps(50):
        t, r, g = mpmath.mpf(float(unit)), -mpmath.mpf(float(gap)), mpmath.mpf(float(dtype(discount)))
        weight, others = mpmath.exp(r), actions - 1
        total = 1 + others * weight
        if of == "value":
            of_reward = t * others * weight / total / (1 - g)
            in_kl = mpmath.log(actions) if kind == "kl" else 0
            of_temperature = t * (mpmath.log1p(others * weight) - in_kl - others * weight * r / total) / (1 - g)
        else:
            of_reward = t * weight / total**2
            of_temperature = -r * of_reward
        off = mpmath.sqrt(
            (mpmath.mpf(float(hyper.gradient["reward"])) - of_reward) ** 2
            + (mpmath.mpf(float(hyper.gradient["temperature"])) - of_temperature) ** 2
        )
        assert float(off) <= float(hyper.error)
