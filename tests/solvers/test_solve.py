"""`solve` against numpy value iteration and closed forms; stats, dtypes, batches, no recompilation."""

import functools
import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ACTIONS, KINDS, LAYOUTS, STATES, make_mdp, make_regularizer, random_process, solve_numpy

import bilevel_jax as bj

PROCESS = random_process(0)
# The discount of each pair; one pair ends the process.
DISCOUNT = np.random.default_rng(0).uniform(0.85, 0.95, (STATES, ACTIONS))
DISCOUNT[2, 1] = 0
SOLVERS = {
    "VI": bj.ValueIteration(),
    "PI": bj.PolicyIteration(),
    "PI-GMRES": bj.PolicyIteration(linear_solver=bj.GMRES()),
    "PI-Neumann": bj.PolicyIteration(linear_solver=bj.Neumann(10)),
}
EXACT = ("VI", "PI")


@functools.cache
def truth(kind, discount=None, temperature=0.5, scale=1.0):
    discount = DISCOUNT if discount is None else discount
    return solve_numpy(kind, PROCESS.dense, scale * PROCESS.reward, discount, temperature, PROCESS.reference)


def regularizer(kind, temperature=0.5):
    return make_regularizer(kind, temperature, PROCESS.reference)


@pytest.mark.often(3)
@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("solver", "kind", "layout"),
    [
        *itertools.product(EXACT, KINDS, LAYOUTS),
        ("PI-GMRES", "shannon", "dense"),
        ("PI-Neumann", "shannon", "successor"),
    ],
)
def test_agrees_with_numpy_value_iteration(solver, kind, layout):
    solution = bj.check(bj.solve(make_mdp(PROCESS, DISCOUNT, layout), regularizer(kind), solver=SOLVERS[solver]))
    for got, want in zip((solution.value, solution.q, solution.policy), truth(kind), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-11)


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", [bj.ValueIteration, bj.PolicyIteration])
def test_error_bound_bounds_the_error(solver, kind):
    true_value = truth(kind, 0.9)[0]
    for tolerance in (10.0, 1.0, 1e-1, 1e-2, 1e-4, 1e-6, 1e-9):
        solution = bj.check(bj.solve(make_mdp(PROCESS, 0.9), regularizer(kind), solver=solver(tolerance)))
        error = np.abs(solution.value - true_value).max()
        assert error <= solution.stats.error_bound + 1e-13, tolerance
        assert solution.stats.error_bound <= tolerance, tolerance
    assert error > 0  # the bound was not met by an exact value


def test_error_bound_holds_before_convergence():
    for steps in (1, 2, 5, 20):
        solution = bj.solve(make_mdp(PROCESS, 0.9), regularizer("shannon"), solver=bj.ValueIteration(1e-9, steps))
        assert np.abs(solution.value - truth("shannon", 0.9)[0]).max() <= solution.stats.error_bound


def test_the_contraction_bound_is_attained():
    # One state, one action: every sweep from 0 falls short by exactly discount / (1 - discount) residual.
    plain = bj.ValueIteration(1.0, centred=False)
    solution = bj.solve(bj.MDP([[[1.0]]], [[2.0]], 0.75), bj.ShannonEntropy(1.0), solver=plain)
    np.testing.assert_allclose(8.0 - solution.value[0], solution.stats.error_bound, rtol=1e-12)


