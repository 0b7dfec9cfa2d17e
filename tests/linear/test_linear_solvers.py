"""Linear solvers against numpy: every solver, preconditioner, direction and dtype; failures; derivatives; batches."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import central_difference, densify, random_process

import bilevel_jax as bj
from bilevel_jax.linear import default_linear_solver, linear_solve
from bilevel_jax.linear import direct as direct_module
from bilevel_jax.mdp.transitions import DenseOperator, PolicyOperator
from bilevel_jax.problems.grid import dynamics, parse_map

STATES, ACTIONS, DISCOUNT = 12, 3, 0.95
PROCESS = random_process(3, STATES, ACTIONS, 4)
POLICY = PROCESS.reference
RHS = np.random.default_rng(4).normal(size=STATES)
SOLVERS = {
    "direct": bj.Direct(),
    "gmres": bj.GMRES(),
    "gmres restarted": bj.GMRES(restart=4),
    "bicgstab": bj.BiCGStab(),
    "adaptive": bj.AdaptiveKrylov(),
    "neumann": bj.Neumann(1000, 1e-10),
    "descent": bj.Descent(0.5, 200_000, 1e-10),
    "gmres jacobi": bj.GMRES(preconditioner=bj.Jacobi()),
    "gmres constant": bj.GMRES(preconditioner=bj.ConstantDeflation()),
    "gmres neumann": bj.GMRES(preconditioner=bj.NeumannPreconditioner(2)),
    "bicgstab jacobi": bj.BiCGStab(preconditioner=bj.Jacobi()),
    "bicgstab constant": bj.BiCGStab(preconditioner=bj.ConstantDeflation()),
    "bicgstab neumann": bj.BiCGStab(preconditioner=bj.NeumannPreconditioner(1)),
}
KRYLOV = {"gmres": bj.GMRES(), "bicgstab": bj.BiCGStab()}


def policy_operator(dtype: Any = np.float64, discount: Any = DISCOUNT):
    kernel = bj.SuccessorTransition(PROCESS.successor, PROCESS.probability.astype(dtype))
    return PolicyOperator(kernel, jnp.asarray(discount * POLICY, dtype))


def matrix_of(discount=DISCOUNT):
    dense = densify(PROCESS.successor, PROCESS.probability)
    return np.eye(STATES) - discount * np.einsum("sa,saj->sj", POLICY, dense)


@jax.jit
def both_ways(solver, operator, modulus, rhs):
    """Solutions and stats of the solve and of the transposed one."""
    return [linear_solve(solver, operator, modulus, rhs, transpose=flip) for flip in (False, True)]


@functools.partial(jax.jit, static_argnames="transpose")
def one_way(solver, operator, modulus, rhs, transpose=False):
    return linear_solve(solver, operator, modulus, rhs, transpose=transpose, share=False)


def norm(x, transpose):
    return np.abs(x).sum() if transpose else np.abs(x).max()


QUICK = ("direct", "gmres", "bicgstab", "adaptive", "neumann", "descent", "bicgstab constant")
BY_SPEED = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in SOLVERS]


@pytest.mark.few(4)
@pytest.mark.parametrize("name", BY_SPEED)
def test_against_numpy_and_by_the_dot_product(name):
    (x, stats), (w, stats_transposed) = both_ways(SOLVERS[name], policy_operator(), DISCOUNT, RHS)
    for flip, got, report in ((False, x, stats), (True, w, stats_transposed)):
        matrix = matrix_of().T if flip else matrix_of()
        error = np.asarray(got) - np.linalg.solve(matrix, RHS)
        residual = RHS - matrix @ np.asarray(got)
        assert int(report.result) == bj.Result.CONVERGED
        assert norm(error, flip) <= float(report.error_bound) <= 1e-6
        assert np.linalg.norm(residual) <= 1.02e-10 * np.linalg.norm(RHS)
        np.testing.assert_allclose(report.residual, norm(residual, flip), atol=1e-13)
        assert int(report.products) >= 1
    other = np.random.default_rng(5).normal(size=STATES)
    transposed = both_ways(SOLVERS[name], policy_operator(), DISCOUNT, other)[1][0]
    np.testing.assert_allclose(other @ np.asarray(x), np.asarray(transposed) @ RHS, rtol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["direct", "gmres", "bicgstab", "gmres constant", "bicgstab jacobi"])
def test_in_single_precision(name):
    single = policy_operator(np.float32), np.float32(DISCOUNT), RHS.astype(np.float32)
    for flip, (x, stats) in zip((False, True), both_ways(SOLVERS[name], *single), strict=True):
        assert x.dtype == np.float32
        matrix = matrix_of().T if flip else matrix_of()
        assert int(stats.result) == bj.Result.CONVERGED
        # The matrix itself is rounded: that is what the second term is for.
        want = np.linalg.solve(matrix, RHS)
        bound = float(stats.error_bound) + 1e-6 * norm(want, flip) / (1 - DISCOUNT)
        assert norm(np.asarray(x, np.float64) - want, flip) <= bound


# What made other implementations return NaN or fail.
TURN = np.array([[0.0, 0.9], [-0.9, 0.0]])


def hazards():
    rng = np.random.default_rng(0)
    yield "2x2", 0.95 * rng.dirichlet(np.ones(2), 2), rng.normal(size=2)
    yield "50", 0.95 * rng.dirichlet(np.ones(50), 50), rng.normal(size=50)
    yield "zero operator", np.zeros((2, 2)), np.ones(2)
    yield "identity", 0.99 * np.eye(2), np.array([1.0, -2.0])
    yield "zero", 0.9 * np.eye(2)[::-1], np.zeros(2)
    yield "turn", TURN, np.array([1.0, 1.0])
    yield "cycle", 0.99 * np.roll(np.eye(50), 1, 1), np.eye(50)[0]
    yield "huge", 0.9 * np.eye(2)[::-1], np.array([1e30, -1e29])
    yield "tiny", 0.9 * np.eye(2)[::-1], np.array([1e-30, 2e-30])
    yield "eigenvector", 0.999 * rng.dirichlet(np.ones(50), 50), np.ones(50)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "dtype"),
    [("gmres", np.float32), ("gmres", np.float64), ("bicgstab", np.float32), ("bicgstab", np.float64)],
)
def test_hazards(solver, dtype):
    for name, matrix, rhs in hazards():
        narrow = matrix.astype(dtype), rhs.astype(dtype)
        operator, modulus = DenseOperator(jnp.asarray(narrow[0])), dtype(np.abs(matrix).sum(1).max())
        for flip, (x, stats) in enumerate(both_ways(KRYLOV[solver], operator, modulus, narrow[1])):
            wide = np.eye(len(rhs)) - narrow[0].astype(np.float64)
            want = np.linalg.solve(wide.T if flip else wide, narrow[1].astype(np.float64))
            assert int(stats.result) == bj.Result.CONVERGED, (name, flip)
            accuracy = 2e-3 if dtype == np.float32 else 1e-7
            np.testing.assert_allclose(x, want, atol=accuracy * np.abs(want).max(), rtol=0, err_msg=f"{name} {flip}")


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["gmres", "bicgstab"])
def test_failures_have_names(solver):
    make = {"gmres": bj.GMRES, "bicgstab": bj.BiCGStab}[solver]
    few = bj.GMRES(1e-9, max_cycles=0) if solver == "gmres" else bj.BiCGStab(1e-9, max_iterations=2)
    narrow = policy_operator(np.float32), np.float32(DISCOUNT), RHS.astype(np.float32)
    x, stats = one_way(few, policy_operator(), DISCOUNT, RHS)
    assert int(stats.result) == bj.Result.MAX_ITERATIONS
    assert norm(np.asarray(x) - np.linalg.solve(matrix_of(), RHS), False) <= float(stats.error_bound)
    # Out of reach in float32: reported, and soon.
    x, stats = one_way(make(tolerance=1e-9), *narrow)
    assert int(stats.result) == bj.Result.PRECISION_LIMIT
    assert int(stats.products) < 200
    assert norm(np.asarray(x, np.float64) - np.linalg.solve(matrix_of(), RHS), False) < 1e-3
    bad = RHS.copy()
    bad[3] = np.nan
    assert int(one_way(few, policy_operator(), DISCOUNT, bad)[1].result) == bj.Result.NOT_FINITE
    broken = policy_operator(discount=np.where(np.arange(ACTIONS) == 1, np.nan, DISCOUNT))
    many = make(tolerance=1e-9)
    assert int(one_way(many, broken, DISCOUNT, RHS)[1].result) == bj.Result.NOT_FINITE


def test_steps_are_products_and_a_looser_tolerance_takes_fewer():
    for make in (bj.GMRES, bj.BiCGStab):
        loose, tight = (int(one_way(make(t), policy_operator(), DISCOUNT, RHS)[1].products) for t in (1e-1, 1e-8))
        assert 2 <= loose < tight <= 2 * STATES + 5


def test_truncated_solvers_can_be_held_to_a_tolerance():
    for solver in (bj.Neumann(5, 1e-10), bj.Descent(0.5, 5, 1e-10)):
        assert int(one_way(solver, policy_operator(), DISCOUNT, RHS)[1].result) == bj.Result.MAX_ITERATIONS
    for solver in (bj.Neumann(5), bj.Descent(0.5, 5)):
        assert int(one_way(solver, policy_operator(), DISCOUNT, RHS)[1].result) == bj.Result.CONVERGED


@pytest.mark.often(3)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "guess"),
    [("bicgstab constant", 0.1)]
    + [
        (name, guess)
        for name in ("gmres restarted", "bicgstab", "gmres constant", "bicgstab neumann")
        for guess in (None, 0.1)
    ],
)
def test_derivatives(name, guess):
    """Along operator and right-hand side at once, forward and reverse, against finite differences."""
    solver, weights = SOLVERS[name], np.cos(np.arange(STATES))
    start = None if guess is None else jnp.full(STATES, guess)
    theta = {"weights": DISCOUNT * POLICY, "rhs": RHS}
    along = {
        "weights": 0.01 * np.random.default_rng(6).normal(size=POLICY.shape),
        "rhs": np.random.default_rng(7).normal(size=STATES),
    }

    def f(theta):
        operator = PolicyOperator(policy_operator().transition, theta["weights"])
        x, _ = linear_solve(solver, operator, jnp.asarray(0.97), theta["rhs"], guess=start, transpose=True)
        return jnp.vdot(weights, x**2)

    gradient = jax.jit(jax.grad(f))(theta)
    _, forward = jax.jit(lambda t, d: jax.jvp(f, (t,), (d,)))(theta, along)
    reverse = sum(np.vdot(gradient[k], along[k]) for k in theta)
    want = central_difference(jax.jit(f), theta, along)[0]
    np.testing.assert_allclose([reverse, forward], want, rtol=1e-6)


@pytest.mark.parametrize(
    ("solver", "batched"),
    [("bicgstab", "policy")]
    + [
        pytest.param(solver, batched, marks=pytest.mark.slow)
        for solver, batched in [("bicgstab", "rhs"), ("bicgstab", "transition")]
        + [("gmres", kind) for kind in ("rhs", "policy", "transition")]
    ],
)
def test_a_batch_equals_singles(solver, batched):
    rng = np.random.default_rng(8)
    rhs = rng.normal(size=(3, STATES))
    policies = rng.dirichlet(np.ones(ACTIONS), (3, STATES))
    kernels = rng.dirichlet(np.ones(STATES), (3, STATES, ACTIONS))
    policy, kernel = (
        policies if batched == "policy" else policies[0],
        kernels if batched == "transition" else kernels[0],
    )

    def solve(kernel, policy, rhs):
        operator = PolicyOperator(bj.DenseTransition(kernel), DISCOUNT * policy)
        return linear_solve(KRYLOV[solver], operator, jnp.asarray(DISCOUNT), rhs)

    axes = (0 if batched == "transition" else None, 0 if batched == "policy" else None, 0)
    x, stats = jax.jit(jax.vmap(solve, axes))(jnp.asarray(kernel), jnp.asarray(policy), rhs)
    np.testing.assert_array_equal(stats.result, np.zeros(3))
    for i in range(3):
        p = kernels[i if batched == "transition" else 0]
        pi = policies[i if batched == "policy" else 0]
        matrix = np.eye(STATES) - DISCOUNT * np.einsum("sa,saj->sj", pi, p)
        np.testing.assert_allclose(x[i], np.linalg.solve(matrix, rhs[i]), rtol=1e-7, atol=1e-8)


def test_a_batch_with_shared_transitions_is_one_matrix_product():
    """And never a batch of [S, S] operators; with transitions of its own each element runs alone."""

    def solve(kernel, policy, rhs):
        operator = PolicyOperator(kernel, DISCOUNT * policy)
        return linear_solve(bj.BiCGStab(), operator, jnp.asarray(DISCOUNT), rhs, share=False)[0]

    kernel = bj.DenseTransition(PROCESS.dense)
    policies = np.broadcast_to(POLICY, (5, *POLICY.shape))
    text = jax.jit(jax.vmap(solve, (None, 0, 0))).lower(kernel, policies, np.tile(RHS, (5, 1))).as_text()
    assert f"5x{STATES}x{STATES}xf64" not in text
    assert any("dot_general" in line and f"{STATES}x5x" in line.replace("5x12", "12x5x") for line in text.split("\n"))


@pytest.mark.slow
def test_constant_deflation_pays_near_discount_one():
    rng = np.random.default_rng(9)
    operator = DenseOperator(jnp.asarray(0.9999 * rng.dirichlet(np.ones(60), 60)))
    rhs = rng.normal(size=60)
    steps = [
        int(one_way(bj.BiCGStab(1e-8, preconditioner=p), operator, 0.9999, rhs)[1].products)
        for p in (None, bj.ConstantDeflation())
    ]
    assert steps[1] < steps[0]


def test_direct_refuses_a_matrix_that_is_too_large(monkeypatch):
    monkeypatch.setattr(direct_module, "MOST_STATES", 6)
    operator = DenseOperator(DISCOUNT * jnp.eye(7))  # 7 states: a program that no other test has compiled
    with pytest.raises(bj.InputError, match=r"use BiCGStab\(\) or GMRES\(\)"):
        linear_solve(bj.Direct(), operator, jnp.asarray(DISCOUNT), jnp.ones(7))


def test_the_default_follows_the_number_of_states():
    assert isinstance(default_linear_solver(100), bj.Direct)
    assert isinstance(default_linear_solver(100_000), bj.AdaptiveKrylov)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bj.GMRES(restart=0), "restart must be at least 1"),
        (lambda: bj.BiCGStab(tolerance=-1.0), "tolerance must be at least 0"),
        (lambda: bj.BiCGStab(max_iterations=-1), "max_iterations must be at least 0"),
        (lambda: bj.GMRES(preconditioner=bj.Jacobi), "expected Preconditioner or None"),  # pyright: ignore
        (lambda: bj.NeumannPreconditioner(0), "terms must be at least 1"),
        (lambda: bj.Neumann(3, -1.0), "tolerance must be at least 0"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(bj.InputError, match=message):
        make()


def goal_grid_operator(side, discount):
    """All mass moves to one corner of a grid: until it has arrived, the 2-norm of a transposed residual grows."""
    corner = side * side - 1
    transition = dynamics(parse_map("\n".join(["." * side] * side)), 0.1, "stencil")
    reward = np.full((side * side, 4), -0.01)
    reward[corner] = 1
    mdp = bj.MDP(transition, reward, discount)
    return mdp, PolicyOperator(transition, discount * bj.solve(mdp, bj.ShannonEntropy(0.1)).policy)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [bj.BiCGStab(1e-8), bj.AdaptiveKrylov(1e-8)], ids=["bicgstab", "adaptive"])
def test_transposed_solve_of_a_policy_that_gathers_all_mass(solver):
    mdp, operator = goal_grid_operator(40, 0.99)
    w, stats = one_way(solver, operator, 0.99, mdp.initial, transpose=True)
    assert int(stats.result) == bj.Result.CONVERGED
    exact = np.linalg.solve(np.eye(1600) - np.asarray(operator.fold().matrix()).T, mdp.initial)
    assert np.abs(np.asarray(w) - exact).sum() <= float(stats.error_bound)
    np.testing.assert_allclose(np.sum(w), 100, rtol=1e-5)  # the occupancy of 1 / (1 - discount) steps


@pytest.mark.slow
def test_extrapolation_makes_the_number_of_products_independent_of_the_discount():
    rng = np.random.default_rng(0)
    successor = rng.integers(1000, size=(5, 1000, 4), dtype=np.int32)
    kernel = bj.SuccessorTransition(successor, np.moveaxis(rng.dirichlet(np.ones(5), (1000, 4)), -1, 0))
    for transpose in (False, True):
        steps = []
        for discount in (0.9, 0.9999):
            operator = PolicyOperator(kernel, jnp.full((1000, 4), discount / 4))
            rhs = jnp.asarray(rng.uniform(size=1000))
            _, stats = one_way(bj.AdaptiveKrylov(1e-6), operator, discount, rhs, transpose=transpose)
            assert int(stats.result) == bj.Result.CONVERGED
            steps.append(int(stats.products))
        assert max(steps) < 30  # plain sweeps would take 138,000
