"""The part that agents with networks share: rewards of steps, returns of episodes, steps of the optimizer."""

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray

from bilevel_jax.core.batching import merge_axes
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.promotion import usual_promotion
from bilevel_jax.core.schedules import as_schedule
from bilevel_jax.core.validation import as_float, require_positive
from bilevel_jax.environments import Trajectory

Rule = Literal["adam", "radam"]


def returns_with_traces(
    rewards: Float[Array, "B H"],
    seen: Trajectory,
    following: Float[Array, "B H"],
    taken: Float[Array, "B H"],
    discount: Float[Array, ""],
    trace: Float[Array, "B H"],
) -> Float[Array, "B H"]:
    """The targets of Q along trajectories of `collect`, [B, H].

      G_t = r_t + discount (1 - terminated_t) (V(s_t+1) + trace_t (G_t+1 - Q(s_t+1, a_t+1)))

    After a truncated step, and after the last one, the trace is 0.

    Args:
      following: V(s_t+1), [B, H], of the observation before any reset.
      taken: Q(s_t+1, a_t+1), [B, H]; its last column is not used.
      trace: lambda min(1, pi / mu) at s_t+1, a_t+1 (Munos et al. 2016, Retrace); its last column is not used.
    """
    goes_on = ~(seen.terminated | seen.truncated) & (jnp.arange(rewards.shape[1]) < rewards.shape[1] - 1)[None]

    def back(ahead: Float[Array, " B"], now: Any) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
        reward, terminated, on, value, q, along = now
        beyond = value + jnp.where(on, along * (ahead - q), 0)
        target = reward + jnp.where(terminated, 0, discount * beyond)
        return target, target

    by_time = tuple(leaf.T for leaf in (rewards, seen.terminated, goes_on, following, taken, trace))
    return lax.scan(back, jnp.zeros_like(rewards[:, 0]), by_time, reverse=True)[1].T


def values_ahead(values: Callable[[Any], Float[Array, "N A"]], seen: Trajectory) -> Float[Array, "B H A"]:
    """Return Q at `next_observation` of trajectories of `collect`, [B, H, A]; any numbers after terminated steps.

    If the trajectories have their distributions, with `values` [B, H, A] of the same network, most are those of the
    step that follows. What is left are the last steps and those after which a process was cut off; they go through the
    network in chunks.

    Args:
      values: Q at observations [N], [N, A].
    """
    acting = getattr(seen.distribution, "values", None)
    if acting is None:
        return values(merge_axes(seen.next_observation)).reshape(*seen.reward.shape, -1)
    processes, steps = seen.reward.shape
    chunk = processes + processes // 4 + 1
    last = jnp.arange(steps) == steps - 1
    missing = merge_axes((seen.truncated | last[None]) & ~seen.terminated)
    observations = merge_axes(seen.next_observation)

    def some_more(carry: Any) -> Any:
        q, missing = carry
        (places,) = jnp.nonzero(missing, size=chunk, fill_value=missing.size)
        some = values(jax.tree.map(lambda leaf: leaf.at[places].get(mode="clip"), observations))
        return q.at[places].set(some, mode="drop"), missing.at[places].set(False, mode="drop")

    start = merge_axes(jnp.roll(acting, -1, 1)), missing
    q, _ = lax.while_loop(lambda carry: jnp.any(carry[1]), some_more, start)
    return q.reshape(processes, steps, -1)


class Episodes(eqx.Module):
    """Returns of episodes in the environment's own rewards, undiscounted.

    `returns` and `lengths` are those of the episodes under way, [B]. `mean_return` and `mean_length` are the means over
    the episodes that ended in the last call in which any did, NaN before. `count` is the number of all that ended. The
    first episode of each process does not count, as `start_processes` lets it begin late in its time limit; `first` [B]
    says where that one is under way.
    """

    returns: Float[Array, " B"]
    lengths: Int32[Array, " B"]
    first: Bool[Array, " B"]
    mean_return: Float[Array, ""]
    mean_length: Float[Array, ""]
    count: Int32[Array, ""]

    @classmethod
    def start(cls, processes: int) -> "Episodes":
        """No step was made."""
        nan = jnp.asarray(jnp.nan, jnp.result_type(float))
        return cls(
            returns=jnp.zeros(processes),
            lengths=jnp.zeros(processes, jnp.int32),
            first=jnp.ones(processes, bool),
            mean_return=nan,
            mean_length=nan,
            count=jnp.zeros((), jnp.int32),
        )

    def after(self, seen: Trajectory) -> "Episodes":
        """After the steps of a trajectory of `collect`, [B, H]. Steps that are not `valid` have no reward, and do not
        count.
        """

        def step(carry, now):
            returns, lengths, first, total, steps, count = carry
            reward, ended, valid = now
            returns, lengths = returns + reward, lengths + valid.astype(jnp.int32)
            counts = ended & ~first
            total = total + jnp.sum(jnp.where(counts, returns, 0))
            steps = steps + jnp.sum(jnp.where(counts, lengths, 0), dtype=jnp.int32)
            count = count + jnp.sum(counts, dtype=jnp.int32)
            returns, lengths = jnp.where(ended, 0, returns), jnp.where(ended, 0, lengths)
            return (returns, lengths, first & ~ended, total, steps, count), None

        nothing = jnp.zeros((), jnp.int32)
        at_start = (self.returns, self.lengths, self.first, jnp.zeros((), self.returns.dtype), nothing, nothing)
        by_time = (seen.reward.astype(self.returns.dtype).T, (seen.terminated | seen.truncated).T, seen.valid.T)
        (returns, lengths, first, total, steps, count), _ = lax.scan(step, at_start, by_time)
        some, ended = count > 0, jnp.maximum(count, 1).astype(total.dtype)
        return Episodes(
            returns=returns,
            lengths=lengths,
            first=first,
            mean_return=jnp.where(some, total / ended, self.mean_return),
            mean_length=jnp.where(some, steps.astype(total.dtype) / ended, self.mean_length),
            count=self.count + count,
        )

    def report(self) -> dict[str, Float[Array, ""]]:
        """`episode_return` and `episode_length`, the means."""
        return {"episode_return": self.mean_return, "episode_length": self.mean_length}


