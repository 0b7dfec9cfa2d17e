"""Distributions on a box have the densities that they say, and the soft actor-critic on it finds pi*."""

import equinox as eqx
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from deep_cases import (
    KEY,
    LINEAR,
    TEMPERATURE,
    Quadratic,
    Table,
    gain_and_deviation,
    improved,
    linear_quadratic,
    means_and_deviations,
    require_nothing_weak,
    require_same_over_seeds,
    traces_of,
)
from scipy import integrate, stats

import bilevel_jax as bj
from bilevel_jax.agents.deep.actors import OneOfTwo
from bilevel_jax.agents.deep.gaussian import Gaussian, TanhGaussian, Uniform
from bilevel_jax.agents.deep.gaussian_actor_critic import GaussianActorCritic
from bilevel_jax.core.schedules import LinearDecay

LOW, HIGH = -1.0, 3.0
CASES = [(0.0, 0.0), (0.7, -1.0), (-1.5, 0.3), (3.0, -2.0), (0.2, 1.0)]  # mean and logarithm of the deviation of u


def squashed(mean, log_std, dtype=None):
    return TanhGaussian(*(jnp.full((1,), part, dtype) for part in (mean, log_std, LOW, HIGH)))


def density(distribution):
    """The density at numbers, of one entry."""
    of = jax.jit(jax.vmap(lambda action: distribution.probability(action[None])))
    return lambda actions: np.asarray(of(jnp.asarray(np.atleast_1d(actions))))


@pytest.mark.parametrize(("mean", "log_std"), CASES)
def test_the_density_integrates_to_one(mean, log_std):
    p = density(squashed(mean, log_std))
    # In t of a = mid + half tanh(t), so that the places near the bounds count, too.
    t = np.linspace(-15, 15, 200_001)
    slope = (HIGH - LOW) / 2 / np.cosh(t) ** 2
    inside = (HIGH + LOW) / 2 + (HIGH - LOW) / 2 * np.tanh(t)
    assert abs(integrate.trapezoid(p(inside) * slope, t) - 1) < 1e-6
    if log_std <= 0:  # there the density itself is bounded, and the plain integral converges
        a = np.linspace(LOW, HIGH, 400_001)[1:-1]
        assert abs(integrate.trapezoid(p(a), a) - 1) < 1e-3


def exact_log_prob(action, mean, log_std):
    """By 60 digits, from the textbook's formula."""
    with mpmath.workdps(60):
        half = mpmath.mpf(HIGH - LOW) / 2
        t = (mpmath.mpf(float(action)) - mpmath.mpf(HIGH + LOW) / 2) / half
        u = mpmath.atanh(t)
        normal = -(((u - mean) / mpmath.exp(log_std)) ** 2) / 2 - log_std - mpmath.log(2 * mpmath.pi) / 2
        return float(normal - mpmath.log(half * (1 - t**2)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 3e-5)])
def test_log_probabilities_have_their_digits(dtype, tolerance):
    for mean, log_std in CASES[:3]:
        distribution = squashed(mean, log_std, dtype)
        mean, log_std = float(distribution.mean[0]), float(distribution.log_std[0])
        for action in np.array([-0.999, -0.5, 0.0, 1.0, 1.0001, 2.9, 2.99], dtype):
            exact = exact_log_prob(action, mean, log_std)
            assert abs(float(distribution.log_prob(jnp.asarray([action]))) - exact) < tolerance * (1 + abs(exact))


def test_log_probabilities_of_draws_need_no_inverse():
    """Far out in the tails, where the inverse of tanh has lost all digits."""
    distribution = squashed(7.0, 0.0, np.float32)
    keys = jax.random.split(KEY, 100)
    actions, logs = jax.vmap(distribution.sample_with_log_prob)(keys)
    u = 7.0 + np.asarray(jax.vmap(lambda key: jax.random.normal(key, (1,), jnp.float32))(keys)[:, 0], float)
    exact = stats.norm.logpdf(u - 7) - np.log(2.0) - 2 * np.log(1 / np.cosh(u))
    np.testing.assert_allclose(logs, exact, rtol=1e-5)
    assert (jax.vmap(distribution.sample)(keys) == actions).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("low_high", [(-1.0, 1.0), (0.1, 0.7), (-3e4, 1e-3)])
