"""QuantEcon's `DiscreteDP`: the product form, rewards of -inf meaning no such action, and state-action pairs."""

from typing import Any

import numpy as np
from scipy import sparse

from bilevel_jax.errors import InputError
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
from bilevel_jax.mdp import MDP
from bilevel_jax.memory import require_room
from bilevel_jax.transitions import DenseTransition
from bilevel_jax.validation import as_numpy


def read(reward: Any, transition: Any, discount: Any, s_indices: Any, a_indices: Any, initial: Any) -> MDP:
    """See `MDP.from_quantecon`."""
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


def _indices(name: str, value: Any, pairs: int, limit: int | None) -> np.ndarray:
    index = np.asarray(value)
    if index.shape != (pairs,) or not np.issubdtype(index.dtype, np.integer):
        raise InputError(f"{name}: expected {pairs} integers, one for each row, got {index.dtype}{list(index.shape)}")
    wrong = (index < 0) if limit is None else (index < 0) | (index >= limit)
    if wrong.any():
        upper = "" if limit is None else f" and below {limit}"
        raise InputError(f"{name}[{int(np.argmax(wrong))}] is {index[wrong][0]}; indices are at least 0{upper}")
    return index.astype(np.int64)


def write(mdp: MDP) -> tuple[Any, ...]:
    """See `MDP.to_quantecon`."""
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
