"""Where products gain too little an LU factorization takes over: chains that go round, against numpy."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import central_difference

import bilevel_jax as bj
from bilevel_jax.linear import default_linear_solver, factorization, linear_solve
from bilevel_jax.mdp.transitions import PolicyOperator
from bilevel_jax.problems.grid import dynamics, parse_map

SIZE = 520  # above what is solved directly
CONVERGED, MAX_ITERATIONS = bj.Result.CONVERGED, bj.Result.MAX_ITERATIONS


def ring(size=SIZE, actions=1, layout="successor"):
    """A step forward; the other actions stay with probability 0.1, 0.2, ..."""
    state = np.arange(size)
    stay = 0.1 * np.arange(actions)
    successor = np.broadcast_to(np.stack([(state + 1) % size, state])[..., None], (2, size, actions))
    probability = np.broadcast_to(np.stack([1 - stay, stay])[:, None], (2, size, actions))
    match layout:
        case "successor":
            return bj.SuccessorTransition(successor, probability)
        case "dense":
            dense = np.zeros((size, actions, size))
            for k in range(2):
                np.add.at(dense, (state[:, None], np.arange(actions), successor[k]), probability[k])
            return bj.DenseTransition(dense)
        case _:
            return bj.MatrixFreeTransition(expect_ring, {"stay": jnp.asarray(stay)}, size, actions)


def expect_ring(parameters, values):
    stay = parameters["stay"][None]
    return (1 - stay) * jnp.roll(values, -1)[:, None] + stay * values[:, None]


def seasons(months, stocks):
    """Each month the stock moves a step up or down; the month always goes on."""
    month, stock = np.divmod(np.arange(months * stocks), stocks)
    to = [(month + 1) % months * stocks + np.clip(stock + step, 0, stocks - 1) for step in (1, 0, -1)]
    probability = np.array([[0.5, 0.2], [0.3, 0.3], [0.2, 0.5]])
    return bj.SuccessorTransition(
        np.broadcast_to(np.stack(to)[..., None], (3, month.size, 2)),
        np.broadcast_to(probability[:, None], (3, month.size, 2)),
    )


def dense_of(transition):
    actions = transition.shape[-1]
    rows = [transition.under(jnp.broadcast_to(jnp.eye(actions)[a], transition.shape)).matrix() for a in range(actions)]
    return np.stack(rows, 1)


KINDS = {
    "ring": ring,
    "ring of two actions": functools.partial(ring, actions=2),
    "dense ring": functools.partial(ring, actions=2, layout="dense"),
    "matrix-free ring": functools.partial(ring, layout="matrix-free"),
    "seasons": lambda: seasons(12, 45),
}


def in_reward(transition, reward, discount, regularizer, adjoint=None):
    return bj.solve(bj.MDP(transition, reward, discount), regularizer, adjoint=adjoint).value[0]


@pytest.mark.often(2)
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("regularizer", [bj.Unregularized(), bj.ShannonEntropy(0.3)])
def test_values_and_gradients_of_chains_that_go_round(kind, regularizer):
    transition = KINDS[kind]()
    reward = np.random.default_rng(0).normal(size=transition.shape)
    dense = dense_of(transition)
    for discount in (0.999, 0.99999):
        mdp = bj.MDP(transition, reward, discount)
        solution = bj.solve(mdp, regularizer)
        assert int(solution.result) == CONVERGED
        q = reward + discount * dense @ np.asarray(solution.value)
        gap = np.asarray(regularizer.conjugate(jnp.asarray(q))) - np.asarray(solution.value)
        assert np.abs(gap).max() <= 1e-14 * np.abs(q).max() / (1 - discount) ** 0.5
        policy = (
            np.asarray(regularizer.policy(jnp.asarray(q))) if regularizer.smooth else np.eye(q.shape[1])[q.argmax(1)]
        )
        system = np.eye(len(q)) - discount * np.einsum("sa,saj->sj", policy, dense)
        visits = np.linalg.solve(system.T, np.eye(len(q))[0])
        gradient = jax.grad(in_reward, 1)(transition, jnp.asarray(reward), discount, regularizer)
        np.testing.assert_allclose(gradient, visits[:, None] * policy, rtol=1e-7, atol=1e-9)


@pytest.mark.slow
def test_second_derivatives():
    transition = ring(actions=2)
    reward = jnp.asarray(np.random.default_rng(1).normal(size=transition.shape))
    value = functools.partial(in_reward, transition, regularizer=bj.ShannonEntropy(0.3))
    slope = jax.jit(jax.grad(lambda discount: value(reward, discount)))
    curvature = jax.jit(jax.grad(slope))(jnp.asarray(0.999))
    np.testing.assert_allclose(curvature, central_difference(slope, jnp.asarray(0.999), 1.0, 1e-5)[0], rtol=1e-6)


def operator_of(discount, dtype=np.float64, size=SIZE):
    weights = jnp.broadcast_to(jnp.asarray(discount, dtype), (size, 1))
    return PolicyOperator(ring(size).astype(dtype), weights)


@functools.partial(jax.jit, static_argnames="transpose")
def solve_one(solver, discount, rhs, transpose=False):
    operator = operator_of(discount, rhs.dtype)
    return linear_solve(solver, operator, jnp.max(operator.weights), rhs, transpose=transpose, share=False)


def wanted(discount, rhs, transpose):
    matrix = np.eye(SIZE) - np.asarray(operator_of(discount).fold().matrix())
    return np.linalg.solve(matrix.T if transpose else matrix, rhs)


RHS = np.random.default_rng(2).normal(size=(3, SIZE))


@pytest.mark.slow
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_default_adjoint_in_both_directions(dtype, transpose):
    pairs = np.linspace(0.99, 0.999, SIZE)[:, None]  # a discount for each pair
    for discount in (0.999, pairs):
        narrow = np.asarray(discount, dtype)
        x, stats = solve_one(default_linear_solver(SIZE), narrow, RHS[0].astype(dtype), transpose)
        assert int(stats.result) == CONVERGED
        assert int(stats.products) >= SIZE**2 // 6  # a factorization's operations are counted
        want = wanted(narrow.astype(np.float64), RHS[0].astype(dtype), transpose)
        accuracy = 1e-11 if dtype == np.float64 else 1e-3
        np.testing.assert_allclose(x, want, rtol=0, atol=accuracy * np.abs(want).max())


@pytest.mark.slow
def test_named_krylov_solvers_say_what_they_reached():
    discount, first = 0.9999, np.eye(SIZE)[0]
    want = wanted(discount, first, True)
    for solver in (bj.BiCGStab(), bj.GMRES(restart=50), bj.AdaptiveKrylov(fall_back=False)):
        x, stats = solve_one(solver, discount, first, True)
        assert int(stats.result) == MAX_ITERATIONS
        assert np.abs(np.asarray(x) - want).sum() <= float(stats.error_bound)
    for solver in (bj.BiCGStab(fall_back=True), bj.GMRES(restart=50, fall_back=True)):
        x, stats = solve_one(solver, discount, first, True)
        assert int(stats.result) == CONVERGED
        np.testing.assert_allclose(x, want, rtol=1e-10)


@pytest.mark.slow
def test_a_goal_grid_just_above_the_direct_limit_is_not_given_up_early():
    """Nothing is gained until the mass has arrived at the goal, and the solve is then done in less than LU's time."""
    side = 24
    transition = dynamics(parse_map("\n".join(["." * side] * side)), 0.1, "successor")
    reward = np.full((side * side, 4), -0.01)
    reward[-1] = 1
    mdp = bj.MDP(transition, reward, 0.99)
    operator = PolicyOperator(transition, 0.99 * bj.solve(mdp, bj.ShannonEntropy(0.1)).policy)
    rhs = jnp.zeros(side * side).at[0].set(1)
    stats = linear_solve(bj.AdaptiveKrylov(), operator, jnp.asarray(0.99), rhs, transpose=True)[1]
    assert int(stats.result) == CONVERGED
    assert int(stats.products) < 200


