"""No regularizer: the ordinary MDP."""

from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Bool

from bilevel_jax.core.derivatives import derivative_of, without_derivative
from bilevel_jax.core.reductions import argmax_last, is_first, max_last, sum_last
from bilevel_jax.mdp.regularizers.protocol import PerRow, Regularizer, Rows


class Unregularized(Regularizer):
    """The ordinary MDP: Omega = 0, Omega* = max, and all probability on the first action that attains the maximum.

    The value is differentiable through the action that is taken. Where several actions attain the maximum, that is the
    first one, so that the derivative is one of the one-sided ones. The policy is piecewise constant: the derivative of
    `policy` is 0, and differentiating the policy of a `Solution` raises InputError (`bellman.read_policy`).

    Example:
      >>> bj.Unregularized().policy(jnp.array([[1.0, 2.0]])).tolist()
      [[0.0, 1.0]]
    """

    smooth: ClassVar[bool] = False

    # Always 0, and no leaf: nothing is differentiated in it. The protocol's is an array.
    temperature: float = eqx.field(static=True)  # type: ignore[assignment]

    def __init__(self):
        self.temperature = 0.0

    def conjugate(self, q):
        return _maximum(q)

    def policy(self, q):
        return stop_gradient(_first_maximum(q).astype(q.dtype))

    def penalty(self, policy):
        return jnp.zeros_like(policy[..., 0])

    def event_ndim(self):
        return self

    def linearized_policy(self, policy, q, value):
        """`policy` itself; differentiating it raises InputError, or gives NaN in forward mode."""
        del value
        return without_derivative(policy, q)

    def validate(self):
        """Nothing to check."""


# The derivative of jnp.max is shared among ties; the operator of the derivative of V takes one action.
def _maximum(q: Rows) -> PerRow:
    return stop_gradient(max_last(q)) + sum_last(derivative_of(q, _first_maximum(q)))


def _first_maximum(q: Rows) -> Bool[Array, "*states A"]:
    return is_first(argmax_last(q), q)