def test_bounds_have_finite_densities_and_derivatives(dtype, low_high):
    low, high = (jnp.full((2,), bound, dtype) for bound in low_high)
    for mean in (-40.0, 0.0, 40.0):
        for edge in (low, high):

            def log_prob(parts, edge=edge):
                return TanhGaussian(*parts, low, high).log_prob(edge)

            parts = jnp.full((2,), mean, dtype), jnp.full((2,), -1.0, dtype)
            value, gradient = jax.value_and_grad(log_prob)(parts)
            assert np.isfinite(value)
            assert all(np.isfinite(part).all() for part in gradient)
            drawn = jax.vmap(TanhGaussian(*parts, low, high).sample)(jax.random.split(KEY, 100))
            assert ((drawn >= low[None]) & (drawn <= high[None])).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bounds", [(-1.0, 1.0), (-1.0, 3.0), (0.0, 2e-3), (100.0, 101.0)])
@pytest.mark.parametrize(
    ("acted", "other"),
    [((12.0, 0.0), (13.0, 0.0)), ((-30.0, 0.5), (-29.0, 0.3)), ((7.9, 0.0), (8.2, -0.2)), ((1.0, 1.5), (-1.0, 1.4))],
)
def test_ratios_of_saturated_policies_have_the_mean_one(dtype, bounds, acted, other):
    """The mean of pi(a) / mu(a) over the actions of mu, by quadrature over u: what importance ratios are for."""
    low, high = (jnp.full((1,), bound, dtype) for bound in bounds)

    def policy(mean, log_std):
        return TanhGaussian(jnp.full((1,), mean, dtype), jnp.full((1,), log_std, dtype), low, high)

    nodes = jnp.linspace(-9, 9, 100_001).astype(dtype)
    u = jnp.asarray(acted[0], dtype) + jnp.exp(jnp.asarray(acted[1], dtype)) * nodes
    actions = jax.vmap(policy(*acted)._action)(u[:, None])
    logs = [jax.vmap(policy(*numbers).log_prob)(actions) for numbers in (acted, other)]
    # Between the last numbers before a bound, densities are those of numbers beside them: a mean of one to percents.
    mean = integrate.trapezoid(
        np.exp(np.asarray(logs[1], float) - np.asarray(logs[0], float)) * stats.norm.pdf(nodes), nodes
    )
    assert abs(mean - 1) < 0.02


@pytest.mark.parametrize("distribution", [squashed(0.7, -0.5), Gaussian(jnp.ones(1), jnp.full(1, -0.5))])
def test_draws_have_the_density(distribution):
    """Chi-square of 30 cells; the chance of a false alarm is 1e-6."""
    draws = np.asarray(jax.vmap(distribution.sample)(jax.random.split(KEY, 30_000))[:, 0])
    edges = np.quantile(draws, np.linspace(0, 1, 31))[1:-1]  # of about equal chance, so that the test is a fair one
    fresh = np.asarray(jax.vmap(distribution.sample)(jax.random.split(jax.random.key(1), 30_000))[:, 0])
    least, most = (LOW, HIGH) if isinstance(distribution, TanhGaussian) else (-12.0, 12.0)
    p, chances = density(distribution), []
    for one, next_one in zip([least, *edges], [*edges, most], strict=True):
        # A density of e^-18 at the ends does not mind the trapezoids.
        grid = np.linspace(one, next_one, 2001)
        chances.append(integrate.trapezoid(p(grid), grid))
    counts = np.histogram(fresh, [-np.inf, *edges, np.inf])[0]
    expected = np.asarray(chances) / np.sum(chances) * counts.sum()
    assert abs(np.sum(chances) - 1) < 1e-3
    assert stats.chisquare(counts, expected).pvalue > 1e-6


