"""Temperatures down to 1e-4 with rewards of order 1: against 60 digits on small MDPs, and annealed on the way there."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

import bilevel_jax as bj
from bilevel_jax.algorithms import UpperLevel, implicit

STATES, ACTIONS = 4, 3
KEY = jax.random.key(0)


def numbers(seed):
    """P[S, A, S], r[S, A], weights of the objective, reference policy, as floats that mpmath takes exactly."""
    rng = np.random.default_rng(seed)
    return (
        rng.dirichlet(np.ones(STATES), (STATES, ACTIONS)),
        rng.normal(size=(STATES, ACTIONS)),
        rng.normal(size=(STATES, ACTIONS)),
        rng.dirichlet(np.ones(ACTIONS), STATES),
    )


def in_many_digits(kind, kernel, reward, weights, reference, discount, temperature):
    """(phi, d phi / d reward [S, A]) of phi = sum weights pi + sum V / S, in 60 digits: Newton, then the adjoint."""
    with mpmath.workdps(60):
        m = mpmath.mpf
        tau, gamma = m(temperature), m(discount)
        prior = [[m(p) if kind == "kl" else m(1) for p in row] for row in reference.tolist()]
        p = [[[m(v) for v in row] for row in rows] for rows in kernel.tolist()]
        r = [[m(v) for v in row] for row in reward.tolist()]
        states, actions = range(STATES), range(ACTIONS)

        def look(value):
            q = [[r[s][a] + gamma * mpmath.fdot(p[s][a], value) for a in actions] for s in states]
            top = [max(row) for row in q]
            e = [[prior[s][a] * mpmath.exp((q[s][a] - top[s]) / tau) for a in actions] for s in states]
            total = [mpmath.fsum(row) for row in e]
            backup = [top[s] + tau * mpmath.log(total[s]) for s in states]
            policy = [[e[s][a] / total[s] for a in actions] for s in states]
            system = mpmath.matrix(STATES)
            for s in states:
                for t in states:
                    flow = mpmath.fsum(policy[s][a] * p[s][a][t] for a in actions)
                    system[s, t] = (1 if s == t else 0) - gamma * flow
            return backup, policy, system

        value = [m(0)] * STATES
        for _ in range(100):
            backup, policy, system = look(value)
            gap = mpmath.matrix([backup[s] - value[s] for s in states])
            step = mpmath.lu_solve(system, gap)
            value = [value[s] + step[s] for s in states]
            if max(abs(v) for v in step) < m(10) ** -50:
                break
        else:
            raise AssertionError("Newton's method did not converge")
        _, policy, system = look(value)
        c = [[m(v) for v in row] for row in weights.tolist()]
        phi = mpmath.fsum(c[s][a] * policy[s][a] for s in states for a in actions) + mpmath.fsum(value) / STATES
        # d pi = pi (dQ - E_pi dQ) / tau, dQ = e + gamma P dV.
        mean = [mpmath.fsum(c[s][a] * policy[s][a] for a in actions) for s in states]
        of_q = [[policy[s][a] * (c[s][a] - mean[s]) / tau for a in actions] for s in states]
        of_value = mpmath.matrix(
            [
                m(1) / STATES + gamma * mpmath.fsum(of_q[s][a] * p[s][a][t] for s in states for a in actions)
                for t in states
            ]
        )
        w = mpmath.lu_solve(system.T, of_value)
        gradient = [[float(of_q[s][a] + w[s] * policy[s][a]) for a in actions] for s in states]
        return float(phi), np.array(gradient)


def rewarded(kernel, discount, reward):
    return bj.MDP(kernel, reward, discount)


def weighed(weights, x, solution):
    return jnp.sum(weights * solution.policy) + jnp.mean(solution.value)


@pytest.mark.often(3)
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shannon", "kl"])
@pytest.mark.parametrize("temperature", [1.0, 0.01, 0.001, 0.0001])
def test_against_sixty_digits(kind, temperature):
    discount = 0.9
    for seed in range(4):
        kernel, reward, weights, reference = numbers(seed)
        phi, want = in_many_digits(kind, kernel, reward, weights, reference, discount, temperature)
        regularizer = bj.ShannonEntropy(temperature) if kind == "shannon" else bj.KLDivergence(temperature, reference)
        mdp = Partial(rewarded, jnp.asarray(kernel), jnp.asarray(discount))
        problem = bj.BilevelProblem(mdp, regularizer, Partial(weighed, jnp.asarray(weights)))
        made = bj.check(bj.hypergradient(problem, reward))
        np.testing.assert_allclose(made.value, phi, rtol=1e-12, atol=1e-12)
        # V is rounded to eps |V|, which the temperature divides: so many digits are there to be had.
        size = np.abs(want).max()
        digits = np.finfo(float).eps * np.abs(made.solution.value).max() / temperature / (1 - discount)
        error = np.linalg.norm(made.gradient - want)
        assert error <= 10 * size * digits + 1e-13 * size
        assert error <= made.error


def near_tie(temperature):
    """Two actions whose Q differ by less than the temperature: where the policy moves most, by x / temperature."""
    kernel = np.zeros((2, 2, 2))
    kernel[:, 0, 0] = kernel[:, 1, 1] = 1
    return kernel, np.array([[0.3 * temperature, 0.0], [0.2 * temperature, 0.0]]), temperature


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.01, 0.001, 0.0001])
def test_near_a_tie(temperature):
    kernel, reward, _ = near_tie(temperature)
    discount, weights = 0.5, np.array([[1.0, -1.0], [0.5, 2.0]])
    padded = [np.zeros((STATES, ACTIONS, STATES)), np.full((STATES, ACTIONS), -1.0), np.zeros((STATES, ACTIONS))]
    padded[0][..., 0] = 1
    padded[0][:2, :2] = 0
    padded[0][:2, :2, :2] = kernel
    padded[1][:2, :2] = reward
    padded[2][:2, :2] = weights
    uniform = np.full((STATES, ACTIONS), 1 / ACTIONS)
    phi, want = in_many_digits("shannon", *padded, uniform, discount, temperature)
    problem = bj.BilevelProblem(
        lambda x: bj.MDP(padded[0], x, discount),
        bj.ShannonEntropy(temperature),
        lambda x, s: jnp.sum(padded[2] * s.policy) + jnp.mean(s.value),
    )
    made = bj.check(bj.hypergradient(problem, padded[1], with_error=False))
    assert np.abs(want).max() > 0.1 / temperature
    np.testing.assert_allclose(made.value, phi, rtol=1e-11)
    np.testing.assert_allclose(made.gradient, want, rtol=1e-8, atol=1e-10 / temperature)


@pytest.mark.slow
def test_annealing_reaches_what_a_cold_start_does_not():
    """At a low temperature phi is flat nearly everywhere; from a high one the gradient leads there."""
    # A corridor whose middle pays x: the designer wants the agent, who is paid 1 at the far end, to stop there.
    kernel = np.zeros((3, 2, 3))
    kernel[0, 0, 0] = kernel[0, 1, 1] = kernel[1, 0, 1] = kernel[1, 1, 2] = 1
    kernel[2, :, 2] = 1
    pays = np.array([[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    discount, target = 0.5, 0.002
    problem = bj.BilevelProblem(
        lambda x: bj.MDP(kernel, pays + jnp.zeros((3, 2)).at[1, 0].set(x), discount, np.array([1.0, 0, 0])),
        bj.ShannonEntropy(target),
        lambda x, s: -s.policy[1, 0] + 0.05 * x**2,
    )
    optimizer = optax.adam(0.02)
    schedule = optax.exponential_decay(500.0, 300, 1 / 500, end_value=1.0)

    def final(upper):
        algorithm = implicit(problem, upper)

        def step(state, _):
            state, info = algorithm.step(KEY, state)
            return state, info

        return jax.jit(lambda: jax.lax.scan(step, algorithm.init(KEY, jnp.asarray(0.0)), length=500))()

    (cold, _), (warm, infos) = final(optimizer), final(UpperLevel(optimizer, temperature=schedule))
    assert np.all(np.isfinite(infos.gradient_norm))
    value = lambda x: float(bj.hypergradient(problem, x, with_error=False).value)  # noqa: E731
    assert abs(float(cold.x)) < 1e-3  # no gradient there: the policy at 0 is deterministic
    assert value(warm.x) < value(cold.x) - 0.8
    best = min(value(x) for x in np.linspace(0, 2, 401))
    assert value(warm.x) <= best + 1e-3


GOOD, BAD = 1.7, -2.9


def of_policies_alone(kind, way):
    """x [1, 2] -> the gradient of <(GOOD, BAD), pi> in the rewards x of one state that is left at once."""
    made = {
        "shannon": lambda: bj.ShannonEntropy(1.0),
        "kl": lambda: bj.KLDivergence(1.0, jnp.full(2, 0.5, jnp.float32)),
    }

    def mdp(x):
        return bj.MDP(jnp.ones((1, 2, 1), x.dtype), x, jnp.zeros((), x.dtype))

    def paid(x, solution):
        return jnp.sum(jnp.asarray([GOOD, BAD], x.dtype) * solution.policy.reshape(2))

    solves = {
        "solve": bj.solve,
        "horizon": lambda m, r: bj.solve_finite_horizon(m, r, 1),
        "average": bj.solve_average_reward,
    }
    if way == "hypergradient":
        problem = bj.BilevelProblem(mdp, made[kind](), paid)
        return lambda x: bj.hypergradient(problem, x).gradient
    return jax.grad(lambda x: paid(x, solves[way](mdp(x), made[kind]())))


@pytest.mark.few(2)
@pytest.mark.parametrize("way", ["hypergradient", "solve", "horizon", "average"])
@pytest.mark.parametrize("kind", ["shannon", "kl"])
def test_the_gradient_of_a_nearly_deterministic_policy_has_its_digits(kind, way):
    gradient = jax.jit(of_policies_alone(kind, way))
    for rare in (1e-3, 1e-6, 1e-8, 1e-12, 1e-20):
        gap = np.float32(-np.log(rare))
        weight = np.exp(-np.float64(gap))
        right = weight / (1 + weight) ** 2 * (GOOD - BAD)
        got = np.asarray(gradient(jnp.asarray([[gap, 0]], jnp.float32)), np.float64)
        np.testing.assert_allclose(got, [[right, -right]], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1.0, 1e-12, 1e-25])
def test_errors_of_tiny_gradients(size):
    """float32, where squares of numbers below 1e-22 are 0: `error` covers what rounding does, and is not 0."""
    rng = np.random.default_rng(7)
    reward, weights = rng.normal(size=(2, 12, 4))
    kernel = rng.dirichlet(np.ones(12), (12, 4))

    def at(dtype, temperature):
        P, r, c, tau = (jnp.asarray(np.float32(a), dtype) for a in (kernel, reward, size * weights, temperature))
        problem = bj.BilevelProblem(
            lambda x: bj.MDP(P, x, jnp.asarray(0.5, dtype)), bj.ShannonEntropy(tau), lambda x, s: jnp.sum(c * s.policy)
        )
        return bj.hypergradient(problem, r)

    for temperature in (1.0, 0.05):
        single, double = at(jnp.float32, temperature), at(jnp.float64, temperature)
        right = np.asarray(double.gradient, np.longdouble)
        off = np.sqrt(np.sum((np.asarray(single.gradient, np.longdouble) - right) ** 2))
        length = np.sqrt(np.sum(right**2))
        assert 0 < off <= float(single.error) <= 0.01 * length
