"""Transition kernels P[s, a, s'] behind one protocol: `expect`, its transpose `push`, and `under`.

Shapes are those of one MDP: S states, A actions, K successors a state-action pair; batch axes come
first and are handled by vmap. A kernel is linear in its probabilities, which are its only
differentiable leaf.
"""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from bilevel_jax.reductions import sum_last


class StateOperator(eqx.Module):
    """A linear map from functions of the state to functions of the state, M [S, S], by its action."""

    @abc.abstractmethod
    def apply(self, values: jax.Array) -> jax.Array:
        """M v for v[S]."""

    @abc.abstractmethod
    def apply_transpose(self, masses: jax.Array) -> jax.Array:
        """M' d for d[S]."""

    @abc.abstractmethod
    def matrix(self) -> jax.Array:
        """M itself, [S, S]."""

    def diagonal(self) -> jax.Array:
        """M[s, s], [S]."""
        return jnp.diagonal(self.matrix())

    @property
    def matrix_products(self) -> int:
        """How many products `matrix` makes; 0 where it reads entries that are stored."""
        return 0

    def fold(self) -> "StateOperator":
        """The same map, made ready for many products."""
        return self

    @property
    def T(self) -> "StateOperator":  # noqa: N802 (numpy's name for the transpose)
        """The transposed map."""
        return TransposedOperator(self)


class TransposedOperator(StateOperator):
    """M' of an operator M."""

    operator: StateOperator

    def apply(self, values):
        return self.operator.apply_transpose(values)

    def apply_transpose(self, masses):
        return self.operator.apply(masses)

    def matrix(self):
        return self.operator.matrix().T

    def diagonal(self):
        return self.operator.diagonal()

    @property
    def matrix_products(self):
        return self.operator.matrix_products

    def fold(self):
        return TransposedOperator(self.operator.fold())

    @property
    def T(self):  # noqa: N802
        return self.operator


class Transition(eqx.Module):
    """The protocol of a transition kernel. `event_ndim` says how many axes a leaf has in one MDP.

    `folding_shrinks`: whether an operator folded `under` a policy reads fewer numbers than `expect` does.
    """

    folding_shrinks: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """(..., S, A), leading axes being batch axes."""

    @property
    @abc.abstractmethod
    def dtype(self) -> Any:
        """Of the probabilities."""

    @property
    @abc.abstractmethod
    def terms(self) -> int:
        """The most summands of an expectation; its rounding error is at most `terms` units in the last place."""

    @abc.abstractmethod
    def astype(self, dtype: Any) -> "Transition":
        """The same kernel with probabilities of another floating-point type."""

    @abc.abstractmethod
    def event_ndim(self) -> "Transition":
        """The same tree with each array replaced by its number of axes in a single MDP."""

    @abc.abstractmethod
    def validate(self) -> None:
        """Check values that are known. Raises InputError."""

    @abc.abstractmethod
    def expect(self, values: jax.Array) -> jax.Array:
        """E[v(s') | s, a] = sum_s' P[s, a, s'] v[s']: [S] -> [S, A]."""

    @abc.abstractmethod
    def push(self, masses: jax.Array) -> jax.Array:
        """The transpose of `expect`: sum_sa d[s, a] P[s, a, s']: [S, A] -> [S]."""

    @abc.abstractmethod
    def under(self, weights: jax.Array) -> StateOperator:
        """M[s, s'] = sum_a weights[s, a] P[s, a, s'], folded once so that many products are cheap."""

    @abc.abstractmethod
    def diagonal(self) -> jax.Array:
        """P[s, a, s], the probability to stay: [S, A]."""

    def select(self, action: jax.Array, weight: jax.Array) -> StateOperator:
        """M[s, s'] = weight[s] P[s, action[s], s'] for action int[S] and weight[S]: `under` a deterministic policy."""
        chosen = jnp.arange(self.shape[-1], dtype=action.dtype)[None] == action[:, None]
        return self.under(jnp.where(chosen, weight[:, None], 0))


class PolicyOperator(StateOperator):
    """M[s, s'] = sum_a weights[s, a] P[s, a, s'], by the transition's own products until it is folded.

    Folded it is cheaper a product, and under vmap it is one operator a batch element: where a dense
    transition is shared by a batch of policies that is a batch of [S, S], while the products of this
    form are one matrix product for all of them.
    """

    transition: Transition
    weights: jax.Array

    def apply(self, values):
        return sum_last(self.weights * self.transition.expect(values))

    def apply_transpose(self, masses):
        return self.transition.push(self.weights * masses[:, None])

    def matrix(self):
        return self.fold().matrix()

    def diagonal(self):
        return sum_last(self.weights * self.transition.diagonal())

    def fold(self):
        return self.transition.under(self.weights)