@pytest.mark.parametrize(("mean", "log_std"), CASES)
def test_entropy(mean, log_std):
    p = density(squashed(mean, log_std))
    t = np.linspace(-15, 15, 200_001)
    inside = (HIGH + LOW) / 2 + (HIGH - LOW) / 2 * np.tanh(t)
    chance = p(inside) * (HIGH - LOW) / 2 / np.cosh(t) ** 2
    exact = -integrate.trapezoid(np.where(chance > 0, chance * np.log(np.maximum(p(inside), 1e-300)), 0), t)
    tolerance = 1e-5 if log_std <= 0 else 1e-2
    assert abs(float(squashed(mean, log_std).entropy()) - exact) < tolerance


def test_other_distributions():
    gaussian, uniform = Gaussian(jnp.array([1.0, 2.0]), jnp.array([0.0, 1.0])), Uniform(jnp.zeros(2), jnp.full(2, 4.0))
    action = jnp.array([0.5, 3.0])
    exact = stats.norm.logpdf(np.asarray(action), [1, 2], np.exp([0.0, 1.0])).sum()
    assert abs(float(gaussian.log_prob(action)) - exact) < 1e-12
    assert abs(float(gaussian.entropy()) - stats.norm.entropy(scale=np.exp([0.0, 1.0])).sum()) < 1e-12
    assert float(uniform.probability(action)) == pytest.approx(1 / 16)
    assert float(uniform.probability(jnp.array([0.5, 5.0]))) == 0
    for takes_one, one in ((True, uniform), (False, gaussian)):
        two = OneOfTwo(uniform, gaussian, jnp.asarray(takes_one))
        assert (two.sample(KEY) == one.sample(KEY)).all()
        assert float(two.log_prob(action)) == float(one.log_prob(action))
        assert float(two.entropy()) == float(one.entropy())


# 16 x 4 steps and 16 gradient steps per update, 64 updates per improve.
LEARNS = {
    "updates": 64,
    "capacity": 20_000,
    "learning_starts": 500,
    "target_update": 0.05,
    "learning_rate": LinearDecay(1e-2, 1e-3, 16_000),
}
BOUND = 8.0  # of actions below 1 on the whole: tanh bends them by (1 / 8)^2 / 3, half of a percent


@pytest.mark.slow
@pytest.mark.parametrize("squash", [True, False])
def test_it_finds_the_optimal_policy_and_follows_x(squash):
    """Values and policies of the right form: what is left is the noise of draws and of Adam's steps of 1e-3 in weights
    that are multiplied by products of states up to 2, and for `squash` the bent mean.
    """
    problem = linear_quadratic(BOUND if squash else np.inf)
    agent = GaussianActorCritic(LINEAR, Quadratic(), squash=squash, **LEARNS)
    state = agent.init(KEY, problem, jnp.asarray(0.5))
    for x in (0.5, 2.0):
        gain, deviation = gain_and_deviation(x)
        states, means, deviations = means_and_deviations(agent, state, problem, jnp.asarray(x))
        before = abs(means - gain * states).max(), abs(deviations / deviation - 1).max()
        state = improved(agent, KEY, state, problem, jnp.asarray(x), 20)
        states, means, deviations = means_and_deviations(agent, state, problem, jnp.asarray(x))
        assert abs(means - gain * states).max() < 0.04 < before[0] / 5
        assert abs(deviations / deviation - 1).max() < 0.07 < before[1] / 4


