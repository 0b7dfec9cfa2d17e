"""Transitions, their operators and the MDP as pytrees, against brute-force numpy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ACTIONS, LAYOUTS, SLOTS, STATES, densify, make_mdp, random_process, transition
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import bilevel_jax as bj
from bilevel_jax.transitions import PolicyOperator

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
NUMBERS = st.floats(-1e3, 1e3, width=64)
WEIGHTS = st.floats(1e-3, 1.0, width=64)

expect = jax.jit(lambda kernel, v: kernel.expect(v))
push = jax.jit(lambda kernel, d: kernel.push(d))
matrix = jax.jit(lambda kernel, w: kernel.under(w).matrix())


@jax.jit
def products(kernel, weights, v):
    """M v and M' v by every route there is."""
    forward, backward = [], []
    for m in (kernel.under(weights), PolicyOperator(kernel, weights), PolicyOperator(kernel, weights).T.fold().T):
        forward += [m.apply(v), m.T.apply_transpose(v), m.matrix() @ v, m.T.T.apply(v)]
        backward += [m.apply_transpose(v), m.T.apply(v), v @ m.matrix(), m.T.matrix() @ v]
    return jnp.stack(forward), jnp.stack(backward)


@st.composite
def kernels(draw):
    """(dense P [S, A, S], the same as dense or successor kernel); successors often repeat."""
    shape = (SLOTS, STATES, ACTIONS)
    successor = draw(arrays(np.int32, shape, elements=st.integers(0, STATES - 1)))
    weight = draw(arrays(float, shape, elements=WEIGHTS))
    probability = weight / weight.sum(0)
    dense = densify(successor, probability)
    if draw(st.booleans()):
        return dense, bj.DenseTransition(dense)
    return dense, bj.SuccessorTransition(successor, probability)


@PROPERTY
@given(kernels(), arrays(float, STATES, elements=NUMBERS), arrays(float, (STATES, ACTIONS), elements=NUMBERS))
def test_push_is_the_transpose_of_expect(kernel, v, d):
    dense, kernel = kernel
    expected, pushed = expect(kernel, v), push(kernel, d)
    scale = np.abs(d).sum() * np.abs(v).max() + 1e-300
    assert abs(np.vdot(expected, d) - np.vdot(v, pushed)) <= 1e-13 * scale
    np.testing.assert_allclose(expected, np.einsum("saj,j->sa", dense, v), rtol=1e-12, atol=1e-12 * np.abs(v).max())
    np.testing.assert_allclose(pushed, np.einsum("saj,sa->j", dense, d), rtol=1e-12, atol=1e-12 * np.abs(d).sum())


@PROPERTY
@given(kernels(), arrays(float, (STATES, ACTIONS), elements=NUMBERS), arrays(float, STATES, elements=NUMBERS))
def test_under_folds_the_weights(kernel, weights, v):
    dense, kernel = kernel
    brute = np.zeros((STATES, STATES))
    for s, a, j in itertools.product(range(STATES), range(ACTIONS), range(STATES)):
        brute[s, j] += weights[s, a] * dense[s, a, j]
    size = np.abs(weights).sum()
    np.testing.assert_allclose(matrix(kernel, weights), brute, rtol=1e-12, atol=1e-13 * size)
    forward, backward = products(kernel, weights, v)
    for got, want in [(forward, brute @ v), (backward, brute.T @ v)]:
        np.testing.assert_allclose(got, np.tile(want, (12, 1)), rtol=1e-12, atol=1e-13 * size * np.abs(v).max())


