"""`hypergradient` against finite differences and jax.grad of the composition; its adjoint and its methods."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    ACTIONS,
    CONTEXTS,
    STATES,
    but,
    central_difference,
    flat,
    random_like,
    random_process,
    upper_mdp,
    upper_objective,
    upper_problem,
    upper_regularizer,
    upper_start,
)

import bilevel_jax as bj
from bilevel_jax.linear import linear_solve
from bilevel_jax.mdp.transitions import PolicyOperator

PROCESS = random_process(11)


def composed(problem):
    """The objective as a function of x alone."""
    return lambda x: problem.objective(x, bj.solve(problem.mdp(x), problem.regularizer(x)))


@functools.cache
def exact(kind, contexts=False):
    return bj.check(bj.hypergradient(upper_problem(kind, contexts), upper_start(), with_error=False))


@pytest.mark.few(1)
@pytest.mark.parametrize(("kind", "contexts"), but([("kl", True)], [("tsallis", False), ("kl", False), ("kl", True)]))
def test_gradient_against_differences_and_composition(kind, contexts):
    problem, x = upper_problem(kind, contexts), upper_start()
    result, f = exact(kind, contexts), jax.jit(composed(problem))
    np.testing.assert_allclose(result.value, f(x), rtol=1e-13)
    by_composition = jax.jit(jax.grad(composed(problem)))(x)
    for name in x:
        np.testing.assert_allclose(
            result.gradient[name], by_composition[name], rtol=1e-10, atol=1e-12, err_msg=f"{name}: composition"
        )
        d = {leaf: v * (leaf == name) for leaf, v in random_like(2, x).items()}
        differences = central_difference(f, x, d, 2e-4)[0]
        along = np.vdot(flat(result.gradient), flat(d))
        if name == "reference" and kind != "kl":
            assert along == 0
        else:
            np.testing.assert_allclose(along, differences, rtol=1e-7, err_msg=f"{name}: differences")


@pytest.mark.slow
def test_contexts_are_separate_solves():
    result = exact("kl", True)
    for i in range(2):
        single = bj.solve(upper_mdp(upper_start(), CONTEXTS[i]), upper_regularizer(upper_start(), "kl"))
        np.testing.assert_allclose(result.solution.policy[i], single.policy, rtol=1e-12)
    assert result.adjoint.shape == (2, STATES)
    assert result.stats.residual.shape == (2,)


@pytest.mark.slow
def test_hessian_vector_product():
    problem, x = upper_problem("kl"), upper_start()
    d = random_like(3, x)
    gradient = lambda x: bj.hypergradient(problem, x, with_error=False).gradient  # noqa: E731
    product = flat(jax.jit(lambda x, d: jax.jvp(gradient, (x,), (d,))[1])(x, d))
    want = central_difference(gradient, x, d, 1e-4)
    np.testing.assert_allclose(product, want, rtol=1e-6, atol=1e-7 * np.abs(want).max())


@pytest.mark.slow
def test_warm_started_hessian_vector_product():
    # In forward and in reverse mode.
    problem, x, cold = upper_problem("kl"), upper_start(), exact("kl")
    d = random_like(3, x)

    def gradient(x, start, adjoint):
        return bj.hypergradient(
            problem, x, method=bj.Implicit(adjoint=adjoint), initial_adjoint=start, with_error=False
        ).gradient

    @functools.partial(jax.jit, static_argnames="reverse")
    def product(start, adjoint, reverse=False):
        if reverse:
            return jax.vjp(lambda x: gradient(x, start, adjoint), x)[1](d)[0]
        return jax.jvp(lambda x: gradient(x, start, adjoint), (x,), (d,))[1]

    want = flat(product(None, bj.Direct()))
    for reverse in (False, True):
        np.testing.assert_allclose(flat(product(cold.adjoint, bj.GMRES(1e-11), reverse)), want, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("transpose", [False, True])
def test_the_guess_serves_its_own_right_hand_side(transpose):
    rng = np.random.default_rng(0)
    weights, weights_dot = jnp.asarray(0.8 * PROCESS.reference), jnp.asarray(rng.normal(size=PROCESS.reference.shape))
    b, b_dot, guess = (jnp.asarray(rng.normal(size=STATES)) for _ in range(3))
    kernel, rough = bj.SuccessorTransition(PROCESS.successor, PROCESS.probability), bj.Descent(0.3, 2)

    def solve(weights, b, guess=guess, solver=rough):
        operator = PolicyOperator(kernel, weights)
        return linear_solve(solver, operator, jnp.asarray(0.8), b, transpose=transpose, guess=guess)[0]

    x, x_dot = jax.jvp(solve, (weights, b), (weights_dot, b_dot))
    matrix = kernel.under(weights_dot).matrix()
    change = b_dot + (matrix.T if transpose else matrix) @ x
    np.testing.assert_allclose(x_dot, solve(weights, change, None), rtol=1e-12)
    assert not np.any(jax.grad(lambda g: solve(weights, b, g).sum())(guess))


@pytest.mark.slow
def test_vmap_over_x():
    problem = upper_problem("kl", True)
    xs = [upper_start(seed) for seed in range(3)]
    many = jax.jit(jax.vmap(lambda x: bj.hypergradient(problem, x, with_error=False)))(
        jax.tree.map(lambda *x: jnp.stack(x), *xs)
    )
    bj.check(many)
    for i, x in enumerate(xs):
        one = bj.hypergradient(problem, x, with_error=False)
        np.testing.assert_allclose(many.value[i], one.value, rtol=1e-12)
        np.testing.assert_allclose(
            flat(jax.tree.map(lambda g, i=i: g[i], many.gradient)), flat(one.gradient), rtol=1e-9
        )


@pytest.mark.slow
def test_warm_start():
    problem, x = upper_problem("kl"), upper_start()
    cold = exact("kl")
    method = bj.Implicit(bj.ValueIteration(1e-12), bj.GMRES(1e-11))
    slow = bj.hypergradient(problem, x, method=method, with_error=False)
    warm = bj.hypergradient(
        problem, x, method=method, initial_value=cold.solution.value, initial_adjoint=cold.adjoint, with_error=False
    )
    assert int(warm.solution.stats.iterations) <= 2 < int(slow.solution.stats.iterations)
    assert int(warm.stats.products) == 0 < int(slow.stats.products)
    for result in (slow, warm):
        np.testing.assert_allclose(flat(bj.check(result).gradient), flat(cold.gradient), rtol=1e-8, atol=1e-9)


@functools.cache
def adjoint_system():
    """(I - discount P_pi)' and df/dV of the KL problem, assembled in numpy and by differences."""
    x, result = upper_start(), exact("kl")
    discount, kernel = float(jax.nn.sigmoid(x["discount"])), np.asarray(jax.nn.softmax(x["transition"]))
    matrix = np.eye(STATES) - discount * np.einsum("sa,saj->js", result.solution.policy, kernel)

    @jax.jit
    def upper(value):
        q = x["reward"] + discount * kernel @ value
        policy = upper_regularizer(x, "kl").policy(q)
        return upper_objective(x, bj.Solution(value, q, policy, result.solution.result, result.solution.stats))

    return matrix, np.array([central_difference(upper, result.solution.value, e, 1e-4)[0] for e in np.eye(STATES)])


