"""Average reward: limits of the discounted problem, closed forms, brute force, bounds, derivatives, many classes."""

import functools
import itertools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ACTIONS, KINDS, STATES
from hypothesis import given, settings
from hypothesis import strategies as st

import bilevel_jax as bj

PROCESS = helpers.random_process(0)
MASK = np.ones((STATES, ACTIONS), bool)
MASK[0, 0] = MASK[3, 1:] = False
SOLVERS = {"newton": bj.RelativePolicyIteration(), "sweeps": bj.RelativeValueIteration()}


def gain_numpy(matrix, reward):
    """(gain, bias of mean 0 under nu = uniform) of one chain, from its stationary distribution and least squares."""
    states = len(matrix)
    system = np.vstack([matrix.T - np.eye(states), np.ones(states)])
    mu = np.linalg.lstsq(system, np.append(np.zeros(states), 1.0), rcond=None)[0]
    system = np.vstack([np.eye(states) - matrix, np.full(states, 1 / states)])
    return mu @ reward, np.linalg.lstsq(system, np.append(reward - mu @ reward, 0.0), rcond=None)[0]


@pytest.mark.slow
@settings(deadline=None, max_examples=15, derandomize=True)
@given(seed=st.integers(0, 10_000), temperature=st.floats(0.01, 10), name=st.sampled_from(sorted(SOLVERS)))
def test_solutions_are_right(seed, temperature, name):
    """g + h = T h and the normalization; the gain is that of the policy by its stationary distribution."""
    process = helpers.random_process(seed)
    mdp, regularizer = helpers.make_mdp(process), bj.ShannonEntropy(temperature)
    solution = bj.check(bj.solve_average_reward(mdp, regularizer, solver=SOLVERS[name]))
    gain, bias, policy = (np.asarray(x) for x in (solution.gain, solution.bias, solution.policy))
    q = process.reward + process.dense @ bias
    scale = np.abs(q).max() + temperature
    np.testing.assert_allclose(solution.q, q, atol=1e-13 * scale)
    value, expected = helpers.conjugate_numpy("shannon", q, temperature, None)
    np.testing.assert_allclose(value, gain + bias, atol=1e-12 * scale)
    np.testing.assert_allclose(policy, expected, atol=1e-12 * scale / temperature)
    np.testing.assert_allclose(process.initial @ bias, 0, atol=1e-13 * scale)
    matrix = np.einsum("sa,saj->sj", policy, process.dense)
    paid = (policy * process.reward).sum(1) - np.asarray(regularizer.penalty(policy))
    by_chain, by_chain_bias = gain_numpy(matrix, paid)
    assert abs(gain - by_chain) <= solution.stats.error_bound + 1e-13 * scale
    np.testing.assert_allclose(bias - bias.mean(), by_chain_bias, atol=1e-10 * scale)
    assert solution.stats.lower <= gain <= solution.stats.upper


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kl", "shannon", "tsallis"])
def test_limits_of_the_discounted_problem(kind):
    """(1 - discount) V -> g and V - g / (1 - discount) -> h up to a constant, with an error like 1 - discount."""
    regularizer = helpers.make_regularizer(kind, 0.3, PROCESS.reference)
    solution = bj.solve_average_reward(helpers.make_mdp(PROCESS), regularizer)
    for short in (1e-3, 1e-5):
        value = np.asarray(bj.solve(helpers.make_mdp(PROCESS, 1 - short), regularizer).value)
        np.testing.assert_allclose(short * value, solution.gain, atol=10 * short)
        np.testing.assert_allclose(value - PROCESS.initial @ value, solution.bias, atol=10 * short)


@pytest.mark.slow
def test_closed_form_of_independent_transitions():
    """Transitions that forget the state: h[s] = Omega*(r[s]) up to a constant, g its mean."""
    rng = np.random.default_rng(1)
    law, reward = rng.dirichlet(np.ones(STATES)), rng.normal(size=(STATES, ACTIONS))
    dense = np.broadcast_to(law, (STATES, ACTIONS, STATES))
    solution = bj.solve_average_reward(bj.MDP(dense, reward, 0.5, law), bj.ShannonEntropy(0.3))
    value, policy = helpers.conjugate_numpy("shannon", reward, 0.3, None)
    np.testing.assert_allclose(solution.gain, law @ value, atol=1e-14)
    np.testing.assert_allclose(solution.bias, value - law @ value, atol=1e-14)
    np.testing.assert_allclose(solution.policy, policy, atol=1e-13)