@pytest.mark.slow
def test_a_temperature_is_tuned_to_an_entropy():
    problem, x = linear_quadratic(BOUND), jnp.asarray(0.5)
    agent = GaussianActorCritic(LINEAR, Quadratic(), target_entropy=-2.0, **LEARNS)
    state = improved(agent, KEY, agent.init(KEY, problem, x), problem, x, 20)
    report = agent.report(state)
    # In actions' own units the entropy is that of actions in [-1, 1] plus log 8; Q is the same at any temperature.
    wanted = -2.0 + np.log(BOUND)
    assert abs(float(report["entropy"]) - wanted) < 0.03
    temperature = TEMPERATURE * np.exp(2 * wanted) / (2 * np.pi * np.e * gain_and_deviation(0.5)[1] ** 2)
    assert float(report["temperature"]) == pytest.approx(temperature, rel=0.1)


SMALL = {"processes": 4, "steps": 4, "updates": 3, "gradient_steps": 2, "batch": 8, "capacity": 64}


def small(**options):
    return GaussianActorCritic(LINEAR, Quadratic(), **SMALL | {"learning_starts": 20} | options)


@pytest.mark.slow
def test_the_first_actions_are_uniform():
    problem, x = linear_quadratic(BOUND), jnp.asarray(0.5)
    agent = small(processes=64, steps=4, updates=2, capacity=1000, learning_starts=1000)
    state = agent.improve(KEY, agent.init(KEY, problem, x), problem, x)
    assert int(state.gradient_steps) == 0
    actions = np.asarray(state.ring.items.action[:512, 0])
    assert stats.kstest(actions, stats.uniform(-BOUND, 2 * BOUND).cdf).pvalue > 1e-6


@pytest.mark.slow
def test_seeds_run_together_as_alone():
    require_same_over_seeds(small(), linear_quadratic(BOUND), jnp.asarray(0.5))


@pytest.mark.slow
def test_it_compiles_once():
    problem, x = linear_quadratic(BOUND), jnp.asarray(0.5)
    agent = small(target_entropy=-1.0)
    counts, state = traces_of(agent, problem, [x, 2 * x, x])
    assert counts[1] == counts[2] <= 2
    require_nothing_weak(state)
    assert set(agent.report(state)) >= {"critic_loss", "actor_loss", "q", "entropy", "temperature"}
    assert agent.environment_steps(problem) == 4 * 4 * 3


@pytest.mark.slow
def test_a_box_of_float32_among_float64():
    problem, x = linear_quadratic(BOUND, "float32"), jnp.asarray(0.5)
    agent = small()
    state = eqx.filter_jit(agent.improve)(KEY, agent.init(KEY, problem, x), problem, x)
    assert state.ring.items.action.dtype == np.float32
    assert state.learned.actor.arrays.layers[1].weight.dtype == np.float64
    assert all(np.isfinite(float(number)) for number in state.numbers.values())


@pytest.mark.slow
def test_float32():
    with jax.enable_x64(False):
        problem, x = linear_quadratic(BOUND), jnp.asarray(0.5)
        agent = small()
        state = eqx.filter_jit(agent.improve)(KEY, agent.init(KEY, problem, x), problem, x)
        reals = [leaf.dtype for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        assert set(reals) == {np.dtype(np.float32)}
        assert all(np.isfinite(float(number)) for number in state.numbers.values())


def test_problems_are_checked():
    x = jnp.asarray(0.5)
    with pytest.raises(bj.InputError, match="needs actions that are a Box"):
        small().init(KEY, Table().problem, Table().x)
    with pytest.raises(bj.InputError, match="finite bounds"):
        small().init(KEY, linear_quadratic(np.inf), x)
    with pytest.raises(bj.InputError, match="knows no bounds"):
        small(squash=False).init(KEY, linear_quadratic(BOUND), x)
    kept = linear_quadratic(BOUND, regularizer=bj.KLDivergence(0.5, jnp.ones(1)))
    with pytest.raises(bj.InputError, match="needs ShannonEntropy, got KLDivergence"):
        small().init(KEY, kept, x)
    with pytest.raises(bj.InputError, match="target_entropy"):
        small(target_entropy=np.nan)
