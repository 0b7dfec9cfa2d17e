"""Lists of successors, [K, S, A]."""

from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp

from bilevel_jax.errors import InputError
from bilevel_jax.indexing import gather, scatter_add
from bilevel_jax.reductions import map_slots, sum_last, sum_slots
from bilevel_jax.transitions.protocol import StateOperator, Transition
from bilevel_jax.validation import as_float, as_integer, require_distribution, require_index

if TYPE_CHECKING:
    from bilevel_jax.transitions.predecessor import PredecessorLists


class SuccessorOperator(StateOperator):
    """A sparse matrix by rows: entry [k, s, a] adds `weight[k, s, a]` at column `successor[k, s, a]`."""

    successor: jax.Array
    weight: jax.Array

    def apply(self, values):
        return sum_last(_expect(self.successor, self.weight, values))

    def apply_transpose(self, masses):
        return scatter_add(self.weight * masses[None, :, None], self.successor, masses.shape[0])

    def matrix(self):
        size = self.weight.shape[1]
        rows = jnp.broadcast_to(jnp.arange(size)[None, :, None], self.weight.shape)
        return jnp.zeros((size, size), self.weight.dtype).at[rows, self.successor].add(self.weight)

    def diagonal(self):
        return sum_last(_stay(self.successor, self.weight))


class SuccessorTransition(Transition):
    """Up to K successors a state-action pair: `successor` int32[K, S, A], `probability` [K, S, A].

    The slot axis comes first because one gather a slot is several times faster than a gather of
    slots (docs/performance.md). Unused slots have probability 0 and any valid successor; a successor
    may stand in several slots.

    `predecessors` is None, or what `with_predecessors` made.

    Raises:
      InputError: shapes that differ, successors that are no integers or out of range, no action,
        negative probabilities, or probabilities that do not sum to 1 over the slots.
    """

    successor: jax.Array
    probability: jax.Array
    predecessors: "PredecessorLists | None"

    def __init__(self, successor: Any, probability: Any):
        self.predecessors = None
        self.probability = as_float("transition.probability", probability)
        self.successor = index = as_integer("transition.successor", successor, "use int32 state indices, 0 to S - 1")
        if index.shape != self.probability.shape or index.ndim < 3:
            raise InputError(
                f"transition: successor and probability must both have shape [K, S, A] (batch axes first), got "
                f"{list(index.shape)} and {list(self.probability.shape)}"
            )
        if index.shape[-3] == 0:
            raise InputError("transition: the slot axis K has length 0; every pair needs a successor")
        self.validate()  # first: numbers in another order are out of range, too
        require_index("transition.successor", index, self.probability.shape[-2])

    @property
    def shape(self):
        return self.probability.shape[:-3] + self.probability.shape[-2:]

    @property
    def dtype(self):
        return self.probability.dtype

    @property
    def terms(self):
        return self.probability.shape[-3]

    def astype(self, dtype):
        return eqx.tree_at(lambda t: t.probability, self, self.probability.astype(dtype))

    def event_ndim(self):
        axes = eqx.tree_at(lambda t: (t.successor, t.probability), self, (3, 3))
        if self.predecessors is None:
            return axes
        return eqx.tree_at(lambda t: (t.predecessors.entry, t.predecessors.owner), axes, (2, 1))

    def validate(self):
        require_distribution(
            "transition.probability",
            self.probability,
            -3,
            "divide by the sum over the slots: p / p.sum(-3)",
            "[slot, state, action]",
        )

    def expect(self, values):
        return _expect(self.successor, self.probability, values)

    def push(self, masses):
        # Predecessor lists serve folded operators only: a gather of each entry's flow, from an array K times
        # as long as the states', was 4 times slower than this at S = 10^6.
        return scatter_add(self.probability * masses[None], self.successor, masses.shape[0])

    def under(self, weights):
        operator = SuccessorOperator(self.successor, self.probability * weights[None])
        return operator if self.predecessors is None else self.predecessors.fold(operator)

    def with_predecessors(self) -> "SuccessorTransition":
        """The same kernel with lists of predecessors: `under` then has transposed products that are gathers as well.

        It pays where such products are many under one policy: adjoint solves, gradients in reverse
        mode, occupancies. The lists take as much memory as the successors and a sort of K S A numbers on
        the host, once; they depend on the successors alone, so that probabilities may be anything,
        traced or differentiated. Their shapes depend on the in-degrees: an MDP with others may compile
        anew (counts are rounded up so that like ones do not).

        Raises:
          InputError: called with traced successors, under jit or vmap.
        """
        from bilevel_jax.transitions.predecessor import predecessor_lists

        return eqx.tree_at(
            lambda t: t.predecessors, self, predecessor_lists(self.successor), is_leaf=lambda x: x is None
        )

    def diagonal(self):
        return _stay(self.successor, self.probability)

    def select(self, action, weight):
        # The chosen rows only, [K, S, 1]: a product then costs K gathers a state, not K A.
        states, actions = self.successor.shape[1:]
        pair = jnp.arange(states, dtype=jnp.int32) * actions + action.astype(jnp.int32)
        rows = [
            map_slots(lambda slot: gather(slot.reshape(-1), pair), array)[..., None]
            for array in (self.successor, self.probability)
        ]
        return SuccessorOperator(rows[0], rows[1] * weight[None, :, None])


def _expect(successor: jax.Array, weight: jax.Array, values: jax.Array) -> jax.Array:
    """sum_k weight[k] values[successor[k]], [S, A]: one gather a slot, several times faster than one of all slots."""
    return sum_slots(lambda index, w: w * gather(values, index), successor, weight)


def _stay(successor: jax.Array, weight: jax.Array) -> jax.Array:
    own = jnp.arange(successor.shape[-2], dtype=successor.dtype)[:, None]
    return sum_slots(lambda index, w: jnp.where(index == own, w, 0), successor, weight)
