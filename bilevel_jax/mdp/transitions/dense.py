"""Probabilities as one array P[S, A, S]."""

from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Real

from bilevel_jax.core.batching import where_mapped
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.indexing import gather
from bilevel_jax.core.reductions import einsum, matmul
from bilevel_jax.core.rounding import of_matrix_product, of_one_total
from bilevel_jax.core.validation import as_float, require_distribution
from bilevel_jax.mdp.transitions.protocol import StateOperator, Transition


class DenseOperator(StateOperator):
    """M as a matrix [S, S]."""

    entries: Float[Array, "S S"]

    def apply(self, values):
        return matmul(self.entries, values)

    def apply_transpose(self, masses):
        return matmul(masses, self.entries)

    def matrix(self):
        return self.entries

    def diagonal(self):
        return jnp.diagonal(self.entries)


class DenseTransition(Transition):
    """Probabilities as one array P[S, A, S]; each row (last axis) sums to 1.

    A vmapped batch of B values that shares this transition is one product of [S A, S] with [S, B], at the speed of a
    matrix product (docs/performance.md).

    Raises:
      InputError: wrong number of axes, first and last axis differ, no action, negative entries, or rows that do not sum
        to 1 (values are checked outside jit only).

    Example:
      >>> bj.DenseTransition(jnp.full((3, 2, 3), 1 / 3)).shape  # S = 3, A = 2
      (3, 2)
    """

    folding_shrinks: ClassVar[bool] = True
    probability: Float[Array, "*batch S A S"]

    def __init__(self, probability: Real[ArrayLike, "*batch S A S"] | Any):
        self.probability = as_float("transition", probability)
        shape = self.probability.shape
        if len(shape) < 3 or shape[-1] != shape[-3]:
            raise InputError(
                f"transition: expected shape [S, A, S] (batch axes first), got {list(shape)}; "
                f"the order is [state, action, next state]"
            )
        self.validate()

    @property
    def shape(self):
        return self.probability.shape[:-1]

    @property
    def dtype(self):
        return self.probability.dtype

    @property
    def terms(self):
        return self.probability.shape[-1]

    def sums(self, values):
        one, many = of_matrix_product(self.terms, self.dtype), of_one_total(self.terms)
        return one._replace(roundings=where_mapped(values, many.roundings, one.roundings))

    def astype(self, dtype):
        return eqx.tree_at(lambda t: t.probability, self, self.probability.astype(dtype))

    def event_ndim(self):
        return eqx.tree_at(lambda t: t.probability, self, 3)

    def validate(self):
        require_distribution(
            "transition",
            self.probability,
            -1,
            "divide each row by its sum: P / P.sum(-1, keepdims=True)",
            "[state, action, next state]",
        )

    # Both products are flat, [S A, S] with a vector: under vmap with a shared kernel XLA then sees one
    # matrix product of two 2-D operands, without a transposed copy of P.

    def expect(self, values):
        return matmul(self._rows(), values).reshape(self.probability.shape[:-1])

    def push(self, masses):
        return matmul(masses.reshape(-1), self._rows())

    def under(self, weights):
        return DenseOperator(einsum("sa,saj->sj", weights, self.probability))

    def diagonal(self):
        return jnp.diagonal(self.probability, axis1=0, axis2=2).T

    def select(self, action, weight):
        states = jnp.arange(self.probability.shape[0])
        rows = gather(self.probability, (states, action))
        return DenseOperator(weight[:, None] * rows)

    def _rows(self) -> Float[Array, "pairs S"]:
        return self.probability.reshape(-1, self.probability.shape[-1])