def test_the_span_bound_is_attained():
    # Two states that only stay, values 4 and 12: the gap after n sweeps is discount^n r, its span discount^n 4, and
    # the middle of the bracket is as far above the one value as below the other.
    mdp = bj.MDP(np.eye(2)[:, None], [[1.0], [3.0]], 0.75)
    solution = bj.solve(mdp, bj.ShannonEntropy(1.0), solver=bj.ValueIteration(1e-3, 5))
    error = solution.value - np.array([4.0, 12.0])
    np.testing.assert_allclose(error, [solution.stats.error_bound, -solution.stats.error_bound], rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_stats_of_value_iteration(kind):
    mdp, chosen = make_mdp(PROCESS, 0.9), regularizer(kind)
    values = [np.zeros(STATES)]

    def sweep(value):
        return np.asarray(chosen.conjugate(PROCESS.reward + 0.9 * PROCESS.dense @ value))

    for _ in range(8):
        values.append(sweep(values[-1]))
    solution = bj.solve(mdp, chosen, solver=bj.ValueIteration(1e-9, 7, centred=False))
    assert int(solution.stats.iterations) == 7
    assert int(solution.result) == bj.Result.MAX_ITERATIONS
    np.testing.assert_allclose(solution.value, values[7], rtol=1e-13)
    residual = np.abs(values[8] - values[7]).max()
    np.testing.assert_allclose(solution.stats.residual, residual, rtol=1e-10)
    np.testing.assert_allclose(solution.stats.error_bound, 10 * residual, rtol=1e-10)  # 1 / (1 - 0.9)
    centred = bj.solve(mdp, chosen, solver=bj.ValueIteration(1e-9, 7))
    gap = values[7] - values[6]
    middle = values[7] + 9 * (gap.max() + gap.min()) / 2
    np.testing.assert_allclose(centred.value, middle, rtol=1e-12)
    residual = np.abs(sweep(middle) - middle).max()
    np.testing.assert_allclose(centred.stats.error_bound, 10 * residual, rtol=1e-8)
    assert 10 * residual <= 9 * np.ptp(gap) / 2 * (1 + 1e-8)  # half of the bracket that the middle was taken of


@pytest.mark.slow
@pytest.mark.parametrize("solver", EXACT)
def test_value_q_and_policy_belong_together(solver):
    mdp, chosen = make_mdp(PROCESS, DISCOUNT), regularizer("kl")
    for steps in (1, 3):  # also before convergence
        start = type(SOLVERS[solver])(max_iterations=steps)
        solution = bj.solve(mdp, chosen, solver=start)
        q = PROCESS.reward + DISCOUNT * (PROCESS.dense @ np.asarray(solution.value))
        np.testing.assert_allclose(solution.q, q, rtol=1e-13)
        np.testing.assert_allclose(solution.policy, chosen.policy(jnp.asarray(q)), rtol=1e-12)


@pytest.mark.parametrize("solver", [bj.ValueIteration(1e-8), bj.PolicyIteration(1e-8)], ids=EXACT)
def test_warm_start(solver):
    solve = functools.partial(bj.solve, solver=solver)
    cold = solve(make_mdp(PROCESS, 0.95), regularizer("shannon"))
    again = solve(make_mdp(PROCESS, 0.95), regularizer("shannon"), initial_value=cold.value)
    moved = PROCESS._replace(reward=PROCESS.reward + 1e-3 * np.eye(STATES, ACTIONS))
    near, near_cold = (
        solve(make_mdp(moved, 0.95), regularizer("shannon"), initial_value=v) for v in (cold.value, None)
    )
    assert int(again.stats.iterations) == 1
    assert int(near.stats.iterations) < int(near_cold.stats.iterations)
    np.testing.assert_allclose(near.value, near_cold.value, atol=2e-8)


@pytest.mark.slow
def test_newton_needs_few_steps():
    for layout in LAYOUTS:
        assert int(bj.solve(make_mdp(PROCESS, 0.999, layout), regularizer("shannon")).stats.iterations) <= 10


@pytest.mark.few(5)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", EXACT)
@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 1.0, 1e3, 1e6])
def test_every_scale(temperature, solver, kind):
    process = PROCESS._replace(reward=1e6 * PROCESS.reward)
    solution = bj.check(bj.solve(make_mdp(process, DISCOUNT), regularizer(kind, temperature), solver=SOLVERS[solver]))
    want = truth(kind, None, temperature, 1e6)[0]
    np.testing.assert_allclose(solution.value, want, rtol=0, atol=1e-13 * np.abs(want).max())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "kind", "layout"),
    [*(("PI", kind, "dense") for kind in KINDS), ("VI", "shannon", "dense"), ("PI", "shannon", "successor")],
)
def test_float32(solver, kind, layout):
    narrow = jax.tree.map(
        lambda x: x.astype(np.float32) if x.dtype == float else x,
        (make_mdp(PROCESS, 0.9, layout), regularizer(kind)),
    )
    solution = bj.check(bj.solve(*narrow, solver=SOLVERS[solver]))
    floats = (solution.value, solution.q, solution.policy, solution.stats.residual, solution.stats.error_bound)
    assert {x.dtype for x in floats} == {np.dtype("float32")}
    value, _, policy = truth(kind, 0.9)
    ulp = np.finfo(np.float32).eps * np.abs(value).max()
    # Working precision: a residual of 16 units in the last place, of |r| + |V|, is all that is promised.
    bound = float(solution.stats.error_bound)
    assert bound <= 9 * 16 * 1.5 * ulp
    error = np.abs(np.asarray(solution.value) - value).max()
    assert error <= bound + 10 * ulp  # rounding of a sweep, times 1 / (1 - discount)
    np.testing.assert_allclose(solution.policy, policy, rtol=0, atol=2 * error / 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1e-6, 1e6])
