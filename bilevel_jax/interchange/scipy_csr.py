"""Sparse matrices of scipy: A matrices [S, S], or one [S A, S] with P[s, a, :] in row s A + a."""

from typing import Any

import numpy as np
from jaxtyping import ArrayLike, Float, Real

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.validation import as_numpy
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
from bilevel_jax.mdp.process import MDP


def from_scipy(
    matrices: Any,
    reward: Real[ArrayLike, "S A"] | Any,
    discount: Real[ArrayLike, ""] | Real[ArrayLike, "S A"] | Any,
    *,
    initial: Real[ArrayLike, " S"] | Any | None = None,
) -> MDP:
    """Return the MDP of scipy sparse matrices, by successors; K is the number of entries in the fullest row.

    Args:
      matrices: a list of A matrices [S, S], or one [S A, S] with P[s, a, :] in row s A + a.
      reward: r[S, A], -inf where the state lacks the action (its row is not read).

    Raises:
      InputError: shapes that disagree, or an error that `MDP` raises.

    Example:
      >>> from scipy import sparse
      >>> stay, move = sparse.eye_array(2, format="csr"), sparse.csr_array(np.array([[0.0, 1.0], [1.0, 0.0]]))
      >>> bj.interchange.from_scipy([stay, move], np.zeros((2, 2)), 0.9).num_actions
      2
    """
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


def to_scipy(mdp: MDP) -> tuple[Any, Float[np.ndarray, "S A"], float]:
    """Return (CSR [S A, S], r[S, A], discount) as `from_scipy` takes them; `matrix[a::A]` is the matrix of action a.

    The numbers are those that are stored, in the MDP's own type, because no function of scipy checks the sums.

    Raises:
      InputError: batch axes, traced values, or several discounts.

    Example:
      >>> mdp = bj.MDP(jnp.full((3, 2, 3), 1 / 3), jnp.zeros((3, 2)), 0.9)
      >>> matrix, reward, discount = bj.interchange.to_scipy(mdp)
      >>> matrix.shape
      (6, 3)
    """
    require_exportable(mdp)
    return rows_of(mdp.transition), joined_reward(mdp), the_discount(mdp)
