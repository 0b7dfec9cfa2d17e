"""Actions that a state lacks: against the same problem in which they are really absent."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ACTIONS, STATES, central_difference, conjugate_numpy, make_mdp, random_like, random_process

import bilevel_jax as bj
from bilevel_jax.core.batching import over_batch
from bilevel_jax.mdp.bellman import action_values, backup, greedy

KINDS = ("shannon", "kl", "tsallis", "unregularized")
PROCESS = random_process(3)
MASK = np.array([[1, 1, 1], [0, 1, 1], [1, 0, 1], [0, 0, 1], [1, 1, 0], [1, 0, 0]], bool)
ABSENT = ~MASK
DISCOUNT = 0.8
INF = np.inf


evaluate = jax.jit(lambda r, q: (r.conjugate(q), r.policy(q)))
sweep = jax.jit(lambda mdp, r, v: (backup(mdp, r, v), *greedy(mdp, r, v)))


def regularizer(kind, temperature=0.4, reference=PROCESS.reference):
    match kind:
        case "shannon":
            return bj.ShannonEntropy(temperature)
        case "kl":
            return bj.KLDivergence(temperature, reference)
        case "tsallis":
            return bj.TsallisEntropy(temperature)
        case _:
            return bj.Unregularized()


def absent_conjugate(kind, q, temperature, reference):
    """(Omega*, policy) of one state in numpy, from the actions that it has; `reference` need not sum to 1."""
    if kind == "unregularized":
        return q.max(), np.eye(len(q))[np.argmax(q)]
    value, policy = conjugate_numpy(kind, q[None], temperature, reference[None])
    return value[0], policy[0]


def absent_solution(kind, transition, reward, discount, temperature=0.4, reference=PROCESS.reference, sweeps=400):
    """V*[S] and the policy [S, A] by numpy, over the list of actions of each state."""
    value = np.zeros(len(reward))
    choices = [np.flatnonzero(row) for row in MASK]
    for _ in range(sweeps):
        q = [reward[s, mine] + discount * transition[s, mine] @ value for s, mine in enumerate(choices)]
        made = [absent_conjugate(kind, q[s], temperature, reference[s, mine]) for s, mine in enumerate(choices)]
        value = np.array([v for v, _ in made])
    policy = np.zeros_like(reward)
    for s, mine in enumerate(choices):
        policy[s, mine] = made[s][1]
    return value, policy


def random_q(seed, scale=1.0):
    return np.where(MASK, scale * np.random.default_rng(seed).normal(size=MASK.shape), -INF)


def make(layout="dense", **leaves):
    return make_mdp(PROCESS, DISCOUNT, layout).replace(available=MASK, **leaves)


# Regularizers


@pytest.mark.parametrize("kind", KINDS)
def test_conjugate_and_policy_without_the_absent(kind):
    for seed, scale, temperature in itertools.product(range(4), (0.1, 1.0, 30.0), (0.05, 0.4, 20.0)):
        q = random_q(seed, scale)
        value, policy = evaluate(regularizer(kind, temperature), q)
        for s, mine in enumerate(map(np.flatnonzero, MASK)):
            want, taken = absent_conjugate(kind, q[s, mine], temperature, PROCESS.reference[s, mine])
            np.testing.assert_allclose(value[s], want, rtol=1e-12, atol=1e-13 * temperature)
            np.testing.assert_allclose(policy[s, mine], taken, rtol=1e-11, atol=1e-14)
        assert (np.asarray(policy)[ABSENT] == 0).all()  # exactly


SHORT = [1, 3]  # two states: the others would only take longer to compile


def parameters(kind):
    leaves = {"q": random_q(1)[SHORT], "temperature": 0.7, "reference": PROCESS.reference[SHORT]}
    return {name: jnp.asarray(leaf) for name, leaf in leaves.items() if name == "q" or kind != "unregularized"}


def outputs(kind, absent, p):
    """A nonlinear function of conjugate and policy, by rows with absent actions or by rows without."""
    temperature, reference = p.get("temperature"), p.get("reference")
    weights = np.random.default_rng(5).normal(size=(len(SHORT), ACTIONS))

    def total(r, q, weights, shift=0.0):
        policy = r.policy(q)
        return jnp.sum(jnp.sin(r.conjugate(q) + shift)) + jnp.sum(weights.reshape(policy.shape) * policy**2)

    if not absent:
        return total(regularizer(kind, temperature, reference), p["q"], weights)
    if kind == "kl":  # derivatives are those of whole rows divided by their sums
        reference = reference / jnp.sum(reference, -1, keepdims=True)
    out = jnp.zeros(())
    for s, mine in enumerate(map(np.flatnonzero, MASK[SHORT])):
        row, shift = None if reference is None else reference[s, mine], 0.0
        if kind == "kl":  # the logarithm of what the reference leaves, and a reference made of that
            row, shift = row / row.sum(), temperature * jnp.log(row.sum())
        out += total(regularizer(kind, temperature, row), p["q"][s : s + 1, mine], weights[s, mine], shift)
    return out


@pytest.mark.slow
@pytest.mark.few(1)
@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_without_the_absent(kind):
    p = parameters(kind)
    along = random_like(0, p)
    along["q"] = jnp.where(MASK[SHORT], along["q"], 0)
    results = []
    for absent in (False, True):
        grad = jax.grad(functools.partial(outputs, kind, absent))
        results.append(jax.jit(lambda p, grad=grad: jax.jvp(grad, (p,), (along,)))(p))
    for path, leaf in jax.tree_util.tree_leaves_with_path(results[0]):
        assert np.isfinite(leaf).all(), path
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), *results)
    for order in results[0]:
        assert (np.asarray(order["q"])[ABSENT[SHORT]] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_derivatives_are_finite_at_every_scale(kind, dtype):
    run = jax.jit(jax.grad(lambda rq: jnp.sum(rq[0].conjugate(rq[1])) + jnp.sum(rq[0].policy(rq[1])[:, 0])))
    for scale, temperature in itertools.product((1e-6, 1.0, 1e6), (1e-6, 1.0, 1e6)):
        r = jax.tree.map(lambda leaf: leaf.astype(dtype), regularizer(kind, temperature))
        for leaf in jax.tree.leaves(run((r, random_q(2, scale).astype(dtype)))):
            assert np.isfinite(leaf).all(), (scale, temperature)


@pytest.mark.parametrize("kind", KINDS)
def test_linearized_policy_of_the_absent(kind):
    r, q = regularizer(kind), jnp.asarray(random_q(4))
    value, policy = evaluate(r, q)
    dq = jnp.asarray(np.where(MASK, random_q(6), 0))
    moves = (jnp.zeros_like(policy), dq, jnp.sum(policy * dq, -1))
    same, tangent = jax.jit(lambda r, p, m: jax.jvp(r.linearized_policy, p, m))(r, (policy, q, value), moves)
    np.testing.assert_array_equal(same, policy)
    if kind == "unregularized":
        assert np.isnan(tangent).all()
        return
    _, want = jax.jit(lambda r, q, dq: jax.jvp(r.policy, (q,), (dq,)))(r, q, dq)
    np.testing.assert_allclose(tangent, want, rtol=1e-10, atol=1e-12)


def test_nan_is_not_absent():
    for kind in KINDS:
        q = random_q(7)
        q[1, 1] = np.nan
        assert np.isnan(evaluate(regularizer(kind), q)[0][1]), kind


def test_a_state_without_any_action_is_not_finite():
    q = random_q(7)
    q[2] = -INF
    for kind in KINDS:
        np.testing.assert_array_equal(np.isfinite(evaluate(regularizer(kind), q)[0]), np.arange(STATES) != 2, kind)


# The MDP


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "layout"), [*((kind, "dense") for kind in KINDS), ("shannon", "successor")])
def test_solution_without_the_absent(kind, layout):
    want, policy = absent_solution(kind, PROCESS.dense, PROCESS.reward, DISCOUNT)
    solution = bj.check(bj.solve(make(layout), regularizer(kind)))
    np.testing.assert_allclose(solution.value, want, rtol=1e-12)
    np.testing.assert_allclose(solution.policy, policy, rtol=1e-10, atol=1e-13)
    np.testing.assert_array_equal(np.isneginf(solution.q), ABSENT)
    assert np.isfinite(np.asarray(solution.q)[MASK]).all()


def test_nothing_depends_on_what_the_absent_say():
    rng = np.random.default_rng(8)
    other = np.where(ABSENT, 1e3 * rng.normal(size=MASK.shape), PROCESS.reward)
    kernel = np.where(ABSENT[..., None], rng.dirichlet(np.ones(STATES), MASK.shape), PROCESS.dense)
    discount = np.where(ABSENT, 0.999, DISCOUNT)
    for kind in KINDS:
        ours = make(discount=np.full(MASK.shape, DISCOUNT))
        theirs = make(reward=other, transition=kernel, discount=discount)
        np.testing.assert_array_equal(ours.modulus, theirs.modulus)
        start = jnp.asarray(rng.normal(size=STATES))
        made = (sweep(m, regularizer(kind), start) for m in (ours, theirs))
        jax.tree.map(np.testing.assert_array_equal, *made)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_derivative_of_the_value(kind):
    p = {"reward": jnp.asarray(PROCESS.reward), "logits": jnp.log(PROCESS.dense), "discount": jnp.asarray(0.5)}
    along = random_like(9, p)
    along["discount"] = 0.1 * along["discount"]
    weights = np.random.default_rng(10).normal(size=STATES)

    def leaves(p, library):
        return library.exp(p["logits"]) / library.exp(p["logits"]).sum(-1, keepdims=True), p["reward"], p["discount"]

    def ours(p):
        transition, reward, discount = leaves(p, jnp)
        return weights @ bj.solve(bj.MDP(transition, reward, discount, available=MASK), regularizer(kind)).value

    def numpy(p):
        return weights @ absent_solution(kind, *leaves(jax.tree.map(np.asarray, p), np), sweeps=80)[0]

    gradient = jax.jit(jax.grad(ours))(p)
    slope = sum(np.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (gradient, along)), strict=True))
    np.testing.assert_allclose(slope, central_difference(numpy, p, along), rtol=1e-8)
    assert (np.asarray(gradient["reward"])[ABSENT] == 0).all()
    assert (np.asarray(gradient["logits"])[ABSENT] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shannon", "kl"])
def test_second_derivative_of_the_solution(kind):
    weights = np.random.default_rng(11).normal(size=MASK.shape)

    def objective(reward):
        solution = bj.solve(make(reward=reward), regularizer(kind))
        return jnp.sum(solution.value**2) + jnp.sum(weights * solution.policy**2)

    reward, along = jnp.asarray(PROCESS.reward), random_like(12, PROCESS.reward)
    gradient = jax.grad(objective)
    both = jax.jit(lambda r, along: jax.jvp(gradient, (r,), (along,)))
    product = both(reward, along)[1]
    wanted = central_difference(lambda r: both(r, along)[0], reward, along)
    np.testing.assert_allclose(product.ravel(), wanted, rtol=1e-7, atol=1e-9)
    assert (np.asarray(product)[ABSENT] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_batches_of_masks(shared):
    rewards = np.random.default_rng(13).normal(size=(2, *MASK.shape))
    masks = np.stack([MASK, np.ones_like(MASK)])
    given = MASK if shared else masks
    mdp = bj.MDP(PROCESS.dense, rewards, DISCOUNT, available=given)
    assert mdp.available.shape == given.shape  # not copied
    assert mdp.event_ndim().available == 2
    assert mdp.replace(discount=0.5).available is mdp.available
    v = jnp.asarray(np.random.default_rng(14).normal(size=(2, STATES)))
    q = over_batch(lambda m, _, v: action_values(m, v))(mdp, bj.Unregularized(), v)
    r = bj.ShannonEntropy(0.4)
    together = bj.solve(mdp, r)
    for b in range(2):
        one = bj.MDP(PROCESS.dense, rewards[b], DISCOUNT, available=given if shared else masks[b])
        np.testing.assert_allclose(q[b], action_values(one, v[b]), rtol=1e-14)
        np.testing.assert_allclose(together.value[b], bj.solve(one, r).value, rtol=1e-12)


def test_a_mask_is_structure_and_its_values_are_not():
    traces = []

    @jax.jit
    def run(mdp):
        traces.append(mdp)
        return backup(mdp, bj.ShannonEntropy(0.5), mdp.reward[:, 0])

    run(make()), run(make().replace(available=np.roll(MASK, 1, 0)))
    assert len(traces) == 1
    assert jax.tree.structure(make()) != jax.tree.structure(make_mdp(PROCESS))
    assert len(jax.tree.leaves(make_mdp(PROCESS))) + 1 == len(jax.tree.leaves(make()))
    full = make_mdp(PROCESS, DISCOUNT)
    v = jnp.asarray(PROCESS.initial)
    both = (action_values(m, v) for m in (full, full.replace(available=np.ones_like(MASK))))
    np.testing.assert_array_equal(*both)


def test_float32_with_a_mask():
    mdp = bj.MDP(np.float32(PROCESS.dense), np.float32(PROCESS.reward), 0.8, available=MASK)
    for kind in KINDS:
        r = jax.tree.map(lambda leaf: leaf.astype(np.float32), regularizer(kind))
        made = jax.eval_shape(sweep, mdp, r, mdp.initial)
        assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {np.dtype("float32")}


@pytest.mark.slow
def test_policy_value_with_a_mask():
    policy = np.where(MASK, PROCESS.reference, 0)
    policy /= policy.sum(-1, keepdims=True)
    matrix = np.eye(STATES) - DISCOUNT * np.einsum("sa,saj->sj", policy, PROCESS.dense)
    want = np.linalg.solve(matrix, (policy * PROCESS.reward).sum(-1))
    mdp = make()
    np.testing.assert_allclose(bj.policy_value(mdp, policy), want, rtol=1e-12)
    grad = jax.grad(lambda m, p: bj.policy_value(m, p).sum(), (0, 1), allow_int=True)(mdp, jnp.asarray(policy))
    for leaf in (grad[0].reward, grad[0].transition.probability, grad[1]):
        assert (np.asarray(leaf)[ABSENT] == 0).all()
        assert np.isfinite(leaf).all()
    # Inside jit the mask cannot be compared: it is NaN, not a number that looks like a value.
    assert np.isnan(jax.jit(bj.policy_value)(mdp, PROCESS.reference)).any()


# Unregularized

UNREGULARIZED = bj.Unregularized()


@pytest.mark.slow
def test_unregularized_takes_the_first_maximum():
    q = jnp.asarray([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [-INF, -1.0, -2.0]])
    np.testing.assert_array_equal(UNREGULARIZED.policy(q), [[0, 1, 0], [1, 0, 0], [0, 1, 0]])
    np.testing.assert_array_equal(UNREGULARIZED.conjugate(q), [3, 2, -1])
    np.testing.assert_array_equal(UNREGULARIZED.penalty(UNREGULARIZED.policy(q)), np.zeros(3))
    # The derivative of the value is that of the action taken, also at ties, in both modes.
    grad = jax.grad(lambda q: UNREGULARIZED.conjugate(q).sum())(q)
    np.testing.assert_array_equal(grad, UNREGULARIZED.policy(q))
    dq = jnp.asarray(np.random.default_rng(0).normal(size=q.shape))
    tangent = jax.jvp(UNREGULARIZED.conjugate, (q,), (dq,))[1]
    np.testing.assert_array_equal(tangent, [dq[0, 1], dq[1, 0], dq[2, 1]])
    np.testing.assert_array_equal(jax.jacrev(UNREGULARIZED.policy)(q), np.zeros((3, 3, 3, 3)))


def test_unregularized_against_every_policy():
    best = np.full(STATES, -INF)
    for choice in itertools.product(*(np.flatnonzero(row) for row in MASK)):
        rows = np.arange(STATES), np.array(choice)
        value = np.linalg.solve(np.eye(STATES) - DISCOUNT * PROCESS.dense[rows], PROCESS.reward[rows])
        best = np.maximum(best, value)
    np.testing.assert_allclose(bj.solve(make(), UNREGULARIZED).value, best, rtol=1e-13)


@pytest.mark.slow
def test_unregularized_is_the_limit_of_small_temperatures():
    small = bj.solve(make(), bj.ShannonEntropy(1e-6)).value
    np.testing.assert_allclose(bj.solve(make(), UNREGULARIZED).value, small, atol=1e-6 * np.log(3) / (1 - DISCOUNT))


def test_unregularized_has_no_leaves_and_no_temperature_to_give():
    assert jax.tree.leaves(UNREGULARIZED) == []
    assert UNREGULARIZED.event_ndim() == UNREGULARIZED
    assert (UNREGULARIZED.smooth, bj.ShannonEntropy(1.0).smooth) == (False, True)
    for kind in (bj.ShannonEntropy, bj.TsallisEntropy, lambda t: bj.KLDivergence(t, [1.0])):
        with pytest.raises(
            bj.InputError, match=r"temperature must be above 0, got 0; .*bilevel_jax\.Unregularized\(\)"
        ):
            kind(0)


@pytest.mark.slow
def test_unregularized_hypergradient_of_a_value_and_of_a_policy():
    def upper(objective):
        problem = bj.BilevelProblem(lambda x: make(reward=PROCESS.reward * x), UNREGULARIZED, objective)
        return bj.hypergradient(problem, jnp.asarray(2.0), with_error=False)

    made = bj.check(upper(lambda x, solution: solution.value[0]))
    np.testing.assert_allclose(made.gradient, made.value / 2, rtol=1e-12)  # V is linear in the scale of the reward
    with pytest.raises(bj.InputError, match="piecewise constant and has no derivative"):
        upper(lambda x, solution: solution.policy[0, 1])
    with pytest.raises(bj.InputError, match="piecewise constant and has no derivative"):
        jax.grad(lambda r: bj.solve(make(reward=r), UNREGULARIZED).policy[0, 1])(jnp.asarray(PROCESS.reward))


# What is refused


def put(array, index, value):
    out = np.array(array)
    out[index] = value
    return out


BAD = {
    "no action": (
        lambda: make().replace(available=put(MASK, 3, False)),
        r"available: state \[3\] has no action \(1 of",
    ),
    "no booleans": (lambda: make().replace(available=MASK * 1.0), r"available: expected booleans, got float64"),
    "mask's shape": (lambda: make().replace(available=MASK[:-1]), r"available: expected shape \[S, A\] = \[6, 3\]"),
    "mask's batch": (lambda: make().replace(available=np.stack([MASK] * 2)), r"available: .* got \[2, 6, 3\]"),
    "absent reward": (lambda: make(reward=put(PROCESS.reward, (1, 0), -INF)), r"reward\[1, 0\] is -inf"),
    "reference": (
        lambda: bj.solve(make(), bj.KLDivergence(1.0, [0.5, 0.5, 0.0])),
        r"reference: no probability on the actions available in state \[3\]",
    ),
    "one batch's reference": (
        lambda: bj.solve(
            make().replace(reward=np.stack([PROCESS.reward] * 2)),
            bj.KLDivergence(1.0, np.stack([PROCESS.reference, put(PROCESS.reference, 3, [0.5, 0.5, 0])])),
        ),
        r"reference: no probability on the actions available in state \[1, 3\]",
    ),
    "policy": (
        lambda: bj.policy_value(make(), np.full((STATES, ACTIONS), 1 / 3)),
        r"policy\[1, 0\] is 0\.333333, but that action is not available",
    ),
    "simulator": (
        lambda: bj.environments.rollout(
            jax.random.key(0),
            bj.environments.TabularEnvironment(make()),
            bj.Table(np.full((STATES, ACTIONS), 1 / 3)),
            batch=1,
            horizon=1,
        ),
        r"policy\[1, 0\] is 0\.333333, but that action is not available",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, message = BAD[name]
    with pytest.raises(bj.InputError, match=message):
        call()