def test_float32_scales(temperature):
    process = PROCESS._replace(reward=np.float32(1e6 * PROCESS.reward), dense=np.float32(PROCESS.dense))
    for kind in KINDS:
        solution = bj.check(bj.solve(make_mdp(process, 0.9), regularizer(kind, np.float32(temperature))))
        want = truth(kind, 0.9, temperature, 1e6)[0]
        np.testing.assert_allclose(solution.value, want, rtol=0, atol=1e-5 * np.abs(want).max())


def two_states(p):
    """Values of two small MDPs with closed forms at the parameters used below, as a batch."""
    uniform = np.full((2, 2, 2), 0.5)
    absorbing = np.stack([np.eye(2), [[0.0, 1.0], [0.0, 1.0]]])  # state 0: stay, leave; state 1 stays
    mdp = bj.MDP(np.stack([uniform, absorbing]), jnp.stack([p["uniform"], p["absorbing"]]), p["discount"])
    value = bj.solve(mdp, bj.ShannonEntropy(p["temperature"])).value
    return {"uniform": value[0], "absorbing": value[1]}


@pytest.mark.slow
def test_closed_form():
    """Two states, two actions, discount 1/2, temperature 1, derived by hand (log is natural).

    uniform: every action leads to each state with probability 1/2; r = [[log 3, 0], [0, 0]].
      V[s] = L[s] + m, L[s] = log sum exp r[s] = (2 log 2, log 2), m = 1/2 mean(V) = mean(L) = 1.5 log 2.
      pi = [[3/4, 1/4], [1/2, 1/2]]. dV[s]/dr[i, a] = pi[i, a] ([s = i] + 1/2).
      dL/dT is the entropy of pi: (2 log 2 - 3/4 log 3, log 2); dV[s]/dT = dL[s] + mean(dL).
      dV/dgamma = mean(L) / (1 - gamma)^2 = 6 log 2.
    absorbing: state 1 stays for ever with r = -log 2, so that V[1] = 0; state 0 stays (r = 0) or
      leaves (r = log 2). u = exp(V[0] / 2) solves u^2 = u + 2, so u = 2, V[0] = 2 log 2, both Q[0, :] are
      log 2, pi[0] = (1/2, 1/2). 1 - gamma pi P = [[3/4, -1/4], [0, 1/2]], its inverse is
      [[4/3, 2/3], [0, 2]].
      dV[0]/dr = [4/3 (1/2, 1/2), 2/3 (1/2, 1/2)].
      dV/dT: brackets are the entropies (log 2, log 2): V[0]: (4/3 + 2/3) log 2.
      dV/dgamma: brackets are pi P V = (1/2 V[0], 0) = (log 2, 0): V[0]: 4/3 log 2.
    """
    log2, log3 = np.log(2), np.log(3)
    p = {
        "uniform": jnp.array([[log3, 0], [0, 0]]),
        "absorbing": jnp.array([[0, log2], [-log2, -log2]]),
        "discount": jnp.asarray(0.5),
        "temperature": jnp.asarray(1.0),
    }
    value = two_states(p)
    np.testing.assert_allclose(value["uniform"], [3.5 * log2, 2.5 * log2], rtol=1e-14)
    np.testing.assert_allclose(value["absorbing"], [2 * log2, 0], atol=1e-14)
    for jacobian in (jax.jacrev, jax.jacfwd):
        d = jax.jit(jacobian(two_states))(p)
        uniform, absorbing = d["uniform"], jax.tree.map(lambda x: x[0], d["absorbing"])
        np.testing.assert_allclose(uniform["uniform"][0], [[9 / 8, 3 / 8], [1 / 4, 1 / 4]], rtol=1e-13)
        np.testing.assert_allclose(uniform["uniform"][1], [[3 / 8, 1 / 8], [3 / 4, 3 / 4]], rtol=1e-13)
        entropy = np.array([2 * log2 - 0.75 * log3, log2])
        np.testing.assert_allclose(uniform["temperature"], entropy + entropy.mean(), rtol=1e-13)
        np.testing.assert_allclose(uniform["discount"], [6 * log2, 6 * log2], rtol=1e-13)
        np.testing.assert_allclose(absorbing["absorbing"], [[2 / 3, 2 / 3], [1 / 3, 1 / 3]], rtol=1e-13)
        np.testing.assert_allclose(absorbing["temperature"], 2 * log2, rtol=1e-13)
        np.testing.assert_allclose(absorbing["discount"], 4 / 3 * log2, rtol=1e-13)


