"""Probabilities as one array P[S, A, S]."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from bilevel_jax.errors import InputError
from bilevel_jax.transitions.protocol import StateOperator, Transition
from bilevel_jax.validation import as_float, require_distribution


class DenseOperator(StateOperator):
    """A matrix [S, S]."""

    entries: jax.Array

    def apply(self, values):
        return self.entries @ values

    def apply_transpose(self, masses):
        return masses @ self.entries

    def matrix(self):
        return self.entries


class DenseTransition(Transition):
    """Probabilities as one array P[S, A, S]; rows (last axis) sum to 1.

    Raises:
      InputError: wrong number of axes, first and last axis differ, no action, negative entries, or
        rows that do not sum to 1 (values are checked outside jit only).
    """

    probability: jax.Array

    def __init__(self, probability: Any):
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

    def astype(self, dtype):
        return eqx.tree_at(lambda t: t.probability, self, self.probability.astype(dtype))

    def event_ndim(self):
        return eqx.tree_at(lambda t: t.probability, self, 3)

    def validate(self):
        require_distribution(
            "transition", self.probability, -1, "divide each row by its sum: P / P.sum(-1, keepdims=True)"
        )

    def expect(self, values):
        return self.probability @ values

    def push(self, masses):
        return jnp.tensordot(masses, self.probability, 2)

    def under(self, weights):
        return DenseOperator(jnp.einsum("sa,saj->sj", weights, self.probability))