BATCHES = {"right-hand sides": (None, 0), "discounts": (0, None), "both": (0, 0)}


@pytest.mark.slow
@pytest.mark.parametrize("batched", BATCHES)
def test_a_batch_equals_singles_and_makes_no_batched_lapack_call(batched):
    axes = BATCHES[batched]
    discounts = np.array([0.999, 0.5, 0.9999])  # the second needs no factorization
    args = [all_ if axis == 0 else all_[0] for all_, axis in zip((discounts, RHS), axes, strict=True)]
    run = jax.jit(jax.vmap(functools.partial(solve_one, default_linear_solver(SIZE)), axes))
    x, stats = run(*args)
    np.testing.assert_array_equal(stats.result, np.full(3, CONVERGED))
    for i in range(3):
        want = wanted(discounts[i if axes[0] == 0 else 0], RHS[i if axes[1] == 0 else 0], False)
        np.testing.assert_allclose(x[i], want, rtol=0, atol=1e-8 * np.abs(want).max())
    if axes[0] == 0:
        assert int(stats.products[1]) < 200
    text = run.lower(*args).as_text()
    calls = re.findall(r"stablehlo.custom_call @(?:lapack|blas)\w+\(.*?-> \(?(.*)", text)
    assert calls, "no LAPACK call found: has its name changed?"
    assert max(shape.count("x") for call in calls for shape in re.findall(r"tensor<((?:\d+x)+)f\d+>", call)) == 2


