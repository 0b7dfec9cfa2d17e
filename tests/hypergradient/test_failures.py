"""Hard cases: what `hypergradient` reports, and whether its gradient and `error` can be believed (docs/failures.md).

The reference is the implicit function theorem in numpy, refined in long double.
"""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ACTIONS, KINDS, STATES, conjugate_numpy, flat, make_regularizer, random_process

import bilevel_jax as bj

pytestmark = pytest.mark.slow  # hard cases, which compile much

LONG = np.longdouble
PROCESS = random_process(0)
EVEN = np.full((STATES, ACTIONS), 1 / ACTIONS)
GMRES = bj.Implicit(adjoint=bj.GMRES())
NOT_FINITE, MAX_ITERATIONS = bj.Result.NOT_FINITE, bj.Result.MAX_ITERATIONS


class Case(bj.Problem):
    """x is reward[S, A] and temperature; phi(x) = sum weights pi + sum of_value V. All numbers are leaves."""

    kernel: Any
    discount: Any
    weights: Any
    of_value: Any
    reference: Any
    available: Any = None
    kind: str = eqx.field(default="shannon", static=True)

    def mdp(self, x):
        return bj.MDP(self.kernel, x["reward"], self.discount, available=self.available)

    def regularizer(self, x):
        return make_regularizer(self.kind, x["temperature"], self.reference)

    def objective(self, x, solution):
        return jnp.sum(self.weights * solution.policy) + jnp.sum(self.of_value * solution.value)


def make(kind="shannon", discount=0.9, seed=0, kernel=PROCESS.dense, reference=PROCESS.reference, **fields):
    rng = np.random.default_rng(seed)
    fields = {"weights": rng.normal(size=kernel.shape[:2]), "of_value": rng.normal(size=len(kernel))} | fields
    return Case(kernel, np.float64(discount), reference=reference, kind=kind, **fields)


def at(temperature=0.5, reward=PROCESS.reward):
    return {"reward": np.asarray(reward), "temperature": np.float64(temperature)}


def refine(x, residual, solve):
    """x + solve(residual(x)) + ... until the residual is rounding."""
    for _ in range(40):
        gap = residual(x)
        x = x + solve(x, gap.astype(float))
        if np.abs(gap).max() <= 1e3 * np.finfo(LONG).eps * np.abs(x).max():
            return x
    raise AssertionError("the reference did not converge")


def truth(case, x, near=None):
    """(phi, gradient, policy [S, A]): Newton, from V[S] `near` if given, then the adjoint."""
    numbers = case.kernel, case.discount, case.weights, case.of_value, case.reference, x["reward"], x["temperature"]
    kernel, discount, weights, of_value, reference, reward, temperature = (np.asarray(n).astype(LONG) for n in numbers)
    reward = reward if case.available is None else np.where(case.available, reward, -1e9)

    def look(value):
        q = reward + discount * np.einsum("saj,j->sa", kernel, value)
        backup, policy = conjugate_numpy(case.kind, q, temperature, reference)
        return q - backup[:, None], backup, policy, np.eye(len(q)) - discount * np.einsum("sa,saj->sj", policy, kernel)

    start = np.zeros(len(reward), LONG) if near is None else np.asarray(near).astype(LONG)
    newton = lambda value, gap: np.linalg.solve(look(value)[3].astype(float), gap)  # noqa: E731
    value = refine(start, lambda value: look(value)[1] - value, newton)
    advantage, _, policy, system = look(value)
    on = policy > 0 if case.kind == "tsallis" else policy
    of_q = on * (weights - np.sum(on * weights, 1, keepdims=True) / np.sum(on, 1, keepdims=True)) / temperature
    of_v = of_value + discount * np.einsum("sa,saj->j", of_q, kernel)
    inverse = np.linalg.inv(system.T.astype(float))
    w = refine(np.zeros(len(reward), LONG), lambda w: of_v - system.T @ w, lambda w, gap: inverse @ gap)
    of_temperature = -(np.sum(of_q * advantage) + w @ np.sum(policy * advantage, 1)) / temperature
    gradient = {"reward": of_q + w[:, None] * policy, "temperature": of_temperature}
    return np.sum(weights * policy) + of_value @ value, gradient, policy


def off_by(case, x, made, near=None):
    """The gradient's relative error, which `error` must cover, and `error` in the same units."""
    want = truth(case, x, near)[1]
    want = np.append(np.ravel(want["reward"]), want["temperature"]).astype(float)
    off = np.linalg.norm(flat(made.gradient) - want)
    assert np.isfinite(made.value)
    assert off <= float(made.error), (off, float(made.error))
    return float(off / np.linalg.norm(want)), float(made.error) / float(np.linalg.norm(want))


