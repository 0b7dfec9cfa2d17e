"""Lists of predecessors. With them, the transposed product of successor lists is a gather.

Without them it is a scatter-add over all entries, which runs on one core and waits for each of its updates. Here the
entries are sorted by the state they lead to, and cut into chunks of `WIDTH` entries that lead to one state. The sums of
chunks are gathers, as fast as the forward product's, and only one number per chunk is scattered, in order. A state
costs as much as it has predecessors, rounded up to a chunk.
"""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int
from scipy import sparse

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.indexing import gather, scatter_add
from bilevel_jax.core.reductions import sum_slots
from bilevel_jax.core.validation import is_known
from bilevel_jax.mdp.transitions.successor_operator import SuccessorOperator

# Entries a chunk: in-degrees scatter around A K, and every state wastes WIDTH / 2 on average.
WIDTH = 4
MOST_ENTRIES = 2**31 - 1


class PredecessorLists(eqx.Module):
    """`entry` int32[W, C]: places in the flattened [K, S, A], K S A where unused.

    `owner` int32[C]: the state of each chunk.
    """

    entry: Int[Array, "*batch W C"]
    owner: Int[Array, "*batch C"]

    def fold(self, operator: SuccessorOperator) -> "PredecessorOperator":
        """The operator with its weights in the order of these lists, too."""
        slots, states, actions = operator.weight.shape
        inside = jnp.minimum(self.entry, slots * states * actions - 1)
        source = lax.div(lax.rem(inside, jnp.full_like(inside, states * actions)), jnp.full_like(inside, actions))
        return PredecessorOperator(
            operator.successor, operator.weight, source, _take(operator.weight.reshape(-1), self.entry), self.owner
        )


class PredecessorOperator(SuccessorOperator):
    """A sparse matrix by rows and, for the transposed product, by chunks of columns [W, C]."""

    source: Int[Array, "W C"]
    incoming: Float[Array, "W C"]
    owner: Int[Array, " C"]

    def apply_transpose(self, masses):
        sums = sum_slots(lambda source, weight: weight * gather(masses, source), self.source, self.incoming)
        return scatter_add(sums, self.owner, masses.shape[0], indices_are_sorted=True)


def predecessor_lists(successor: Int[Array, "*batch K S A"], width: int = WIDTH) -> PredecessorLists:
    """The lists of `successor` int32[..., K, S, A], by a counting sort on the host.

    Raises:
      InputError: successors that are traced.
    """
    if not is_known(successor):
        raise InputError(
            "transition: predecessor lists have shapes that depend on the successors; call with_predecessors() "
            "outside jit and vmap, and pass the transition in"
        )
    index = np.asarray(successor)
    batch, (slots, states, actions) = index.shape[:-3], index.shape[-3:]
    entries = slots * states * actions
    if entries > MOST_ENTRIES:
        raise InputError(
            f"transition: predecessor lists number {entries} entries K S A by int32, at most {MOST_ENTRIES}; use the "
            f"transition as it is, or in parts"
        )
    cut = [_chunks(one.reshape(-1), states, width) for one in index.reshape(-1, slots, states, actions)]
    # Chunk counts are rounded up, by a 32nd at most, so that like MDPs share a compiled program.
    most = max((owner.size for _, owner in cut), default=1)
    unit = 1 << max(0, most.bit_length() - 6)
    length = -(-most // unit) * unit
    entry = np.full((len(cut), width, length), entries, np.int32)
    owner = np.full((len(cut), length), states - 1, np.int32)  # the last one: owners stay in order
    for i, (places, states_of) in enumerate(cut):
        entry[i, :, : states_of.size] = places
        owner[i, : states_of.size] = states_of
    return PredecessorLists(
        jnp.asarray(entry.reshape(*batch, width, length)), jnp.asarray(owner.reshape(*batch, length))
    )


def _chunks(
    index: Int[np.ndarray, " N"], states: int, width: int
) -> tuple[Int[np.ndarray, "W C"], Int[np.ndarray, " C"]]:
    """(places [width, C], index.size where unused; the state of each chunk [C]) of one list of successors."""
    size = index.size
    rows = sparse.csr_matrix((np.ones(size, np.int8), index, np.arange(size + 1)), shape=(size, states))
    columns = rows.tocsc()
    order, counts = columns.indices, np.diff(columns.indptr)
    chunks = -(-counts // width)
    owner = np.repeat(np.arange(states, dtype=np.int32), chunks)
    first = np.cumsum(chunks) - chunks
    start = (np.arange(owner.size) - first[owner]) * width
    within = start + np.arange(width)[:, None]
    used = within < counts[owner]
    place = np.where(used, columns.indptr[owner] + within, 0)
    return np.where(used, order[place], size), owner


def _take(flat: Float[Array, " N"], entry: Int[Array, "W C"]) -> Float[Array, "W C"]:
    return flat.at[entry].get(mode="fill", fill_value=0)
