"""Every representation of a kernel, its operators and conversions, against brute-force numpy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ACTIONS, SLOTS, STATES, central_difference, densify, random_like, random_process
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import bilevel_jax as bj
from bilevel_jax.core.reductions import max_last, sum_last, sum_slots
from bilevel_jax.mdp.transitions import PolicyOperator

FORMS = ("dense", "successor", "predecessor", "stencil", "matrix_free")
PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)
NUMBERS = st.floats(-1e3, 1e3, width=64)
WEIGHTS = st.floats(1e-3, 1.0, width=64)
BANDS = [(o,) for o in range(1 - STATES, STATES)]

expect = jax.jit(lambda kernel, v: kernel.expect(v))
push = jax.jit(lambda kernel, d: kernel.push(d))


@jax.jit
def operators(kernel, weights, v, action):
    """By every route there is: (M v, M' v, diagonal, matrix) of M = under(weights), and of `select`."""

    def parts(*routes):
        forward = [product for m in routes for product in (m.apply(v), m.T.apply_transpose(v))]
        backward = [product for m in routes for product in (m.apply_transpose(v), m.T.apply(v))]
        matrices = [matrix for m in routes for matrix in (m.matrix(), m.T.matrix().T)]
        diagonals = [diagonal for m in routes for diagonal in (m.diagonal(), m.T.diagonal())]
        return jnp.stack(forward), jnp.stack(backward), jnp.stack(diagonals), jnp.stack(matrices)

    policy = PolicyOperator(kernel, weights)
    return parts(policy, policy.fold(), policy.T.fold().T), parts(kernel.select(action, v))


def product_of(parameters, values):
    """A user's function: a kernel by its square roots."""
    return (parameters["root"] ** 2) @ values


def stencil_of(dense):
    """A dense kernel as all bands of a grid with one axis."""
    states = np.arange(STATES)
    rows = []
    for (o,) in BANDS:
        inside = (states + o >= 0) & (states + o < STATES)
        rows.append(np.where(inside[:, None], dense[states, :, np.clip(states + o, 0, STATES - 1)], 0))
    return bj.StencilTransition(BANDS, np.stack(rows), (STATES,))


def kernel_of(form, successor, probability):
    dense = densify(successor, probability).astype(probability.dtype)
    match form:
        case "dense":
            return bj.DenseTransition(dense)
        case "successor":
            return bj.SuccessorTransition(successor, probability)
        case "predecessor":
            return bj.SuccessorTransition(successor, probability).with_predecessors()
        case "stencil":
            return stencil_of(dense)
        case _:
            return bj.MatrixFreeTransition(product_of, {"root": np.sqrt(dense)}, STATES, ACTIONS)


@st.composite
def kernels(draw):
    """(dense P [S, A, S], the same in some form); successors often repeat."""
    shape = (SLOTS, STATES, ACTIONS)
    successor = draw(arrays(np.int32, shape, elements=st.integers(0, STATES - 1)))
    weight = draw(arrays(float, shape, elements=WEIGHTS))
    probability = weight / weight.sum(0)
    return densify(successor, probability), kernel_of(draw(st.sampled_from(FORMS)), successor, probability)


@pytest.mark.slow
@PROPERTY
@given(kernels(), arrays(float, STATES, elements=NUMBERS), arrays(float, (STATES, ACTIONS), elements=NUMBERS))
def test_push_is_the_transpose_of_expect(kernel, v, d):
    dense, kernel = kernel
    expected, pushed = expect(kernel, v), push(kernel, d)
    scale = np.abs(d).sum() * np.abs(v).max() + 1e-300
    assert abs(np.vdot(expected, d) - np.vdot(v, pushed)) <= 1e-13 * scale
    np.testing.assert_allclose(expected, np.einsum("saj,j->sa", dense, v), rtol=1e-12, atol=1e-12 * np.abs(v).max())
    np.testing.assert_allclose(pushed, np.einsum("saj,sa->j", dense, d), rtol=1e-12, atol=1e-12 * np.abs(d).sum())


@pytest.mark.slow
@PROPERTY
@given(
    kernels(),
    arrays(float, (STATES, ACTIONS), elements=NUMBERS),
    arrays(float, STATES, elements=NUMBERS),
    arrays(np.int32, STATES, elements=st.integers(0, ACTIONS - 1)),
)
def test_operators_of_weights_and_of_actions(kernel, weights, v, action):
    dense, kernel = kernel
    under = np.zeros((STATES, STATES))
    for s, a, j in itertools.product(range(STATES), range(ACTIONS), range(STATES)):
        under[s, j] += weights[s, a] * dense[s, a, j]
    select = v[:, None] * dense[np.arange(STATES), action]
    for brute, got in zip([under, select], operators(kernel, weights, v, action), strict=True):
        forward, backward, diagonals, matrices = got
        size = max(np.abs(weights).sum(), np.abs(v).sum())
        for matrix in matrices:
            np.testing.assert_allclose(matrix, brute, rtol=1e-12, atol=1e-13 * size)
        np.testing.assert_allclose(
            diagonals, np.tile(np.diag(brute), (len(diagonals), 1)), rtol=1e-12, atol=1e-13 * size
        )
        for products, want in [(forward, brute @ v), (backward, brute.T @ v)]:
            np.testing.assert_allclose(
                products, np.tile(want, (len(products), 1)), rtol=1e-12, atol=1e-13 * size * np.abs(v).max()
            )


@functools.cache
def one_of_each(dtype="float64", seed=0):
    process = random_process(seed)
    probability = process.probability.astype(dtype)
    return {form: kernel_of(form, process.successor, probability) for form in FORMS}


@jax.jit
def every_product(kernel, v, d):
    operator = kernel.under(d)
    chosen = kernel.select(jnp.zeros(STATES, int), v)
    return (
        kernel.expect(v),
        kernel.push(d),
        operator.apply(v),
        operator.T.apply(v),
        chosen.apply(v),
        kernel.diagonal(),
    )


@pytest.mark.few(4)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_shape_dtype_terms_and_stays(form, dtype):
    kernel, dense = one_of_each(dtype)[form], random_process(0).dense
    assert kernel.shape == (STATES, ACTIONS)
    assert kernel.dtype == dtype
    assert kernel.terms == {"successor": SLOTS, "predecessor": SLOTS, "stencil": len(BANDS)}.get(form, STATES)
    rng = np.random.default_rng(1)
    v, d = rng.normal(size=STATES).astype(dtype), rng.normal(size=(STATES, ACTIONS)).astype(dtype)
    tolerance = 1e-5 if dtype == "float32" else 1e-13
    wants = (
        dense @ v,
        np.einsum("sa,saj->j", d, dense),
        np.einsum("sa,saj,j->s", d, dense, v),
        np.einsum("sa,saj,s->j", d, dense, v),
        v * (dense[:, 0] @ v),
        np.einsum("sas->sa", dense),
    )
    for got, want in zip(every_product(kernel, v, d), wants, strict=True):
        assert got.dtype == dtype
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)
    if dtype == "float64":  # outside jit, with numpy arrays
        np.testing.assert_allclose(kernel.expect(v), wants[0], rtol=1e-13, atol=1e-13)
        np.testing.assert_allclose(kernel.push(d), wants[1], rtol=1e-13, atol=1e-13)
        np.testing.assert_allclose(kernel.under(d).T.apply(v), wants[3], rtol=1e-13, atol=1e-13)
    other = kernel.astype("float64" if dtype == "float32" else "float32")
    assert other.dtype != dtype
    assert jax.tree.structure(other) == jax.tree.structure(kernel)


