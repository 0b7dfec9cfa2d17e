"""Backward induction against brute force, numpy, finite differences and simulation of the flow."""

import itertools

import equinox as eqx
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ACTIONS, KINDS, STATES

import bilevel_jax as bj

PROCESS = helpers.random_process(0)
HORIZON = 4
MASK = np.ones((STATES, ACTIONS), bool)
MASK[0, 0] = MASK[3, 1:] = False


def backward(kind, dense, reward, discount, temperature, reference, terminal):
    """value [H + 1, S], q, policy by a plain loop; every argument but kind and terminal has a time axis."""
    horizon = len(reward)
    value, q, policy = [terminal], [], []
    for h in reversed(range(horizon)):
        q.append(reward[h] + discount[h] * (dense[h] @ value[-1]))
        v, pi = helpers.conjugate_numpy(kind, q[-1], temperature[h], reference[h])
        value.append(v)
        policy.append(pi)
    return np.array(value[::-1]), np.array(q[::-1]), np.array(policy[::-1])


def varying(seed=0, horizon=HORIZON):
    """Everything of H processes, on a time axis; discounts up to 1, 0 for some pairs."""
    rng = np.random.default_rng(seed)
    processes = [helpers.random_process(seed + h) for h in range(horizon)]
    discount = rng.uniform(0.5, 1, (horizon, STATES, ACTIONS))
    discount[rng.uniform(size=discount.shape) < 0.1] = 0
    discount[0, 0] = 1
    return {
        "successor": np.stack([p.successor for p in processes]),
        "probability": np.stack([p.probability for p in processes]),
        "dense": np.stack([p.dense for p in processes]),
        "reward": np.stack([p.reward for p in processes]),
        "discount": discount,
        "temperature": rng.uniform(0.2, 1, horizon),
        "reference": np.stack([p.reference for p in processes]),
        "terminal": rng.normal(size=STATES),
        "initial": processes[0].initial,
    }


def solve_varying(kind, parts, layout="dense"):
    if layout == "dense":
        transition = bj.DenseTransition(parts["dense"])
    else:
        transition = bj.SuccessorTransition(parts["successor"], parts["probability"])
    return bj.solve_finite_horizon(
        bj.MDP(transition, parts["reward"], 0.0, parts["initial"]),
        helpers.make_regularizer(kind, parts["temperature"], parts["reference"]),
        time_varying=True,
        discount=parts["discount"],
        terminal_value=parts["terminal"],
    )


def assert_same(solution, expected, tolerance=1e-12):
    for got, want in zip((solution.value, solution.q, solution.policy), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("shannon", "successor"), ("kl", "dense"), pytest.param("tsallis", "dense", marks=pytest.mark.slow)],
)
def test_time_varying_agrees_with_numpy(kind, layout):
    parts = varying()
    solution = bj.check(solve_varying(kind, parts, layout))
    names = ("dense", "reward", "discount", "temperature", "reference", "terminal")
    expected = backward(kind, *(parts[name] for name in names))
    assert_same(solution, expected)
    assert np.abs(solution.value - expected[0]).max() <= solution.error_bound < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tsallis", *(kind for kind in KINDS[:2])])
def test_stationary_is_time_varying_with_the_same_steps(kind):
    mdp, regularizer = helpers.make_mdp(PROCESS), helpers.make_regularizer(kind, 0.3, PROCESS.reference)
    solution = bj.solve_finite_horizon(mdp, regularizer, HORIZON)

    def repeat(array):
        return np.broadcast_to(array, (HORIZON, *np.shape(array)))

    numbers = (PROCESS.dense, PROCESS.reward, 0.8, 0.3, PROCESS.reference)
    assert_same(solution, backward(kind, *(repeat(n) for n in numbers), np.zeros(STATES)))
    # Shared transition and regularizer, rewards on a time axis.
    mdp = mdp.replace(reward=repeat(PROCESS.reward), initial=None)
    again = bj.solve_finite_horizon(mdp, regularizer, time_varying=True)
    assert_same(again, (solution.value, solution.q, solution.policy), 0)


