"""The part that algorithms on labels share: an agent, a source of labels, and what every run reports of its labels."""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from bilevel_jax.agents.processes import simulator
from bilevel_jax.algorithms.base import State
from bilevel_jax.algorithms.labels.sources import AgentSegments, Labels, segments_of
from bilevel_jax.algorithms.sampled.base import Learned, SampledAlgorithm, SampledEstimate
from bilevel_jax.core.rounds import only_if
from bilevel_jax.environments import Policy, Trajectory, collect, start_processes
from bilevel_jax.preferences import (
    Preferences,
    Segments,
    decision_scores,
    fit_rationality,
    gains,
    pair_losses,
)
from bilevel_jax.preferences.problem import PreferenceProblem

# The numbers of `at_the_end`.
HELD_OUT = ("held_out_decisions", "held_out_outcomes", "held_out_error", "held_out_pairs")


class LabelMemory(eqx.Module):
    """The memory of an algorithm on labels: the state of the labels, and what the method itself carries."""

    labels: Any
    own: Any


class LabelEstimate(eqx.Module):
    """The result of `fit`: the loss on a minibatch and its gradient in x, what the method carries on, and further
    numbers by name.
    """

    loss: Float[Array, ""]
    gradient: Any
    own: Any
    reports: dict[str, Float[Array, ""]] = eqx.field(default_factory=dict)