def batch_of(count, seed=1):
    rng = np.random.default_rng(seed)
    return (
        rng.dirichlet(np.ones(STATES), (count, STATES, ACTIONS)),
        rng.normal(size=(count, STATES, ACTIONS)),
        rng.uniform(0.5, 0.95, count),
        rng.uniform(0.1, 2, count),
    )


@pytest.mark.slow
@pytest.mark.parametrize("solver", EXACT)
def test_vmap_equals_single_solves(solver):
    def solve(p, r, discount, temperature):
        return bj.solve(bj.MDP(p, r, discount), bj.ShannonEntropy(temperature), solver=SOLVERS[solver])

    batch = batch_of(64)
    singles = [jax.jit(solve)(*one) for one in zip(*batch, strict=True)]
    single = jax.tree.map(lambda *x: np.stack(x), *singles)
    nested = jax.jit(jax.vmap(jax.vmap(solve)))(*(x.reshape(8, 8, *x.shape[1:]) for x in batch))
    for many in (
        jax.jit(jax.vmap(solve))(*batch),
        solve(*batch),  # batch axes passed directly
        jax.tree.map(lambda x: x.reshape(64, *x.shape[2:]), nested),
    ):
        bj.check(many)
        for name in ("value", "q", "policy"):
            np.testing.assert_allclose(getattr(many, name), getattr(single, name), rtol=1e-12, atol=1e-13)
    assert len(set(np.asarray(many.stats.iterations).tolist())) > 1  # they end at their own times


@pytest.mark.slow
def test_batches_that_share_what_they_can():
    _, rewards, _, temperatures = batch_of(4)
    solution = bj.solve(bj.MDP(PROCESS.dense, rewards, DISCOUNT), bj.KLDivergence(temperatures, PROCESS.reference))
    for i in range(4):
        value = solve_numpy("kl", PROCESS.dense, rewards[i], DISCOUNT, temperatures[i], PROCESS.reference)[0]
        np.testing.assert_allclose(solution.value[i], value, rtol=1e-10)


@pytest.mark.slow
def test_initial_value_of_a_batch():
    _, rewards, _, _ = batch_of(3)
    mdp = bj.MDP(PROCESS.dense, rewards, 0.9)
    cold = bj.solve(mdp, bj.ShannonEntropy(0.5), solver=bj.ValueIteration(1e-8))
    warm = bj.solve(mdp, bj.ShannonEntropy(0.5), solver=bj.ValueIteration(1e-8), initial_value=cold.value)
    np.testing.assert_array_equal(warm.stats.iterations, [1, 1, 1])


