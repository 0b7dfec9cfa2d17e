"""LU factorization as the last resort of iterations that gain too little: what it costs, and a solve that is made if
it is needed.

Chains that go round (rings, seasons) have eigenvalues all around a circle of radius `discount`: no polynomial of a
degree below S is small on it, so that every Krylov method gains next to nothing a product until it made S of them, and
sweeps gain 1 - discount each. A factorization does not see the difference.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import lu_factor, lu_solve

from bilevel_jax.reductions import matmul
from bilevel_jax.transitions import StateOperator

# The most states for which a fall-back exists: a matrix of 200 MB in float64, factorized in some seconds.
FALL_BACK_LIMIT = 5000
# What was measured on one CPU core (docs/performance.md): operations a second of an LU factorization, seconds for each
# entry of its matrix beside it; and seconds of a product with all that an iteration does beside it: at all, for each
# state, and for each entry of a sparse and of a dense operator.
LU_RATE, PER_MATRIX_ENTRY = 25e9, 3e-9
PER_PRODUCT, PER_STATE, PER_ENTRY, PER_DENSE_ENTRY = 4e-6, 4e-9, 1e-9, 0.3e-9


def is_affordable(num_states: int) -> bool:
    """Whether a matrix [S, S] may be made where iterations fail."""
    return num_states <= FALL_BACK_LIMIT


def time_in_products(operator: StateOperator) -> float:
    """As long as so many products take the matrix of M and its factorization. By structure: known when tracing."""
    folded, size, entries = _structure(operator)
    dense = entries >= size * size
    product = PER_PRODUCT + PER_STATE * size + (PER_DENSE_ENTRY if dense else PER_ENTRY) * entries
    return folded.matrix_products + (size**3 / 1.5 / LU_RATE + PER_MATRIX_ENTRY * size**2) / product


def operations_in_products(operator: StateOperator) -> int:
    """As many operations as so many products have the matrix of M and its factorization: what reports count."""
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

    x: jax.Array
    gap: jax.Array


def solve_if(
    needed: jax.Array, operator: StateOperator, rhs: jax.Array, otherwise: jax.Array, *, transpose: bool = False
) -> jax.Array:
    """x[S] with (I - M) x = rhs, or (I - M') x = rhs, by LU where `needed`, a scalar bool; else `otherwise` [S].

    Under vmap too nothing is factorized that is not needed, and one matrix at a time is held: elements that share an
    operator share its factorization, others go one after another (batched LAPACK calls deadlock XLA's CPU pool, see
    `batching.py`, and a batch of matrices may not fit an accelerator's memory). Not differentiable by itself.
    """

    def solve(matrix, rhs, otherwise):
        del otherwise
        return _refined(matrix, rhs, transpose).x

    return _if_needed(solve, needed, operator, rhs, otherwise)


def improve_if(
    needed: jax.Array, operator: StateOperator, rhs: jax.Array, found: Candidate, *, transpose: bool = False
) -> Candidate:
    """As `solve_if`, with the residual; `found` where that is nearer."""

    def solve(matrix, rhs, found):
        made = _refined(matrix, rhs, transpose)
        nearer = jnp.max(jnp.abs(made.gap), -1) < jnp.max(jnp.abs(found.gap), -1)  # False for NaN
        return jax.tree.map(lambda new, old: jnp.where(nearer[:, None], new, old), made, found)

    return _if_needed(solve, needed, operator, rhs, found)


def _refined(matrix: jax.Array, rhs: jax.Array, transpose: bool) -> Candidate:
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
            rows = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), vectors)
            found = mapped(operator, *rows)
            found = jax.tree.map(lambda leaf: leaf.reshape(axis_size, -1, leaf.shape[-1]), found)
        return found, jax.tree.map(lambda _: True, found)

    found = mapped(operator, *jax.tree.map(lambda leaf: leaf[None], (needed, rhs, otherwise)))
    return jax.tree.map(lambda leaf: leaf[0], found)
