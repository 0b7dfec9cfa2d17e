"""Segments of trajectories, as a teacher sees them, and how they are cut so that their length tells nothing."""

import functools
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int32, PRNGKeyArray, Real

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.indexing import gather
from bilevel_jax.core.validation import as_float, as_size
from bilevel_jax.environments.protocol import Trajectory

Ends = Literal["exclude", "hide", "show"]


class Segments(eqx.Module):
    """N segments of H steps.

    Args:
      observation: before each step, a pytree with leaves [N, H, ...].
      action: [N, H, ...].
      next_observation: after each step, of the structure of `observation`; None where it was not kept.
      valid: which steps count, [N, H].
      reward: what a synthetic teacher judges by and the learner does not see, [N, H]; None if there is none.
      state: the simulator's state before each step, a pytree with leaves [N, H, ...], from which `NestedRollouts`
        start; None where it was not kept. Files do not keep it.

    Raises:
      InputError: leaves without the leading axes [N, H], or `valid` that is not boolean.

    Example:
      >>> segments = bj.preferences.Segments(
      ...     observation=jnp.zeros((3, 5, 2)), action=jnp.zeros((3, 5), jnp.int32), valid=jnp.ones((3, 5), bool)
      ... )
      >>> segments.count, segments.length
      (3, 5)
    """

    observation: Any
    action: Real[Array, "..."]
    next_observation: Any
    valid: Bool[Array, "*steps"]
    reward: Float[Array, "*steps"] | None
    state: Any

    def __init__(
        self,
        observation: Any,
        action: Real[ArrayLike, "..."] | Any,
        next_observation: Any = None,
        *,
        valid: Bool[ArrayLike, "N H"] | Any,
        reward: Real[ArrayLike, "N H"] | Any | None = None,
        state: Any = None,
    ):
        self.observation = jax.tree.map(jnp.asarray, observation)
        self.action = jnp.asarray(action)
        self.next_observation = jax.tree.map(jnp.asarray, next_observation)
        self.valid = jnp.asarray(valid)
        self.reward = None if reward is None else as_float("reward", reward)
        self.state = jax.tree.map(jnp.asarray, state)
        if self.valid.ndim != 2 or self.valid.dtype != bool:
            raise InputError(f"valid: expected booleans [N, H], got {self.valid.dtype}{list(self.valid.shape)}")
        for path, leaf in jax.tree_util.tree_leaves_with_path(self):
            if leaf.shape[:2] != self.valid.shape:
                name = jax.tree_util.keystr(path).lstrip(".")
                expected = list(self.valid.shape)
                raise InputError(f"{name}: expected the leading axes [N, H] = {expected}, got {list(leaf.shape)}")

    @classmethod
    def of(cls, trajectories: Any, *, hidden: bool = True) -> "Segments":
        """The segments that trajectories [N, H] are, e.g. of `cut_segments`. `hidden` keeps their reward (static)."""
        if isinstance(trajectories, Segments):
            return trajectories
        return cls(
            trajectories.observation,
            trajectories.action,
            trajectories.next_observation,
            valid=trajectories.valid,
            reward=trajectories.reward if hidden else None,
            state=trajectories.state,
        )

    @property
    def count(self) -> int:
        """N."""
        return self.valid.shape[0]

    @property
    def length(self) -> int:
        """H."""
        return self.valid.shape[1]


class Cut(NamedTuple):
    """Segments [count, length] that were cut out of trajectories [B, H].

    `process` and `start` say where each begins. `absorbing` marks steps after an end that is hidden. `found` is False
    where there was no further place to cut at; none of the steps of such a segment are valid.
    """

    trajectories: Trajectory
    process: Int32[Array, " count"]
    start: Int32[Array, " count"]
    absorbing: Bool[Array, "count length"]
    found: Bool[Array, " count"]


def cut_segments(
    key: PRNGKeyArray,
    trajectories: Trajectory,
    length: int,
    count: int,
    *,
    ends: Ends = "exclude",
    absorbing_reward: Real[ArrayLike, ""] | Any = 0.0,
) -> Cut:
    """Cut `count` segments of `length` steps out of trajectories [B, H], at different places, all equally likely.

    Trajectories may be of `rollout`, where steps after the end are not valid, or of `collect`, where the next process
    follows. If segments stop where an episode ends, their length says how well it went, and a reward model that gives
    every step the same number can predict the labels.

    Args:
      length, count: static.
      ends: what becomes of the end of an episode (static).
        "exclude": a segment may end with the last step of an episode, but steps never follow an end.
        "hide": steps after a termination repeat what it led to. Observation and next observation are those of the end,
          the action is the last one, the reward is `absorbing_reward`, and they are valid: all segments have `length`
          steps. After a truncation nobody knows what would have followed; segments never reach beyond one. Actions in
          repeated steps were not chosen: for labels that judge decisions, take "exclude".
        "show": steps after an end are not valid, so that segments have different lengths.
      absorbing_reward: what the hidden reward is after a termination, for a synthetic teacher.

    Raises:
      InputError: a length that is not from 1 to H, a count below 1, or an unknown word for `ends`.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> environment = bj.environments.TabularEnvironment(mdp)
      >>> policy = jnp.array([[0.5, 0.5], [1.0, 0.0]])  # [S, A]
      >>> trajectories = bj.environments.rollout(jax.random.key(0), environment, policy, batch=2, horizon=9)
      >>> cut = bj.preferences.cut_segments(jax.random.key(1), trajectories, 3, 5)
      >>> cut.trajectories.action.shape, bool(cut.found.all())
      ((5, 3), True)
    """
    horizon = trajectories.valid.shape[1]
    if as_size("length", length) > horizon:
        raise InputError(f"length: expected 1 to the horizon {horizon}, got {length}")
    count = as_size("count", count)
    if ends not in ("exclude", "hide", "show"):
        raise InputError(f"ends: expected exclude, hide or show, got {ends!r}")
    reward = as_float("absorbing_reward", absorbing_reward, trajectories.reward.dtype, ())
    return _cut(key, trajectories, reward, length, count, ends)


