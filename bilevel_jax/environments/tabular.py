"""Any `MDP` as a simulator."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bilevel_jax.environments.protocol import Environment, TimeStep, Trajectory, pick, thresholds
from bilevel_jax.errors import InputError
from bilevel_jax.functions import tabulate
from bilevel_jax.mdp import MDP
from bilevel_jax.transitions import DenseTransition, SuccessorTransition
from bilevel_jax.validation import is_known


class TabularEnvironment(Environment):
    """The process of an `MDP`: state and observation are the index of the state, int32.

    Args:
      mdp: an `MDP` with a dense or successor transition. One with batch axes is a set of contexts:
        the context is drawn uniformly at reset and never changes; with C contexts of S states, state s
        of context c has index c S + s.

    A pair whose discount is 0 ends the process. Probabilities are rounded to float32, and what is rarer
    than 2^-24 may never happen. Build it outside jit: dense rows are then stored by their K
    successors; under jit all S states count as successors.

    Raises:
      InputError: a discount that takes several values besides 0 (no simulator has those), or a kind of
        transition that cannot be sampled.
    """

    successor: jax.Array  # int32 [S A, K]
    threshold: jax.Array  # float32 [S A, K]
    reward: jax.Array  # [S, A]
    ends: jax.Array  # bool [S A]
    initial: jax.Array  # float32 [S], thresholds

    def __init__(self, mdp: MDP):
        flat = flatten_contexts(mdp)
        transition: Any = flat.transition
        successor, probability = transition.successor, transition.probability
        pairs = flat.num_states * flat.num_actions
        self.successor = jnp.moveaxis(successor, 0, -1).reshape(pairs, -1)
        self.threshold = thresholds(jnp.moveaxis(probability, 0, -1)).reshape(pairs, -1)
        self.reward = flat.reward
        discount = jnp.broadcast_to(flat.discount, flat.reward.shape)
        self.ends = (discount == 0).reshape(-1)
        self.initial = thresholds(flat.initial)
        if is_known(discount):
            values = np.unique(np.asarray(discount[discount > 0]))
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
        # The words of a folded key are random bits themselves: one hash a step serves both draws.
        return pick(_numbers(jax.random.fold_in(key, 0))[0], self.initial)

    def observe(self, state):
        return state

    def step(self, key, state, action):
        following, reward, ends = self._move(_numbers(jax.random.fold_in(key, 0))[1], state, action)
        return following, TimeStep(following, reward, ends, jnp.zeros_like(ends))

    def run(self, keys, states, policy, horizon, actions):
        table = tabulate(policy, self.num_states).values
        chances = thresholds(table)

        def step(carry, h):
            state, alive = carry
            for_action, for_state = _numbers(jax.vmap(jax.random.fold_in, (0, None))(keys, h + 1))
            action = pick(for_action, _rows(chances, state))
            if actions is not None:
                action = jnp.where(h == 0, actions, action)
            following, reward, ends = self._move(for_state, state, action)
            probability = _rows(table.reshape(-1), state * self.num_actions + action)
            return (following, alive & ~ends), (state, action, probability, reward, following, ends, alive)

        start = (states, jnp.ones(keys.shape, bool))
        (states, _), records = lax.scan(step, start, jnp.arange(horizon))
        state, action, probability, reward, following, ends, alive = (jnp.swapaxes(r, 0, 1) for r in records)
        trajectory = Trajectory(state, state, action, probability, reward, following, ends, jnp.zeros_like(ends), alive)
        return trajectory, states

    def _move(self, number: jax.Array, state: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        pair = state * self.num_actions + action
        slot = pick(number, _rows(self.threshold, pair))
        following = _rows(self.successor.reshape(-1), pair * self.successor.shape[1] + slot)
        return following, _rows(self.reward.reshape(-1), pair), _rows(self.ends, pair)


def flatten_contexts(mdp: MDP) -> MDP:
    """An MDP with batch axes as one MDP of all their states, by successors; see `TabularEnvironment`."""
    transition: Any = mdp.transition
    if isinstance(transition, DenseTransition):
        successor, probability = _successors(transition.probability)
    elif isinstance(transition, SuccessorTransition):
        successor, probability = transition.successor, transition.probability
    else:
        raise InputError(
            f"transition: {type(transition).__name__} cannot be sampled; give a DenseTransition or a "
            f"SuccessorTransition"
        )
    batch, states, actions = mdp.batch_shape, mdp.num_states, mdp.num_actions
    contexts = int(np.prod(batch))

    def together(leaf: jax.Array, *event: int) -> jax.Array:
        return jnp.broadcast_to(leaf, batch + tuple(event)).reshape(contexts, *event)

    slots = successor.shape[-3]
    offset = states * jnp.arange(contexts, dtype=jnp.int32)[:, None, None, None]
    kernel = SuccessorTransition(
        *(
            jnp.moveaxis(part, 0, 1).reshape(slots, contexts * states, actions)
            for part in (
                together(successor, slots, states, actions) + offset,
                together(probability, slots, states, actions),
            )
        )
    )
    discount = mdp.discount if mdp.discount.ndim > len(batch) else mdp.discount[..., None, None]
    return MDP(
        kernel,
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


def _numbers(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two numbers in [0, 1), float32 with 24 random bits each, from the words of keys made by fold_in."""
    words = jax.random.key_data(keys)[..., :2]
    numbers = (words >> 8).astype(jnp.float32) * 2.0**-24
    return numbers[..., 0], numbers[..., 1]


def _rows(table: jax.Array, index: jax.Array) -> jax.Array:
    return table.at[index].get(mode="promise_in_bounds")