class Optimizer(eqx.Module):
    """Adam or its rectified form (Liu et al. 2020), on gradients clipped to a 2-norm.

    Its numbers are leaves, so that runs that differ in a learning rate are one program.
    """

    learning_rate: Callable
    max_gradient_norm: Float[Array, ""]
    rule: Rule = eqx.field(static=True)

    def __init__(self, learning_rate: Any, max_gradient_norm: Any, rule: Rule):
        self.learning_rate = as_schedule("learning_rate", learning_rate)
        self.max_gradient_norm = as_float("max_gradient_norm", max_gradient_norm, float)
        require_positive("max_gradient_norm", self.max_gradient_norm, "10 seldom clips")
        if rule not in ("adam", "radam"):
            raise InputError(f"rule: expected adam or radam, got {rule!r}")
        self.rule = rule

    @property
    def _direction(self) -> optax.GradientTransformation:
        return optax.scale_by_adam(eps=1e-5) if self.rule == "adam" else optax.scale_by_radam()

    def init(self, params: Any) -> Any:
        """The state at the start."""
        with usual_promotion():
            return jax.tree.map(jnp.asarray, self._direction.init(params))

    def update(self, gradient: Any, state: Any, params: Any, count: Int32[Array, ""]) -> tuple[Any, Any, Array]:
        """(next parameters, next state, norm of the gradient). `count` is the argument of the learning rate."""
        rate = self.learning_rate(count)
        with usual_promotion():
            norm = optax.tree.norm(gradient)
            scale = jnp.minimum(1, self.max_gradient_norm.astype(norm.dtype) / jnp.maximum(norm, 1e-12))
            clipped = jax.tree.map(lambda leaf: leaf * scale, gradient)
            steps, after = self._direction.update(clipped, state, params)
            moved = jax.tree.map(lambda leaf, step: (leaf - rate * step).astype(leaf.dtype), params, steps)
        after = jax.tree.map(lambda new, old: new.astype(old.dtype), after, state)
        return moved, after, norm


def minibatch_steps(
    key: PRNGKeyArray,
    carry: Any,
    data: Any,
    step: Callable[[Any, Any], tuple[Any, Any]],
    *,
    epochs: int,
    minibatches: int,
) -> tuple[Any, Any]:
    """Go `epochs` times through the data [N, ...] in a new order, `minibatches` steps each.

    `step(carry, batch)` returns (carry, numbers). Returns the carry, and the mean of the numbers.
    """
    count = jax.tree.leaves(data)[0].shape[0]

    def epoch(carry: Any, key: PRNGKeyArray) -> tuple[Any, Any]:
        places = jax.random.permutation(key, count).reshape(minibatches, -1)
        return lax.scan(lambda carry, own: step(carry, jax.tree.map(lambda leaf: leaf[own], data)), carry, places)

    carry, numbers = lax.scan(epoch, carry, jax.random.split(key, epochs))
    return carry, jax.tree.map(jnp.mean, numbers)


def require_divisible(processes: int, steps: int, minibatches: int) -> None:
    """Raise InputError unless the steps of all processes divide into the minibatches."""
    if (processes * steps) % minibatches:
        raise InputError(
            f"minibatches: {processes} processes of {steps} steps are {processes * steps}, which does not divide by "
            f"{minibatches}; choose a divisor"
        )


def entropy(probabilities: Float[Array, "N A"]) -> Float[Array, ""]:
    """The mean entropy of policies in nats, []."""
    logs = jnp.log(jnp.where(probabilities > 0, probabilities, 1))
    return -jnp.mean(jnp.sum(probabilities * logs, -1))
