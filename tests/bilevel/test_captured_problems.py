"""Edits of what functions read, in every public object that holds a function: V = 2 RATE x in all of them."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from bilevel_jax.agents import SoftQLearning
from bilevel_jax.algorithms import UpperLevel, implicit, m_sobirl, naive
from bilevel_jax.core.captures import jit
from bilevel_jax.environments import TabularEnvironment

RATE = 1.0
KEY = jax.random.key(0)
STAY = np.eye(2)[:, None]
ENTROPY = bj.ShannonEntropy(0.5)


@pytest.fixture(autouse=True)
def _put_back():
    yield
    edit(1.0)


def edit(value):
    global RATE
    RATE = value


def rewards(x):
    return jnp.full((2, 1), RATE) * x


def build(x):
    return bj.MDP(STAY, rewards(x), 0.5)


def first(x, solution):
    return solution.value[0]


class Own(bj.Problem):
    """A problem of the user's, with numbers, and methods that read a global."""

    entropy: bj.Regularizer

    def mdp(self, x):
        return bj.MDP(STAY, rewards(x), 0.5)

    def regularizer(self, x):
        return self.entropy

    def objective(self, x, solution):
        return solution.value[0]


class OwnEntropy(bj.ShannonEntropy):
    """Pays RATE in each state beside."""

    def conjugate(self, q):
        return super().conjugate(q) + RATE - 1

    @property
    def bonus(self):
        return RATE


class Scaled(bj.Problem):
    """Its number is a leaf."""

    scale: jax.Array

    def mdp(self, x):
        return bj.MDP(STAY, self.scale * rewards(x), 0.5)

    def regularizer(self, x):
        return ENTROPY

    def objective(self, x, solution):
        return solution.value[0]


PROBLEMS = {
    "three functions": bj.BilevelProblem(build, ENTROPY, first),
    "a class": Own(ENTROPY),
    "a bound method": bj.BilevelProblem(Own(ENTROPY).mdp, ENTROPY, first),
    "the objective": bj.BilevelProblem(
        lambda x: bj.MDP(STAY, jnp.ones((2, 1)) * x, 0.5), ENTROPY, lambda x, s: RATE * s.value[0]
    ),
    "the kernel": bj.BilevelProblem(
        lambda x: bj.MDP(
            bj.MatrixFreeTransition(lambda p, v: jnp.broadcast_to(v[:, None], (2, 1)), (), 2, 1), rewards(x), 0.5
        ),
        ENTROPY,
        first,
    ),
}
X = jnp.asarray(1.5)
compute = importlib.import_module("bilevel_jax.hypergradient.compute")


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBLEMS)
def test_hypergradient(name):
    made = bj.check(bj.hypergradient(PROBLEMS[name], X, with_error=False))
    np.testing.assert_allclose([made.value, made.gradient], [3, 2], rtol=1e-12)
    size = compute._hypergradient._cache_size()
    bj.hypergradient(PROBLEMS[name], 2 * X, with_error=False)
    assert compute._hypergradient._cache_size() == size
    edit(8.0)
    for _ in range(2):
        made = bj.check(bj.hypergradient(PROBLEMS[name], X, with_error=False))
        np.testing.assert_allclose([made.value, made.gradient], [24, 16], rtol=1e-12)
    assert compute._hypergradient._cache_size() == size + 1
    edit(1.0)  # as before: what was compiled then serves again
    np.testing.assert_allclose(bj.hypergradient(PROBLEMS[name], X, with_error=False).value, 3, rtol=1e-12)
    assert compute._hypergradient._cache_size() == size + 1


@pytest.mark.slow
def test_a_kernel_and_a_regularizer_in_solve():
    transition = bj.MatrixFreeTransition(lambda p, v: jnp.stack([v, v[::-1]], -1) @ jnp.eye(2)[SIDE][:, None], (), 2, 1)
    mdp = bj.MDP(transition, [[1.0], [0.0]], 0.5)
    np.testing.assert_allclose(bj.check(bj.solve(mdp, ENTROPY)).value, [2, 0], atol=1e-12)
    globals()["SIDE"] = 1
    np.testing.assert_allclose(bj.check(bj.solve(mdp, ENTROPY)).value, [4 / 3, 2 / 3], rtol=1e-12)
    np.testing.assert_allclose(bj.policy_value(mdp, np.ones((2, 1))), [4 / 3, 2 / 3], rtol=1e-12)
    globals()["SIDE"] = 0
    own = bj.MDP(STAY, np.ones((2, 1)), 0.5)
    np.testing.assert_allclose(bj.check(bj.solve(own, OwnEntropy(0.5))).value, [2, 2], rtol=1e-12)
    edit(3.0)
    np.testing.assert_allclose(bj.check(bj.solve(own, OwnEntropy(0.5))).value, [6, 6], rtol=1e-12)


SIDE = 0