def codes(made):
    return int(made.solution.result), int(made.stats.result)


def element(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


# Discounts near 1, and adjoint solvers that do not get there


def test_discounts_near_one():
    gaps, x = np.array([1e-6, 1e-9, 1e-12]), at()
    run = lambda discount: bj.hypergradient(eqx.tree_at(lambda c: c.discount, make(), discount), x)  # noqa: E731
    many = bj.check(jax.jit(jax.vmap(run))(1 - gaps))
    for i, gap in enumerate(gaps):
        for made in (element(many, i), bj.check(run(1 - gap))):
            off, error = off_by(make(discount=1 - gap), x, made)
            assert 1e-3 * error < off
            assert error <= 100 * np.finfo(float).eps / gap


@pytest.mark.parametrize("kind", KINDS)
def test_the_discount_next_to_one(kind):
    # I - discount P is singular in floats: a code, or a bound that says that no digit is right.
    for seed in range(3):
        process = random_process(seed)
        made = bj.hypergradient(make(kind, np.nextafter(1, 0), kernel=process.dense), at(reward=process.reward))
        if int(made.solution.result) == bj.Result.CONVERGED:
            assert float(made.error) >= np.linalg.norm(flat(made.gradient))
        else:
            with pytest.raises(bj.ConvergenceError, match=r"solve: (a value was not finite|rounding stopped)"):
                bj.check(made)


def chain(name, discount, states=200, seed=1, temperature=0.2):
    """(case, x): a ring, on which the agent goes a step to the right or to the left; or what mixes at once."""
    kernel, place = np.zeros((states, 2, states)), np.arange(states)
    kernel[place, 0, (place + 1) % states] = kernel[place, 1, place - 1] = 1
    kernel = kernel if name == "ring" else random_process(seed, states, 2, 5).dense
    reward = np.random.default_rng(1).normal(size=(states, 2))
    return make(discount=discount, seed=seed, kernel=kernel, reference=np.full(2, 0.5)), at(temperature, reward)


@functools.cache
def exact_chain(name):
    return bj.check(bj.hypergradient(*chain(name, 0.9999)))


SHORT = {  # method, codes, what check says
    "GMRES": (GMRES, (0, MAX_ITERATIONS), "adjoint: the maximum number of iterations"),
    "few cycles": (bj.Implicit(adjoint=bj.GMRES(restart=5, max_cycles=2)), (0, MAX_ITERATIONS), "adjoint: the maximum"),
    "Neumann": (bj.Implicit(adjoint=bj.Neumann(50)), (0, 0), None),
    "Neumann to a tolerance": (bj.Implicit(adjoint=bj.Neumann(50, 1e-6)), (0, MAX_ITERATIONS), "adjoint: the maximum"),
    "Unrolled": (bj.Unrolled(50), (MAX_ITERATIONS, 0), "solve: the maximum number of iterations"),
}


@pytest.mark.parametrize("name", SHORT)
def test_too_few_steps_on_a_slow_chain(name):
    method, wanted, message = SHORT[name]
    made = bj.hypergradient(*chain("ring", 0.9999), method=method)
    assert codes(made) == wanted
    if message is None:
        bj.check(made)
    else:
        with pytest.raises(bj.ConvergenceError, match=message):
            bj.check(made)
    off, error = off_by(*chain("ring", 0.9999), made, exact_chain("ring").solution.value)
    assert 0.5 <= off <= error <= 10  # of the gradient's size: useless, and `error` says so


def test_slow_and_fast_chains_at_discount_0_9999():
    fast = bj.check(bj.hypergradient(*chain("random", 0.9999), method=GMRES))
    for name, made in [("ring", exact_chain("ring")), ("random", exact_chain("random")), ("random", fast)]:
        assert off_by(*chain(name, 0.9999), made, made.solution.value)[1] <= 1e-9


@pytest.mark.parametrize("method", [None, bj.Implicit(adjoint=bj.GMRES(1e-4))], ids=["default", "rough GMRES"])
def test_the_error_covers_above_512_states(method):
    # There no adjoint is factorized, nor that of the estimate of the error.
    for seed, discount in [(1, 0.999999), (3, 0.9999), (3, 0.999999)]:
        case, x = chain("random", discount, 520, seed, 2.0)
        made = bj.check(bj.hypergradient(case, x, method=method))
        assert off_by(case, x, made, made.solution.value)[1] <= 1e-3


# Low temperatures and ties


@pytest.mark.parametrize("kind", KINDS)
def test_temperature_of_a_millionth(kind):
    for seed in range(4):
        process = random_process(seed)
        case, x = make(kind, kernel=process.dense, seed=seed), at(1e-6, process.reward)
        assert np.min(np.max(truth(case, x)[2], 1)) > 0.999  # the best action is unique
        assert off_by(case, x, bj.check(bj.hypergradient(case, x)))[1] <= 1e-8


@pytest.mark.parametrize("kind", KINDS)
def test_ties_are_shared_by_regularized_policies(kind):
    kernel, reward = PROCESS.dense.copy(), PROCESS.reward.copy()
    kernel[:, 1], reward[:, 1] = kernel[:, 0], reward[:, 0]
    reward[:, 2] -= 5  # the two that tie are the best
    for temperature in (0.5, 1e-6):
        case, x = make(kind, kernel=kernel, reference=EVEN), at(temperature, reward)
        made = bj.check(bj.hypergradient(case, x))
        assert off_by(case, x, made)[1] <= 1e-8
        assert np.abs(made.gradient["reward"]).max() > 0.05 / temperature  # as the policy moves
        case = eqx.tree_at(lambda c: c.weights, case, np.zeros_like(reward))
        of_value = bj.check(bj.hypergradient(case, x)).gradient["reward"]
        np.testing.assert_array_equal(of_value[:, 0], of_value[:, 1])


def test_the_border_of_a_tsallis_support():
    # A second action that is just not taken: the derivative is one of the two one-sided ones.
    kernel, reward = np.full((STATES, ACTIONS, STATES), 1 / STATES), np.tile([0.5, 0.0, -5.0], (STATES, 1))
    case = make("tsallis", kernel=kernel, weights=np.eye(STATES, ACTIONS), of_value=np.zeros(STATES))
    got = bj.check(bj.hypergradient(case, at(0.5, reward))).gradient["reward"]
    left, right = (truth(case, at(0.5 + side, reward))[1]["reward"].astype(float) for side in (-1e-9, 1e-9))
    assert np.abs(left - right).max() > 0.9
    assert min(np.abs(got - left).max(), np.abs(got - right).max()) <= 1e-7


def paired(seed, pairs=8):
    """P, r: states in pairs that are worth the same, actions that split masses otherwise. All tie, but for rounding."""
    rng = np.random.default_rng(seed)
    mass, share = rng.dirichlet(np.ones(pairs), pairs)[:, None, None], rng.uniform(size=(pairs, 2, ACTIONS, pairs))
    kernel = np.stack([mass * share, mass * (1 - share)], -1).reshape(2 * pairs, ACTIONS, 2 * pairs)
    return kernel, np.repeat(rng.normal(size=pairs), 2)[:, None] * np.ones(ACTIONS)


def best_value(kernel, reward):
    sweep = lambda value, _: (reward + 0.9 * kernel @ value).max(1)  # noqa: E731
    return functools.reduce(sweep, range(600), np.zeros(len(reward)))


def test_ties_without_regularization():
    # V[0] is convex in the reward: the gradient of one best policy is a subgradient.
    problem = bj.BilevelProblem(lambda x: bj.MDP(*x, 0.9), bj.Unregularized(), lambda x, s: s.value[0])
    many = [paired(seed) for seed in range(6)]
    run = jax.jit(jax.vmap(lambda x: bj.hypergradient(problem, x)))
    occupancies = bj.check(run(tuple(map(np.stack, zip(*many, strict=True))))).gradient[1]
    for (kernel, reward), occupancy in zip(many, np.asarray(occupancies), strict=True):
        assert np.all(np.count_nonzero(occupancy, axis=1) <= 1)
        flow = occupancy.sum(1) - 0.9 * np.einsum("sa,saj->j", occupancy, kernel)
        np.testing.assert_allclose(flow, np.eye(len(reward))[0], atol=1e-12)
        for seed in range(3):
            step = 1e-2 * np.random.default_rng(seed).normal(size=reward.shape)
            rise = best_value(kernel, reward + step)[0] - best_value(kernel, reward)[0]
            assert rise > np.sum(occupancy * step) + 1e-4  # above: this is a kink


def test_an_unregularized_policy_has_no_derivative():
    problem = bj.BilevelProblem(lambda x: bj.MDP(*x, 0.9), bj.Unregularized(), lambda x, s: s.policy[0, 0])
    with pytest.raises(bj.InputError, match="piecewise constant and has no derivative"):
        bj.hypergradient(problem, paired(0))


# States and actions that play no part


@pytest.mark.parametrize("kind", KINDS)
def test_unreachable_absorbing_and_single_actions(kind):
    # State 0 is absorbing with one action, 2 has one action, 3 two; nothing leads to state 5.
    kernel, available = PROCESS.dense.copy(), np.ones((STATES, ACTIONS), bool)
    kernel[..., 5], kernel[0] = 0, np.eye(STATES)[0]
    kernel /= kernel.sum(-1, keepdims=True)
    available[0, 1:] = available[2, [0, 2]] = available[3, 1] = False
    case = make(kind, kernel=kernel, available=available, of_value=np.eye(STATES)[1])
    run = jax.jit(jax.vmap(lambda temperature: bj.hypergradient(case, at() | {"temperature": temperature})))
    many = bj.check(run(np.array([0.5, 1e-6])))
    for made, temperature in ((element(many, 0), 0.5), (element(many, 1), 1e-6)):
        assert off_by(case, at(temperature), made)[1] <= 1e-8
        assert not np.any(made.gradient["reward"][~available])
        np.testing.assert_array_equal(made.solution.policy[np.array([0, 2])], [[1, 0, 0], [0, 1, 0]])
        assert abs(float(made.adjoint[5])) <= 1e-12  # nobody gets there, and V[5] is not in f
        paid = PROCESS.reward[0, 0] + (kind == "kl") * temperature * np.log(PROCESS.reference[0, 0])
        np.testing.assert_allclose(made.solution.value[0], 10 * paid, rtol=1e-12)


FORBIDDING = np.array([0.6, 0.0, 0.4])


def test_an_action_that_the_reference_forbids():
    for temperature in (0.5, 1e-6):
        case, x = make("kl", reference=FORBIDDING), at(temperature)
        made = bj.check(bj.hypergradient(case, x))
        assert off_by(case, x, made)[1] <= 1e-8
        assert not np.any(made.gradient["reward"][:, 1])


def test_the_derivative_in_a_reference_that_is_zero():
    # Along x, which allows the forbidden action: the one-sided derivative.
    case, toward = make("kl"), np.array([-1.0, 1.0, 0.0])
    regularizer = lambda x: bj.KLDivergence(0.5, FORBIDDING + toward * x)  # noqa: E731
    problem = bj.BilevelProblem(lambda x: case.mdp(at()), regularizer, case.objective)
    ends = [truth(make("kl", reference=FORBIDDING + share * toward), at())[0] for share in (0, 1e-8)]
    slope = float((ends[1] - ends[0]) / LONG(1e-8))
    np.testing.assert_allclose(bj.check(bj.hypergradient(problem, 0.0)).gradient, slope, rtol=1e-5)


# NaN, infinities, and numbers that are not allowed

METHODS = {
    "default": None,
    "iterative": bj.Implicit(bj.ValueIteration(1e-8), bj.GMRES()),
    "Neumann": bj.Implicit(adjoint=bj.Neumann(30, 1e-8)),
    "Unrolled": bj.Unrolled(30),
}


@pytest.mark.often(3)
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", METHODS)
def test_nan_and_infinities_in_x(name, number):
    for x in (at(reward=np.where(np.arange(ACTIONS) == 1, number, PROCESS.reward)), at(number)):
        made = bj.hypergradient(make(), x, method=METHODS[name])
        assert int(made.solution.result) == NOT_FINITE
        assert int(made.solution.stats.iterations) <= 30
        assert not np.isfinite(made.error)
        with pytest.raises(bj.ConvergenceError, match=r"solve: a value was not finite; look for NaN"):
            bj.check(made)


@pytest.mark.parametrize("name", ["default", "iterative"])
def test_nan_of_one_batch_element_leaves_the_others_alone(name):
    run = jax.jit(jax.vmap(lambda x: bj.hypergradient(make(), x, method=METHODS[name])))
    good = [at(), at(0.3), at(0.7), at(0.2)]
    bad = [good[0], at(reward=PROCESS.reward * np.nan), good[2], at(np.nan)]
    clean, mixed = (run(jax.tree.map(lambda *leaves: np.stack(leaves), *xs)) for xs in (good, bad))
    bj.check(clean)
    for result in (mixed.solution.result, mixed.stats.result):
        np.testing.assert_array_equal(result, [0, NOT_FINITE, 0, NOT_FINITE])
    for i in (0, 2):
        jax.tree.map(np.testing.assert_array_equal, element(mixed, i), element(clean, i))
    with pytest.raises(bj.ConvergenceError, match=r"2 of 4 failed"):
        bj.check(mixed)


OUTSIDE = [(0.0, 0.9), (-0.5, 0.9), (0.5, 1.0), (0.5, 1.5), (0.5, -0.5)]


@pytest.mark.often(4)
@pytest.mark.parametrize(("temperature", "discount"), OUTSIDE)
@pytest.mark.parametrize("kind", KINDS)
def test_temperatures_and_discounts_out_of_range(kind, temperature, discount):
    # They are traced, so that no constructor sees them: no number may pass for a result.
    with pytest.raises((bj.InputError, bj.ConvergenceError)):
        bj.check(bj.hypergradient(make(kind, discount), at(temperature)))


@pytest.mark.parametrize("tolerance", [None, 1e-6])
def test_float32_at_discount_0_999(tolerance):
    method = None if tolerance is None else bj.Implicit(bj.PolicyIteration(tolerance), bj.GMRES(1e-9))
    for seed in range(3):
        process = random_process(seed)
        both = make(discount=0.999, kernel=process.dense, seed=seed), at(0.5, process.reward)
        case, x = jax.tree.map(np.float32, both)
        made = bj.hypergradient(case, x, method=method)
        assert {leaf.dtype for leaf in jax.tree.leaves((made.value, made.gradient, made.error))} == {np.dtype("f4")}
        assert off_by(case, x, made)[1] <= 1e-2
        if tolerance is None:
            bj.check(made)
        else:
            assert codes(made) == (bj.Result.PRECISION_LIMIT,) * 2
            with pytest.raises(bj.ConvergenceError, match=r"solve: rounding stopped .* use float64"):
                bj.check(made)


# Objectives


def upper(objective, x=1.0, **options):
    """Its hyper-gradient at x, which scales the reward."""
    mdp, entropy = (lambda x: bj.MDP(PROCESS.dense, PROCESS.reward * x, 0.9)), bj.ShannonEntropy(0.5)
    return bj.hypergradient(bj.BilevelProblem(mdp, entropy, objective), x, **options)


UNDEFINED = {
    "the value is NaN": lambda x, s: jnp.log(-s.policy[0, 0]),
    "the value is infinite": lambda x, s: s.policy[0, 0] + 1 / (x - 1) ** 2,
    "a slope in x is infinite": lambda x, s: s.policy[0, 0] + jnp.sqrt(x - 1),
    "a slope in x is NaN": lambda x, s: s.policy[0, 0] + jnp.linalg.norm(x - jnp.ones(2)),
    "a slope in V is infinite": lambda x, s: jnp.sqrt(0 * s.value[0]),
    "where over NaN": lambda x, s: jnp.where(s.value[0] > -100, s.value[0], jnp.log(0 * s.value[0])),
}


def test_an_objective_that_is_not_finite_in_one_element_of_a_batch():
    """Its gradient is finite, and the solve converged: the error is infinite, and `check` counts all that failed."""

    def log_of_x(x, s):
        return jnp.log(x) - s.policy[0, 1]

    batch = jnp.asarray([1.0, -1.0, jnp.nan])
    made = jax.vmap(lambda x: upper(log_of_x, x))(batch)
    assert np.asarray(made.solution.result).tolist() == [0, 0, int(bj.Result.NOT_FINITE)]
    assert np.isfinite(np.asarray(made.gradient)).tolist() == [True, True, False]
    assert np.isfinite(np.asarray(made.error)).tolist() == [True, False, False]
    with pytest.raises(bj.ConvergenceError, match=r"solve: .*1 of 3 failed(.|\n)*objective or .*2 of 3 failed"):
        bj.check(made)


@pytest.mark.parametrize("name", UNDEFINED)
def test_objectives_that_are_not_finite(name):
    with pytest.raises(bj.ConvergenceError, match="not finite"):
        bj.check(upper(UNDEFINED[name], with_error=False))


UNTRACEABLE = {
    "numpy": lambda x, s: np.sum(np.asarray(s.policy)),
    "if": lambda x, s: x if s.value[0] > 0 else 2 * x,
    "callback": lambda x, s: jax.pure_callback(np.sum, jax.ShapeDtypeStruct((), float), s.policy),
}


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_objectives_that_jax_cannot_differentiate(name):
    with pytest.raises((jax.errors.JAXTypeError, ValueError), match=r"traced array|Pure callbacks do not support JVP"):
        upper(UNTRACEABLE[name])


@pytest.mark.parametrize("method", [None, GMRES])
def test_objectives_that_the_agent_does_not_move(method):
    # By steps of the policy, constant almost everywhere; the rest is in x alone.
    made = bj.check(upper(lambda x, s: jnp.round(4 * s.policy[0, 0]) + x**3, method=method))
    np.testing.assert_allclose(made.gradient, 3.0, rtol=1e-15)
    assert not np.any(made.adjoint)
    assert float(made.error) < 1e-12
