"""Gymnasium's tabular environments: P[s][a] = [(probability, next state, reward, terminated), ...]."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import ArrayLike, Bool, Float64, Real
from scipy import sparse

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.memory import require_room
from bilevel_jax.core.validation import as_numpy
from bilevel_jax.interchange.common import as_matrix, bytes_of, require_room_for_pairs, successors
from bilevel_jax.mdp.process import MDP
from bilevel_jax.mdp.transitions import SuccessorTransition


def from_gymnasium(
    env: Any, discount: Real[ArrayLike, ""] | Any = 0.99, *, initial: Real[ArrayLike, " S"] | Any | None = None
) -> MDP:
    """The MDP of a tabular gymnasium environment (FrozenLake, Taxi, CliffWalking), by successors.

    A pair that terminates with probability e gets the discount d (1 - e), and as successors those that do not
    terminate. That is exact for all values and policies: Q = r + d (1 - e) E[V(s') | not terminated] for every
    regularizer, whatever the table says of the terminal states themselves. Where 0 < e < 1 (slippery FrozenLake),
    discounts differ between pairs; `with_end_state` turns that into a state. Time limits are left out.

    Args:
      env: the environment, wrapped or not, or its table P[s][a] = [(probability, next state, reward,
        terminated), ...]. An action that a state does not list, or with an empty list, is not available.
      discount: d, a number in [0, 1); gymnasium has none.
      initial: rho[S]; None is the environment's `initial_state_distrib`, or uniform.

    Raises:
      InputError: no such table, or one whose probabilities or states are wrong.

    Example:
      >>> table = {0: {0: [(1.0, 1, 0.0, False)]}, 1: {0: [(1.0, 0, 1.0, True)]}}  # P[s][a], as env.unwrapped.P
      >>> bj.interchange.from_gymnasium(table, 0.9).reward.tolist()
      [[0.0], [1.0]]
    """
    inner, table = _table(env)
    states = len(table)
    choices = [_choices(table, state) for state in range(states)]
    actions = 1 + max((action for mine in choices for action in mine), default=-1)
    pairs = sum(len(mine) for mine in choices)
    given = bytes_of(sum(len(outcomes) for mine in choices for outcomes in mine.values()), float)
    require_room_for_pairs("env", states, actions, pairs, given)
    reward = np.zeros((states, max(actions, 1)))
    goes, available = np.ones_like(reward), np.zeros(reward.shape, bool)
    pair, following, chance = [], [], []
    for state, mine in enumerate(choices):
        for action, outcomes in mine.items():
            kept = _kept(outcomes, state, action, states)
            if not kept:  # an empty list: the action does not exist here
                continue
            total = sum(p for p, *_ in kept)
            going = sum(p for p, _, _, terminated in kept if not terminated)
            available[state, action] = True
            reward[state, action] = sum(p * r for p, _, r, _ in kept)
            goes[state, action] = going / total
            onward = [(p / going, s) for p, s, _, terminated in kept if not terminated] or [(1.0, state)]
            pair += [state * reward.shape[1] + action] * len(onward)
            chance += [p for p, _ in onward]
            following += [s for _, s in onward]
    shape = (reward.size, states)
    rows = as_matrix("P", sparse.coo_array((np.array(chance, float), (pair, following)), shape=shape))
    mask = None if available.all() else available
    if initial is None:
        initial = getattr(inner, "initial_state_distrib", None)
    if (goes < 1).any():
        discount = as_numpy("discount", discount) * goes
    kernel = successors(rows, reward.shape[1], mask, given)
    return MDP(kernel, reward, discount, initial, mask)


def read_outcomes(
    env: Any, initial: Real[ArrayLike, " S"] | Any | None
) -> tuple[MDP, Float64[np.ndarray, "S A K"], Bool[np.ndarray, "S A K"]]:
    """Return (MDP, rewards, ends) of a table, outcome by outcome, for `TabularEnvironment.from_gymnasium`.

    Outcome k of a pair is slot k of the MDP's successor lists [K, S, A], also where it terminates. The outcomes'
    rewards, and whether they terminate, are [S, A, K]. The MDP's discount has no meaning.
    """
    inner, table = _table(env)
    states = len(table)
    choices = [_choices(table, state) for state in range(states)]
    actions = max(1, 1 + max((action for mine in choices for action in mine), default=-1))
    listed = {(s, a): _kept(o, s, a, states) for s, mine in enumerate(choices) for a, o in mine.items()}
    count, slots = sum(map(len, listed.values())), max([1, *map(len, listed.values())])
    given = bytes_of(count, float)
    require_room_for_pairs("env", states, actions, len(listed), given)
    what = f"lists as long as those of the pair with {slots} outcomes, for {states * actions} pairs,"
    require_room(
        "env", states * actions * slots * 21, what, "split that pair's outcomes over several states", given=given
    )
    successor = np.tile(np.arange(states)[:, None, None], (1, actions, slots))
    probability, reward = np.zeros(successor.shape), np.zeros(successor.shape)
    ends = np.zeros(successor.shape, bool)
    probability[..., 0] = 1
    for pair, outcomes in listed.items():
        if outcomes:
            chance, *rest = (np.array(column) for column in zip(*outcomes, strict=True))
            slot = slice(len(outcomes))
            probability[pair][slot] = chance / chance.sum()
            successor[pair][slot], reward[pair][slot], ends[pair][slot] = rest
    available = np.zeros((states, actions), bool)
    for pair, outcomes in listed.items():
        available[pair] = bool(outcomes)
    kernel = SuccessorTransition(np.moveaxis(successor, -1, 0), np.moveaxis(probability, -1, 0))
    first = getattr(inner, "initial_state_distrib", None) if initial is None else initial
    mean = np.sum(probability * reward, -1)
    return MDP(kernel, mean, 0.5, first, None if available.all() else available), reward, ends


def _table(env: Any) -> tuple[Any, Any]:
    """The environment without wrappers, and its table. Raises InputError."""
    inner = getattr(env, "unwrapped", env)
    table = inner if isinstance(inner, Mapping) else getattr(inner, "P", None)
    if not isinstance(table, Mapping | list | tuple) or len(table) == 0:
        raise InputError(
            f"env: expected a tabular gymnasium environment, with a table `P` (FrozenLake, Taxi, CliffWalking), or "
            f"that table, got {type(inner).__name__}"
        )
    return inner, table


def _choices(table: Any, state: int) -> dict[int, Any]:
    """{action: outcomes} of a state."""
    try:
        mine = table[state]
    except (KeyError, IndexError):
        raise InputError(f"env: P has {len(table)} states and none with the index {state}; use 0 to S - 1") from None
    return dict(mine if isinstance(mine, Mapping) else enumerate(mine))


def _kept(outcomes: Any, state: int, action: int, states: int) -> list[tuple[float, int, float, bool]]:
    """The outcomes of a pair, checked, without those of probability 0."""
    where = f"env: P[{state}][{action}]"
    try:
        listed = [(float(p), int(s), float(r), bool(terminated)) for p, s, r, terminated in outcomes]
    except (TypeError, ValueError):
        raise InputError(f"{where}: expected a list of (probability, next state, reward, terminated)") from None
    for p, s, _, _ in listed:
        if not 0 <= s < states or not p >= 0:
            raise InputError(f"{where}: probability {p:g} of state {s}; there are states 0 to {states - 1}")
    total = sum(p for p, *_ in listed)
    if listed and not abs(total - 1) <= 1e-6:
        raise InputError(f"{where}: probabilities sum to {total:.9g}, not 1")
    return [outcome for outcome in listed if outcome[0] > 0]