def test_dense_and_successor_agree():
    process = random_process(0)
    dense, sparse = (transition(process, layout) for layout in LAYOUTS)
    rng = np.random.default_rng(1)
    v, d = jnp.asarray(rng.normal(size=STATES)), jnp.asarray(rng.normal(size=(STATES, ACTIONS)))
    assert dense.shape == sparse.shape == (STATES, ACTIONS)
    assert len(np.unique(process.successor[:, 0, 0])) < SLOTS  # successors repeat
    np.testing.assert_allclose(dense.expect(v), sparse.expect(v), rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(dense.push(d), sparse.push(d), rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(matrix(dense, d), matrix(sparse, d), rtol=1e-14, atol=1e-15)
    for kernel in (dense, sparse):  # numpy arrays too
        np.testing.assert_array_equal(kernel.expect(np.asarray(v)), kernel.expect(v))
        np.testing.assert_array_equal(kernel.push(np.asarray(d)), kernel.push(d))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_differentiate_in_the_probabilities(layout):
    # <d, P v> is linear in P: the gradient is the outer product, at a repeated successor in every slot.
    process = random_process(2)
    rng = np.random.default_rng(3)
    v, d = jnp.asarray(rng.normal(size=STATES)), jnp.asarray(rng.normal(size=(STATES, ACTIONS)))
    kernel = transition(process, layout)
    grads = [
        jax.grad(lambda k: jnp.vdot(d, k.expect(v)), allow_int=True)(kernel),
        jax.grad(lambda k: jnp.vdot(v, k.push(d)), allow_int=True)(kernel),
        jax.grad(lambda k: k.under(d).apply(v).sum(), allow_int=True)(kernel),
    ]
    want = d[..., None] * v if layout == "dense" else d * v[process.successor]
    for grad in grads:
        np.testing.assert_allclose(grad.probability, want, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("discount", [0.9, np.full((STATES, ACTIONS), 0.9)], ids=["number", "pairs"])
def test_mdp_round_trips_as_a_pytree(layout, discount):
    mdp = make_mdp(random_process(4), discount, layout)
    leaves, structure = jax.tree.flatten(mdp)
    copies = [
        jax.tree.unflatten(structure, leaves),
        jax.jit(lambda m: m)(mdp),
        jax.tree.map(lambda x: x[0], jax.vmap(lambda m: m)(jax.tree.map(lambda x: jnp.stack([x, x]), mdp))),
        mdp.replace(),
    ]
    assert structure == jax.tree.structure(copies[1])
    for copy in copies:
        assert isinstance(copy, bj.MDP)
        assert (copy.num_states, copy.num_actions, copy.batch_shape) == (STATES, ACTIONS, ())
        jax.tree.map(np.testing.assert_array_equal, copy, mdp)


def test_mdp_is_built_inside_jit_and_vmap():
    process = random_process(5)
    rewards = np.random.default_rng(0).normal(size=(4, STATES, ACTIONS))
    batch = jax.jit(jax.vmap(lambda r: bj.MDP(process.dense, r, 0.9)))(rewards)
    assert batch.reward.shape == (4, STATES, ACTIONS)
    np.testing.assert_array_equal(batch.reward, rewards)
    np.testing.assert_allclose(batch.initial, np.full((4, STATES), 1 / STATES))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [(2,), (2, 3)])
def test_batch_axes_with_a_shared_transition(layout, batch):
    process = random_process(6)
    rewards = np.random.default_rng(0).normal(size=(*batch, STATES, ACTIONS))
    mdp = bj.MDP(transition(process, layout), rewards, 0.9, process.initial)
    assert mdp.batch_shape == batch
    assert mdp.transition.shape == (STATES, ACTIONS)  # shared, not copied
    assert mdp.initial.shape == (*batch, STATES)
    np.testing.assert_array_equal(mdp.initial, np.broadcast_to(process.initial, mdp.initial.shape))
    np.testing.assert_array_equal(mdp.modulus, np.full(batch, 0.9))
    stacked = jax.tree.map(lambda x: np.broadcast_to(x, (*batch, *x.shape)), mdp.transition)
    assert bj.MDP(stacked, rewards, 0.9).transition.shape == (*batch, STATES, ACTIONS)


@pytest.mark.parametrize(
    ("shape", "kept"),
    [
        ((), (2,)),
        ((2,), (2,)),
        ((STATES, ACTIONS), (2, STATES, ACTIONS)),
        ((2, STATES, ACTIONS), (2, STATES, ACTIONS)),
    ],
)
def test_discount_takes_numbers_pairs_and_batch_axes(shape, kept):
    process = random_process(7)
    discount = np.random.default_rng(0).uniform(0, 0.9, shape)
    mdp = bj.MDP(process.dense, np.stack([process.reward] * 2), discount)
    assert mdp.discount.shape == kept
    events = np.broadcast_to(discount, kept).reshape(2, -1)
    np.testing.assert_array_equal(mdp.modulus, events.max(-1))


def test_dtypes():
    process = random_process(8)
    ints = bj.MDP(process.dense, np.ones((STATES, ACTIONS), int), 0)
    assert {leaf.dtype for leaf in jax.tree.leaves(ints)} == {np.dtype("float64")}
    narrow = bj.MDP(np.float32(process.dense), np.float32(process.reward), 0.9, process.initial)
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {np.dtype("float32")}
    for mode in ("strict", "standard"):
        with jax.numpy_dtype_promotion(mode):
            wide = bj.MDP(np.float32(process.dense), process.reward, np.float32(0.9))
        assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {np.dtype("float64")}
    sparse = make_mdp(process, 0.9, "successor")
    assert sparse.transition.successor.dtype == np.int32