ROUGH = {
    "GMRES": bj.GMRES(1e-2, restart=2),
    "Neumann": bj.Neumann(5),
    "Descent": bj.Descent(0.3, 10),
    "Direct": bj.Direct(),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUGH)
def test_adjoint_equation_and_its_error_bound(name):
    matrix, rhs = adjoint_system()
    true_adjoint = np.linalg.solve(matrix, rhs)
    np.testing.assert_allclose(exact("kl").adjoint, true_adjoint, rtol=1e-8)

    rough = bj.hypergradient(
        upper_problem("kl"), upper_start(), method=bj.Implicit(adjoint=ROUGH[name]), with_error=False
    )
    error = np.abs(rough.adjoint - exact("kl").adjoint).sum()
    residual = np.abs(rhs - matrix @ rough.adjoint).sum()
    np.testing.assert_allclose(rough.stats.residual, residual, rtol=1e-6, atol=1e-8)
    assert error <= rough.stats.error_bound + 1e-12
    assert (error > 1e-4) == (name != "Direct")  # rough ones are rough


@pytest.mark.slow
def test_neumann_converges_at_the_rate_of_the_discount():
    direct, discount = exact("shannon"), float(jax.nn.sigmoid(1.0))
    errors, adjoint_errors = [], []
    for terms in (20, 21, 40):
        method = bj.Implicit(adjoint=bj.Neumann(terms))
        rough = bj.hypergradient(upper_problem("shannon"), upper_start(), method=method, with_error=False)
        assert int(rough.stats.products) == terms
        errors.append(np.linalg.norm(flat(rough.gradient) - flat(direct.gradient)))
        adjoint_errors.append(np.abs(rough.adjoint - direct.adjoint).sum())
    for of in (errors, adjoint_errors):
        # P_pi is stochastic: what is left after k terms is (discount P_pi)'^k, of norm discount^k.
        np.testing.assert_allclose(of[1] / of[0], discount, rtol=1e-2)
        np.testing.assert_allclose(of[2] / of[0], discount**20, rtol=1e-2)


