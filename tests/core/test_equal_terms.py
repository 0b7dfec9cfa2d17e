"""Long sums of equal numbers, in float32: they are all rounded in one direction, and bounds hold nevertheless."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from bilevel_jax.core import reductions

HALF, REWARDS = np.float32(0.5), [0.1, 0.7]
NONE = bj.Unregularized()


def slots(count, states=4):
    successor = np.tile(np.arange(count)[:, None, None] % states, (1, states, 1))
    return bj.SuccessorTransition(successor, np.full((count, states, 1), 1 / count, np.float32))


def stencil(count, states=4):
    offsets = [(0,)] * count
    return bj.StencilTransition(offsets, np.full((count, states, 1), 1 / count, np.float32), (states,))


def dense(count):
    return bj.DenseTransition(np.full((count, 1, count), 1 / count, np.float32))


def of_a_function(count):
    def expect(p, values):
        return jnp.full((count, 1), jnp.sum(p * values), values.dtype)

    return bj.MatrixFreeTransition(expect, jnp.full(count, 1 / count, jnp.float32), count, 1)


def row_sum(count):
    return count * np.longdouble(np.float32(1 / count))


def check(made, right, bound):
    """The value within its bound, and the bound below a thousandth of it."""
    assert np.max(np.abs(np.asarray(made, np.longdouble) - right)) <= float(bound) < 1e-3 * float(np.max(np.abs(right)))


@pytest.mark.often(3)
@pytest.mark.few(1)
@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize(
    ("kind", "count"),
    [
        (slots, 12),
        (slots, 17),
        pytest.param(slots, 100, marks=pytest.mark.slow),
        (slots, 1000),
        (stencil, 40),
        pytest.param(dense, 200, marks=pytest.mark.slow),
        (dense, 3000),
        (of_a_function, 3000),
    ],
)
def test_equal_successors(kind, count, reward):
    transition = kind(count)
    reward = np.full(transition.shape, reward, np.float32)
    mdp = bj.MDP(transition, reward, HALF)
    mass, paid = row_sum(count), np.longdouble(reward[0, 0])
    made = bj.check(bj.solve(mdp, NONE))
    check(made.value, paid / (1 - mass / 2), made.stats.error_bound)
    horizon = bj.check(bj.solve_finite_horizon(mdp, NONE, 5))
    right = [np.longdouble(0)]
    for _ in range(5):
        right.append(paid + mass / 2 * right[-1])
    check(horizon.value, np.array(right[::-1])[:, None], horizon.error_bound)


@pytest.mark.few(1)
@pytest.mark.parametrize("first", [None, 0.5])
@pytest.mark.parametrize("solver", [bj.Auto(), bj.ValueIteration()], ids=["auto", "value iteration"])
def test_rows_that_the_compiler_sums(solver, first):
    """A kernel that is a constant of the program."""
    row = np.full(256, 1 / 256, np.float32)
    if first is not None:
        row[0], row[1:] = first, (1 - first) / 255
    transition = bj.DenseTransition(np.broadcast_to(row, (256, 1, 256)))

    @jax.jit
    def solve(reward):
        return bj.solve(bj.MDP(transition, reward, HALF), NONE, solver=solver)

    made = bj.check(solve(np.full((256, 1), 0.1, np.float32)))
    right = np.longdouble(np.float32(0.1)) / (1 - row.astype(np.longdouble).sum() / 2)
    check(made.value, right, made.stats.error_bound)


@pytest.mark.often(4)
@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("first", [None, 0.5])
@pytest.mark.parametrize(
    ("states", "batch"),
    [(100, 1), (256, 33), *(pytest.param(s, 16, marks=pytest.mark.slow) for s in (100, 300, 600, 1500))],
)
def test_equal_successors_of_a_batch(states, batch, first, dtype):
    """One product for all elements of a batch adds in one running total, which a large first term rounds the most."""
    row = np.full(states, 1 / states, dtype)
    if first is not None:
        row[0], row[1:] = first, (1 - first) / (states - 1)
    transition = bj.DenseTransition(np.broadcast_to(row, (states, 1, states)))
    rewards = np.linspace(0.1, 0.95, batch).astype(dtype)

    def mdp(reward):
        return bj.MDP(transition, jnp.full((states, 1), reward), dtype(0.5))

    made = bj.check(jax.jit(jax.vmap(lambda reward: bj.solve(mdp(reward), NONE)))(rewards))
    horizon = bj.check(jax.jit(jax.vmap(lambda reward: bj.solve_finite_horizon(mdp(reward), NONE, 5)))(rewards))
    mass = row.astype(np.longdouble).sum()
    for i, paid in enumerate(rewards.astype(np.longdouble)):
        check(made.value[i], paid / (1 - mass / 2), made.stats.error_bound[i])
        right = paid * sum((mass / 2) ** k for k in range(5))
        check(horizon.value[i, 0], right, horizon.error_bound[i])


def test_one_problem_is_told_from_a_batch():
    """The derivatives of what is not in a bound are not touched by it."""
    transition = dense(300)

    def roundings(value):
        return transition.sums(value).roundings

    value = jnp.ones(300, jnp.float32)
    assert roundings(value) == jax.jit(roundings)(value) == 300 / 8
    assert roundings(value.astype(jnp.float64)) == 300 / 8  # of the kernel's own type
    for function in (roundings, jax.jit(roundings), jax.vmap(roundings)):
        assert (jax.vmap(function)(jnp.ones((2, 3, 300))) == 150).all()
    assert (jax.grad(lambda v: roundings(v) + jnp.sum(v))(value) == 1).all()


KINDS = {
    "shannon": lambda actions: bj.ShannonEntropy(np.float32(1)),
    "kl": lambda actions: bj.KLDivergence(np.float32(1), np.full(actions, 1 / actions, np.float32)),
    "tsallis": lambda actions: bj.TsallisEntropy(np.float32(1)),
}


def conjugate(kind, rewards):
    """Omega* of r[A] in long double, at the temperature 1."""
    if kind == "shannon":
        return np.log(np.exp(rewards).sum())
    if kind == "kl":
        return np.log(np.exp(rewards).mean())
    descending, count = np.sort(rewards)[::-1], np.arange(1, rewards.size + 1)
    total = np.cumsum(descending)
    size = (1 + count * descending > total).sum()
    policy = np.maximum(rewards - (total[size - 1] - 1) / size, 0)
    return policy @ rewards + (1 - policy @ policy) / 2


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("actions", "below"), [(16, 0.4472), (17, 0.4743), (256, 0.44), (1000, 0.44)])
def test_logarithms_of_sums(actions, below, dtype):
    """KL: the relative rounding of the sum and of the reference's counts as much as the temperature is large."""
    reference = np.full(actions, 0.5 / (actions - 1), dtype)
    reference[0] = 0.5
    for temperature in (1.0, 1.0777, 860.0):
        reward = np.zeros((1, actions), dtype)
        reward[0, 1:] = temperature * np.log(below)
        mdp = bj.MDP(np.ones((1, actions, 1), dtype), reward, dtype(0))
        regularizer = bj.KLDivergence(dtype(temperature), reference)
        weight, exact = reference.astype(np.longdouble), np.longdouble(dtype(temperature))
        total = (weight * np.exp(reward[0].astype(np.longdouble) / exact)).sum() / weight.sum()
        made = bj.check(bj.solve(mdp, regularizer))
        check(made.value, exact * np.log(total), made.stats.error_bound)
        horizon = bj.check(bj.solve_finite_horizon(mdp, regularizer, 1))
        check(horizon.value[0], exact * np.log(total), horizon.error_bound)


