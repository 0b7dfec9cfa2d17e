"""Every solver against numpy, what its certificate proves against the truth, and what each is for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ACTIONS, STATES, make_mdp, make_regularizer, random_process, solve_numpy

import bilevel_jax as bj
from bilevel_jax.problems.grid import dynamics, parse_map

PROCESS = random_process(0)
DISCOUNT = np.random.default_rng(0).uniform(0.85, 0.95, (STATES, ACTIONS))
DISCOUNT[2, 1] = 0
SOLVERS = {
    "value": bj.ValueIteration,
    "plain value": functools.partial(bj.ValueIteration, centred=False),
    "policy": bj.PolicyIteration,
    "modified": bj.ModifiedPolicyIteration,
    "newton": bj.NewtonKrylov,
    "newton gmres": functools.partial(bj.NewtonKrylov, krylov=bj.GMRES()),
    "anderson": bj.AndersonIteration,
    "adaptive": bj.AdaptivePolicyIteration,
    "auto": bj.Auto,
}


def regularizer(kind):
    return bj.Unregularized() if kind == "unregularized" else make_regularizer(kind, 0.5, PROCESS.reference)


@functools.cache
def truth(kind, discount=None):
    discount = DISCOUNT if discount is None else discount
    if kind == "unregularized":
        value = np.zeros(STATES)
        for _ in range(2000):
            value = (PROCESS.reward + discount * (PROCESS.dense @ value)).max(1)
        return value, PROCESS.reward + discount * (PROCESS.dense @ value)
    return solve_numpy(kind, PROCESS.dense, PROCESS.reward, discount, 0.5, PROCESS.reference)[:2]


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_agrees_with_numpy(name):
    for kind, layout in (("shannon", "dense"), ("unregularized", "successor")):
        solution = bj.check(bj.solve(make_mdp(PROCESS, DISCOUNT, layout), regularizer(kind), solver=SOLVERS[name]()))
        value, q = truth(kind)
        np.testing.assert_allclose(solution.value, value, rtol=1e-10, atol=1e-11)
        np.testing.assert_allclose(solution.q, q, rtol=1e-10, atol=1e-11)
        assert float(solution.stats.error_bound) < 1e-11


@pytest.mark.often(8)
@pytest.mark.slow
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("kind", ["kl", "tsallis", "unregularized"])
@pytest.mark.parametrize("layout", ["dense", "successor"])
def test_every_solver_on_every_regularizer(name, kind, layout):
    solution = bj.check(bj.solve(make_mdp(PROCESS, DISCOUNT, layout), regularizer(kind), solver=SOLVERS[name]()))
    np.testing.assert_allclose(solution.value, truth(kind)[0], rtol=1e-10, atol=1e-11)


def policy_value(dense, reward, discount, kind, policy):
    """V^pi[S] with the policy's penalty, by one dense solve in numpy."""
    penalty = 0.0
    if kind == "shannon":
        penalty = 0.5 * np.sum(policy * np.log(np.where(policy > 0, policy, 1)), 1)
    operator = np.einsum("sa,saj->sj", np.broadcast_to(discount, policy.shape) * policy, dense)
    return np.linalg.solve(np.eye(len(dense)) - operator, (policy * reward).sum(1) - penalty)


@pytest.mark.often(3)
@pytest.mark.slow
@pytest.mark.parametrize("name", ["value", "plain value", "modified", "newton", "anderson", "adaptive"])
@pytest.mark.parametrize("kind", ["shannon", "unregularized"])
def test_certificates_hold_at_every_stage(name, kind):
    """Value and policy are within their bounds after any number of sweeps, one discount or many, ends or not."""
    solver, seen = SOLVERS[name], []
    for discount in (0.9, DISCOUNT):
        value = truth(kind, discount if np.ndim(discount) == 0 else None)[0]
        mdp = make_mdp(PROCESS, discount)
        for steps in (1, 2, 3, 5, 9, 17):
            solution = bj.solve(mdp, regularizer(kind), solver=solver(1e-7, steps))
            error = np.abs(np.asarray(solution.value) - value).max()
            loss = (value - policy_value(PROCESS.dense, PROCESS.reward, discount, kind, solution.policy)).max()
            assert error <= solution.stats.error_bound
            assert loss <= solution.stats.suboptimality
            seen.append(loss > 0)
    assert any(seen)  # policies that lose nothing would prove nothing