def test_unregularized_is_the_best_of_all_deterministic_policies():
    """Two states, two actions, three steps: 64 Markov policies, each rolled out as products of matrices."""
    rng = np.random.default_rng(3)
    horizon, states, actions = 3, 2, 2
    dense, reward = rng.dirichlet(np.ones(states), (states, actions)), rng.normal(size=(states, actions))
    terminal = rng.normal(size=states)
    best = np.full(states, -np.inf)
    for choice in itertools.product(range(actions), repeat=horizon * states):
        policy = np.reshape(choice, (horizon, states))
        reach, total = np.eye(states), np.zeros(states)
        for h in range(horizon):
            rows = np.arange(states), policy[h]
            total = total + reach @ reward[rows]
            reach = reach @ dense[rows]
        best = np.maximum(best, total + reach @ terminal)
    mdp = bj.MDP(dense, reward, 0.0)
    solution = bj.solve_finite_horizon(mdp, bj.Unregularized(), horizon, discount=1, terminal_value=terminal)
    np.testing.assert_allclose(solution.value[0], best, atol=1e-13)
    close = bj.solve_finite_horizon(mdp, bj.ShannonEntropy(1e-4), horizon, discount=1, terminal_value=terminal)
    np.testing.assert_allclose(close.value[0], best, atol=3 * 1e-4 * np.log(actions) + 1e-12)


@pytest.mark.slow
def test_long_horizons_go_to_the_discounted_solution():
    mdp, regularizer = helpers.make_mdp(PROCESS), bj.ShannonEntropy(0.3)
    limit = bj.solve(mdp, regularizer)
    long = bj.solve_finite_horizon(mdp, regularizer, 200)
    np.testing.assert_allclose(long.value[0], limit.value, atol=1e-12)
    np.testing.assert_allclose(long.policy[0], limit.policy, atol=1e-12)


@pytest.mark.slow
def test_action_masks_are_actions_that_are_absent():
    mdp = bj.MDP(PROCESS.dense, PROCESS.reward, 0.8, available=MASK)
    solution = bj.check(bj.solve_finite_horizon(mdp, bj.ShannonEntropy(0.3), HORIZON))
    value = np.zeros(STATES)
    for h in reversed(range(HORIZON)):
        q = PROCESS.reward + 0.8 * (PROCESS.dense @ value)
        value = np.array([0.3 * np.log(np.exp(q[s, MASK[s]] / 0.3).sum()) for s in range(STATES)])
        np.testing.assert_allclose(solution.value[h], value, atol=1e-13)
    assert (np.asarray(solution.policy)[:, ~MASK] == 0).all()
    total = jax.grad(
        lambda m: bj.solve_finite_horizon(m, bj.ShannonEntropy(0.3), HORIZON).value[0].sum(), allow_int=True
    )
    gradient = total(mdp)
    for leaf in (gradient.reward, gradient.transition.probability, gradient.discount):
        assert np.isfinite(leaf).all()
    assert (np.asarray(gradient.reward)[~MASK] == 0).all()
    # In a batch over time, with a mask for each time.
    masks = np.stack([MASK, np.ones_like(MASK)])
    rewards = np.stack([PROCESS.reward] * 2)
    both = bj.solve_finite_horizon(
        bj.MDP(PROCESS.dense, rewards, 0.8, available=masks), bj.ShannonEntropy(0.3), time_varying=True
    )
    full = bj.solve_finite_horizon(helpers.make_mdp(PROCESS), bj.ShannonEntropy(0.3), 1)
    np.testing.assert_allclose(both.value[1], full.value[0], atol=1e-14)
    assert (np.asarray(both.policy)[0][~MASK] == 0).all()


# Derivatives: numbers [H, ...] of a successor process, all differentiated at once.