class LabelAlgorithm(SampledAlgorithm):
    """An algorithm that fits the reward of a `PreferenceProblem` to labels. A subclass says how, by `fit`.

    An iteration improves the agent on the reward so far, asks for labels if it is time, and makes a step of the
    optimizer on a minibatch. Its info reports `labels`, how many there are. `at_the_end` tells what they judge.

    Fields:
      labels: where labels come from.
      batch: pairs of a minibatch (static).
      warm_up: how often the agent is improved before the first iteration (static).
    """

    problem: PreferenceProblem
    labels: Labels = eqx.field(kw_only=True)
    batch: int = eqx.field(kw_only=True, static=True)
    warm_up: int = eqx.field(kw_only=True, static=True)

    @classmethod
    def requires(cls, problem: Any) -> str | None:
        if not isinstance(problem, PreferenceProblem):
            return "has no reward model that is fitted to labels: it is no preferences.PreferenceProblem"
        return None

    @abc.abstractmethod
    def fit(self, key: PRNGKeyArray, state: State, own: Any, data: Preferences) -> LabelEstimate:
        """Return the loss and its gradient on a minibatch, at state.x, where the agent has improved already."""

    def init_own(self, key: PRNGKeyArray, x: Any) -> Any:
        """What the method itself carries, at the start."""
        del key, x

    def first_policy(self, agent: Any, own: Any, x: Any) -> Policy:
        """The policy at the start."""
        del own
        return self.agent.policy(agent, self.problem, x)

    def init_memory(self, key, x):
        # The labels' key comes first, so that all methods get the same pairs with the same key.
        for_labels, for_agent, for_warm_up, for_own = jax.random.split(key, 4)
        agent, own = self.init_agent(for_agent, x), self.init_own(for_own, x)
        labels = self.labels.init(for_labels, self.problem, self.first_policy(agent, own, x), x)
        return Learned(self.warmed_up(for_warm_up, agent, x), LabelMemory(labels, own))

    def warmed_up(self, key: PRNGKeyArray, agent: Any, x: Any) -> Any:
        """The state of an agent after `warm_up` improvements at x."""

        def improve(agent: Any, key: PRNGKeyArray) -> tuple[Any, None]:
            return self.agent.improve(key, agent, self.problem, x), None

        return jax.lax.scan(improve, agent, jax.random.split(key, self.warm_up))[0] if self.warm_up else agent

    def estimate_from_samples(self, key, state):
        for_batch, for_fit, for_fresh, for_labels = jax.random.split(key, 4)
        memory, policy = state.memory.estimator, self.policy(state)
        labels = memory.labels
        if self.labels.fresh_segments:
            shape = jax.eval_shape(self._fresh, for_fresh, policy)
            nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shape)
            due = self.labels.due(labels, state.iteration)
            segments = only_if(due, lambda: self._fresh(for_fresh, policy), nothing)
            seen = AgentSegments(self.problem, state.x, segments)
            labels = self.labels.update(for_labels, labels, due, state.iteration, seen)
        data = self.labels.draw(for_batch, labels, self.batch)
        made = self.fit(for_fit, state, memory.own, data)
        reports = {"labels": self.labels.judged(labels).astype(made.loss.dtype), **made.reports}
        return SampledEstimate(
            value=made.loss,
            gradient=made.gradient,
            memory=LabelMemory(labels, made.own),
            effective_sample_size=jnp.asarray(float(self.batch)),
            reports=reports,
        )

    @property
    def environment_steps(self):
        # On average, rounded up: segments are drawn where labels are due.
        fresh = -(-self._fresh_steps // self.labels.period) if self.labels.fresh_segments else 0
        return self.agent.environment_steps(self.problem) + fresh + self.own_steps

    @property
    def own_steps(self) -> int:
        """The number of simulator steps that `fit` takes."""
        return 0

    @property
    def _fresh_shape(self) -> tuple[int, int]:
        """Processes and steps from which fresh segments are cut: twice as many steps as the segments have."""
        steps = max(self.problem.horizon, 2 * self.problem.length)
        return -(-2 * self.labels.fresh_segments * self.problem.length // steps), steps

    @property
    def _fresh_steps(self) -> int:
        processes, steps = self._fresh_shape
        return processes * steps

    def _fresh(self, key: PRNGKeyArray, policy: Policy) -> Segments:
        """Segments of the agent's trajectories, from new processes of its own problem."""
        keys = jax.random.split(key, 3)
        count, steps = self._fresh_shape
        processes = start_processes(keys[0], simulator(self.problem, None), count)
        shown = collect(keys[1], processes, policy, steps, with_states=True)[1]
        return segments_of(keys[2], self.problem, shown, self.labels.fresh_segments)[0]

    def at_the_end(self, state):
        """Return `held_out_decisions` and `held_out_outcomes`: the mean loss of pairs that nothing was fitted to, under
        the agent's decisions and under the returns of the reward, each at its best rationality; `held_out_error`, the
        standard error of their difference, and `held_out_pairs`. `preferences.verdict_of` puts them into words. NaN: no
        pairs are held out.
        """
        data, policy = self.labels.held_out(state.memory.estimator.labels), self.policy(state)
        nothing = jnp.asarray(jnp.nan, jnp.result_type(float))
        if data is None:
            return dict.fromkeys(HELD_OUT, nothing)
        outcomes = jnp.mean(self.problem.member_scores(state.x, data.segments), 0)
        decisions = decision_scores(policy, data.segments)
        first, second = fitted_losses(data, decisions), fitted_losses(data, outcomes.astype(decisions.dtype))
        counts = data.weight > 0
        number = jnp.maximum(jnp.sum(counts), 2).astype(first.dtype)
        gain = jnp.where(counts, second - first, 0)
        mean = jnp.sum(gain) / number
        spread = jnp.sum(jnp.where(counts, (gain - mean) ** 2, 0)) / (number - 1)
        losses = (jnp.sum(jnp.where(counts, each, 0)) / number for each in (first, second))
        return dict(zip(HELD_OUT, (*losses, jnp.sqrt(spread / number), number), strict=True))


def fitted_losses(data: Preferences, scores: Float[Array, "N H"]) -> Float[Array, " P"]:
    """Return the loss of each pair at the rationality that fits all of them best, [P].

    That is one number which is fitted to pairs that are held out.
    """
    fit = fit_rationality(gains(data, scores), data.label.astype(scores.dtype), data.weight.astype(scores.dtype))
    return pair_losses(data, scores, jnp.where(fit.undetermined, 0, fit.rationality))


def as_trajectories(segments: Segments) -> Trajectory:
    """Segments [N, H] as trajectories, for estimators; probabilities are 1, rewards and ends nothing."""
    number = jnp.zeros(segments.valid.shape, jnp.result_type(float))
    never = jnp.zeros_like(segments.valid)
    return Trajectory(
        state=segments.state,
        observation=segments.observation,
        action=segments.action,
        probability=jnp.ones_like(number),
        reward=number,
        next_observation=segments.next_observation,
        terminated=never,
        truncated=never,
        valid=segments.valid,
    )


def weighted_loss(data: Preferences, scores: Float[Array, "N H"], rationality: Any) -> Float[Array, ""]:
    """The mean loss of a minibatch; pairs that were skipped were not drawn, unless all were."""
    losses = pair_losses(data, scores, rationality)
    return jnp.mean(jnp.where(data.weight > 0, losses, 0))


def mean_square(scores: Float[Array, "*members N H"], data: Preferences) -> Float[Array, ""]:
    """Return the mean square of the rewards of steps, summed over the members of an ensemble."""
    valid = data.segments.valid
    total = jnp.sum(jnp.where(valid, scores.reshape(-1, *valid.shape) ** 2, 0))
    return total / jnp.maximum(jnp.sum(valid), 1).astype(scores.dtype)
