"""SoBiRL: model-free bilevel RL from trajectories."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from bilevel_jax.agents import Agent
from bilevel_jax.algorithms.sampled import SampledAlgorithm, SampledEstimate, batch_steps, require_batch
from bilevel_jax.algorithms.upper import UpperLevel
from bilevel_jax.environments import Trajectory
from bilevel_jax.estimators import (
    Baseline,
    LeaveOneOut,
    Response,
    SampledProblem,
    estimate_from,
    importance_weights,
    paid,
    regroup,
    sample_groups,
)
from bilevel_jax.validation import as_float, as_size, plain, require_positive


class Reuse(eqx.Module):
    """Use the last `batches` batches again, with importance weights of at most `clip`.

    Unbiased but for the clipping, unless the response or the baseline learns: what they learned from a
    batch then meets it again.

    Raises:
      InputError: batches below 1 (static), clip not above 0.
    """

    batches: int = eqx.field(static=True)
    clip: jax.Array

    def __init__(self, batches: int = 1, clip: Any = 10.0):
        self.batches = as_size("batches", batches, "reuse=None uses none again")
        self.clip = as_float("clip", clip)
        require_positive("clip", self.clip, "10 is usual")


class SoBiRL(SampledAlgorithm):
    """See `sobirl`."""

    response: Response
    baseline: Baseline
    batch: int = eqx.field(static=True)
    reuse: Reuse | None = None
    pairings: int = eqx.field(default=1, static=True, converter=plain)

    def init_memory(self, x):
        return self.response.init(self.problem, x), self.baseline.init(self.problem), self._no_batches(x)

    def estimate(self, key, state):
        learned, baseline_state, earlier = state.memory
        policy = self.policy(state)
        for_groups, for_rest = jax.random.split(key)
        sampled = sample_groups(for_groups, self.problem, policy, self.batch)
        fresh = regroup(sampled, self.pairings)

        def learn(first, learned, baseline_state):
            if self.response.learns_first == first:
                learned = self.response.update(learned, self.problem, state.x, policy, sampled)
            if self.baseline.learns_first == first:
                costs = paid(for_rest, self.problem, state.x, fresh)
                baseline_state = self.baseline.update(baseline_state, self.problem, fresh, costs)
            return learned, baseline_state

        learned, baseline_state = learn(True, learned, baseline_state)
        groups, weights, size, earlier = self._with_earlier(fresh, earlier, policy)
        made = estimate_from(
            for_rest,
            self.problem,
            state.x,
            policy,
            groups,
            self.response,
            learned,
            self.baseline,
            baseline_state,
            weights,
        )
        learned, baseline_state = learn(False, learned, baseline_state)
        return SampledEstimate(made.value, made.gradient, (learned, baseline_state, earlier), size)

    @property
    def environment_steps(self):
        groups = self._groups * (1 if self.reuse is None else 1 + self.reuse.batches)
        return (
            self.agent.environment_steps(self.problem)
            + batch_steps(self.problem, self.batch)
            + self.response.environment_steps(self.problem, groups * self.problem.trajectories)
        )

    @property
    def _groups(self) -> int:
        """Groups made from a batch."""
        return self.batch * self.pairings

    def _no_batches(self, x):
        """Room for the batches to be used again, [R, N, I, H], and how many of them are there."""
        if self.reuse is None:
            return None

        def sampled(key):
            policy = self.agent.policy(self.init_agent(key, x), self.problem, x)
            return regroup(sample_groups(key, self.problem, policy, self.batch), self.pairings)

        shapes = jax.eval_shape(sampled, jax.random.key(0))
        batches = self.reuse.batches
        room = jax.tree.map(lambda leaf: jnp.zeros((batches, *leaf.shape), leaf.dtype), shapes)
        return room, jnp.asarray(0, jnp.int32)

    def _with_earlier(self, fresh: Trajectory, earlier, policy):
        """The fresh groups, the earlier ones behind them; weights, effective sample size, and what to keep."""
        if self.reuse is None:
            return fresh, None, jnp.asarray(float(self._groups)), None
        kept, count = earlier
        groups = jax.tree.map(lambda new, old: jnp.concatenate([new, old.reshape(-1, *new.shape[1:])]), fresh, kept)
        here = jnp.repeat(jnp.arange(self.reuse.batches + 1, dtype=count.dtype) <= count, self._groups)
        # Room that is still empty holds no actions: give it a probability, and then no weight.
        safe = groups._replace(probability=jnp.where(here[:, None, None], groups.probability, 1))
        raw = importance_weights(policy, safe, self.reuse.clip).weights
        weights = jnp.where(here, raw, 0)
        size = jnp.sum(weights) ** 2 / jnp.maximum(jnp.sum(weights**2), jnp.finfo(weights.dtype).tiny)
        share = jnp.mean(here.astype(weights.dtype))
        kept = jax.tree.map(lambda new, old: jnp.concatenate([new[None], old[:-1]]), fresh, kept)
        return groups, weights / share, size, (kept, jnp.minimum(count + 1, self.reuse.batches))


def sobirl(
    problem: SampledProblem,
    optimizer: optax.GradientTransformation | UpperLevel,
    *,
    agent: Agent,
    response: Response,
    batch: int = 64,
    baseline: Baseline | None = None,
    reuse: Reuse | None = None,
    pairings: int = 1,
) -> SoBiRL:
    """SoBiRL (Yang, Gao and Yuan, AISTATS 2025, Algorithm 2) for any `SampledProblem`.

    An iteration improves the agent at x from where it stood, draws a batch of groups of trajectories
    under its policy, estimates the hyper-gradient from them in one backward pass and updates x.

    Args:
      problem: a `SampledProblem`; its numbers are leaves.
      optimizer: an optax transformation, or an `UpperLevel`.
      agent: the lower level, e.g. `agents.SoftQLearning()`; `agents.ExactAgent()` is an oracle.
      response: estimator of dQ* - dV*, see `estimators`.
      batch: groups of trajectories an iteration (static).
      baseline: None is `LeaveOneOut()`.
      pairings: groups that each trajectory is used in, for losses that compare trajectories (static); see
        `estimators.regroup`. `LeaveOneOut` then takes means over groups that share a trajectory, which
        shrinks the gradient by about 1 / batch.
      reuse: `Reuse(...)` uses earlier batches again, weighted by importance; None does not.

    Raises:
      InputError: batch below 1, pairings not from 1 to the batch.
    """
    baseline = LeaveOneOut() if baseline is None else baseline
    return SoBiRL(problem, optimizer, agent, response, baseline, require_batch(batch), reuse, pairings)