FLOATS = ("probability", "reward", "discount", "temperature", "reference", "terminal")
WEIGHT = np.random.default_rng(5).normal(size=(HORIZON + 1, STATES))


def objective(floats, kind):
    parts = varying() | floats
    solution = solve_varying(kind, parts, "successor")
    return jnp.sum(WEIGHT * solution.value**2) + jnp.sum(WEIGHT[1:, :, None] * jnp.sin(solution.policy))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kl", *(kind for kind in ("shannon", "tsallis"))])
def test_derivatives_agree_with_finite_differences(kind):
    parts = {name: jnp.asarray(varying()[name]) for name in FLOATS}
    direction = {name: jnp.asarray(leaf) for name, leaf in helpers.random_like(1, parts).items()}
    # Inside the domain: references and probabilities keep their sums, discounts of 1 and 0 stay.
    for name, axis in (("reference", -1), ("probability", 1)):
        direction[name] = 0.1 * (direction[name] - direction[name].mean(axis, keepdims=True))
    direction["discount"] = jnp.where((parts["discount"] > 0) & (parts["discount"] < 1), 0.1 * direction["discount"], 0)
    direction["temperature"] = 0.1 * direction["temperature"]
    value = jax.jit(lambda floats: objective(floats, kind))
    gradient_function = jax.jit(jax.grad(lambda floats: objective(floats, kind)))
    gradient = gradient_function(parts)
    expected = helpers.central_difference(value, parts, direction, 1e-4)
    along = helpers.flat(gradient) @ helpers.flat(direction)
    np.testing.assert_allclose(along, expected[0], rtol=1e-7)
    np.testing.assert_allclose(jax.jvp(value, (parts,), (direction,))[1], along, rtol=1e-10)
    if kind == "kl":  # second order in the slow tests
        return
    second = helpers.flat(jax.jvp(gradient_function, (parts,), (direction,))[1])
    differences = helpers.central_difference(gradient_function, parts, direction, 1e-4)
    np.testing.assert_allclose(second, differences, rtol=1e-6, atol=1e-6 * np.abs(differences).max())


@pytest.mark.slow
def test_batches_are_single_problems():
    rng = np.random.default_rng(2)
    rewards, temperatures = rng.normal(size=(3, STATES, ACTIONS)), np.array([0.2, 0.5, 1.0])
    terminal = rng.normal(size=STATES)
    batch = bj.solve_finite_horizon(
        bj.MDP(PROCESS.dense, rewards, 0.8), bj.ShannonEntropy(temperatures), HORIZON, terminal_value=terminal
    )
    assert batch.value.shape == (3, HORIZON + 1, STATES)
    assert batch.result.shape == batch.error_bound.shape == (3,)
    for i in range(3):
        one = bj.solve_finite_horizon(
            bj.MDP(PROCESS.dense, rewards[i], 0.8), bj.ShannonEntropy(temperatures[i]), HORIZON, terminal_value=terminal
        )
        assert_same(jax.tree.map(lambda leaf, i=i: leaf[i], batch), (one.value, one.q, one.policy), 1e-13)
    # Batch and time: temperatures [H] shared over the batch.
    both = rng.normal(size=(3, HORIZON, STATES, ACTIONS))
    heat = np.linspace(0.2, 1, HORIZON)
    batch = bj.solve_finite_horizon(bj.MDP(PROCESS.dense, both, 0.8), bj.ShannonEntropy(heat), time_varying=True)
    for i in range(3):
        one = bj.solve_finite_horizon(bj.MDP(PROCESS.dense, both[i], 0.8), bj.ShannonEntropy(heat), time_varying=True)
        assert_same(jax.tree.map(lambda leaf, i=i: leaf[i], batch), (one.value, one.q, one.policy), 1e-13)
    mapped = jax.vmap(
        lambda r: bj.solve_finite_horizon(bj.MDP(PROCESS.dense, r, 0.8), bj.ShannonEntropy(heat), time_varying=True)
    )(both)
    np.testing.assert_allclose(mapped.value, batch.value, atol=1e-13)