@pytest.mark.often(4)
@pytest.mark.few(1)
@pytest.mark.parametrize("below", [0.7, 0.3])
@pytest.mark.parametrize("actions", [16, 17, pytest.param(1000, marks=pytest.mark.slow), 10_000])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_actions(kind, actions, below):
    """All but the best have one weight. The reference is divided by its sum, as the regularizer does."""
    reward = np.zeros((1, actions), np.float32)
    reward[0, 1:] = -below / actions if kind == "tsallis" else np.log(below)
    mdp = bj.MDP(np.ones((1, actions, 1), np.float32), reward, HALF)
    made = bj.check(bj.solve(mdp, KINDS[kind](actions)))
    check(made.value, 2 * conjugate(kind, reward[0].astype(np.longdouble)), made.stats.error_bound)


@pytest.mark.few(1)
@pytest.mark.parametrize("length", [0, 1, 16, 17, 33, 255, 257, 5000])
def test_sums_and_their_derivatives(length):
    x = jax.random.normal(jax.random.key(length), (2, 3, length))

    def of(total):
        return lambda x: jnp.sum(total(jnp.sin(x)) ** 2)

    def plain(x):
        return jnp.sum(x, -1)

    np.testing.assert_allclose(reductions.sum_last(x), plain(x), rtol=1e-12)
    np.testing.assert_allclose(jax.vmap(reductions.sum_last)(x), plain(x), rtol=1e-12)
    ours, theirs = jax.grad(of(reductions.sum_last)), jax.grad(of(plain))
    np.testing.assert_allclose(jax.jit(jax.vmap(ours))(x), theirs(x), rtol=1e-10, atol=1e-14)
    along = jax.random.normal(jax.random.key(1), x.shape)
    np.testing.assert_allclose(
        jax.jvp(ours, (x,), (along,))[1], jax.jvp(theirs, (x,), (along,))[1], rtol=1e-10, atol=1e-13
    )
    once = jnp.ones((2, 3, 7, length))
    assert (reductions.sum_last(once) == length).all()
    assert reductions.levels_of_sum(max(length, 1)) == 1 + (length > 16) + (length >= 16 * 17) + (length >= 16**2 * 17)


@pytest.mark.few(1)
@pytest.mark.parametrize("count", [5, 17, 101])
def test_sums_of_slots(count):
    """The loop that groups them, its derivatives in both arguments, and its transpose."""
    rng = np.random.default_rng(count)
    index, weight, values = (
        rng.integers(6, size=(count, 6, 2)),
        rng.random((count, 6, 2)),
        jnp.asarray(rng.normal(size=6)),
    )

    def ours(weight, values):
        return reductions.sum_slots(lambda i, w: w * values[i], jnp.asarray(index), weight)

    def plain(weight, values):
        return jnp.einsum("ksa,ksa->sa", weight, values[index])

    np.testing.assert_allclose(ours(weight, values), plain(weight, values), rtol=1e-12)
    for argument in (0, 1):
        gradients = [jax.jacobian(f, argument)(jnp.asarray(weight), values) for f in (ours, plain)]
        np.testing.assert_allclose(*gradients, rtol=1e-12, atol=1e-15)
