"""Transition kernels P[s, a, s'] behind one protocol: `expect`, its transpose `push`, and `under`.

Shapes are those of one MDP: S states, A actions, K successors per state-action pair; batch axes come
first and are handled by vmap. A kernel is linear in its probabilities, which are its only
differentiable leaf.
"""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bilevel_jax.core.arrays import PerPair, PerState
from bilevel_jax.core.reductions import sum_last
from bilevel_jax.core.rounding import Sums, of_groups


class StateOperator(eqx.Module):
    """A linear map from functions of the state to functions of the state, M [S, S], by its action."""

    @abc.abstractmethod
    def apply(self, values: PerState) -> PerState:
        """M v for v[S]."""

    @abc.abstractmethod
    def apply_transpose(self, masses: PerState) -> PerState:
        """M' d for d[S]."""

    @abc.abstractmethod
    def matrix(self) -> Float[Array, "S S"]:
        """M itself, [S, S]."""

    def diagonal(self) -> PerState:
        """M[s, s], [S]."""
        return jnp.diagonal(self.matrix())

    @property
    def matrix_products(self) -> int:
        """Return how many products `matrix` makes. It is 0 where the entries are stored."""
        return 0

    def fold(self) -> "StateOperator":
        """Return the same map in a form in which each of many products is cheap."""
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
        """The dtype of the probabilities."""

    @property
    @abc.abstractmethod
    def terms(self) -> int:
        """The largest number of summands of an expectation."""

    def sums(self, values: Float[Array, "..."]) -> Sums:
        """Return how the sums in an expectation of `values` are rounded. Only the batch axes of the values matter."""
        del values
        return of_groups(self.terms)

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
    def expect(self, values: PerState) -> PerPair:
        """E[v(s') | s, a] = sum_s' P[s, a, s'] v[s']: [S] -> [S, A]."""

    @abc.abstractmethod
    def push(self, masses: PerPair) -> PerState:
        """The transpose of `expect`: sum_sa d[s, a] P[s, a, s']: [S, A] -> [S]."""

    @abc.abstractmethod
    def under(self, weights: PerPair) -> StateOperator:
        """M[s, s'] = sum_a weights[s, a] P[s, a, s'], folded once so that many products are cheap."""

    @abc.abstractmethod
    def diagonal(self) -> PerPair:
        """P[s, a, s], the probability to stay: [S, A]."""

    def select(self, action: Int[Array, " S"], weight: PerState) -> StateOperator:
        """M[s, s'] = weight[s] P[s, action[s], s'] for action int[S] and weight[S]: `under` a deterministic policy."""
        chosen = jnp.arange(self.shape[-1], dtype=action.dtype)[None] == action[:, None]
        return self.under(jnp.where(chosen, weight[:, None], 0))


class PolicyOperator(StateOperator):
    """M[s, s'] = sum_a weights[s, a] P[s, a, s'], computed by the transition's own products until it is folded.

    Once folded, each product is cheaper, but under vmap there is one operator per batch element. A batch of policies
    that shares a dense transition then becomes a batch of matrices [S, S], while the products of the unfolded form are
    one matrix product for the whole batch.
    """

    transition: Transition
    weights: PerPair

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