@pytest.mark.slow
def test_nested_batches_share_a_factorization_where_they_share_the_operator():
    two = np.stack([RHS, 2 * RHS])
    run = jax.jit(jax.vmap(jax.vmap(functools.partial(solve_one, default_linear_solver(SIZE), 0.999))))
    x, stats = run(two)
    np.testing.assert_array_equal(stats.result, np.full((2, 3), CONVERGED))
    np.testing.assert_allclose(x[1, 2], wanted(0.999, 2 * RHS[2], False), rtol=1e-9)
    assert "stablehlo.case" in run.lower(two).as_text() or "stablehlo.if" in run.lower(two).as_text()


def garnet(size=SIZE, slots=4, actions=3):
    rng = np.random.default_rng(3)
    successor = rng.integers(size, size=(slots, size, actions), dtype=np.int32)
    probability = np.moveaxis(rng.dirichlet(np.ones(slots), (size, actions)), -1, 0)
    return bj.MDP(bj.SuccessorTransition(successor, probability), rng.normal(size=(size, actions)), 0.999)


@pytest.mark.slow
def test_chains_that_mix_make_the_same_products_as_before():
    mdp = garnet()
    operator = PolicyOperator(mdp.transition, jnp.full(mdp.reward.shape, 0.999 / 3))
    found = [
        jax.jit(lambda s=s: linear_solve(s, operator, jnp.asarray(0.999), RHS[0], transpose=True))()
        for s in (bj.AdaptiveKrylov(), bj.AdaptiveKrylov(fall_back=False))
    ]
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert int(found[0][1].products) == int(found[1][1].products) < 150
    stats = bj.solve(mdp, bj.ShannonEntropy(0.1)).stats
    assert int(stats.products) < 200  # a factorization alone counts more


def test_above_the_limit_nothing_is_factorized(monkeypatch):
    def calls(size):
        operator = operator_of(0.9, size=size)
        rhs = jnp.ones(size)
        made = jax.jit(lambda: linear_solve(bj.AdaptiveKrylov(), operator, jnp.asarray(0.9), rhs)[0]).lower()
        return "getrf" in made.as_text()

    monkeypatch.setattr(factorization, "FALL_BACK_LIMIT", 530)
    assert calls(529)
    assert not calls(531)


def test_a_matrix_free_transition_costs_its_products():
    stored, free = (
        PolicyOperator(ring(layout=layout), jnp.full((SIZE, 1), 0.9)) for layout in ("successor", "matrix-free")
    )
    for count in (factorization.time_in_products, factorization.operations_in_products):
        assert count(free) >= SIZE + 1
        assert count(free.T) == count(free)
    assert stored.matrix_products == 0
    np.testing.assert_allclose(free.fold().matrix(), stored.fold().matrix(), atol=1e-15)