@pytest.mark.slow
def test_descent_converges_to_direct():
    rough = bj.hypergradient(
        upper_problem("shannon"), upper_start(), method=bj.Implicit(adjoint=bj.Descent(0.5, 2000)), with_error=False
    )
    np.testing.assert_allclose(flat(rough.gradient), flat(exact("shannon").gradient), rtol=1e-9, atol=1e-10)


@pytest.mark.slow
def test_x_of_any_structure():
    def lower(x):
        return bj.MDP(PROCESS.dense, PROCESS.reward * x[0] + x[1]["shift"], 0.8)

    problem = bj.BilevelProblem(lower, bj.ShannonEntropy(0.5), lambda x, s: s.policy[0, 0] + x[1]["shift"])
    result = bj.hypergradient(problem, (1.5, {"shift": 0.0}), with_error=False)  # Python floats too
    assert jax.tree.structure(result.gradient) == jax.tree.structure((0, {"shift": 0}))
    np.testing.assert_allclose(result.gradient[1]["shift"], 1.0, atol=1e-12)  # a constant reward moves no policy
    want = central_difference(jax.jit(composed(problem)), (1.5, {"shift": 0.0}), (1.0, {"shift": 0.0}))
    np.testing.assert_allclose(result.gradient[0], want[0], rtol=1e-9)


@pytest.mark.slow
def test_objective_without_the_lower_level():
    problem = bj.BilevelProblem(
        upper_mdp, functools.partial(upper_regularizer, kind="kl"), lambda x, s: x["discount"] ** 2
    )
    result = bj.check(bj.hypergradient(problem, upper_start(), with_error=False))
    np.testing.assert_array_equal(result.adjoint, 0)
    np.testing.assert_allclose(result.gradient["discount"], 2.0)
    np.testing.assert_array_equal(result.gradient["transition"], 0)


def data_reward(data, x):
    return bj.MDP(PROCESS.dense, data * x, 0.8)


def data_objective(data, x, solution):
    return jnp.sum(data * solution.policy) + x**2


@pytest.mark.slow
def test_partials_keep_their_data_as_leaves():
    counted = importlib.import_module("bilevel_jax.hypergradient.compute")._hypergradient
    counted.clear_cache()
    values = []
    for seed in range(3):
        data = jnp.asarray(np.random.default_rng(seed).normal(size=(STATES, ACTIONS)))
        problem = bj.BilevelProblem(
            jax.tree_util.Partial(data_reward, data),
            bj.ShannonEntropy(0.5),
            jax.tree_util.Partial(data_objective, data),
        )
        assert isinstance(problem, bj.Problem)
        values.append(float(bj.hypergradient(problem, 1.5, with_error=False).value))
        np.testing.assert_allclose(values[-1], composed(problem)(1.5), rtol=1e-12)
    assert counted._cache_size() == 1
    assert len(set(values)) == 3


@pytest.mark.slow
def test_float32():
    x = jax.tree.map(jnp.float32, upper_start())
    narrow = bj.BilevelProblem(
        lambda x: bj.MDP(jax.nn.softmax(x["transition"]), x["reward"], jax.nn.sigmoid(x["discount"])),
        lambda x: bj.KLDivergence(jnp.exp(x["temperature"]), jax.nn.softmax(x["reference"])),
        lambda x, s: jnp.sum(s.policy**2) + jnp.sum(s.value),
    )
    result, wide = (bj.check(bj.hypergradient(narrow, tree, with_error=False)) for tree in (x, upper_start()))
    assert {leaf.dtype for leaf in jax.tree.leaves((result.value, result.gradient, result.adjoint))} == {
        np.dtype("float32")
    }
    np.testing.assert_allclose(flat(result.gradient), flat(wide.gradient), rtol=1e-3, atol=1e-4)