@pytest.mark.slow
@pytest.mark.parametrize("make", [implicit, m_sobirl])
def test_a_step_of_an_algorithm_built_before(make):
    def project(x):
        return jnp.maximum(x, 10.0 * RATE - 30)

    def rule(updates, state, params=None):
        return jax.tree.map(lambda g: -RATE * g, updates), state

    optimizer = optax.GradientTransformation(lambda x: optax.EmptyState(), rule)
    algorithm = make(
        PROBLEMS["three functions"], UpperLevel(optimizer, projection=project, temperature=lambda k: RATE + 0 * k)
    )
    step = importlib.import_module("bilevel_jax.algorithms.base")._step
    state = algorithm.init(KEY, jnp.asarray(5.0))
    size = step._cache_size()
    state, info = algorithm.step(KEY, state)
    state, info = algorithm.step(KEY, state)
    assert step._cache_size() == size + 1
    edit(2.0)
    fresh = make(bj.BilevelProblem(lambda x: build(x), ENTROPY, first), algorithm.upper)
    for _ in range(2):
        (state, info), (other, wanted) = algorithm.step(KEY, state), fresh.step(KEY, state)
        np.testing.assert_array_equal(info.gradient, wanted.gradient)
        np.testing.assert_array_equal(state.x, other.x)
        assert float(info.gradient) > 2.5 or make is m_sobirl  # 2 RATE; M-SoBiRL's adjoint is on its way there
    assert step._cache_size() == size + 3  # two algorithms
    edit(5.0)
    state, _ = algorithm.step(KEY, state)
    assert float(state.x) == 20  # projected


@pytest.mark.slow
def test_a_sampled_problem():
    environment = TabularEnvironment(bj.MDP(STAY, np.zeros((2, 1)), 0.5))
    problem = bj.SampledBilevelProblem(
        environment,
        lambda x: jnp.ones((2, 1)) * x,
        ENTROPY,
        lambda key, x, trajectories: RATE * x * jnp.ones(4),
        discount=0.5,
        horizon=4,
    )
    algorithm = naive(problem, optax.sgd(0.0), agent=SoftQLearning(), batch=2)
    state = algorithm.init(KEY, X)
    for rate in (1.0, 1.0, 7.0, 7.0):
        edit(rate)
        state, info = algorithm.step(KEY, state)
        np.testing.assert_allclose(info.objective, 4 * 1.5 * rate, rtol=1e-12)


def test_features_that_are_a_function():
    policy = bj.core.functions.Linear(lambda observation: RATE * jnp.ones(2), np.ones((2, 3)))
    run = jit(lambda policy: policy.all(0))
    np.testing.assert_allclose(run(policy), 2)
    edit(5.0)
    np.testing.assert_allclose(run(policy), 10)
    assert run._cache_size() == 2


@pytest.mark.slow
def test_numbers_of_a_problem_stay_leaves():
    values = [bj.hypergradient(Scaled(jnp.asarray(s)), X, with_error=False).value for s in (1.0, 2.0)]
    size = compute._hypergradient._cache_size()
    values.append(bj.hypergradient(Scaled(jnp.asarray(3.0)), X, with_error=False).value)
    np.testing.assert_allclose(values, [3, 6, 9], rtol=1e-12)
    assert compute._hypergradient._cache_size() == size


@pytest.mark.slow
def test_what_a_function_counts_is_no_edit():
    count, calls, each = 0, [], {"made": 0}

    def mdp(x):
        nonlocal count
        count += 1
        calls.append(x)
        each["made"] += 1
        return build(x)

    problem = bj.BilevelProblem(mdp, ENTROPY, first)
    bj.hypergradient(problem, X, with_error=False)
    made = count, len(calls), each["made"]
    for _ in range(2):
        bj.hypergradient(problem, X, with_error=False)
    assert (count, len(calls), each["made"]) == made
    count = 0
    calls.clear()
    bj.hypergradient(problem, X, with_error=False)
    assert (count, calls) == (0, [])


def test_names_that_are_not_read_do_not_matter():
    global value
    value = jnp.zeros(3)  # `first` reads an attribute of this name
    bj.hypergradient(PROBLEMS["three functions"], X, with_error=False)
    size = compute._hypergradient._cache_size()
    value = jnp.ones(4)
    bj.hypergradient(PROBLEMS["three functions"], X, with_error=False)
    assert compute._hypergradient._cache_size() == size


value: Any = None


@pytest.mark.slow
def test_captured_tracers_are_what_they_are():
    def payoff(scale):
        problem = bj.BilevelProblem(lambda x: bj.MDP(STAY, scale * rewards(x), 0.5), ENTROPY, first)
        return bj.hypergradient(problem, X, with_error=False).value

    np.testing.assert_allclose(jax.jit(payoff)(2.0), 6, rtol=1e-12)
    np.testing.assert_allclose(jax.vmap(payoff)(jnp.asarray([1.0, 2.0])), [3, 6], rtol=1e-12)
    np.testing.assert_allclose(jax.grad(payoff)(2.0), 3, rtol=1e-12)


@pytest.mark.slow
def test_functions_and_what_they_capture_are_let_go():
    import gc
    import weakref

    def make():
        held = Own(ENTROPY)
        run = jit(lambda f, x: f(x))
        function = lambda x: held.entropy.temperature * x  # noqa: E731
        run(jax.tree_util.Partial(function), X)
        return weakref.ref(held)

    reference = make()
    jax.clear_caches()
    importlib.import_module("bilevel_jax.core.captures.watch")._watch_of_structure.cache_clear()
    gc.collect()
    assert reference() is None