@functools.partial(jax.jit, static_argnames=("length", "count", "ends"))
def _cut(
    key: PRNGKeyArray, trajectories: Trajectory, absorbing_reward: Float[Array, ""], length: int, count: int, ends: Ends
) -> Cut:
    horizon = trajectories.valid.shape[1]
    valid, terminated = trajectories.valid, trajectories.terminated & trajectories.valid
    # A record that stops before its last step without a word is one that was cut there.
    stops = valid & ~jnp.concatenate([valid[:, 1:], jnp.ones_like(valid[:, :1])], 1)
    truncated = ((trajectories.truncated & valid) | stops) & ~terminated
    termination, truncation = _next(terminated), _next(truncated)
    # Of each start [B, H], the step before which the segment is over.
    begin = jnp.arange(horizon, dtype=jnp.int32)[None]
    end = begin + length
    untruncated = jnp.minimum(truncation + 1, horizon)
    if ends == "exclude":
        allowed = (end <= jnp.minimum(termination + 1, untruncated)) & valid
    elif ends == "hide":
        allowed = ((end <= untruncated) | (termination < untruncated)) & valid
    else:
        allowed = ((end <= horizon) | (jnp.minimum(termination, truncation) < horizon)) & valid
    # A random order of all places, those that are not allowed last.
    ranks = jnp.where(allowed, jax.random.uniform(key, allowed.shape), 2.0).reshape(-1)
    taken = min(count, ranks.size)
    places = jnp.argsort(ranks)[jnp.minimum(jnp.arange(count), taken - 1)].astype(jnp.int32)
    found = gather(allowed.reshape(-1), places) & (jnp.arange(count) < taken)
    process, start = places // horizon, places % horizon
    last = jnp.minimum(gather(jnp.minimum(termination, truncation), (process, start)), horizon - 1)
    steps = start[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
    after = steps > last[:, None]
    index = (process[:, None], jnp.minimum(steps, last[:, None]))
    pieces = jax.tree.map(lambda leaf: gather(leaf, index), trajectories)
    if ends == "hide":
        pieces = pieces._replace(
            observation=jax.tree.map(
                lambda new, old: jnp.where(_like(after, old), new, old), pieces.next_observation, pieces.observation
            ),
            reward=jnp.where(after, absorbing_reward, pieces.reward),
            valid=pieces.valid & found[:, None],
        )
    else:
        pieces = pieces._replace(valid=pieces.valid & ~after & found[:, None])
    return Cut(pieces, process, start, after & found[:, None] & (ends == "hide"), found)


def relabelled(reward: Any, steps: Any) -> Any:
    """Return steps with the rewards of a reward function, in place of those that they have.

    Args:
      reward: an `ActionFunction`, such as a `RewardNetwork` at its parameters, or a function of one observation, action
        and next observation.
      steps: a `Trajectory`, `Segments`, the items of a replay buffer, or any named tuple or Module with the fields
        observation, action, next_observation and reward; the axes of `reward` are those of the steps. Segments may
        have no reward yet.

    Returns:
      The same with another `reward`, of the old one's dtype; 0 where `steps.valid` is False.

    Raises:
      InputError: `steps` lack a field.

    Example:
      >>> segments = bj.preferences.Segments(
      ...     jnp.zeros((3, 5), jnp.int32), jnp.zeros((3, 5), jnp.int32), valid=jnp.ones((3, 5), bool)
      ... )
      >>> bj.preferences.relabelled(bj.Table([[2.0, 1.0]]), segments).reward[0].tolist()
      [2.0, 2.0, 2.0, 2.0, 2.0]
    """
    for name in ("observation", "action", "next_observation", "reward"):
        if not hasattr(steps, name):
            raise InputError(f"steps: {type(steps).__name__} has no field {name}; give a Trajectory, Segments or alike")
    old = steps.reward
    rank = (steps.valid if old is None else old).ndim
    function = reward.of_step if hasattr(reward, "of_step") else reward
    for _ in range(rank):
        function = jax.vmap(function)
    new = function(steps.observation, steps.action, steps.next_observation)
    new = new if old is None else new.astype(old.dtype)
    if hasattr(steps, "valid"):
        new = jnp.where(steps.valid, new, 0)
    if hasattr(steps, "_replace"):
        return steps._replace(reward=new)
    return eqx.tree_at(lambda steps: steps.reward, steps, new, is_leaf=lambda leaf: leaf is None)


def _next(ended: Bool[Array, "B H"]) -> Int32[Array, "B H"]:
    """The first step from each on at which a process ended; H where there is none."""
    horizon = ended.shape[1]
    steps = jnp.where(ended, jnp.arange(horizon, dtype=jnp.int32)[None], jnp.int32(horizon))
    return lax.cummin(steps, axis=1, reverse=True)


def _like(mask: Bool[Array, "*steps"], leaf: Any) -> Bool[Array, "..."]:
    return mask.reshape(mask.shape + (1,) * (leaf.ndim - mask.ndim))