@pytest.mark.slow
def test_newton_krylov_and_average_reward_on_a_ring():
    transition = ring(actions=2)
    reward = np.random.default_rng(4).normal(size=transition.shape)
    regularizer = bj.ShannonEntropy(0.3)
    mdp = bj.MDP(transition, reward, 0.9999)
    right = bj.solve(mdp, regularizer, solver=bj.PolicyIteration(linear_solver=bj.Direct()))
    for solver in (bj.NewtonKrylov(), bj.Auto(), bj.PolicyIteration()):
        solution = bj.solve(mdp, regularizer, solver=solver)
        assert int(solution.result) == CONVERGED
        np.testing.assert_allclose(solution.value, right.value, rtol=0, atol=1e-9 * np.abs(right.value).max())
    exact = bj.RelativePolicyIteration(linear_solver=bj.Direct())
    found, right = (bj.solve_average_reward(mdp, regularizer, solver=s) for s in (None, exact))
    assert int(found.result) == CONVERGED
    np.testing.assert_allclose(found.gain, right.gain, rtol=1e-12)
    np.testing.assert_allclose(found.bias, right.bias, atol=1e-10)


@pytest.mark.slow
def test_hypergradient_and_its_error_on_a_ring():
    transition = ring(actions=2)
    reward = np.random.default_rng(5).normal(size=transition.shape)
    problem = bj.BilevelProblem(
        mdp=lambda x: bj.MDP(transition, x * reward, 0.999),
        regularizer=bj.ShannonEntropy(0.3),
        objective=lambda x, solution: solution.value[0],
    )
    x = jnp.asarray(1.5)
    made = bj.check(bj.hypergradient(problem, x))
    right = bj.hypergradient(problem, x, method=bj.Implicit(bj.PolicyIteration(linear_solver=bj.Direct()), bj.Direct()))
    np.testing.assert_allclose(made.gradient, right.gradient, rtol=1e-8)
    assert abs(float(made.gradient - right.gradient)) <= float(made.error) <= 1e-6 * abs(float(right.gradient))


def test_tolerances_that_zero_meets_are_refused():
    for make in (bj.GMRES, bj.BiCGStab, bj.AdaptiveKrylov):
        with pytest.raises(bj.InputError, match=r"tolerance must be below 1, got 50"):
            make(50)
    assert float(default_linear_solver(SIZE, 5.0).tolerance) <= 0.1  # given in units of the reward


@pytest.mark.slow
def test_select_and_long_stencils_compile_in_the_same_program_for_any_number_of_slots():
    size, rng = 300, np.random.default_rng(6)

    def program(transition):
        def products(transition, action, weight, values):
            chosen, folded = transition.select(action, weight), transition.under(jnp.stack([weight, 1 - weight], -1))
            pairs = jnp.stack([values, -values], -1)
            return (
                *(o.apply(values) for o in (chosen, folded)),
                *(o.apply_transpose(values) for o in (chosen, folded)),
                chosen.matrix() @ values,
                transition.expect(values),
                transition.push(pairs),
                transition.diagonal(),
            )

        given = transition, jnp.asarray(action), jnp.asarray(weight), jnp.asarray(values)
        return jax.jit(products)(*given), len(jax.jit(products).lower(*given).as_text().split("\n"))

    action, weight, values = rng.integers(2, size=size), rng.uniform(size=size), rng.normal(size=size)
    lengths = {}
    for slots in (40, 200):
        offsets = np.arange(slots) - slots // 2
        inside = (np.arange(size) + offsets[:, None] >= 0) & (np.arange(size) + offsets[:, None] < size)
        probability = rng.uniform(size=(slots, size, 2)) * inside[..., None]
        stencil = bj.StencilTransition(offsets[:, None].tolist(), probability / probability.sum(0), (size,))
        found = [program(t) for t in (stencil, stencil.to_successors(), bj.DenseTransition(dense_of(stencil)))]
        for got, _ in found[:2]:
            for one, right in zip(got, found[2][0], strict=True):
                np.testing.assert_allclose(one, right, atol=1e-13)
        lengths[slots] = [length for _, length in found]
    assert lengths[40][:2] == lengths[200][:2]
