"""Any `MDP` as a simulator."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Float32, Int, Int32, Integer, Real

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.indexing import gather
from bilevel_jax.core.validation import as_float, is_known, require_instance, require_probability
from bilevel_jax.environments.policies import policy_table, require_policy_shape
from bilevel_jax.environments.protocol import Environment, TimeStep, Trajectory, require_available
from bilevel_jax.environments.sampling import pick, thresholds, two_numbers
from bilevel_jax.environments.spaces import Discrete
from bilevel_jax.interchange.gymnasium import read_outcomes
from bilevel_jax.mdp.process import MDP
from bilevel_jax.mdp.transitions import DenseTransition, StencilTransition, SuccessorTransition


class TabularEnvironment(Environment):
    """The process of an `MDP`: state and observation are the index of the state, int32.

    Args:
      mdp: an `MDP` with a dense, successor or stencil transition. An MDP with batch axes is a set of contexts: the
        context is drawn uniformly at reset and never changes. With C contexts of S states, state s of context c has
        index c S + s.
      ends: the probability that a pair ends the process, [S, A] (with batch axes in front, or none). None computes it
        from the discounts: if d is the largest discount of a context, a pair ends the process with probability
        1 - discount / d, as in `interchange.with_end_state`. Returns discounted by d then have the mean V. A
        probability of ending that all pairs of a context have in common does not show in the discounts: give `ends` for
        that.

    A simulator needs no discount: if `ends` is given, the discounts of the MDP are ignored. A process that ends by
    chance because of a discount ends where it is: its `next_observation` is the state that it was in, because the MDP
    does not say where it would go. `from_gymnasium` makes a simulator that knows it.

    A policy for the simulator gives probability 0 to actions that are not available; the reward is NaN if they are
    taken. Probabilities are rounded to float32, and events that are rarer than 2^-24 may never happen. Build the
    simulator outside jit: dense rows are then stored by their K successors, while under jit all S states count as
    successors. Traced discounts have to be 0 or one other number; rewards are NaN where they are not.

    Raises:
      InputError: contexts with several largest discounts besides 0 (no simulator has those), ends that are no
        probabilities, or a kind of transition that cannot be sampled.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> environment = bj.environments.TabularEnvironment(mdp)
      >>> state = environment.reset(jax.random.key(0))
      >>> state, step = environment.step(jax.random.key(1), state, jnp.asarray(1))
      >>> step.reward.shape
      ()
    """

    # "pairs" is S A.
    successor: Int32[Array, "pairs K"]
    threshold: Float32[Array, "pairs K"]
    reward: Float[Array, "S A"]  # the mean
    ends: Bool[Array, " pairs"] | Bool[Array, "pairs K"]  # the latter where it depends on what follows
    initial: Float32[Array, " S"]  # thresholds
    outcome_reward: Float[Array, "pairs K"] | None  # where it depends on what follows
    mask: Bool[Array, "S A"] | None

    def __init__(self, mdp: MDP, *, ends: Real[ArrayLike, "*batch S A"] | Any | None = None):
        require_instance("mdp", mdp, MDP)
        flat = flatten_contexts(mdp)
        chances = None
        if ends is not None:
            chances = _given_ends(ends, mdp)
        elif mdp.discount.ndim > len(mdp.batch_shape) and is_known(mdp.discount):
            chances = _discounted_ends(mdp)
        elif is_known(flat.discount):
            _require_one_discount(np.unique(np.asarray(flat.discount)))
        by_chance = chances is not None and not (is_known(chances) and np.isin(np.asarray(chances), (0, 1)).all())
        self.successor, self.threshold, self.ends, self.initial, proper = _tables(flat, chances, by_chance)
        self.reward = flat.reward if is_known(flat.discount) or ends is not None else flat.reward * proper
        self.outcome_reward, self.mask = None, flat.available

    @classmethod
    def from_gymnasium(cls, env: Any, *, initial: Any = None) -> "TabularEnvironment":
        """Return the simulator of a tabular gymnasium environment, with the rewards, successors and ends of its
        outcomes.

        `interchange.from_gymnasium` keeps only what follows a pair that goes on, and the pair's mean reward. Here the
        outcomes are kept: an episode ends in the state that the table says, and each outcome pays its own reward. Time
        limits are left out: put `TimeLimit` around the simulator.

        Args:
          env, initial: as in `interchange.from_gymnasium`.

        Raises:
          InputError: no such table, or one whose probabilities or states are wrong.
        """
        mdp, reward, ends = read_outcomes(env, initial)
        made = cls(mdp)
        slots = made.successor.shape
        leaves = (jnp.asarray(ends).reshape(slots), jnp.asarray(reward, mdp.reward.dtype).reshape(slots))
        return eqx.tree_at(lambda e: (e.ends, e.outcome_reward), made, leaves, is_leaf=lambda leaf: leaf is None)

    @property
    def num_states(self) -> int:
        """S, over all contexts."""
        return self.reward.shape[0]

    @property
    def action_space(self):
        return Discrete(self.reward.shape[1])

    @property
    def num_pairs(self) -> int:
        """S A."""
        return self.reward.size

    def pair(self, state: Integer[Array, "*batch"], action: Integer[Array, "*batch"]) -> Integer[Array, "*batch"]:
        """The number of each pair, s A + a: its place in an array [S A]."""
        return state * self.num_actions + action

    def reset(self, key) -> Int32[Array, ""]:
        # As `pick` does, by bisection: there are many states, and most never come first.
        return jnp.searchsorted(self.initial, two_numbers(key, 0)[0], side="right").astype(jnp.int32)

    def observe(self, state):
        return state

    @property
    def available(self) -> Bool[Array, "S A"] | None:
        return self.mask

    def step(self, key, state, action) -> tuple[Integer[Array, ""], TimeStep]:
        pair = self.pair(state, action)
        place = self._place(two_numbers(key, 0)[1], pair)
        following, ends = gather(self.successor.reshape(-1), place), self._ends(pair, place)
        return following, TimeStep(
            observation=following, reward=self._paid(pair, place), terminated=ends, truncated=jnp.zeros_like(ends)
        )

    def run(self, keys, states, policy, horizon, actions):
        table = policy_table(policy, self.num_states)
        require_policy_shape(table.shape, self.reward.shape)
        require_available(self.mask, table)
        chances = thresholds(table)
        by_outcome = self.ends.ndim > 1

        def step(carry, h):
            state, ended = carry
            for_action, for_state = two_numbers(keys, h + 1)
            action = pick(for_action, gather(chances, state))
            if actions is not None:
                action = jnp.where(h == 0, actions, action)
            pair = self.pair(state, action)
            place = self._place(for_state, pair)
            following = jnp.where(ended, state, gather(self.successor.reshape(-1), place))
            kept = place if by_outcome else pair
            return (following, ended | self._ends(pair, place)), jnp.where(ended, ~kept, kept)

        # The loop writes one number a step, below 0 after the end, from which all else follows: memory is
        # what a long run waits for, the more so as [H, B] has to become [B, H].
        start = (states.astype(jnp.int32), jnp.zeros(states.shape, bool))
        (states, _), packed = lax.scan(step, start, jnp.arange(horizon, dtype=jnp.uint32))
        packed = packed.T
        valid = packed >= 0
        place = jnp.where(valid, packed, ~packed)
        pair = lax.div(place, jnp.full_like(place, self.successor.shape[1])) if by_outcome else place
        state = lax.div(pair, jnp.full_like(pair, self.num_actions))
        following = jnp.concatenate([state[:, 1:], states[:, None]], 1)
        ends = self._ends(pair, place)
        trajectory = Trajectory(
            state=state,
            observation=state,
            action=pair - state * self.num_actions,
            probability=gather(table.reshape(-1), pair),
            reward=self._paid(pair, place),
            next_observation=following,
            terminated=ends,
            truncated=jnp.zeros_like(ends),
            valid=valid,
        )
        return trajectory, states

    def _place(self, number: Float32[Array, "*batch"], pair: Integer[Array, "*batch"]) -> Integer[Array, "*batch"]:
        """Return the place, in the flat tables of outcomes, of the outcome that a number picks for a pair."""
        return pair * self.successor.shape[1] + pick(number, gather(self.threshold, pair))

    def _ends(self, pair: Integer[Array, "*batch"], place: Integer[Array, "*batch"]) -> Bool[Array, "*batch"]:
        return gather(self.ends.reshape(-1), place if self.ends.ndim > 1 else pair)

    def _paid(self, pair: Integer[Array, "*batch"], place: Integer[Array, "*batch"]) -> Float[Array, "*batch"]:
        each = self.outcome_reward
        paid = gather(self.reward.reshape(-1), pair) if each is None else gather(each.reshape(-1), place)
        return paid if self.mask is None else jnp.where(gather(self.mask.reshape(-1), pair), paid, jnp.nan)


@functools.partial(jax.jit, static_argnames="by_chance")
def _tables(flat: MDP, chances: Float[Array, "*batch S A"] | None, by_chance: bool) -> tuple[jax.Array, ...]:
    """Successors and thresholds [S A, K], what ends [S A] or [S A, K], thresholds of the first state [S].

    With the last, 1 where discounts are one number besides 0, else NaN. `by_chance` adds a successor: the end.
    """
    transition: Any = flat.transition
    pairs = flat.num_states * flat.num_actions
    successor, probability = (jnp.moveaxis(part, 0, -1) for part in (transition.successor, transition.probability))
    discount = jnp.broadcast_to(flat.discount, flat.reward.shape)
    ends = discount == 0 if chances is None else chances.reshape(flat.reward.shape) == 1
    if by_chance and chances is not None:
        # Where a pair always ends the process, it is drawn where it leads, as without chance.
        chance = jnp.where(ends, 0, chances.reshape(ends.shape)).astype(probability.dtype)[..., None]
        own = jnp.broadcast_to(jnp.arange(flat.num_states, dtype=successor.dtype)[:, None, None], chance.shape)
        successor = jnp.concatenate([successor, own], -1)
        probability = jnp.concatenate([probability * (1 - chance), chance], -1)
        always = jnp.broadcast_to(ends[..., None], successor.shape)
        ends = always.at[..., -1].set(True).reshape(pairs, -1)
    proper = jnp.all((discount == 0) | (discount == jnp.max(discount)))
    return (
        successor.reshape(pairs, -1),
        thresholds(probability).reshape(pairs, -1),
        ends if by_chance else ends.reshape(-1),
        thresholds(flat.initial),
        jnp.where(proper, 1, jnp.nan).astype(flat.reward.dtype),
    )


def _given_ends(ends: Any, mdp: MDP) -> Float[Array, "*batch S A"]:
    """Probabilities of ending. Raises InputError."""
    chances = as_float("ends", ends)
    if chances.shape not in (mdp.reward.shape, mdp.reward.shape[-2:]):
        raise InputError(f"ends: expected shape [S, A] = {list(mdp.reward.shape[-2:])}, got {list(chances.shape)}")
    require_probability("ends", chances, "it is the probability that a pair ends the process")
    return jnp.broadcast_to(chances, mdp.reward.shape)


def _discounted_ends(mdp: MDP) -> Float[np.ndarray, "*batch S A"]:
    """Return probabilities of ending from the discounts; 1 where all discounts of a context are 0.

    Raises InputError.
    """
    shape = mdp.reward.shape
    discount = np.broadcast_to(np.asarray(mdp.discount), shape)
    used = np.ones(shape, bool)
    if mdp.available is not None and is_known(mdp.available):
        used = np.broadcast_to(np.asarray(mdp.available), shape)
    largest = np.max(np.where(used, discount, 0), (-2, -1), keepdims=True)
    _require_one_discount(np.unique(largest))
    ratio = discount / np.where(largest > 0, largest, 1)
    return np.where(used, 1 - np.minimum(ratio, 1), 0)  # what nobody may take need not end


def _require_one_discount(values: Float[np.ndarray, " N"]) -> None:
    values = values[values > 0]
    if values.size > 1:
        raise InputError(
            f"discount: a simulator has one discount besides 0 (the end), the contexts of this MDP have {values.size}, "
            f"from {values[0]:g} to {values[-1]:g}; use one, or give ends"
        )


def flatten_contexts(mdp: MDP) -> MDP:
    """Return an MDP with batch axes as one MDP of all their states, by successors; see `TabularEnvironment`.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.ones((3, 2, 2)), 0.9)  # 3 contexts of 2 states
      >>> bj.environments.flatten_contexts(mdp).num_states
      6
    """
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
def _flat(
    mdp: MDP, successor: Int[Array, "*_ K S A"], probability: Float[Array, "*_ K S A"]
) -> tuple[jax.Array | None, ...]:
    """Arrays of the one MDP: successors, probabilities, reward, discount, initial distribution, mask."""
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
        None if mdp.available is None else together(mdp.available, states, actions).reshape(-1, actions),
    )


def _successors(
    probability: Float[Array, "*batch S A S"],
) -> tuple[Int32[Array, "*batch K S A"], Float[Array, "*batch K S A"]]:
    """The lists of successors of transition probabilities, K the most successors of any pair, where it is known."""
    states = probability.shape[-1]
    most = states
    if is_known(probability):
        most = max(1, int(np.max(np.sum(np.asarray(probability) > 0, -1), initial=1)))
    weight, index = (probability, None) if most == states else lax.top_k(probability, most)
    index = jnp.broadcast_to(jnp.arange(states), weight.shape) if index is None else index
    return tuple(jnp.moveaxis(part, -1, -3) for part in (index.astype(jnp.int32), weight))  # type: ignore[return-value]
