"""Lists of successors, [K, S, A]."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Real

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.indexing import gather, scatter_add
from bilevel_jax.core.reductions import map_slots
from bilevel_jax.core.validation import as_float, as_integer, require_distribution, require_index
from bilevel_jax.mdp.transitions.predecessor import PredecessorLists, predecessor_lists
from bilevel_jax.mdp.transitions.protocol import Transition
from bilevel_jax.mdp.transitions.successor_operator import SuccessorOperator, expected, staying


class SuccessorTransition(Transition):
    """Up to K successors per state-action pair: `successor` int32[K, S, A], `probability` [K, S, A].

    The slot axis comes first because one gather per slot is several times faster than a gather of slots
    (docs/performance.md). An unused slot has probability 0 and any valid successor. A successor may stand in several
    slots.

    `predecessors` is None, or the lists that `with_predecessors` made.

    Raises:
      InputError: shapes that differ, successors that are no integers or out of range, no action, negative
        probabilities, or probabilities that do not sum to 1 over the slots.

    Example:
      >>> successor = jnp.array([[[0], [1]], [[1], [0]]])  # [K = 2, S = 2, A = 1]: stay, or move to the other state
      >>> bj.SuccessorTransition(successor, jnp.full((2, 2, 1), 0.5)).expect(jnp.array([0.0, 1.0])).tolist()
      [[0.5], [0.5]]
    """

    successor: Int[Array, "*batch K S A"]
    probability: Float[Array, "*batch K S A"]
    predecessors: PredecessorLists | None

    def __init__(
        self, successor: Int[ArrayLike, "*batch K S A"] | Any, probability: Real[ArrayLike, "*batch K S A"] | Any
    ):
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
        return expected(self.successor, self.probability, values)

    def push(self, masses):
        # Predecessor lists serve folded operators only: a gather of each entry's flow, from an array K times
        # as long as the states', was 4 times slower than this at S = 10^6.
        return scatter_add(self.probability * masses[None], self.successor, masses.shape[0])

    def under(self, weights):
        operator = SuccessorOperator(self.successor, self.probability * weights[None])
        return operator if self.predecessors is None else self.predecessors.fold(operator)

    def with_predecessors(self) -> "SuccessorTransition":
        """Return the same kernel with lists of predecessors, with which the transposed products of `under` are gathers,
        too.

        The lists pay where many such products are made under one policy: in adjoint solves, gradients in reverse mode
        and occupancies. They take as much memory as the successors, and one sort of K S A numbers on the host. They
        depend on the successors alone, so that the probabilities may be traced or differentiated. Their shapes depend
        on how many predecessors the states have: another MDP may have to be compiled again. Counts are rounded up, so
        that similar MDPs are not.

        Raises:
          InputError: called with traced successors, under jit or vmap.
        """
        return eqx.tree_at(
            lambda t: t.predecessors, self, predecessor_lists(self.successor), is_leaf=lambda x: x is None
        )

    def diagonal(self):
        return staying(self.successor, self.probability)

    def select(self, action, weight):
        # The chosen rows only, [K, S, 1]: a product then costs K gathers a state, not K A.
        states, actions = self.successor.shape[1:]
        pair = jnp.arange(states, dtype=jnp.int32) * actions + action.astype(jnp.int32)
        rows = [
            map_slots(lambda slot: gather(slot.reshape(-1), pair), array)[..., None]
            for array in (self.successor, self.probability)
        ]
        return SuccessorOperator(rows[0], rows[1] * weight[None, :, None])