@pytest.mark.slow
def test_certificates_know_of_rows_that_do_not_sum_to_one():
    # Within the tolerance of the constructor, and worth 1e-6 / (1 - discount) of the value.
    dense = PROCESS.dense * (1 + 0.9e-6 * np.linspace(-1, 1, STATES))[:, None, None]
    mdp = bj.MDP(dense, PROCESS.reward + 100, 0.999)
    value = solve_numpy("shannon", dense, PROCESS.reward + 100, 0.999, 0.5, None, 100_000)[0]
    for tolerance in (1e3, 1.0, 1e-3):
        for solver in (bj.ValueIteration, bj.ModifiedPolicyIteration):
            solution = bj.check(bj.solve(mdp, bj.ShannonEntropy(0.5), solver=solver(tolerance)))
            assert np.abs(solution.value - value).max() <= solution.stats.error_bound <= tolerance


@pytest.mark.slow
def test_rounding_is_a_part_of_the_bound():
    # float32 at discount 0.999: the error is far above what the span alone says, and within what is reported.
    for seed in range(3):
        process = random_process(seed, 40, 4)
        exact = solve_numpy("shannon", process.dense, process.reward + 5, 0.999, 0.5, None, 60_000)[0]
        narrow = jax.tree.map(lambda leaf: leaf.astype(np.float32), bj.MDP(process.dense, process.reward + 5, 0.999))
        for solver in (bj.ValueIteration(), bj.PolicyIteration(), bj.AdaptivePolicyIteration()):
            solution = bj.check(bj.solve(narrow, bj.ShannonEntropy(np.float32(0.5)), solver=solver))
            # The data were rounded too: one unit in the last place of reward and discount, times 1 / (1 - discount).
            of_data = 2e-7 / 0.001 * np.abs(exact).max()
            assert np.abs(np.asarray(solution.value) - exact).max() <= float(solution.stats.error_bound) + of_data
            assert 0.01 < solution.stats.error_bound < 50
            unreachable = type(solver)(1e-3)
            result = bj.solve(narrow, bj.ShannonEntropy(np.float32(0.5)), solver=unreachable)
            assert int(result.result) == bj.Result.PRECISION_LIMIT
            assert int(result.stats.iterations) < 200


def grid_mdp(side, discount, seed=0):
    """An open grid with slip and a random reward a cell: it mixes slowly."""
    rng = np.random.default_rng(seed)
    reward = np.repeat(rng.uniform(size=(side * side, 1)), 4, 1)
    return bj.MDP(dynamics(parse_map("\n".join(["." * side] * side)), 0.1, "successor"), reward, discount)


def random_mdp(states, discount, seed=0):
    process_rng = np.random.default_rng(seed)
    successor = process_rng.integers(states, size=(5, states, 4), dtype=np.int32)
    probability = np.moveaxis(process_rng.dirichlet(np.ones(5), (states, 4)), -1, 0)
    return bj.MDP(bj.SuccessorTransition(successor, probability), process_rng.uniform(size=(states, 4)), discount)


def test_span_bounds_do_not_see_the_discount_on_fast_chains():
    steps = [
        int(
            bj.check(
                bj.solve(random_mdp(500, g), bj.Unregularized(), solver=bj.ValueIteration(1e-4 / (1 - g)))
            ).stats.iterations
        )
        for g in (0.9, 0.999)
    ]
    assert max(steps) < 40  # the gap itself would need 14,000 at 0.999


