"""QuantEcon's `DiscreteDP`, in its product form, where a reward of -inf means that there is no such action, and in its
form of state-action pairs.
"""

from typing import Any

import numpy as np
from jaxtyping import ArrayLike, Int, Real
from scipy import sparse

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.memory import require_room
from bilevel_jax.core.validation import as_numpy
from bilevel_jax.interchange.common import (
    as_matrix,
    bytes_of,
    dense,
    joined_reward,
    require_exportable,
    require_room_for_pairs,
    rows_of,
    rows_sum_to_one,
    split_reward,
    successors,
    sums_to_one,
    the_discount,
)
from bilevel_jax.mdp.process import MDP
from bilevel_jax.mdp.transitions import DenseTransition


def from_quantecon(
    reward: Any,
    transition: Any = None,
    discount: Any = None,
    s_indices: Any = None,
    a_indices: Any = None,
    *,
    initial: Real[ArrayLike, " S"] | Any | None = None,
) -> MDP:
    """The MDP of a QuantEcon `DiscreteDP`, or of its arguments; dense if its transition is.

    Args:
      reward: a `DiscreteDP`; or R[S, A], -inf where the state lacks the action; or R[L] of pairs.
      transition: Q[S, A, S]; or of pairs [L, S], an array or a scipy sparse matrix.
      discount: a number (`beta`).
      s_indices, a_indices: state and action of each pair, int[L]; other pairs are not available.

    Raises:
      InputError: shapes or indices that disagree, a pair that stands twice, or an error that `MDP` raises.

    Example:
      >>> reward = np.array([[1.0, -np.inf], [0.0, 2.0]])  # state 0 lacks action 1
      >>> bj.interchange.from_quantecon(reward, np.full((2, 2, 2), 0.5), 0.9).available.tolist()
      [[True, False], [True, True]]
    """
    if transition is None and all(hasattr(reward, name) for name in ("R", "Q", "beta")):
        process = reward
        reward, transition, discount = process.R, process.Q, process.beta
        s_indices, a_indices = process.s_indices, process.a_indices
    if transition is None or discount is None:
        raise InputError("transition: give a DiscreteDP, or reward, transition and discount")
    reward = as_numpy("reward", reward)
    if (s_indices is None) != (a_indices is None):
        raise InputError("s_indices, a_indices: give both, for state-action pairs, or none")
    if s_indices is not None:
        return _of_pairs(reward, transition, discount, s_indices, a_indices, initial)
    if sparse.issparse(transition):
        raise InputError("s_indices: a sparse transition is one row for each state-action pair; say which they are")
    array = as_numpy("transition", transition)
    if array.ndim != 3 or array.shape != (*reward.shape, reward.shape[0]):
        raise InputError(
            f"transition: expected shape [S, A, S] with rewards [S, A], got {list(array.shape)} with "
            f"{list(reward.shape)}"
        )
    reward, available = split_reward(reward)
    return MDP(dense(array, available), reward, discount, initial, available)


def _of_pairs(reward, transition, discount, s_indices, a_indices, initial) -> MDP:
    matrix = as_matrix("transition", transition)
    pairs, states = matrix.shape
    s, a = (
        _indices(name, index, pairs, limit)
        for name, index, limit in (("s_indices", s_indices, states), ("a_indices", a_indices, None))
    )
    if reward.shape != (pairs,):
        raise InputError(f"reward: expected shape [L] = [{pairs}], one for each row, got {list(reward.shape)}")
    actions = 1 + int(a.max(initial=0))
    index = s * actions + a
    found, times = np.unique(index, return_counts=True)
    if len(found) < pairs:
        first = int(found[times > 1][0])
        raise InputError(f"s_indices: the pair of state {first // actions} and action {first % actions} stands twice")
    given = bytes_of(matrix.nnz, matrix.dtype) + pairs * 8
    require_room_for_pairs("a_indices", states, actions, pairs, given)
    table = np.full(states * actions, -np.inf, reward.dtype)
    table[index] = reward
    table, available = split_reward(table.reshape(states, actions))
    rows = sparse.coo_array(matrix)
    placed = sparse.coo_array((rows.data, (index[rows.coords[0]], rows.coords[1])), shape=(states * actions, states))
    if sparse.issparse(transition):
        kernel: Any = successors(as_matrix("transition", placed), actions, available, given)
    else:
        size = matrix.dtype.itemsize
        require_room(
            "transition",
            states * actions * states * size,
            f"a dense transition of {states} states and {actions} actions, of which {pairs} pairs exist,",
            "give the rows as a scipy sparse matrix, and number each state's actions from 0 on",
            given=pairs * states * size,
        )
        kernel = dense(placed.toarray().reshape(states, actions, states), available)
    return MDP(kernel, table, discount, initial, available)


def _indices(name: str, value: Any, pairs: int, limit: int | None) -> Int[np.ndarray, " L"]:
    index = np.asarray(value)
    if index.shape != (pairs,) or not np.issubdtype(index.dtype, np.integer):
        raise InputError(f"{name}: expected {pairs} integers, one for each row, got {index.dtype}{list(index.shape)}")
    wrong = (index < 0) if limit is None else (index < 0) | (index >= limit)
    if wrong.any():
        upper = "" if limit is None else f" and below {limit}"
        raise InputError(f"{name}[{int(np.argmax(wrong))}] is {index[wrong][0]}; indices are at least 0{upper}")
    return index.astype(np.int64)


def to_quantecon(mdp: MDP) -> tuple[Any, ...]:
    """The arguments of `DiscreteDP`: (R, Q, beta) if dense, else (R, Q, beta, s_indices, a_indices).

    R and Q are float64, rows of Q divided by their sums.

    Raises:
      InputError: batch axes, traced values, or several discounts.

    Example:
      >>> mdp = bj.MDP(jnp.full((3, 2, 3), 1 / 3), jnp.zeros((3, 2)), 0.9)
      >>> reward, transition, discount = bj.interchange.to_quantecon(mdp)
      >>> transition.shape
      (3, 2, 3)
    """
    require_exportable(mdp)
    reward, discount, kernel = joined_reward(mdp).astype(np.float64), the_discount(mdp), mdp.transition
    if isinstance(kernel, DenseTransition):
        return reward, sums_to_one(np.asarray(kernel.probability)), discount
    pairs = np.flatnonzero(reward.reshape(-1) != -np.inf)
    rows = rows_sum_to_one(rows_of(kernel))[pairs]
    return (
        reward.reshape(-1)[pairs],
        sparse.csr_matrix(rows),
        discount,
        pairs // mdp.num_actions,
        pairs % mdp.num_actions,
    )