@pytest.mark.parametrize("name", SOLVERS)
def test_unregularized_is_the_best_of_all_policies(name):
    process = helpers.random_process(2, states=4, actions=2)
    rows = np.arange(4)
    gains = [
        gain_numpy(process.dense[rows, list(choice)], process.reward[rows, list(choice)])[0]
        for choice in itertools.product(range(2), repeat=4)
    ]
    solution = bj.check(bj.solve_average_reward(helpers.make_mdp(process), bj.Unregularized(), solver=SOLVERS[name]))
    np.testing.assert_allclose(solution.gain, max(gains), atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLVERS)
def test_periodic_chains(name):
    """A cycle through which one hurries or not at a cost: period 5 under the best policy, which always hurries."""
    states = 5
    forward = np.roll(np.eye(states), 1, 1)
    dense, reward = np.stack([forward, np.eye(states)], 1), np.stack([np.arange(5.0), -np.ones(states)], 1)
    mdp = bj.MDP(dense, reward, 0.5)
    solution = bj.check(bj.solve_average_reward(mdp, bj.Unregularized(), solver=SOLVERS[name]))
    np.testing.assert_allclose(solution.gain, 2, atol=1e-12)
    undamped = bj.RelativeValueIteration(damping=0.0, max_iterations=500)
    assert bj.solve_average_reward(mdp, bj.Unregularized(), solver=undamped).result == bj.Result.MAX_ITERATIONS


@pytest.mark.slow
@pytest.mark.parametrize("name", ["newton", "sweeps"])
def test_several_classes_do_not_converge_and_are_bounded(name):
    """Two closed halves with gains 1 and 3: no one gain, and the bounds hold both."""
    dense = np.zeros((4, 1, 4))
    dense[:2, 0, :2] = dense[2:, 0, 2:] = 0.5
    reward = np.array([[0.0], [2.0], [2.5], [3.5]])
    solver = type(SOLVERS[name])(max_iterations=300)
    mdp = bj.MDP(dense, reward, 0.5)
    solution = bj.solve_average_reward(mdp, bj.ShannonEntropy(0.3), solver=solver)
    assert solution.result == bj.Result.MAX_ITERATIONS
    assert solution.stats.lower <= 1 < 3 <= solution.stats.upper
    np.testing.assert_allclose([solution.stats.lower, solution.stats.upper], [1, 3], atol=1e-9)
    with pytest.raises(bj.ConvergenceError, match="solve_average_reward: the maximum number of iterations"):
        bj.check(solution)
    # With equal gains it does converge, but the bias, and derivatives, are not unique.
    equal = mdp.replace(reward=reward * 0)
    assert bj.solve_average_reward(equal, bj.ShannonEntropy(0.3), solver=solver).result == bj.Result.CONVERGED
    gradient = jax.grad(lambda m: bj.solve_average_reward(m, bj.ShannonEntropy(0.3), solver=solver).gain)(equal)
    assert np.isnan(gradient.reward).all()


@functools.cache
def solution_of(kind, name):
    """(gain, bias, policy) as a jitted function of all numbers of a successor process."""

    def function(a):
        mdp = bj.MDP(bj.SuccessorTransition(PROCESS.successor, a["p"]), a["reward"], 0.5, a["initial"])
        regularizer = helpers.make_regularizer(kind, a["temperature"], a["reference"])
        solution = bj.solve_average_reward(mdp, regularizer, solver=SOLVERS[name])
        return solution.gain, solution.bias, solution.policy

    return jax.jit(function)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name", "second_order"),
    [("shannon", "sweeps", False), *((kind, "newton", kind != "tsallis") for kind in KINDS)],
)
def test_derivatives_agree_with_finite_differences(kind, name, second_order):
    arguments = {
        "p": PROCESS.probability,
        "reward": PROCESS.reward,
        "temperature": np.array(0.5),
        "reference": PROCESS.reference,
        "initial": PROCESS.initial,
    }
    direction = jax.tree.map(lambda leaf: 0.01 * leaf, helpers.random_like(2, arguments))
    for part, axis in (("p", 0), ("reference", -1), ("initial", -1)):
        direction[part] = direction[part] - direction[part].mean(axis, keepdims=True)
    function = solution_of(kind, name)
    out, tangent = jax.jvp(function, (arguments,), (direction,))
    assert all(np.abs(leaf).max() > 1e-4 for leaf in tangent)
    differences = helpers.central_difference(function, arguments, direction, 0.05)
    np.testing.assert_allclose(helpers.flat(tangent), differences, atol=1e-8)
    cotangent = jax.tree.map(jnp.asarray, helpers.random_like(3, out))
    pull = jax.jit(lambda a: jax.vjp(function, a)[1](cotangent)[0])
    along = helpers.flat(pull(arguments)) @ helpers.flat(direction)
    np.testing.assert_allclose(along, helpers.flat(cotangent) @ helpers.flat(tangent), rtol=1e-8)
    if not second_order:
        return
    _, second = jax.jvp(pull, (arguments,), (direction,))
    differences = helpers.central_difference(pull, arguments, direction, 0.05)
    np.testing.assert_allclose(helpers.flat(second), differences, atol=1e-6 * np.abs(differences).max())