@pytest.mark.slow
def test_adaptive_policy_iteration_sweeps_on_fast_chains_and_solves_on_slow_ones():
    fast, slow = random_mdp(500, 0.999), grid_mdp(32, 0.999)
    for mdp, most in ((fast, 80), (slow, 1000)):
        tolerance = 1e-4
        adaptive, modified = (
            bj.check(bj.solve(mdp, bj.ShannonEntropy(0.1), solver=solver(tolerance, forcing=0.2)))
            for solver in (bj.AdaptivePolicyIteration, bj.ModifiedPolicyIteration)
        )
        np.testing.assert_allclose(adaptive.value, modified.value, atol=2 * tolerance, rtol=0)
        work = [int(s.stats.iterations + s.stats.products) for s in (adaptive, modified)]
        assert work[0] < most
        if mdp is slow:
            assert work[1] > 3 * work[0]
        else:
            assert work[1] == work[0]


@pytest.mark.slow
@pytest.mark.parametrize("discount", [0.9, 0.99])
def test_anderson_never_loses_more_than_a_fifth(discount):
    """In sweeps to the same bound, on random and grid MDPs, soft and hard."""
    gains = []
    for mdp in (grid_mdp(10, discount), *(random_mdp(100, discount, seed) for seed in range(6))):
        for chosen in (bj.ShannonEntropy(0.1), bj.Unregularized()):
            plain, accelerated = (
                int(bj.check(bj.solve(mdp, chosen, solver=solver(1e-6 / (1 - discount)))).stats.iterations)
                for solver in (bj.ValueIteration, bj.AndersonIteration)
            )
            assert accelerated <= 1.2 * plain + 1
            gains.append(plain / accelerated)
    assert max(gains) > 1.3


@pytest.mark.slow
def test_auto_is_resolved_by_structure():
    small, large = make_mdp(PROCESS, 0.9), random_mdp(500, 0.9)
    dense = np.full((100, 2, 100), 0.01)
    batch = bj.MDP(dense, np.zeros((20, 100, 2)), 0.9)

    def kinds(mdp):
        return [type(solver) for solver in bj.Auto(1e-3).resolve(mdp)]

    assert kinds(small) == [bj.PolicyIteration]
    assert kinds(large) == [bj.AdaptivePolicyIteration]
    assert kinds(batch) == [bj.ValueIteration, bj.AdaptivePolicyIteration]
    assert kinds(bj.MDP(dense, np.zeros((3, 100, 2)), 0.9)) == [bj.AdaptivePolicyIteration]
    assert kinds(bj.MDP(dense, np.zeros((100, 2)), 0.9)) == [bj.AdaptivePolicyIteration]
    assert {float(solver.tolerance) for solver in bj.Auto(1e-3).resolve(batch)} == {1e-3}
    for mdp in (small, large):
        auto, named = (
            bj.solve(mdp, bj.ShannonEntropy(0.5), solver=s) for s in (bj.Auto(1e-5), bj.Auto(1e-5).resolve(mdp)[0])
        )
        np.testing.assert_array_equal(auto.value, named.value)


@pytest.mark.slow
def test_a_batch_over_slow_dense_transitions_is_not_left_to_sweeps():
    # A ring takes thousands of sweeps, the uniform chain a few: one is done together, the other goes on by itself.
    states = 80
    place = np.arange(states)
    ring = np.stack([np.eye(states)[(place + step) % states] for step in (1, -1)], 1)
    reward = np.random.default_rng(0).normal(size=(16, states, 2))
    for transition, slow in ((ring, True), (np.full(ring.shape, 1 / states), False)):
        mdp = bj.MDP(transition, reward, 0.999)
        made = bj.check(bj.solve(mdp, bj.ShannonEntropy(0.5)))
        single = bj.check(bj.solve(bj.MDP(transition, reward[3], 0.999), bj.ShannonEntropy(0.5)))
        np.testing.assert_allclose(made.value[3], single.value, rtol=1e-11)
        assert bool((made.stats.products > 0).all()) is slow
        assert (made.stats.iterations < 300).all()
        if slow:
            few = bj.solve(mdp, bj.ShannonEntropy(0.5), solver=bj.Auto(1e-6, max_iterations=2))
            assert (few.result == bj.Result.MAX_ITERATIONS).all()