@pytest.mark.few(2)
@pytest.mark.parametrize("form", FORMS)
def test_products_differentiate(form):
    """Gradients in every float leaf, of products with a fold, by finite differences; forward mode agrees."""
    process = random_process(2)
    kernel = kernel_of(form, process.successor, process.probability)
    rng = np.random.default_rng(3)
    v, d = jnp.asarray(rng.normal(size=STATES)), jnp.asarray(rng.normal(size=(STATES, ACTIONS)))
    floats, rest = jax.tree.flatten(kernel)
    which = [i for i, leaf in enumerate(floats) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    @jax.jit
    def scalar(inputs):
        leaves = list(floats)
        for i, leaf in zip(which, inputs[0], strict=True):
            leaves[i] = leaf
        made = jax.tree.unflatten(rest, leaves)
        _, v, d = inputs
        operator = made.under(d)
        chosen = made.select(jnp.arange(STATES) % ACTIONS, v)
        terms = jnp.sin(made.expect(v)) * d, made.push(d) ** 2, operator.apply(v) ** 2, operator.apply_transpose(v) ** 2
        return sum(jnp.sum(term) for term in terms) + jnp.sum(chosen.apply(v) * chosen.apply_transpose(v))

    x = ([floats[i] for i in which], v, d)
    direction = random_like(4, x)
    value, slope = jax.jvp(scalar, (x,), (direction,))
    gradient = jax.grad(scalar)(x)
    along = sum(np.vdot(g, t) for g, t in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
    np.testing.assert_allclose(along, slope, rtol=1e-11)
    np.testing.assert_allclose(slope, central_difference(scalar, x, direction)[0], rtol=1e-7)
    assert np.isfinite(value)


@pytest.mark.slow
def test_gradients_reach_every_slot():
    # <d, P v> is linear in P: the gradient is the outer product, at a repeated successor in every slot.
    process = random_process(2)
    rng = np.random.default_rng(3)
    v, d = jnp.asarray(rng.normal(size=STATES)), jnp.asarray(rng.normal(size=(STATES, ACTIONS)))
    for form in ("dense", "successor", "predecessor"):
        kernel = kernel_of(form, process.successor, process.probability)
        want = d[..., None] * v[None, None] if form == "dense" else d[None] * v[process.successor]
        for function in (
            lambda k: jnp.vdot(d, k.expect(v)),
            lambda k: jnp.vdot(v, k.push(d)),
            lambda k: k.under(d).apply(v).sum(),
            lambda k: jnp.vdot(k.under(d).apply_transpose(jnp.ones(STATES)), v),
        ):
            grad = jax.grad(function, allow_int=True)(kernel)
            np.testing.assert_allclose(grad.probability, want, rtol=1e-13, atol=1e-15)


@pytest.mark.few(4)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_batches_equal_singles(form, shared):
    processes = [random_process(seed) for seed in (0, 0 if shared else 1)]
    if form == "predecessor":
        stacked = bj.SuccessorTransition(
            *(np.stack([getattr(p, name) for p in processes]) for name in ("successor", "probability"))
        ).with_predecessors()
        if shared:
            stacked = jax.tree.map(lambda x: x[0], stacked)
        singles = [bj.SuccessorTransition(p.successor, p.probability) for p in processes]
    else:
        singles = [kernel_of(form, p.successor, p.probability) for p in processes]
        stacked = singles[0] if shared else jax.tree.map(lambda *x: jnp.stack(x), *singles)
    rng = np.random.default_rng(5)
    v, d = rng.normal(size=(2, STATES)), rng.normal(size=(2, STATES, ACTIONS))

    def products(kernel, v, d):
        m = kernel.under(d)
        return kernel.expect(v), kernel.push(d), m.apply(v), m.apply_transpose(v), PolicyOperator(kernel, d).T.apply(v)

    together = jax.jit(jax.vmap(products, in_axes=(None if shared else 0, 0, 0)))(stacked, v, d)
    for i, single in enumerate(singles):
        for got, want in zip(together, products(single, v[i], d[i]), strict=True):
            np.testing.assert_allclose(got[i], want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("form", ["successor", "predecessor"])
def test_look_ups_neither_wrap_nor_clamp_indices(form):
    """Wrapped, each slot's indices are copied at the start of every loop: up to half of a solve's time."""
    kernel, v, d = one_of_each()[form], jnp.ones(STATES), jnp.ones((STATES, ACTIONS))

    def products(kernel, operator, v, d):
        return kernel.expect(v), kernel.push(d), operator.apply(v), operator.T.apply(v)

    text = str(jax.make_jaxpr(products)(kernel, kernel.under(d), v, d))
    assert "gather" in text
    assert "scatter" in text
    for of_an_index in ("CLIP", " lt ", "select_n", " clamp"):
        assert of_an_index not in text


def test_a_shared_dense_kernel_is_one_flat_matrix_product():
    kernel = one_of_each()["dense"]
    batch = 5
    v, d = jnp.ones((batch, STATES)), jnp.ones((batch, STATES, ACTIONS))
    for function, x in [(lambda k, v: k.expect(v), v), (lambda k, d: k.push(d), d)]:
        text = jax.jit(jax.vmap(function, in_axes=(None, 0))).lower(kernel, x).as_text()
        dots = [line for line in text.splitlines() if "dot_general" in line]
        assert len(dots) == 1
        assert "batching_dims" not in dots[0]
        assert f"tensor<{STATES * ACTIONS}x{STATES}xf64>" in dots[0]
        copies = [line for line in text.splitlines() if "transpose" in line and f"{STATES * ACTIONS}x{STATES}" in line]
        assert not copies


@pytest.mark.slow
@pytest.mark.few(2)
@pytest.mark.parametrize("form", FORMS)
def test_solutions_agree(form):
    process = random_process(7)
    regularizer = bj.ShannonEntropy(0.3)

    def value(kernel):
        mdp = bj.MDP(kernel, process.reward, 0.8, process.initial)
        return bj.check(bj.solve(mdp, regularizer)).value

    np.testing.assert_allclose(
        value(kernel_of(form, process.successor, process.probability)), value(process.dense), rtol=1e-10
    )


# Predecessor lists


def test_predecessors_of_uneven_in_degrees():
    """One state with all successors, some with none; unused slots; vmapped; the structure of like MDPs."""
    rng = np.random.default_rng(0)
    successor = rng.integers(40, size=(3, 50, 2), dtype=np.int32)
    successor[0] = 7
    probability = rng.dirichlet(np.ones(3), (50, 2)).transpose(2, 0, 1)
    probability[:, :20] = np.array([1.0, 0, 0])[:, None, None]
    plain = bj.SuccessorTransition(successor, probability)
    lists = plain.with_predecessors()
    assert lists.predecessors is not None
    d, v = rng.normal(size=(50, 2)), rng.normal(size=50)
    np.testing.assert_allclose(lists.push(d), plain.push(d), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(
        lists.under(d).apply_transpose(v), plain.under(d).apply_transpose(v), rtol=1e-12, atol=1e-14
    )
    # Probabilities may change afterwards, those of unused slots as well.
    other = jax.tree.map(lambda x: x, lists)
    other = bj.SuccessorTransition(successor, np.full(successor.shape, 1 / 3)).with_predecessors()
    assert jax.tree.structure(other) == jax.tree.structure(lists)
    assert jax.tree.map(jnp.shape, other) == jax.tree.map(jnp.shape, lists)


def test_predecessor_lists_are_built_outside_jit():
    kernel = one_of_each()["successor"]
    with pytest.raises(bj.InputError, match="outside jit"):
        jax.jit(lambda k: k.with_predecessors())(kernel)


def test_like_mdps_share_a_program():
    traces = []

    @jax.jit
    def run(kernel, d):
        traces.append(1)
        return kernel.push(d)

    rng = np.random.default_rng(0)
    for _ in range(3):
        successor = rng.integers(2000, size=(4, 2000, 3), dtype=np.int32)
        kernel = bj.SuccessorTransition(successor, np.full(successor.shape, 0.25)).with_predecessors()
        run(kernel, jnp.ones((2000, 3)))
    assert len(traces) == 1


# Stencils

GRID = (3, 4)


def grid_walk():
    """Four moves and staying on a 3 x 4 grid, with random probabilities that respect its edges."""
    offsets = [(-1, 0), (0, 1), (1, 0), (0, -1), (0, 0)]
    rng = np.random.default_rng(1)
    row, column = np.unravel_index(np.arange(12), GRID)
    weight = rng.uniform(0.1, 1, (5, 12, 2))
    for k, (i, j) in enumerate(offsets):
        outside = (row + i < 0) | (row + i >= 3) | (column + j < 0) | (column + j >= 4)
        weight[k, outside] = 0
    return offsets, weight / weight.sum(0)


def test_stencil_on_a_grid_by_cells():
    offsets, probability = grid_walk()
    dense = np.zeros((12, 2, 12))
    for k, s, a in itertools.product(range(5), range(12), range(2)):
        if probability[k, s, a]:
            cell = np.array(np.unravel_index(s, GRID)) + offsets[k]
            dense[s, a, np.ravel_multi_index(tuple(cell), GRID)] += probability[k, s, a]
    kernel = bj.StencilTransition(offsets, probability, GRID)
    rng = np.random.default_rng(2)
    v, d = rng.normal(size=12), rng.normal(size=(12, 2))
    np.testing.assert_allclose(kernel.expect(v), dense @ v, rtol=1e-12)
    np.testing.assert_allclose(kernel.push(d), np.einsum("sa,saj->j", d, dense), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(kernel.under(d).matrix(), np.einsum("sa,saj->sj", d, dense), rtol=1e-12, atol=1e-15)
    assert kernel.under(d).weight.shape == (5, 12)
    lists = kernel.to_successors()
    np.testing.assert_allclose(densify(np.asarray(lists.successor), np.asarray(lists.probability)), dense)
    back = bj.StencilTransition.from_successors(lists, GRID)
    assert set(back.offsets) == set(offsets)
    np.testing.assert_allclose(back.expect(v), dense @ v, rtol=1e-12)


def test_stencil_of_successors_differentiates():
    offsets, probability = grid_walk()
    lists = bj.StencilTransition(offsets, probability, GRID).to_successors()
    v = jnp.asarray(np.random.default_rng(0).normal(size=12))

    def total(probability, convert):
        kernel = bj.SuccessorTransition(lists.successor, probability)
        return jnp.sum(jnp.sin((bj.StencilTransition.from_successors(kernel, GRID) if convert else kernel).expect(v)))

    got, want = (jax.grad(total)(lists.probability, convert) for convert in (True, False))
    np.testing.assert_allclose(got, want, rtol=1e-13)


def test_stencil_of_lists_takes_traced_probabilities():
    """Under jit a transition's successors are traced, whatever they were made of; numpy's array is not."""
    offsets, probability = grid_walk()
    lists = bj.StencilTransition(offsets, probability, GRID).to_successors()
    successor, v = np.asarray(lists.successor), jnp.asarray(np.random.default_rng(0).normal(size=12))
    made = jax.jit(lambda p: bj.StencilTransition.from_lists(successor, p, GRID))(lists.probability)
    assert set(offsets) <= set(made.offsets)
    np.testing.assert_allclose(made.expect(v), lists.expect(v), rtol=1e-12)
    wrong = [
        (successor[:-1], lists.probability, GRID, "both have shape"),
        (successor + 0.5, lists.probability, GRID, "transition.successor"),
        (np.full_like(successor, 12), lists.probability, GRID, "transition.successor.* 12"),
        (np.full_like(successor, -1), lists.probability, GRID, "transition.successor.* -1"),
        (successor, lists.probability, (5, 2), "10 cells, the transition has 12 states"),
    ]
    for *arguments, message in wrong:
        with pytest.raises(bj.InputError, match=message):
            bj.StencilTransition.from_lists(*arguments)
        index, chance, grid = arguments
        with pytest.raises(bj.InputError, match=message):
            jax.jit(lambda p, s=index, g=grid: bj.StencilTransition.from_lists(s, p, g))(chance)
    with pytest.raises(bj.InputError, match="offsets are static; give numpy's array"):
        jax.jit(lambda s, p: bj.StencilTransition.from_lists(s, p, GRID))(successor, lists.probability)
    with pytest.raises(bj.InputError, match=r"offsets are static; .* from_lists with numpy's array"):
        jax.jit(lambda t: bj.StencilTransition.from_successors(t, GRID))(lists)


def test_stencil_input_errors():
    offsets, probability = grid_walk()
    make = bj.StencilTransition
    wrong = probability.copy()
    wrong[1, 3], wrong[:, 3] = 1, 0
    wrong[1, 3] = 1
    for arguments, message in [
        ((offsets, wrong, GRID), r"slot 1, offset \(0, 1\), has a positive probability at state 3, cell \(0, 3\)"),
        ((offsets, probability * 2, GRID), "sum to 2"),
        ((offsets, probability, (3, 5)), r"\[5, 15\]"),
        ((offsets[:4], probability, GRID), r"\[4, 12\]"),
        (([(1,)] * 5, probability, GRID), "2 numbers each"),
        (([(0.5, 1)] * 5, probability, GRID), "whole numbers"),
        ((offsets, probability, (12, -1)), "each at least 1"),
    ]:
        with pytest.raises(bj.InputError, match=message):
            make(*arguments)
    rng = np.random.default_rng(0)
    many = bj.SuccessorTransition(rng.integers(100, size=(3, 100, 2), dtype=np.int32), np.full((3, 100, 2), 1 / 3))
    for kernel, grid, message in [(many, (10, 10), "offsets on the grid"), (many, (9, 10), "90 cells")]:
        with pytest.raises(bj.InputError, match=message):
            make.from_successors(kernel, grid)


# Matrix-free


class Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __call__(self, parameters, values):
        return parameters @ values


def test_matrix_free_input_errors():
    root = np.sqrt(random_process(0).dense)
    make = functools.partial(bj.MatrixFreeTransition, num_states=STATES, num_actions=ACTIONS)
    for function, parameters, message in [
        (product_of, {"root": 2 * root}, r"expectation of ones is 4"),
        (lambda p, v: jnp.abs(p @ v - 0.5) + 0.5, root**2, "not linear"),
        (lambda p, v: p @ v[::-1] * 2 - p @ v, root**2, "none negative"),
        (lambda p, v: (p @ v)[:, :2], root**2, "of shape"),
        (lambda p, v: p @ v, np.where(root == root[0, 0, 0], np.nan, root**2), "not all finite"),
        (Unhashable(), root**2, "hashed"),
    ]:
        with pytest.raises(bj.InputError, match=message):
            make(function, parameters)


@pytest.mark.slow
def test_matrix_free_is_built_under_jit_and_vmap():
    process = random_process(3)
    roots = jnp.sqrt(jnp.stack([process.dense, random_process(4).dense]))

    def value(root):
        kernel = bj.MatrixFreeTransition(product_of, {"root": root}, STATES, ACTIONS)
        return bj.solve(bj.MDP(kernel, process.reward, 0.7), bj.ShannonEntropy(0.5)).value

    want = [bj.solve(bj.MDP(root**2, process.reward, 0.7), bj.ShannonEntropy(0.5)).value for root in roots]
    np.testing.assert_allclose(jax.jit(jax.vmap(value))(roots), want, rtol=1e-10)


# Short reductions


@pytest.mark.few(2)
@pytest.mark.parametrize("length", [1, 3, 16, 17, 40])
def test_reductions(length):
    x = np.random.default_rng(length).normal(size=(3, 5, length))
    np.testing.assert_allclose(sum_last(jnp.asarray(x)), x.sum(-1), rtol=1e-13)
    np.testing.assert_array_equal(max_last(jnp.asarray(x)), x.max(-1))
    slots = jnp.asarray(x.transpose(2, 0, 1))
    np.testing.assert_allclose(sum_slots(jnp.multiply, slots, slots), (x**2).sum(-1), rtol=1e-13)
    grad = jax.grad(lambda s: jnp.sum(sum_slots(lambda a, b: jnp.sin(a) * b, s, s)))(slots)
    np.testing.assert_allclose(grad, np.sin(slots) + slots * np.cos(slots), rtol=1e-12)
    x[0, 0, 0] = np.nan
    assert np.isnan(max_last(jnp.asarray(x))[0, 0])