@pytest.mark.slow
def test_the_gradient_of_the_gain_is_the_stationary_distribution():
    mdp, regularizer = helpers.make_mdp(PROCESS), bj.ShannonEntropy(0.3)
    gradient = jax.grad(lambda m: bj.solve_average_reward(m, regularizer).gain)(mdp)
    policy = bj.solve_average_reward(mdp, regularizer).policy
    mu = bj.stationary_distribution(mdp, policy)
    np.testing.assert_allclose(gradient.reward, mu[:, None] * policy, atol=1e-12)
    assert gradient.discount == 0
    np.testing.assert_allclose(gradient.initial, 0, atol=1e-14)


@pytest.mark.slow
def test_batches_masks_and_starts():
    rewards, temperatures = np.random.default_rng(3).normal(size=(2, STATES, ACTIONS)), np.array([0.2, 0.9])
    mdp = bj.MDP(PROCESS.dense, rewards, 0.5, PROCESS.initial, available=MASK)
    batch = bj.check(bj.solve_average_reward(mdp, bj.ShannonEntropy(temperatures)))
    assert batch.gain.shape == batch.stats.lower.shape == (2,)
    assert (np.asarray(batch.policy)[:, ~MASK] == 0).all()
    for i in range(2):
        one = bj.MDP(PROCESS.dense, rewards[i], 0.5, PROCESS.initial, available=MASK)
        start = np.random.default_rng(4).normal(size=STATES)
        single = bj.solve_average_reward(
            one, bj.ShannonEntropy(temperatures[i]), solver=SOLVERS["sweeps"], initial_bias=start
        )
        np.testing.assert_allclose(single.gain, batch.gain[i], atol=1e-13)
        np.testing.assert_allclose(single.bias, batch.bias[i], atol=1e-11)
    # As the actions that are there: rewards so low that the others are never taken.
    low = np.where(MASK, rewards, -1e3)
    absent = bj.solve_average_reward(mdp.replace(reward=low, available=None), bj.ShannonEntropy(temperatures))
    np.testing.assert_allclose(absent.gain, batch.gain, atol=1e-12)


@pytest.mark.slow
def test_float32_many_states_and_tolerances():
    process = helpers.random_process(5, states=600)
    exact = bj.solve_average_reward(
        helpers.make_mdp(process, layout="successor"), bj.ShannonEntropy(0.3), solver=SOLVERS["sweeps"]
    )
    krylov = bj.check(bj.solve_average_reward(helpers.make_mdp(process, layout="successor"), bj.ShannonEntropy(0.3)))
    np.testing.assert_allclose(krylov.bias, exact.bias, atol=1e-10)
    transition = bj.SuccessorTransition(process.successor, process.probability.astype(np.float32))
    mdp = bj.MDP(transition, process.reward.astype(np.float32), np.float32(0.5))
    regularizer = bj.ShannonEntropy(np.float32(0.3))
    for tolerance, result in (
        (1e-3, bj.Result.CONVERGED),
        (None, bj.Result.CONVERGED),
        (1e-12, bj.Result.PRECISION_LIMIT),
    ):
        single = bj.solve_average_reward(mdp, regularizer, solver=bj.RelativeValueIteration(tolerance))
        assert single.result == result
        assert single.gain.dtype == single.bias.dtype == jnp.float32
        error = abs(float(single.gain) - float(exact.gain))
        assert error <= float(single.stats.error_bound) <= (tolerance if tolerance == 1e-3 else 1e-4)