@pytest.mark.slow
def test_the_unregularized_policy_has_no_derivative_and_the_value_has_one():
    mdp = make_mdp(PROCESS, 0.9)

    def solved(reward):
        return bj.solve(mdp.replace(reward=reward), bj.Unregularized())

    _, q = truth("unregularized", 0.9)
    policy = np.eye(ACTIONS)[q.argmax(1)]
    gradient = jax.grad(lambda r: solved(r).value[0])(mdp.reward)
    inverse = np.linalg.inv(np.eye(STATES) - 0.9 * np.einsum("sa,saj->sj", policy, PROCESS.dense))
    np.testing.assert_allclose(gradient, inverse[0][:, None] * policy, rtol=1e-9, atol=1e-12)
    with pytest.raises(bj.InputError, match="piecewise constant and has no derivative"):
        jax.grad(lambda r: solved(r).policy[0, 0])(mdp.reward)
    problem = bj.BilevelProblem(
        lambda x: mdp.replace(reward=mdp.reward + x), bj.Unregularized(), lambda x, s: s.policy[0, 0]
    )
    with pytest.raises(bj.InputError, match="piecewise constant and has no derivative"):
        bj.hypergradient(problem, jnp.zeros((STATES, ACTIONS)), with_error=False)


@pytest.mark.slow
def test_new_numbers_do_not_recompile():
    compiled = __import__("importlib").import_module("bilevel_jax.solvers.solve")._solve
    compiled.clear_cache()
    for number in (0.5, 0.7, 0.9):
        for solver in (
            bj.ModifiedPolicyIteration(number, 1000, int(10 * number), number),
            bj.NewtonKrylov(number, 1000, None, number),
            bj.AdaptivePolicyIteration(number, 1000, int(10 * number), number, number),
            bj.AndersonIteration(number),
        ):
            bj.solve(make_mdp(PROCESS, number), bj.ShannonEntropy(number), solver=solver)
        assert compiled._cache_size() == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bj.ModifiedPolicyIteration(sweeps=-1), r"sweeps must be at least 0, got -1"),
        (lambda: bj.NewtonKrylov(krylov=bj.Direct()), r"krylov: expected GMRES or BiCGStab or None, got Direct"),
        (lambda: bj.NewtonKrylov(forcing=-0.1), r"forcing must be at least 0, got -0\.1"),
        (lambda: bj.AndersonIteration(history=0), r"history must be at least 1, got 0"),
        (lambda: bj.AdaptivePolicyIteration(preconditioner="jacobi"), r"preconditioner: expected .*got str"),
        (lambda: bj.Auto(tolerance=-1.0), r"tolerance must be at least 0, got -1"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(bj.InputError, match=message):
        make()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["value", "modified", "newton", "anderson", "adaptive"])
def test_batches_equal_single_solves(name):
    rewards = np.random.default_rng(1).normal(size=(3, STATES, ACTIONS))
    own = np.stack([random_process(seed).dense for seed in range(3)])
    for transition in (PROCESS.dense, own):
        many = bj.check(bj.solve(bj.MDP(transition, rewards, 0.9), bj.ShannonEntropy(0.5), solver=SOLVERS[name](1e-9)))
        for i in range(3):
            kernel = transition if transition.ndim == 3 else transition[i]
            value = solve_numpy("shannon", kernel, rewards[i], 0.9, 0.5, None)[0]
            np.testing.assert_allclose(many.value[i], value, atol=1.1e-9, rtol=0)
