"""The order of MDPToolbox: transitions [A, S, S], or A matrices [S, S]; rewards [S], [S, A] or [A, S, S]."""

from typing import Any

import numpy as np
from scipy import sparse

from bilevel_jax.errors import InputError
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
from bilevel_jax.mdp import MDP
from bilevel_jax.transitions import DenseTransition
from bilevel_jax.validation import as_numpy


def read(transition: Any, reward: Any, discount: Any, initial: Any) -> MDP:
    """See `MDP.from_mdptoolbox`."""
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


def _expected(reward: Any, matrices: list[Any]) -> np.ndarray:
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


def write(mdp: MDP) -> tuple[Any, np.ndarray, float]:
    """See `MDP.to_mdptoolbox`."""
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
