"""What the formats share: a process as a sparse matrix with one row per pair, rewards of -inf, one discount.

`rows` is a scipy CSR matrix [S A, S] with P[s, a, :] in row s A + a.
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Float64
from scipy import sparse

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.memory import require_room
from bilevel_jax.core.validation import as_numpy, is_known
from bilevel_jax.mdp.process import MDP
from bilevel_jax.mdp.transitions import DenseTransition, SuccessorTransition, Transition

# The first correction leaves an error of a rounding or two, which moves the sum again.
ROUNDS = 3


def as_matrix(name: str, value: Any, shape: tuple[int, ...] | None = None) -> Any:
    """`value`, sparse or not, as a CSR matrix of floats with sorted rows. Raises InputError."""
    if not sparse.issparse(value):
        value = as_numpy(name, value)
        if value.ndim != 2:
            raise InputError(f"{name}: expected a matrix, got shape {list(value.shape)}")
    if np.issubdtype(value.dtype, np.complexfloating):
        raise InputError(f"{name}: expected real numbers, got {value.dtype}; take the real part")
    matrix: Any = sparse.csr_array(value)
    if not np.issubdtype(matrix.dtype, np.floating):
        matrix = matrix.astype(float)
    if shape is not None and matrix.shape != shape:
        raise InputError(f"{name}: expected shape {list(shape)}, got {list(matrix.shape)}")
    matrix = matrix.copy()
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    return matrix


def bytes_of(entries: int, dtype: Any) -> int:
    """Return the bytes that `entries` entries take in a list of successors: an index and a probability per entry."""
    return entries * (np.dtype(np.int32).itemsize + np.dtype(dtype).itemsize)


def require_room_for_pairs(name: str, states: int, actions: int, pairs: int, given: int) -> None:
    """Raise InputError if tables [S, A] would be too large for so many pairs that exist; see `require_room`."""
    # Reward, discount, mask, a successor and its probability.
    require_room(
        name,
        states * actions * (8 + 8 + 1 + 4 + 8),
        f"tables of {states} states and {actions} actions, of which {pairs} pairs exist,",
        "number each state's actions from 0 on, and let a state with very many actions choose in stages, as states of "
        "their own with fewer actions each",
        given=given,
    )


def successors(
    rows: Any, actions: int, available: Bool[np.ndarray, "S A"] | None = None, given: int | None = None
) -> SuccessorTransition:
    """Return `rows` as successor lists [K, S, A], where K is the number of entries of the fullest row.

    A pair that is not available stays in its state.

    Args:
      given: the bytes that the input takes; None takes those of `rows`.

    Raises:
      InputError: one full row among sparse ones makes the lists too large, see `require_room`.
    """
    pairs, states = rows.shape
    counts = np.diff(rows.indptr)
    slots = max(1, int(counts.max(initial=1)))
    if given is None:
        given = bytes_of(rows.nnz, rows.dtype) + rows.indptr.nbytes
    fullest = int(np.argmax(counts))
    require_room(
        "transition",
        bytes_of(slots * pairs, rows.dtype),
        f"lists of successors as long as the fullest row's {slots} (state {fullest // actions}, action "
        f"{fullest % actions}), for {pairs} pairs with {rows.nnz / pairs:.3g} on average,",
        "let the full row go through intermediate states, give a DenseTransition where S is small, or a "
        "MatrixFreeTransition that sums over the matrix's entries (docs/interchange.md)",
        given=given,
    )
    own = np.arange(pairs, dtype=np.int32) // actions
    successor = np.tile(own, (slots, 1))
    probability = np.zeros((slots, pairs), rows.dtype)
    pair = np.repeat(np.arange(pairs), counts)
    slot = np.arange(rows.nnz) - rows.indptr[:-1][pair]
    successor[slot, pair], probability[slot, pair] = rows.indices, rows.data
    if available is not None:
        out = ~available.reshape(-1)
        successor[:, out], probability[:, out] = own[out], 0
        probability[0, out] = 1
    shape = (slots, states, actions)
    return SuccessorTransition(successor.reshape(shape), probability.reshape(shape))


def dense(probability: Float[np.ndarray, "S A S"], available: Bool[np.ndarray, "S A"] | None = None) -> DenseTransition:
    """Return P[S, A, S]. A pair that is not available stays in its state."""
    if available is not None:
        states = len(probability)
        stay = np.broadcast_to(np.eye(states)[:, None], probability.shape)
        probability = np.where(available[..., None], probability, stay).astype(probability.dtype)
    return DenseTransition(probability)


def split_reward(reward: Float[np.ndarray, "S A"]) -> tuple[Float[np.ndarray, "S A"], Bool[np.ndarray, "S A"] | None]:
    """Return (rewards [S, A], `available` or None) for rewards that are -inf where a state lacks the action."""
    available = reward != -np.inf
    return (reward, None) if available.all() else (np.where(available, reward, 0), available)


def joined_reward(mdp: MDP) -> Float[np.ndarray, "S A"]:
    """r[S, A], -inf where the action is not available."""
    reward = np.asarray(mdp.reward)
    return reward if mdp.available is None else np.where(np.asarray(mdp.available), reward, -np.inf)


def require_exportable(mdp: MDP) -> None:
    """Raise InputError for MDPs with batch axes and for traced ones."""
    if mdp.batch_shape:
        raise InputError(f"mdp: has batch axes {list(mdp.batch_shape)}; export one MDP at a time")
    if not is_known(*jax.tree.leaves(mdp)):
        raise InputError("mdp: holds traced values; export it outside jit and vmap")


def rows_of(transition: Transition) -> Any:
    """The rows [S A, S] of one transition, unused successors left out. Raises InputError for a kind without entries."""
    convert = getattr(transition, "to_successors", None)
    if convert is not None:
        transition = convert()
    states, actions = transition.shape
    if isinstance(transition, DenseTransition):
        return as_matrix("transition", np.asarray(transition.probability).reshape(states * actions, states))
    if isinstance(transition, SuccessorTransition):
        successor, probability = np.asarray(transition.successor), np.asarray(transition.probability)
        pair = np.broadcast_to(np.arange(states * actions).reshape(states, actions), successor.shape)
        entries = (probability.ravel(), (pair.ravel(), successor.ravel()))
        return as_matrix("transition", sparse.coo_array(entries, shape=(states * actions, states)))
    raise InputError(
        f"transition: {type(transition).__name__} cannot be exported; give a DenseTransition or a SuccessorTransition"
    )


def sums_to_one(probability: Float[np.ndarray, "*rows S"]) -> Float64[np.ndarray, "*rows S"]:
    """Return float64[..., S] with each row divided by its sum, so that numpy's sums of the rows are as near to 1 as
    possible.

    Other libraries check sums in float64, pymdptoolbox to 2e-15. Rows of float32 miss that by 1e-7, and long rows by
    rounding.
    """
    rows = np.array(probability, np.float64)
    rows /= rows.sum(-1, keepdims=True)
    largest = np.argmax(rows, -1)[..., None]
    for _ in range(ROUNDS):
        over = rows.sum(-1, keepdims=True) - 1
        np.put_along_axis(rows, largest, np.take_along_axis(rows, largest, -1) - over, -1)
    return rows


def rows_sum_to_one(rows: Any) -> Any:
    """Like `sums_to_one`, for a CSR matrix and scipy's sums."""
    matrix = rows.astype(np.float64)
    lengths = np.diff(matrix.indptr)
    filled = np.flatnonzero(lengths)
    row = np.repeat(np.arange(len(lengths)), lengths)
    matrix.data /= matrix.sum(1)[row]
    order = np.lexsort((matrix.data, row))
    largest = order[matrix.indptr[1:][filled] - 1]
    for _ in range(ROUNDS):
        matrix.data[largest] -= matrix.sum(1)[filled] - 1
    return matrix