def test_what_is_not_finite_is_reported():
    mdp = helpers.make_mdp(PROCESS)
    solve = jax.jit(lambda r: bj.solve_average_reward(mdp.replace(reward=r), bj.ShannonEntropy(0.3)))
    assert solve(PROCESS.reward).result == bj.Result.CONVERGED
    for bad in (np.nan, np.inf):
        assert solve(np.where(MASK, PROCESS.reward, bad)).result == bj.Result.NOT_FINITE


def test_bad_input_is_named():
    mdp, regularizer = helpers.make_mdp(PROCESS), bj.ShannonEntropy(0.3)
    with pytest.raises(bj.InputError, match=r"discount: shape .* has one for each pair"):
        bj.solve_average_reward(helpers.make_mdp(PROCESS, np.full((STATES, ACTIONS), 0.5)), regularizer)
    with pytest.raises(bj.InputError, match="solver: expected AverageRewardSolver or None, got PolicyIteration"):
        bj.solve_average_reward(mdp, regularizer, solver=bj.PolicyIteration())  # type: ignore[arg-type]
    with pytest.raises(bj.InputError, match="initial_bias: expected shape"):
        bj.solve_average_reward(mdp, regularizer, initial_bias=np.zeros(2))  # type: ignore[arg-type]
    with pytest.raises(bj.InputError, match="damping must be below 1, got 1"):
        bj.RelativeValueIteration(damping=1.0)
    with pytest.raises(bj.InputError, match="tolerance must be at least 0"):
        bj.RelativePolicyIteration(tolerance=-1.0)


@pytest.mark.slow
@pytest.mark.few(1)
@pytest.mark.parametrize("solver", [bj.RelativePolicyIteration, bj.RelativeValueIteration])
@pytest.mark.parametrize("gain", [1.0, 1e-2, 0.0])
def test_gains_far_below_the_rewards(solver, gain):
    """A chain that mixes expects the same everywhere in the end: that is no reason to refuse its gain."""
    rng = np.random.default_rng(0)
    states = 50
    p, reward = rng.dirichlet(np.ones(states), (states, 1)), rng.normal(size=(states, 1))
    system = np.vstack([p[:, 0].T - np.eye(states), np.ones(states)])
    visits = np.linalg.lstsq(system, np.r_[np.zeros(states), 1], rcond=None)[0]
    mdp = bj.MDP(p, reward - visits @ reward[:, 0] + gain, 0.9)
    for tolerance in (None, 1e-6):
        made = bj.check(bj.solve_average_reward(mdp, bj.Unregularized(), solver=solver(tolerance=tolerance)))
        assert abs(float(made.gain) - gain) <= float(made.stats.error_bound) <= (tolerance or 1e-13)
        assert int(made.stats.iterations) < 40


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_gain_of_a_way_to_a_goal(dtype):
    states = 20
    p = np.eye(states, k=1, dtype=dtype)
    p[-1, -1] = 1
    reward = np.r_[-np.ones(states - 1, dtype), 0][:, None]
    made = bj.check(bj.solve_average_reward(bj.MDP(p[:, None], reward, dtype(0.9)), bj.Unregularized()))
    assert abs(float(made.gain)) <= float(made.stats.error_bound) <= 1e-5


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [10, 100, 10000])
@pytest.mark.parametrize("solver", [bj.RelativeValueIteration, bj.RelativePolicyIteration])
def test_gains_near_the_smallest_normal_number(solver, size, dtype):
    """What is lost below that number is no excuse for all of a gain: as right as the same gain of ordinary size."""
    tiny, states = np.finfo(dtype).tiny, 4
    for seed in range(3):
        rng = np.random.default_rng(seed)
        p = rng.dirichlet(np.ones(states), (states, 2)).astype(dtype)
        p /= p.sum(-1, keepdims=True)
        reward = rng.normal(size=(states, 2)).astype(dtype)
        of_ordinary_size = bj.check(bj.solve_average_reward(bj.MDP(p, reward, dtype(0.9)), bj.Unregularized()))
        found = bj.solve_average_reward(
            bj.MDP(p, reward * dtype(size) * tiny, dtype(0.9)), bj.Unregularized(), solver=solver()
        )
        right = float(of_ordinary_size.gain) * size * float(tiny)
        lost = 8 * (states + 4) * float(tiny)
        assert abs(float(found.gain) - right) <= float(found.stats.error_bound) + float(tiny)
        if int(found.result) == bj.Result.CONVERGED:
            assert abs(float(found.gain) - right) <= 0.02 * size * float(tiny) + lost
