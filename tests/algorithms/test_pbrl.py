"""PBRL: the penalized function in numpy, the bias of its gradient, descent, and what every algorithm must allow."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import central_difference, densify, flat, normalize, solve_numpy, upper_mdp, upper_problem, upper_start
from sampled_helpers import garnet

import bilevel_jax as bj
from bilevel_jax.algorithms import pbrl
from bilevel_jax.algorithms.base import _step

KEY = jax.random.key(0)
SGD = optax.inject_hyperparams(optax.sgd)(learning_rate=0.0)
PENALTIES = ["value", "bellman"]
STEPS = 60


@functools.partial(jax.jit, static_argnums=2)
def run(algorithm, state, steps):
    """The last state, and (x before, info) of each iteration."""

    def body(state, _):
        after, info = algorithm.step(KEY, state)
        return after, (state.x, info)

    return jax.lax.scan(body, state, length=steps)


def train(algorithm, x, weight=100.0, rate=0.0):
    algorithm = eqx.tree_at(lambda a: a.weight, algorithm, jnp.asarray(weight, float))
    state = algorithm.init(KEY, x)
    state = eqx.tree_at(lambda s: s.optimizer_state.hyperparams["learning_rate"], state, jnp.asarray(rate, float))
    return run(algorithm, state, STEPS)


@functools.cache
def on_garnet(penalty):
    return pbrl(garnet(), SGD, penalty=penalty)


def penalized_numpy(problem, penalty, x, dual):
    """f and p of the policy softmax(dual / temperature), from linear solves in numpy."""
    dense = densify(np.asarray(problem.transition.successor), np.asarray(problem.transition.probability))
    gamma, tau, x = float(problem.discount), float(problem.temperature), np.asarray(x)
    reward, dual = np.asarray(problem.base) + x, np.asarray(dual) / tau
    policy = normalize(np.exp(dual - dual.max(1, keepdims=True)), 1)
    entropy = -np.sum(policy * np.log(policy), 1)

    def value_of(rewards):
        moves = np.einsum("sa,saz->sz", policy, dense)
        return np.linalg.solve(np.eye(len(reward)) - gamma * moves, np.sum(policy * rewards, 1))

    best, q, _ = solve_numpy("shannon", dense, reward, gamma, tau, None)
    own = value_of(reward + tau * entropy[:, None])
    value = {"value": own, "bellman": np.sum(policy * q, 1) + tau * entropy}[penalty]
    costs = np.asarray(problem.cost) + float(problem.price) / 2 * x**2
    return np.mean(value_of(costs)), np.mean(best - value)


@pytest.mark.slow
@pytest.mark.parametrize("penalty", PENALTIES)
def test_gradient_of_the_least_penalized_value(penalty):
    """d/dx min over pi of f + weight p, by finite differences of what numpy says; and the two summands as reported."""
    algorithm, weight = on_garnet(penalty), 20.0
    x = 0.5 * jax.random.normal(KEY, (5, 2))
    direction = jax.random.normal(jax.random.key(1), (5, 2))

    def least(x):
        state, _ = train(algorithm, x, weight)
        objective, distance = penalized_numpy(algorithm.problem, penalty, x, state.memory.dual)
        return objective + weight * distance

    state, (_, info) = train(algorithm, x, weight)
    objective, distance = penalized_numpy(algorithm.problem, penalty, x, state.memory.dual)
    np.testing.assert_allclose(info.objective[-1], objective, rtol=1e-9)
    np.testing.assert_allclose(info.reports["penalty"][-1], distance, rtol=1e-8)
    assert distance > 1e-4
    slope = central_difference(least, x, direction, 5e-3)
    np.testing.assert_allclose(jnp.sum(info.gradient[-1] * direction), slope[0], rtol=1e-7)


def biases(algorithm, x, weights):
    """Distance to the hyper-gradient, relative, with the policies at rest."""
    exact = flat(bj.hypergradient(algorithm.problem, x, with_error=False).gradient)
    made = [train(algorithm, x, weight)[1][1].gradient for weight in weights]
    last = [flat(jax.tree.map(lambda g: g[-1], gradient)) for gradient in made]
    return np.array([np.linalg.norm(g - exact) / np.linalg.norm(exact) for g in last])


@pytest.mark.slow
@pytest.mark.parametrize("penalty", PENALTIES)
def test_bias_is_one_over_the_weight(penalty):
    bias = biases(on_garnet(penalty), 0.5 * jax.random.normal(KEY, (5, 2)), (1e2, 1e3, 1e4))
    np.testing.assert_allclose(bias[:-1] / bias[1:], 10, rtol=0.2)
    assert bias[0] < 0.2


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "contexts", "penalty"), [("kl", True, "value"), ("tsallis", False, "bellman")])
def test_bias_of_other_regularizers(kind, contexts, penalty):
    """x in everything, f in value and q too; contexts."""
    bias = biases(pbrl(upper_problem(kind, contexts), SGD, penalty=penalty), upper_start(), (1e3, 1e4))
    np.testing.assert_allclose(bias[0] / bias[1], 10, rtol=0.05)
    assert bias[1] < 1e-2


@pytest.mark.slow
def test_states_with_fewer_actions():
    """An action that is not available changes nothing: the process without it has the same gradient."""
    x = upper_start()
    with_it = jnp.arange(3) < 2

    def objective(x, solution):
        return jnp.sum(solution.policy[:, :2] ** 2) + 0.1 * jnp.sum(solution.value**2) + 0 * x["discount"]

    def fewer(x):
        return upper_mdp(x).replace(available=jnp.broadcast_to(with_it, x["reward"].shape))

    def without(x):
        mdp = upper_mdp(x)
        return bj.MDP(mdp.transition.probability[:, :2], mdp.reward[:, :2], mdp.discount)

    made = []
    for mdp in (fewer, without):
        algorithm = pbrl(bj.BilevelProblem(mdp, bj.ShannonEntropy(0.5), objective), SGD)
        made.append(flat(train(algorithm, x)[1][1].gradient))
    assert np.all(np.isfinite(made[0]))
    np.testing.assert_allclose(made[0], made[1], rtol=1e-8, atol=1e-12)


def exact_value(problem, x):
    return float(bj.hypergradient(problem, x, with_error=False).value)


@pytest.mark.slow
def test_descends_the_exact_objective():
    algorithm, x = on_garnet("value"), 0.1 * jax.random.normal(KEY, (5, 2))
    state, (_, info) = train(algorithm, x, rate=0.3)
    first, last = (exact_value(algorithm.problem, at) for at in (x, state.x))
    assert last < first - 0.1
    assert info.gradient_norm[-1] < 0.3 * info.gradient_norm[0]
    assert abs(info.objective[-1] - last) < 0.01
    assert 0 < info.reports["penalty"][-1] < 1e-3


@pytest.mark.slow
def test_many_seeds_and_rates_in_one_program():
    algorithm = on_garnet("value")
    starts = jax.vmap(lambda key: 0.1 * jax.random.normal(key, (5, 2)))(jax.random.split(KEY, 2))
    rates = jnp.array([0.0, 0.05, 0.3])
    over_rates = jax.vmap(train, (None, None, None, 0))
    state, _ = jax.vmap(over_rates, (None, 0, None, None))(algorithm, starts, 100.0, rates)
    np.testing.assert_array_equal(state.x[:, 0], starts)
    for i in range(2):
        np.testing.assert_allclose(state.x[i, 2], train(algorithm, starts[i], 100.0, rates[2])[0].x, rtol=1e-8)
        exact = [exact_value(algorithm.problem, x) for x in state.x[i]]
        assert exact[2] < exact[1] < exact[0] - 0.01


@pytest.mark.slow
def test_one_compilation():
    algorithm, x = on_garnet("value"), jnp.zeros((5, 2))
    state, info = algorithm.step(KEY, algorithm.init(KEY, x))
    bj.check(info)
    compiled = _step._cache_size()
    other = pbrl(garnet(seed=1, temperature=0.8, price=0.2), SGD, weight=3.0, policy_step_size=0.5)
    other.step(KEY, state)
    algorithm.step(KEY, algorithm.init(KEY, x + 1))
    assert _step._cache_size() == compiled


@pytest.mark.slow
def test_float32():
    x = jnp.zeros((5, 2))
    wide = on_garnet("value")
    problem = jax.tree.map(lambda a: a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a, garnet())
    narrow = pbrl(problem, SGD)
    made = narrow.step(KEY, narrow.init(KEY, x.astype(jnp.float32)))
    floats = {leaf.dtype for leaf in jax.tree.leaves(made) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    assert floats == {np.dtype("float32")}
    _, info = wide.step(KEY, wide.init(KEY, x))
    # Rounding in both policies counts weight times.
    np.testing.assert_allclose(made[1].gradient, info.gradient, atol=100 * 1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pbrl(garnet(), SGD, penalty="values"), "penalty: expected 'value' or 'bellman', got 'values'"),
        (lambda: pbrl(garnet(), SGD, weight=0.0), "weight must be above 0"),
        (lambda: pbrl(garnet(), SGD, policy_step_size=-1.0), "policy_step_size must be above 0"),
        (lambda: pbrl(garnet(), SGD, policy_updates=0), "policy_updates: .*at least 1"),
        (lambda: pbrl(garnet(), SGD, solver=bj.Direct()), "solver: expected Solver"),
        (lambda: pbrl(lambda x: x, SGD), "problem: expected Problem"),
        (lambda: on_garnet("value").init(KEY, jnp.zeros((5, 2), int)), "floating"),
        (
            lambda: pbrl(bj.BilevelProblem(upper_mdp, bj.Unregularized(), lambda x, s: 0.0), SGD).init(
                KEY, upper_start()
            ),
            "regularizer: .*Unregularized is piecewise constant",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(bj.InputError, match=message):
        make()