def test_float32_stays_float32():
    mdp = bj.MDP(PROCESS.dense.astype(np.float32), PROCESS.reward.astype(np.float32), np.float32(0.8))
    solution = bj.check(bj.solve_finite_horizon(mdp, bj.ShannonEntropy(np.float32(0.3)), 50, discount=1))
    assert {leaf.dtype for leaf in (solution.value, solution.q, solution.policy)} == {jnp.dtype(jnp.float32)}
    exact = bj.solve_finite_horizon(helpers.make_mdp(PROCESS), bj.ShannonEntropy(0.3), 50, discount=1)
    assert np.abs(np.asarray(solution.value) - np.asarray(exact.value)).max() <= float(solution.error_bound)


def test_what_is_not_finite_is_reported():
    mdp = helpers.make_mdp(PROCESS)
    bad = eqx.tree_at(lambda m: m.reward, mdp, mdp.reward.at[2, 1].set(jnp.nan))
    solution = bj.solve_finite_horizon(bad, bj.ShannonEntropy(0.3), HORIZON)
    assert solution.result == bj.Result.NOT_FINITE
    with pytest.raises(bj.ConvergenceError, match="solve_finite_horizon: a value was not finite"):
        bj.check(solution)


@pytest.mark.slow
def test_memory_of_the_gradient_does_not_grow_with_successors():
    """Reverse mode in transition and reward keeps q and little else, whatever K is."""
    states, actions, horizon, rng = 200, 3, 40, np.random.default_rng(0)
    unit = horizon * states * actions * 8

    def kept(slots):
        probability = rng.dirichlet(np.ones(slots), (states, actions)).transpose(2, 0, 1)
        successor = rng.integers(states, size=probability.shape)
        mdp = bj.MDP(bj.SuccessorTransition(successor, probability), rng.normal(size=(states, actions)), 0.9)

        def value(mdp):
            return bj.solve_finite_horizon(mdp, bj.ShannonEntropy(0.3), horizon).value[0].sum()

        gradient = jax.jit(jax.grad(value, allow_int=True))
        return gradient.lower(mdp).compile().memory_analysis().temp_size_in_bytes / unit

    few, many = kept(4), kept(16)
    assert few < 3
    assert many - few < 2  # 12 more slots kept at each step would be 12 more


def test_occupancy_is_the_flow_and_pays_the_value():
    parts = varying()
    solution = solve_varying("kl", parts)
    mdp = bj.MDP(parts["dense"], parts["reward"], 0.0, parts["initial"])
    visits = bj.finite_horizon_occupancy(mdp, solution.policy, time_varying=True, discount=parts["discount"])
    states, total = parts["initial"], 0.0
    penalty = bj.KLDivergence(parts["temperature"][:, None], parts["reference"]).penalty(solution.policy)
    for h in range(HORIZON):
        np.testing.assert_allclose(visits[h], states[:, None] * solution.policy[h], atol=1e-14)
        total += (visits[h] * parts["reward"][h]).sum() - states @ penalty[h]
        states = np.einsum("sa,saj->j", visits[h] * parts["discount"][h], parts["dense"][h])
    np.testing.assert_allclose(total + states @ parts["terminal"], parts["initial"] @ solution.value[0], atol=1e-12)
    probabilities = bj.finite_horizon_occupancy(mdp, solution.policy, time_varying=True, discount=1)
    np.testing.assert_allclose(probabilities.sum((1, 2)), 1, atol=1e-13)


