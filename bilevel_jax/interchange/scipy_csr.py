"""Sparse matrices of scipy: A matrices [S, S], or one [S A, S] with P[s, a, :] in row s A + a."""

from typing import Any

import numpy as np

from bilevel_jax.errors import InputError
from bilevel_jax.interchange.common import (
    as_matrix,
    by_pair,
    joined_reward,
    require_exportable,
    rows_of,
    split_reward,
    successors,
    the_discount,
)
from bilevel_jax.mdp import MDP
from bilevel_jax.validation import as_numpy


def read(matrices: Any, reward: Any, discount: Any, initial: Any) -> MDP:
    """See `MDP.from_scipy`."""
    reward = as_numpy("reward", reward)
    if reward.ndim != 2:
        raise InputError(f"reward: expected shape [S, A], got {list(reward.shape)}")
    states, actions = reward.shape
    reward, available = split_reward(reward)
    if isinstance(matrices, list | tuple):
        if len(matrices) != actions:
            raise InputError(f"matrices: expected one for each of {actions} actions, got {len(matrices)}")
        rows = by_pair([as_matrix(f"matrices[{a}]", m, (states, states)) for a, m in enumerate(matrices)])
    else:
        rows = as_matrix("matrices", matrices, (states * actions, states))
    return MDP(successors(rows, actions, available), reward, discount, initial, available)


def write(mdp: MDP) -> tuple[Any, np.ndarray, float]:
    """See `MDP.to_scipy`."""
    require_exportable(mdp)
    return rows_of(mdp.transition), joined_reward(mdp), the_discount(mdp)
