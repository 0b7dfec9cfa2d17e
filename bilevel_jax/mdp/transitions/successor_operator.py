"""A sparse matrix by rows, in lists of successors, and the sums over slots that it shares with the kernel."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bilevel_jax.core.arrays import PerPair, PerState
from bilevel_jax.core.indexing import gather, scatter_add
from bilevel_jax.core.reductions import sum_last, sum_slots
from bilevel_jax.mdp.transitions.protocol import StateOperator


class SuccessorOperator(StateOperator):
    """A sparse matrix by rows: entry [k, s, a] adds `weight[k, s, a]` at column `successor[k, s, a]`."""

    successor: Int[Array, "K S A"]
    weight: Float[Array, "K S A"]

    def apply(self, values):
        return sum_last(expected(self.successor, self.weight, values))

    def apply_transpose(self, masses):
        return scatter_add(self.weight * masses[None, :, None], self.successor, masses.shape[0])

    def matrix(self):
        size = self.weight.shape[1]
        rows = jnp.broadcast_to(jnp.arange(size)[None, :, None], self.weight.shape)
        return jnp.zeros((size, size), self.weight.dtype).at[rows, self.successor].add(self.weight)

    def diagonal(self):
        return sum_last(staying(self.successor, self.weight))


def expected(successor: Int[Array, "K S A"], weight: Float[Array, "K S A"], values: PerState) -> PerPair:
    """Return sum_k weight[k] values[successor[k]], [S, A]: one gather per slot, several times faster than one of all
    slots.
    """
    return sum_slots(lambda index, w: w * gather(values, index), successor, weight)


def staying(successor: Int[Array, "K S A"], weight: Float[Array, "K S A"]) -> PerPair:
    """sum_k weight[k] where successor[k] is the state itself, [S, A]."""
    own = jnp.arange(successor.shape[-2], dtype=successor.dtype)[:, None]
    return sum_slots(lambda index, w: jnp.where(index == own, w, 0), successor, weight)