def test_occupancy_derivatives_batches_and_masks():
    policy = np.random.default_rng(4).dirichlet(np.ones(ACTIONS), (HORIZON, STATES))
    arguments = {"p": PROCESS.probability, "policy": policy, "discount": np.array(0.7), "initial": PROCESS.initial}
    direction = helpers.random_like(6, arguments)
    direction = jax.tree.map(lambda leaf: 0.01 * leaf, direction)
    direction |= {name: direction[name] - direction[name].mean(0) for name in ("p", "initial")}

    @jax.jit
    def visits(a):
        mdp = bj.MDP(bj.SuccessorTransition(PROCESS.successor, a["p"]), PROCESS.reward, a["discount"], a["initial"])
        return bj.finite_horizon_occupancy(mdp, a["policy"])

    _, tangent = jax.jvp(visits, (arguments,), (direction,))
    np.testing.assert_allclose(tangent.ravel(), helpers.central_difference(visits, arguments, direction), atol=1e-10)
    cotangent = helpers.random_like(7, tangent)
    _, pull = jax.vjp(visits, arguments)
    np.testing.assert_allclose(
        helpers.flat(pull(jnp.asarray(cotangent))[0]) @ helpers.flat(direction), (cotangent * tangent).sum(), rtol=1e-9
    )
    batch = bj.MDP(PROCESS.dense, np.stack([PROCESS.reward] * 2), np.array([0.7, 0.9]), PROCESS.initial)
    both = bj.finite_horizon_occupancy(batch, np.stack([policy] * 2))
    np.testing.assert_allclose(both[0], visits(arguments), atol=1e-14)
    masked = bj.MDP(PROCESS.dense, PROCESS.reward, 0.8, available=MASK)
    with pytest.raises(bj.InputError, match="not available"):
        bj.finite_horizon_occupancy(masked, policy)
    assert np.isnan(jax.jit(bj.finite_horizon_occupancy)(masked, policy)).any()
    allowed = helpers.normalize(policy * MASK, -1)
    assert np.isfinite(jax.jit(bj.finite_horizon_occupancy)(masked, allowed)).all()


@pytest.mark.parametrize(
    ("match", "arguments"),
    [
        ("horizon: expected an integer", {}),
        ("horizon: expected an integer", {"horizon": 0}),
        ("horizon: expected an integer", {"horizon": 2.5}),
        ("time as the last batch axis", {"time_varying": True}),
        ("discount: must be in 0 to 1, got 1.5", {"horizon": 2, "discount": 1.5}),
        ("discount: must be in 0 to 1, got -0.5", {"horizon": 2, "discount": -0.5}),
        ("discount: expected a number", {"horizon": 2, "discount": np.ones(STATES)}),
        ("terminal_value: expected shape", {"horizon": 2, "terminal_value": np.ones(STATES + 1)}),
        ("terminal_value.*is nan", {"horizon": 2, "terminal_value": np.full(STATES, np.nan)}),
        ("time_varying: expected bool", {"horizon": 2, "time_varying": 1}),
    ],
)
def test_bad_input_is_named(match, arguments):
    with pytest.raises(bj.InputError, match=match):
        bj.solve_finite_horizon(helpers.make_mdp(PROCESS), bj.ShannonEntropy(0.3), **arguments)


def test_horizons_and_policies_that_disagree_are_named():
    mdp = bj.MDP(PROCESS.dense, np.stack([PROCESS.reward] * 3), 0.8)
    with pytest.raises(bj.InputError, match="horizon: 4 disagrees"):
        bj.solve_finite_horizon(mdp, bj.ShannonEntropy(0.3), 4, time_varying=True)
    with pytest.raises(bj.InputError, match=r"policy: expected shape \[H, S, A\]"):
        bj.finite_horizon_occupancy(mdp, PROCESS.reference)
    with pytest.raises(bj.InputError, match=r"policy: expected shape \[3, 2, 6, 3\]"):
        bj.finite_horizon_occupancy(mdp, np.stack([PROCESS.reference] * 2))
    with pytest.raises(bj.InputError, match="mdp: expected MDP"):
        bj.solve_finite_horizon(None, bj.ShannonEntropy(0.3), 4)  # type: ignore[arg-type]
