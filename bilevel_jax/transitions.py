"""Transition kernels P[s, a, s'] behind one protocol: `expect`, its transpose `push`, and `under`.

Shapes are those of one MDP: S states, A actions, K successors a state-action pair; batch axes come
first and are handled by vmap. A kernel is linear in its probabilities, which are its only
differentiable leaf.
"""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from bilevel_jax.errors import InputError
from bilevel_jax.validation import as_array, as_float, require_distribution, require_index


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

    def fold(self):
        return TransposedOperator(self.operator.fold())

    @property
    def T(self):  # noqa: N802
        return self.operator


class Transition(eqx.Module):
    """The protocol of a transition kernel. `event_ndim` says how many axes a leaf has in one MDP."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """(..., S, A), leading axes being batch axes."""

    @property
    @abc.abstractmethod
    def dtype(self) -> Any:
        """Of the probabilities."""

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


class PolicyOperator(StateOperator):
    """M[s, s'] = sum_a weights[s, a] P[s, a, s'], by the transition's own products until it is folded."""

    transition: Transition
    weights: jax.Array

    def apply(self, values):
        return jnp.sum(self.weights * self.transition.expect(values), -1)

    def apply_transpose(self, masses):
        return self.transition.push(self.weights * masses[:, None])

    def matrix(self):
        return self.fold().matrix()

    def fold(self):
        return self.transition.under(self.weights)


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


class SuccessorOperator(StateOperator):
    """A sparse matrix by rows: entry [k, s, a] adds `weight[k, s, a]` at column `successor[k, s, a]`."""

    successor: jax.Array
    weight: jax.Array

    def apply(self, values):
        return jnp.sum(self.weight * _gather(values, self.successor), (0, 2))

    def apply_transpose(self, masses):
        return _scatter(self.weight * masses[:, None], self.successor, masses.shape[0])

    def matrix(self):
        size = self.weight.shape[1]
        rows = jnp.broadcast_to(jnp.arange(size)[:, None], self.weight.shape)
        return jnp.zeros((size, size), self.weight.dtype).at[rows, self.successor].add(self.weight)


class SuccessorTransition(Transition):
    """Up to K successors a state-action pair: `successor` int32[K, S, A], `probability` [K, S, A].

    The slot axis comes first because one gather a slot is several times faster than a gather of
    slots (docs/performance.md). Unused slots have probability 0 and any valid successor; a successor
    may stand in several slots.

    Raises:
      InputError: shapes that differ, successors that are no integers or out of range, no action,
        negative probabilities, or probabilities that do not sum to 1 over the slots.
    """

    successor: jax.Array
    probability: jax.Array

    def __init__(self, successor: Any, probability: Any):
        self.probability = as_float("transition.probability", probability)
        index = as_array("transition.successor", successor)
        if not jnp.issubdtype(index.dtype, jnp.integer):
            raise InputError(f"transition.successor: expected integers, got {index.dtype}; use int32 state indices")
        if index.shape != self.probability.shape or index.ndim < 3:
            raise InputError(
                f"transition: successor and probability must both have shape [K, S, A] (batch axes first), got "
                f"{list(index.shape)} and {list(self.probability.shape)}"
            )
        if index.shape[-3] == 0:
            raise InputError("transition: the slot axis K has length 0; every pair needs a successor")
        require_index("transition.successor", index, self.probability.shape[-2])
        self.successor = index.astype(jnp.int32)
        self.validate()

    @property
    def shape(self):
        return self.probability.shape[:-3] + self.probability.shape[-2:]

    @property
    def dtype(self):
        return self.probability.dtype

    def astype(self, dtype):
        return eqx.tree_at(lambda t: t.probability, self, self.probability.astype(dtype))

    def event_ndim(self):
        return eqx.tree_at(lambda t: (t.successor, t.probability), self, (3, 3))

    def validate(self):
        require_distribution(
            "transition.probability", self.probability, -3, "divide by the sum over the slots: p / p.sum(-3)"
        )

    def expect(self, values):
        return jnp.sum(self.probability * _gather(values, self.successor), 0)

    def push(self, masses):
        return _scatter(self.probability * masses, self.successor, masses.shape[0])

    def under(self, weights):
        return SuccessorOperator(self.successor, self.probability * weights)


def _gather(values: jax.Array, index: jax.Array) -> jax.Array:
    # Indices are checked when the kernel is built; skipping the clamp is worth a factor of 2 and more.
    return jnp.asarray(values).at[index].get(mode="promise_in_bounds")


def _scatter(masses: jax.Array, index: jax.Array, size: int) -> jax.Array:
    return jnp.zeros((size,), masses.dtype).at[index].add(masses, mode="promise_in_bounds")