def compiled(name):
    """The library's own jitted function."""
    module, function = name.rsplit(".", 1)
    return getattr(importlib.import_module(f"bilevel_jax.{module}"), function)


def run_solve(number):
    process = PROCESS._replace(reward=PROCESS.reward * number, dense=np.roll(PROCESS.dense, int(10 * number), 0))
    mdp = make_mdp(process, 0.9 * number)
    bj.solve(mdp, bj.KLDivergence(number, PROCESS.reference), solver=bj.ValueIteration(number))
    bj.solve(mdp, bj.ShannonEntropy(number), solver=bj.PolicyIteration(None, int(10 * number)))


COUNTED = bj.BilevelProblem(
    lambda x: bj.MDP(PROCESS.dense, PROCESS.reward * x, 0.9), bj.ShannonEntropy(0.5), lambda x, s: x * s.value[0]
)


def run_hypergradient(number):
    bj.hypergradient(
        COUNTED, jnp.asarray(number), method=bj.Implicit(bj.ValueIteration(number), bj.GMRES(number)), with_error=False
    )


OPTIMIZER = optax.sgd(0.1)


def run_m_sobirl(number):
    synthetic = bj.problems.make("synthetic", dimension=3, discount=number, temperature=number, seed=int(10 * number))
    algorithm = bj.algorithms.m_sobirl(
        synthetic, OPTIMIZER, solver=bj.ValueIteration(number, int(20 * number)), adjoint=bj.Descent(number)
    )
    state = algorithm.init(jax.random.key(0), number * jnp.ones(3))
    for _ in range(3):  # the state that comes out is of the kind that went in
        state, _ = algorithm.step(jax.random.key(0), state)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "compilations"),
    [
        (run_solve, {"solvers.solve._solve": 2}),
        (run_hypergradient, {"hypergradient.compute._hypergradient": 1}),
        (run_m_sobirl, {"algorithms.base.initial_state": 1, "algorithms.base._step": 1}),
    ],
)
def test_new_numbers_do_not_recompile(run, compilations):
    for name in compilations:
        compiled(name).clear_cache()
    for number in (0.5, 0.7, 0.9):
        run(number)
        assert {name: compiled(name)._cache_size() for name in compilations} == compilations


@pytest.mark.slow
def test_a_weakly_typed_start_does_not_recompile():
    algorithm = bj.algorithms.m_sobirl(bj.problems.make("synthetic", dimension=3), OPTIMIZER)
    x, value, policy = jnp.full(3, 0.1), jnp.full(10, 1.0), jnp.full((10, 5), 0.2)
    assert x.weak_type
    state = algorithm.init(jax.random.key(0), x, initial_value=value, initial_policy=policy, initial_adjoint=value)
    compiled("algorithms.base._step").clear_cache()
    for _ in range(3):
        state, _ = algorithm.step(jax.random.key(0), state)
    assert compiled("algorithms.base._step")._cache_size() == 1


@pytest.mark.slow
def test_numbers_of_every_kind_share_a_compilation():
    # A Python float, a numpy number and an array: none is a new structure.
    compiled("solvers.solve._solve").clear_cache()
    for temperature in (0.5, 0.6, np.float64(0.7), np.array(0.8), jnp.asarray(0.9), 1):
        bj.solve(make_mdp(PROCESS), bj.ShannonEntropy(temperature))
    assert compiled("solvers.solve._solve")._cache_size() == 1


@pytest.mark.slow
def test_max_iterations_of_every_integer_type():
    for steps in (3, np.int64(3), np.int32(3), jnp.asarray(3)):
        solution = bj.solve(make_mdp(PROCESS), bj.ShannonEntropy(0.5), solver=bj.ValueIteration(0.0, steps))
        assert int(solution.stats.iterations) == 3
