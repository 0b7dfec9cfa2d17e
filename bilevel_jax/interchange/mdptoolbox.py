"""The order of MDPToolbox: transitions [A, S, S], or A matrices [S, S]; rewards [S], [S, A] or [A, S, S]."""

from typing import Any

import numpy as np
from jaxtyping import ArrayLike, Float, Float64, Real
from scipy import sparse

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.validation import as_numpy
from bilevel_jax.interchange.common import (
    as_matrix,
    by_action,
    by_pair,
    dense,
    require_exportable,
    rows_of,
    rows_sum_to_one,
    successors,
    sums_to_one,
    the_discount,
)
from bilevel_jax.mdp.process import MDP
from bilevel_jax.mdp.transitions import DenseTransition


def from_mdptoolbox(
    transition: Any,
    reward: Any,
    discount: Real[ArrayLike, ""] | Real[ArrayLike, "S A"] | Any,
    *,
    initial: Real[ArrayLike, " S"] | Any | None = None,
) -> MDP:
    """Return an MDP from arrays in the order of MDPToolbox.

    Args:
      transition: P[A, S, S] (stays dense), or a list of A scipy sparse matrices [S, S] (stored by successors).
      reward: [S] or [S, A]; or, if it also depends on the next state, [A, S, S] or A sparse matrices.

    Raises:
      InputError: shapes that disagree, or an error that `MDP` raises.

    Example:
      >>> bj.interchange.from_mdptoolbox(np.full((2, 3, 3), 1 / 3), np.zeros((3, 2)), 0.9).num_actions
      2
    """
    if _is_sparse(transition):
        count = len(transition)
        first = transition[0].shape[0]
        matrices = [as_matrix(f"transition[{a}]", transition[a], (first, first)) for a in range(count)]
        kernel: Any = successors(by_pair(matrices), count)
    else:
        array = as_numpy("transition", transition)
        if array.ndim != 3 or array.shape[1] != array.shape[2]:
            raise InputError(
                f"transition: expected shape [A, S, S] or a list of A matrices [S, S], got {list(array.shape)}"
            )
        matrices = list(array)
        kernel = dense(np.moveaxis(array, 0, 1))
    return MDP(kernel, _expected(reward, matrices), discount, initial)


def _is_sparse(matrices: Any) -> bool:
    return isinstance(matrices, list | tuple | np.ndarray) and any(sparse.issparse(m) for m in matrices)


def _expected(reward: Any, matrices: list[Any]) -> Float[np.ndarray, "S A"]:
    """r[S, A], of rewards of the state, of the pair, or of the pair and the next state."""
    actions, states = len(matrices), matrices[0].shape[0]
    shapes = f"[S] = [{states}], [S, A] = {[states, actions]} or [A, S, S] = {[actions, states, states]}"
    if _is_sparse(reward):
        parts = [as_matrix(f"reward[{a}]", part, (states, states)) for a, part in enumerate(reward)]
        if len(parts) != actions:
            raise InputError(f"reward: expected shape {shapes}, got {len(parts)} matrices")
    else:
        array = as_numpy("reward", reward)
        if array.shape == (states,):
            return np.repeat(array[:, None], actions, 1)
        if array.shape == (states, actions):
            return array
        if array.shape != (actions, states, states):
            raise InputError(f"reward: expected shape {shapes}, got {list(array.shape)}")
        parts = list(array)
    # A transition that cannot happen may carry any reward.
    products = [(as_matrix("transition", p) * r).sum(1) for p, r in zip(matrices, parts, strict=True)]
    return np.stack([np.asarray(product).reshape(states) for product in products], 1)


def to_mdptoolbox(mdp: MDP) -> tuple[Any, Float64[np.ndarray, "S A"], float]:
    """Return (P, R, discount) in the order of MDPToolbox; P[A, S, S], or A CSR matrices if it is not dense, and R[S,
    A].

    All are float64, with rows of P divided by their sums, because MDPToolbox refuses the sums of float32 rows.

    Raises:
      InputError: batch axes, traced values, several discounts, or states with fewer actions.

    Example:
      >>> mdp = bj.MDP(jnp.full((3, 2, 3), 1 / 3), jnp.zeros((3, 2)), 0.9)
      >>> bj.interchange.to_mdptoolbox(mdp)[0].shape
      (2, 3, 3)
    """
    require_exportable(mdp)
    if mdp.available is not None:
        raise InputError(
            "available: MDPToolbox has all actions in all states, this MDP has states with fewer; use to_quantecon"
        )
    kernel = mdp.transition
    if isinstance(kernel, DenseTransition):
        matrices: Any = sums_to_one(np.ascontiguousarray(np.moveaxis(np.asarray(kernel.probability), 1, 0)))
    else:
        rows = rows_sum_to_one(rows_of(kernel))
        matrices = [sparse.csr_matrix(m) for m in by_action(rows, mdp.num_actions)]
    return matrices, np.asarray(mdp.reward, np.float64), the_discount(mdp)
