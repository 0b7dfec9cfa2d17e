"""AMD: the tables of the public implementation, its limits, descent, and what every algorithm must allow."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import conjugate_numpy, densify, flat, upper_problem, upper_start
from sampled_helpers import garnet

import bilevel_jax as bj
from bilevel_jax.algorithms import amd
from bilevel_jax.algorithms.base import _step

KEY = jax.random.key(0)
STEPS = 80
SGD = optax.inject_hyperparams(optax.sgd)(learning_rate=0.3)


@functools.partial(jax.jit, static_argnums=2)
def run(algorithm, state, steps):
    """The last state, and (state before, info) of each iteration."""

    def body(state, _):
        after, info = algorithm.step(KEY, state)
        return after, (state, info)

    return jax.lax.scan(body, state, length=steps)


def published(problem, xs, sweeps):
    """The tables Q, dQ, upper Q and Q~ of `train_amd.py`, in numpy: V, dV and the gradient at each of xs."""
    dense = densify(np.asarray(problem.transition.successor), np.asarray(problem.transition.probability))
    cost = np.asarray(problem.cost)
    gamma, tau, price = float(problem.discount), float(problem.temperature), float(problem.price)
    states, actions = cost.shape
    unit = np.eye(states * actions).reshape(states, actions, -1)
    q, dq = np.full(cost.shape, -tau * np.log(actions)), np.zeros_like(unit)  # V = 0, dV = 0
    upper, tilde, made = np.zeros_like(cost), np.zeros_like(dq), []
    for x in map(np.asarray, xs):
        reward = np.asarray(problem.mdp(x).reward)
        paid, direct = cost + price / 2 * x**2, unit * (price * x)[..., None]
        for _ in range(sweeps):
            value, policy = conjugate_numpy("shannon", q, tau, None)
            slope = np.sum(policy[..., None] * dq, 1)
            above, below = np.sum(policy * upper, 1), np.sum(policy[..., None] * tilde, 1)
            ahead = (upper - above[:, None])[..., None] * (dq - slope[:, None]) / tau
            tilde = direct + ahead + gamma * np.einsum("saz,zn->san", dense, below)
            upper = paid + gamma * dense @ above
            q, dq = reward + gamma * dense @ value, unit + gamma * np.einsum("saz,zn->san", dense, slope)
        value, policy = conjugate_numpy("shannon", q, tau, None)
        slope = np.sum(policy[..., None] * dq, 1)
        start = np.asarray(problem.mdp(x).initial)
        made.append((value, slope.T, start @ np.sum(policy[..., None] * tilde, 1)))
    return made


@functools.cache
def short():
    return amd(garnet(), SGD, sweeps=3)


@pytest.mark.slow
def test_as_published():
    """V and dV at every iteration, x moving; and, long swept, the gradient, which the published code gets from Q~."""
    problem, algorithm = garnet(), short()
    state, (before, info) = run(algorithm, algorithm.init(KEY, jnp.zeros((5, 2))), STEPS)
    tables = published(problem, before.x[:5], 3)
    for (value, slope, _), got, along in zip(tables, before.memory.value[1:6], before.memory.slopes[1:6], strict=True):
        np.testing.assert_allclose(got, value, rtol=1e-11)
        np.testing.assert_allclose(along, slope, rtol=1e-11, atol=1e-13)
    assert float(jnp.linalg.norm(before.x[4] - before.x[0])) > 0.1
    assert int(info.reports["lower level"].stats.iterations[0]) == 3
    # At the last x, everything that is carried has come to rest.
    ((_, _, gradient),) = published(problem, [state.x], 60)
    still, _ = run(algorithm, with_rate(state, 0.0), STEPS)
    _, made = algorithm.step(KEY, still)
    np.testing.assert_allclose(flat(made.gradient), gradient, rtol=1e-8, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "contexts"),
    [("shannon", False), ("tsallis", False), ("kl", True)],
)
def test_at_rest_it_is_iterative_differentiation(kind, contexts):
    """x stands still: after m iterations the derivative of m K sweeps, and in the end the hyper-gradient."""
    problem, x = upper_problem(kind, contexts), upper_start()
    algorithm = amd(problem, optax.sgd(0.0), sweeps=4)
    _, (_, info) = run(algorithm, algorithm.init(KEY, x), 40)
    gradients = [flat(jax.tree.map(lambda g, k=k: g[k], info.gradient)) for k in range(40)]
    unrolled = bj.hypergradient(problem, x, method=bj.Unrolled(12), with_error=False)
    np.testing.assert_allclose(gradients[2], flat(unrolled.gradient), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(info.objective[2], unrolled.value, rtol=1e-11)
    exact = flat(bj.hypergradient(problem, x, with_error=False).gradient)
    assert np.linalg.norm(gradients[0] - exact) > 0.05 * np.linalg.norm(exact)
    np.testing.assert_allclose(gradients[-1], exact, rtol=1e-8, atol=1e-9)


def with_rate(state, rate):
    return eqx.tree_at(lambda s: s.optimizer_state.hyperparams["learning_rate"], state, jnp.asarray(rate, float))


def train(algorithm, x, rate):
    return run(algorithm, with_rate(algorithm.init(KEY, x), rate), STEPS)


@pytest.mark.slow
def test_many_seeds_and_rates_in_one_program_all_descend():
    algorithm = short()
    starts = jax.vmap(lambda key: 0.1 * jax.random.normal(key, (5, 2)))(jax.random.split(KEY, 2))
    rates = jnp.array([0.0, 0.1, 0.3])
    over_rates = jax.vmap(train, (None, None, 0))
    state, (before, info) = jax.vmap(over_rates, (None, 0, None))(algorithm, starts, rates)
    np.testing.assert_array_equal(state.x[:, 0], starts)
    problem = algorithm.problem
    value = jax.jit(lambda x: problem.objective(x, bj.solve(problem.mdp(x), problem.regularizer(x))))
    for i in range(2):
        alone, _ = train(algorithm, starts[i], rates[2])
        np.testing.assert_allclose(state.x[i, 2], alone.x, rtol=1e-9)
        exact = np.array([value(x) for x in state.x[i]])
        assert exact[2] < exact[1] < exact[0] - 0.01
        np.testing.assert_allclose(info.objective[i, 2, -1], value(before.x[i, 2, -1]), rtol=1e-5)
    assert float(jnp.max(info.gradient_norm[:, 2, -1])) < 0.1 * float(jnp.min(info.gradient_norm[:, 2, 0]))


@pytest.mark.slow
def test_one_compilation_and_float32():
    algorithm, x = short(), jnp.zeros((5, 2))
    state, info = algorithm.step(KEY, algorithm.init(KEY, x))
    compiled = _step._cache_size()
    other = amd(garnet(seed=1, temperature=0.8, price=0.2), SGD, sweeps=3)
    other.step(KEY, state)
    algorithm.step(KEY, algorithm.init(KEY, x + 1))
    assert _step._cache_size() == compiled
    with pytest.raises(bj.ConvergenceError, match="lower level: the maximum number of iterations"):
        bj.check(info)
    narrow = jax.tree.map(lambda a: a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a, algorithm)
    made = narrow.step(KEY, narrow.init(KEY, x.astype(jnp.float32)))
    floats = {leaf.dtype for leaf in jax.tree.leaves(made) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    assert floats == {np.dtype("float32")}
    np.testing.assert_allclose(made[1].gradient, info.gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: amd(garnet(), SGD, sweeps=0), "sweeps: .*at least 1"),
        (lambda: amd(garnet(), SGD, sweeps=2.5), "sweeps: .*at least 1"),
        (lambda: amd(lambda x: x, SGD), "problem: expected Problem"),
        (lambda: amd(garnet(), 0.1), "optimizer: expected GradientTransformation"),
        (lambda: short().init(KEY, jnp.zeros((5, 2), int)), "floating"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(bj.InputError, match=message):
        make()
