"""SoBiRL: model-free bilevel RL from trajectories."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float, Real

from bilevel_jax import replay
from bilevel_jax.agents import Agent
from bilevel_jax.algorithms.registry import register_algorithm
from bilevel_jax.algorithms.sampled.base import SampledAlgorithm, SampledEstimate, as_agent, batch_steps
from bilevel_jax.algorithms.upper import UpperLevel
from bilevel_jax.bilevel import SampledProblem
from bilevel_jax.core.validation import as_float, as_size, plain, require_at_least, require_positive
from bilevel_jax.environments import TabularEnvironment, Trajectory
from bilevel_jax.estimators import (
    Baseline,
    CriticAdvantage,
    LearnedAdvantage,
    LearnedModel,
    LeaveOneOut,
    NestedRollouts,
    Response,
    estimate_from,
    group_costs,
    importance_weights,
    regroup,
    sample_groups,
)
from bilevel_jax.networks import OneHot


class Reuse(eqx.Module):
    """Use the last `batches` batches again, with importance weights of at most `clip`.

    The estimate is unbiased apart from the clipping, unless the response or the baseline learns: they are then used on
    batches that they have already learned from.

    Raises:
      InputError: batches below 1 (static), clip not above 0.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> reuse = bj.algorithms.Reuse(4, clip=2.0)
      >>> algorithm = bj.algorithms.sobirl(problem, optax.adam(0.1), response=bj.estimators.OneStep(), reuse=reuse)
    """

    batches: int = eqx.field(static=True)
    clip: Float[Array, ""]

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
    pairings: int = eqx.field(default=1, static=True, converter=plain("pairings"))
    max_ratio: Float[Array, ""] | None = None

    def init_estimator(self, x):
        return self.response.init(self.problem, x), self.baseline.init(self.problem), self._no_batches(x)

    def estimate_from_samples(self, key, state):
        learned, baseline_state, earlier = state.memory.estimator
        policy = self.policy(state)
        for_groups, for_rest = jax.random.split(key)
        sampled = sample_groups(for_groups, self.problem, policy, self.batch)
        fresh = regroup(sampled, self.pairings)

        def learn(first, learned, baseline_state):
            if self.response.learns_first == first:
                learned = self.response.update(learned, self.problem, state.x, policy, sampled)
            if self.baseline.learns_first == first:
                costs = group_costs(for_rest, self.problem, state.x, fresh)
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
            self.max_ratio,
        )
        learned, baseline_state = learn(False, learned, baseline_state)
        parts = {"direct_norm": made.direct_norm, "implicit_norm": made.implicit_norm, "cosine": made.cosine}
        return SampledEstimate(
            value=made.value,
            gradient=made.gradient,
            memory=(learned, baseline_state, earlier),
            effective_sample_size=size,
            reports={name: number for name, number in parts.items() if number is not None},
        )

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
        """Return the number of groups that are made from a batch."""
        return self.batch * self.pairings

    def _no_batches(self, x):
        """Return empty room for the batches that will be used again, each [N, I, H]."""
        if self.reuse is None:
            return None

        def sampled(key):
            policy = self.agent.policy(self.init_agent(key, x), self.problem, x)
            return regroup(sample_groups(key, self.problem, policy, self.batch), self.pairings)

        return replay.init(jax.eval_shape(sampled, jax.random.key(0)), self.reuse.batches)

    def _with_earlier(self, fresh: Trajectory, earlier, policy):
        """Return the fresh groups followed by the earlier ones, their weights, the effective sample size, and the
        batches to keep.
        """
        if self.reuse is None:
            return fresh, None, jnp.asarray(float(self._groups)), None
        batches, there = replay.latest(earlier)
        groups = jax.tree.map(lambda new, old: jnp.concatenate([new, old.reshape(-1, *new.shape[1:])]), fresh, batches)
        here = jnp.repeat(jnp.concatenate([jnp.ones_like(there[:1]), there]), self._groups)
        # Room that is still empty holds no actions: give it a probability, and then no weight.
        safe = groups._replace(probability=jnp.where(here[:, None, None], groups.probability, 1))
        raw = importance_weights(policy, safe, self.reuse.clip).weights
        weights = jnp.where(here, raw, 0)
        size = jnp.sum(weights) ** 2 / jnp.maximum(jnp.sum(weights**2), jnp.finfo(weights.dtype).tiny)
        share = jnp.mean(here.astype(weights.dtype))
        earlier = replay.add(earlier, jax.tree.map(lambda leaf: leaf[None], fresh))
        return groups, weights / share, size, earlier


def sobirl(
    problem: SampledProblem,
    optimizer: optax.GradientTransformation | UpperLevel,
    *,
    agent: Agent | None = None,
    response: Response,
    batch: int = 64,
    baseline: Baseline | None = None,
    reuse: Reuse | None = None,
    pairings: int = 1,
    max_ratio: Real[ArrayLike, ""] | None = None,
) -> SoBiRL:
    """SoBiRL (Yang, Gao and Yuan, AISTATS 2025, Algorithm 2) for any `SampledProblem`.

    An iteration improves the agent at x, starting from its last state, draws a batch of groups of trajectories under
    its policy, estimates the hyper-gradient from them in one backward pass and updates x.

    Args:
      problem: a `SampledProblem`; its numbers are leaves.
      optimizer: an optax transformation, or an `UpperLevel`.
      agent: the lower level; None is `default_agent(problem)`.
      response: estimator of dQ* - dV*, see `estimators`.
      batch: groups of trajectories per iteration (static).
      baseline: None is `LeaveOneOut()`.
      pairings: the number of groups in which each trajectory is used, for losses that compare trajectories (static);
        see `estimators.regroup`. The means of `LeaveOneOut` then contain groups that share a trajectory, which shrinks
        the gradient by about 1 / batch.
      reuse: `Reuse(...)` uses earlier batches again, weighted by importance; None does not.
      max_ratio: the bound on the norm of the part of the gradient that comes from the policy's answer, over that of
        the direct part; see `estimators.estimate`. The info then reports `direct_norm`, `implicit_norm` and `cosine`.
        Infinity only reports them. None does neither.

    Raises:
      InputError: batch below 1, pairings not from 1 to the batch, max_ratio below 0.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> algorithm = bj.algorithms.sobirl(problem, optax.adam(0.1), response=bj.estimators.LearnedModel(), batch=8)
      >>> state = algorithm.init(jax.random.key(0), problem.start(jax.random.key(1)))
      >>> state, info = algorithm.step(jax.random.key(2), state)
      >>> state.x.shape, info.objective.shape
      ((8, 3), ())
    """
    baseline = LeaveOneOut() if baseline is None else baseline
    if max_ratio is not None:
        max_ratio = as_float("max_ratio", max_ratio, float)
        require_at_least("max_ratio", max_ratio, 0, "1 allows for parts of one size, infinity does not bound")
    return SoBiRL(
        problem,
        optimizer,
        as_agent(problem, agent),
        response,
        baseline,
        as_size("batch", batch),
        reuse,
        pairings,
        max_ratio,
    )


def sobirl_by_problem(
    problem: SampledProblem,
    upper: UpperLevel | optax.GradientTransformation,
    *,
    agent: Agent | None = None,
    response: Response | None = None,
    batch: int = 64,
    baseline: Baseline | None = None,
    reuse: Reuse | None = None,
    pairings: int | None = None,
    max_ratio: Real[ArrayLike, ""] | None = None,
) -> SoBiRL:
    """SoBiRL (Yang, Gao and Yuan 2025) from trajectories, with defaults that suit the problem.

    Args:
      agent: see `sobirl`.
      response: None is `default_response(problem)`.
      batch: groups of trajectories per iteration (static).
      baseline: None is `default_baseline(problem, response)`.
      reuse: see `sobirl`.
      pairings: None is 10 where losses compare trajectories and the response is a learned model, else 1.
      max_ratio: see `sobirl`.
    """
    response = default_response(problem) if response is None else response
    if pairings is None:
        compared = problem.trajectories > 1 and isinstance(response, LearnedModel)
        pairings = min(10, batch) if compared else 1
    baseline = default_baseline(problem, response) if baseline is None else baseline
    return sobirl(
        problem,
        upper,
        agent=agent,
        response=response,
        batch=batch,
        baseline=baseline,
        reuse=reuse,
        pairings=pairings,
        max_ratio=max_ratio,
    )


def default_response(problem: SampledProblem) -> Response:
    """`LearnedModel()` on a table, else `NestedRollouts` over the steps that matter."""
    if _is_tabular(problem):
        return LearnedModel()
    return NestedRollouts(min(steps_that_matter(float(problem.discount)), problem.horizon), visits=1)


def default_baseline(problem: SampledProblem, response: Response) -> Baseline:
    """`LearnedAdvantage()` for losses of single trajectories on a table, `LeaveOneOut()` otherwise; and
    `CriticAdvantage()` for a response that needs the credit of pairs.
    """
    environment = problem.environment
    if response.credit_of_pairs:
        tabular = isinstance(environment, TabularEnvironment)
        return CriticAdvantage(OneHot(environment.num_states) if tabular else None)
    return LearnedAdvantage() if problem.trajectories == 1 and _is_tabular(problem) else LeaveOneOut()


def steps_that_matter(discount: float) -> int:
    """Return the number of steps after which a reward has less than a hundredth of its weight."""
    return max(1, math.ceil(math.log(100) / -math.log(max(discount, 1e-6))))


def _is_tabular(problem: SampledProblem) -> bool:
    return isinstance(problem.environment, TabularEnvironment)


register_algorithm("sobirl", sobirl_by_problem)
