"""LU factorization as the last resort of iterations that gain too little: what it costs, and a solve if it is needed.

Some chains go round (rings, seasons). Their eigenvalues lie all around a circle of radius `discount`, and no polynomial
of a degree below S is small on the whole circle. Every Krylov method therefore gains next to nothing per product until
it has made S of them, and each sweep gains a factor `discount`. A factorization takes as long on such chains as on any
other.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import lu_factor, lu_solve
from jaxtyping import Array, Float

from bilevel_jax.core.arrays import Flag, PerState
from bilevel_jax.core.batching import merge_axes
from bilevel_jax.core.reductions import matmul
from bilevel_jax.mdp.transitions import StateOperator

# The most states for which a fall-back exists: a matrix of 200 MB in float64, factorized in some seconds.
FALL_BACK_LIMIT = 5000
# What was measured on one CPU core (docs/performance.md): operations a second of an LU factorization, seconds for each
# entry of its matrix beside it; and seconds of a product with all that an iteration does beside it: at all, for each
# state, and for each entry of a sparse and of a dense operator.
LU_RATE, PER_MATRIX_ENTRY = 25e9, 3e-9
PER_PRODUCT, PER_STATE, PER_ENTRY, PER_DENSE_ENTRY = 4e-6, 4e-9, 1e-9, 0.3e-9


def is_affordable(num_states: int) -> bool:
    """Return whether a matrix [S, S] may be made where iterations fail."""
    return num_states <= FALL_BACK_LIMIT


def time_in_products(operator: StateOperator) -> float:
    """Return how long it takes to make the matrix of M and factorize it, in products.

    It depends on the structure alone, which is known while tracing.
    """
    folded, size, entries = _structure(operator)
    dense = entries >= size * size
    product = PER_PRODUCT + PER_STATE * size + (PER_DENSE_ENTRY if dense else PER_ENTRY) * entries
    return folded.matrix_products + (size**3 / 1.5 / LU_RATE + PER_MATRIX_ENTRY * size**2) / product


def operations_in_products(operator: StateOperator) -> int:
    """Return how many operations it takes to make the matrix of M and factorize it, in products.

    Reports count this number.
    """
    folded, size, entries = _structure(operator)
    return folded.matrix_products + max(1, size**3 // (3 * entries))


def _structure(operator: StateOperator) -> tuple[StateOperator, int, int]:
    """The folded operator, its states and its entries."""
    folded = jax.eval_shape(lambda o: o.fold(), operator)
    size = jax.eval_shape(lambda o: o.diagonal(), operator).shape[0]
    entries = sum(leaf.size for leaf in jax.tree.leaves(folded) if jnp.issubdtype(leaf.dtype, jnp.floating))
    return folded, size, max(size, entries)


class Candidate(NamedTuple):
    """x[S] and its residual b - A x [S]."""

    x: Float[Array, "*batch S"]
    gap: Float[Array, "*batch S"]


def solve_if(
    needed: Flag, operator: StateOperator, rhs: PerState, otherwise: PerState, *, transpose: bool = False
) -> PerState:
    """Return x[S] with (I - M) x = rhs, or (I - M') x = rhs, by LU where `needed`, a scalar bool; else `otherwise` [S].

    Under vmap, too, nothing is factorized that is not needed, and only one matrix is held at a time. Batch elements
    that share an operator share its factorization; others are solved one after another, because batched LAPACK calls
    deadlock XLA's CPU pool (see `batching.py`) and because a batch of matrices may not fit an accelerator's memory. The
    result is not differentiable by itself.
    """

    def solve(matrix, rhs, otherwise):
        del otherwise
        return _refined(matrix, rhs, transpose).x

    return _if_needed(solve, needed, operator, rhs, otherwise)


def improve_if(
    needed: Flag, operator: StateOperator, rhs: PerState, found: Candidate, *, transpose: bool = False
) -> Candidate:
    """Like `solve_if`, but with the residual. Returns `found` where its residual is smaller."""

    def solve(matrix, rhs, found):
        made = _refined(matrix, rhs, transpose)
        nearer = jnp.max(jnp.abs(made.gap), -1) < jnp.max(jnp.abs(found.gap), -1)  # False for NaN
        return jax.tree.map(lambda new, old: jnp.where(nearer[:, None], new, old), made, found)

    return _if_needed(solve, needed, operator, rhs, found)


def _refined(matrix: Float[Array, "S S"], rhs: Float[Array, "B S"], transpose: bool) -> Candidate:
    """By LU and one step of iterative refinement, of right-hand sides [B, S]."""
    factors = lu_factor(matrix)

    def refine(_, last):
        x = last.x + lu_solve(factors, last.gap.T, trans=1 if transpose else 0).T
        image = matmul(x, matrix if transpose else matrix.T)
        return Candidate(x, rhs - image)

    return lax.fori_loop(0, 2, refine, Candidate(jnp.zeros_like(rhs), rhs))


def _if_needed(solve, needed, operator, rhs, otherwise):
    """`solve(I - M, rhs[B, S], otherwise[B, ...])` of one system where it is needed."""

    @jax.jit
    def run(operator, needed, rhs, otherwise):
        def factorize():
            matrix = operator.matrix()
            found = solve(jnp.eye(matrix.shape[-1], dtype=matrix.dtype) - matrix, rhs, otherwise)
            return jax.tree.map(lambda new, old: jnp.where(needed[:, None], new, old), found, otherwise)

        return lax.cond(jnp.any(needed), factorize, lambda: otherwise)

    mapped = jax.custom_batching.custom_vmap(run)

    @mapped.def_vmap
    def rule(axis_size, in_batched, operator, *vectors):
        operator_batched, *vectors_batched = in_batched

        def whole(leaf, batched):
            return leaf if batched else jnp.broadcast_to(leaf, (axis_size, *leaf.shape))

        vectors = jax.tree.map(whole, tuple(vectors), tuple(vectors_batched))
        if any(jax.tree.leaves(operator_batched)):
            operators = jax.tree.map(whole, operator, operator_batched)
            found = lax.map(lambda one: mapped(one[0], *one[1]), (operators, vectors))
        else:
            rows = merge_axes(vectors)
            found = mapped(operator, *rows)
            found = jax.tree.map(lambda leaf: leaf.reshape(axis_size, -1, leaf.shape[-1]), found)
        return found, jax.tree.map(lambda _: True, found)

    found = mapped(operator, *jax.tree.map(lambda leaf: leaf[None], (needed, rhs, otherwise)))
    return jax.tree.map(lambda leaf: leaf[0], found)
