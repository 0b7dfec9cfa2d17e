"""Any `MDP` as a simulator."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bilevel_jax.environments.protocol import Environment, TimeStep, Trajectory, require_policy_shape
from bilevel_jax.environments.sampling import pick, thresholds, two_numbers
from bilevel_jax.errors import InputError
from bilevel_jax.functions import tabulate
from bilevel_jax.indexing import gather
from bilevel_jax.mdp import MDP
from bilevel_jax.transitions import DenseTransition, StencilTransition, SuccessorTransition
from bilevel_jax.validation import is_known, require_instance


class TabularEnvironment(Environment):
    """The process of an `MDP`: state and observation are the index of the state, int32.

    Args:
      mdp: an `MDP` with a dense, successor or stencil transition. One with batch axes is a set of contexts:
        the context is drawn uniformly at reset and never changes; with C contexts of S states, state s
        of context c has index c S + s.

    A pair whose discount is 0 ends the process. Probabilities are rounded to float32, and what is rarer
    than 2^-24 may never happen. Build it outside jit: dense rows are then stored by their K
    successors; under jit all S states count as successors.

    Raises:
      InputError: a discount that takes several values besides 0 (no simulator has those), states with
        fewer actions (`available`), or a kind of transition that cannot be sampled.
    """

    successor: jax.Array  # int32 [S A, K]
    threshold: jax.Array  # float32 [S A, K]
    reward: jax.Array  # [S, A]
    ends: jax.Array  # bool [S A]
    initial: jax.Array  # float32 [S], thresholds

    def __init__(self, mdp: MDP):
        require_instance("mdp", mdp, MDP)
        flat = flatten_contexts(mdp)
        self.reward = flat.reward
        self.successor, self.threshold, self.ends, self.initial = _tables(flat)
        if is_known(flat.discount):
            values = np.unique(np.asarray(flat.discount))
            values = values[values > 0]
            if values.size > 1:
                raise InputError(
                    f"discount: a simulator has one discount besides 0 (the end), this MDP has {values.size}, from "
                    f"{values[0]:g} to {values[-1]:g}; use one"
                )

    @property
    def num_states(self) -> int:
        """S, over all contexts."""
        return self.reward.shape[0]

    @property
    def num_actions(self):
        return self.reward.shape[1]

    def reset(self, key):
        # As `pick` does, by bisection: there are many states, and most never come first.
        return jnp.searchsorted(self.initial, two_numbers(key, 0)[0], side="right").astype(jnp.int32)

    def observe(self, state):
        return state

    def step(self, key, state, action):
        pair = state * self.num_actions + action
        following = self._follow(two_numbers(key, 0)[1], pair)
        ends = gather(self.ends, pair)
        return following, TimeStep(following, gather(self.reward.reshape(-1), pair), ends, jnp.zeros_like(ends))

    def run(self, keys, states, policy, horizon, actions):
        table = tabulate(policy, self.num_states).values
        require_policy_shape(table.shape, self.reward.shape)
        chances = thresholds(table)

        def step(carry, h):
            state, ended = carry
            for_action, for_state = two_numbers(keys, h + 1)
            action = pick(for_action, gather(chances, state))
            if actions is not None:
                action = jnp.where(h == 0, actions, action)
            pair = state * self.num_actions + action
            following = jnp.where(ended, state, self._follow(for_state, pair))
            return (following, ended | gather(self.ends, pair)), jnp.where(ended, ~pair, pair)

        # The loop writes one number a step, below 0 after the end, from which all else follows: memory is
        # what a long run waits for, the more so as [H, B] has to become [B, H].
        start = (states.astype(jnp.int32), jnp.zeros(states.shape, bool))
        (states, _), packed = lax.scan(step, start, jnp.arange(horizon, dtype=jnp.uint32))
        packed = packed.T
        valid = packed >= 0
        pair = jnp.where(valid, packed, ~packed)
        state = lax.div(pair, jnp.full_like(pair, self.num_actions))
        following = jnp.concatenate([state[:, 1:], states[:, None]], 1)
        ends = gather(self.ends, pair)
        trajectory = Trajectory(
            state,
            state,
            pair - state * self.num_actions,
            gather(table.reshape(-1), pair),
            gather(self.reward.reshape(-1), pair),
            following,
            ends,
            jnp.zeros_like(ends),
            valid,
        )
        return trajectory, states

    def _follow(self, number: jax.Array, pair: jax.Array) -> jax.Array:
        slot = pick(number, gather(self.threshold, pair))
        return gather(self.successor.reshape(-1), pair * self.successor.shape[1] + slot)


@jax.jit
def _tables(flat: MDP) -> tuple[jax.Array, ...]:
    """Successors and thresholds [S A, K], whether a pair ends [S A], thresholds of the first state [S]."""
    transition: Any = flat.transition
    pairs = flat.num_states * flat.num_actions
    successor, probability = (jnp.moveaxis(part, 0, -1) for part in (transition.successor, transition.probability))
    ends = jnp.broadcast_to(flat.discount, flat.reward.shape) == 0
    return (
        successor.reshape(pairs, -1),
        thresholds(probability).reshape(pairs, -1),
        ends.reshape(-1),
        thresholds(flat.initial),
    )


def flatten_contexts(mdp: MDP) -> MDP:
    """An MDP with batch axes as one MDP of all their states, by successors; see `TabularEnvironment`."""
    if mdp.available is not None:
        raise InputError(
            "available: a simulator takes every action in every state, this MDP has states with fewer; let the "
            "others do what one of the available ones does, and give available=None"
        )
    transition: Any = mdp.transition
    if isinstance(transition, StencilTransition):
        transition = transition.to_successors()
    if isinstance(transition, DenseTransition):
        successor, probability = _successors(transition.probability)
    elif isinstance(transition, SuccessorTransition):
        successor, probability = transition.successor, transition.probability
    else:
        raise InputError(
            f"transition: {type(transition).__name__} cannot be sampled; give a DenseTransition, a "
            f"SuccessorTransition or a StencilTransition"
        )
    successor, probability, *rest = _flat(mdp, successor, probability)
    return MDP(SuccessorTransition(successor, probability), *rest)


@jax.jit
def _flat(mdp: MDP, successor: jax.Array, probability: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays of the one MDP: successors, probabilities, reward, discount, initial distribution."""
    batch, states, actions = mdp.batch_shape, mdp.num_states, mdp.num_actions
    contexts = int(np.prod(batch))

    def together(leaf: jax.Array, *event: int) -> jax.Array:
        return jnp.broadcast_to(leaf, batch + tuple(event)).reshape(contexts, *event)

    slots = successor.shape[-3]
    offset = states * jnp.arange(contexts, dtype=jnp.int32)[:, None, None, None]

    def side_by_side(part: jax.Array) -> jax.Array:
        return jnp.moveaxis(part, 0, 1).reshape(slots, contexts * states, actions)

    discount = mdp.discount if mdp.discount.ndim > len(batch) else mdp.discount[..., None, None]
    return (
        side_by_side(together(successor, slots, states, actions) + offset),
        side_by_side(together(probability, slots, states, actions)),
        together(mdp.reward, states, actions).reshape(-1, actions),
        together(discount, states, actions).reshape(-1, actions),
        together(mdp.initial, states).reshape(-1) / contexts,
    )


def _successors(probability: jax.Array) -> tuple[jax.Array, jax.Array]:
    """P[..., S, A, S] as successor lists [..., K, S, A], K the most successors of any pair, where it is known."""
    states = probability.shape[-1]
    most = states
    if is_known(probability):
        most = max(1, int(np.max(np.sum(np.asarray(probability) > 0, -1), initial=1)))
    weight, index = (probability, None) if most == states else lax.top_k(probability, most)
    index = jnp.broadcast_to(jnp.arange(states), weight.shape) if index is None else index
    return tuple(jnp.moveaxis(part, -1, -3) for part in (index.astype(jnp.int32), weight))  # type: ignore[return-value]