def by_action(matrix: Any, actions: int) -> list[Any]:
    """Rows [S A, S] as A matrices [S, S]."""
    return [matrix[action::actions] for action in range(actions)]


def by_pair(matrices: list[Any]) -> Any:
    """A matrices [S, S] as rows [S A, S]."""
    actions, states = len(matrices), matrices[0].shape[0]
    order = np.arange(actions * states).reshape(actions, states).T.ravel()
    return as_matrix("transition", sparse.csr_array(sparse.vstack(matrices))[order])


def the_discount(mdp: MDP) -> float:
    """Return the discount of an MDP that has only one. Raises InputError otherwise."""
    discount = np.asarray(mdp.discount)
    used = discount if discount.ndim == 0 or mdp.available is None else discount[np.asarray(mdp.available)]
    values = np.unique(used)
    if values.size > 1:
        raise InputError(
            f"discount: this form has one discount, the MDP has {values.size}, from {values[0]:g} to "
            f"{values[-1]:g}; export bj.interchange.with_end_state(mdp)"
        )
    return float(values[0])


def with_end_state(mdp: MDP, *, one_action: bool = True) -> MDP:
    """Return the same process with one discount for all pairs, and with one more state, the last, in which it has
    ended.

    If d is the largest discount, a pair with discount[s, a] ends the process with probability 1 - discount[s, a] / d.
    That probability leads to the last state, which pays nothing for ever. Values, action values and policies of the
    other states stay the same. The result is stored by successors; `initial` is 0 at the end.

    Args:
      one_action: whether the last state has only action 0. That is right for Shannon and Tsallis entropy, because more
        actions would earn entropy there. False gives it all actions, for solvers without masks.

    Raises:
      InputError: batch axes, traced values, or a transition that has no entries.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), jnp.array([[0.9, 0.0], [0.9, 0.9]]))
      >>> bj.interchange.with_end_state(mdp).num_states
      3
    """
    require_exportable(mdp)
    states, actions = mdp.num_states, mdp.num_actions
    available = np.ones((states, actions), bool) if mdp.available is None else np.asarray(mdp.available)
    discount = np.broadcast_to(np.asarray(mdp.discount), (states, actions))
    largest = np.asarray(mdp.modulus)
    going = np.ones_like(discount) if largest == 0 else np.where(available, discount / np.maximum(largest, 1e-300), 1)
    going = going.reshape(-1)
    inside = sparse.diags_array(going) @ rows_of(mdp.transition)
    ending = sparse.csr_array((1 - going)[:, None])
    end = sparse.csr_array((np.ones(actions), np.full(actions, states), np.arange(actions + 1)), (actions, states + 1))
    rows = as_matrix("transition", sparse.vstack([sparse.hstack([inside, ending]), end]))
    last = np.arange(actions)[None] == 0 if one_action else np.ones((1, actions), bool)
    mask = np.concatenate([available, last])
    kept = None if mask.all() else mask
    given = sum(leaf.nbytes for leaf in jax.tree.leaves(mdp.transition))
    return MDP(
        successors(rows, actions, kept, given),
        np.concatenate([np.asarray(mdp.reward), np.zeros((1, actions), mdp.reward.dtype)]),
        largest,
        np.append(np.asarray(mdp.initial), np.zeros((), mdp.reward.dtype)),
        kept,
    )
