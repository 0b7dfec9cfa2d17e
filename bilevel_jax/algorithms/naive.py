"""Alternating gradient without the implicit term: what is lost by taking the policy for a constant."""

import equinox as eqx
import jax.numpy as jnp
import optax

from bilevel_jax.agents import Agent
from bilevel_jax.algorithms.sampled import SampledAlgorithm, SampledEstimate, batch_steps, require_batch
from bilevel_jax.algorithms.upper import UpperLevel
from bilevel_jax.estimators import NoBaseline, Response, SampledProblem, estimate


class Naive(SampledAlgorithm):
    """See `naive`."""

    batch: int = eqx.field(static=True)

    def estimate(self, key, state):
        made = estimate(
            key,
            self.problem,
            state.x,
            self.policy(state),
            batch=self.batch,
            response=_NoResponse(),
            baseline=NoBaseline(),
        )
        return SampledEstimate(made.value, made.gradient, None, jnp.asarray(float(self.batch)))

    @property
    def environment_steps(self):
        return self.agent.environment_steps(self.problem) + batch_steps(self.problem, self.batch)


class _NoResponse(Response):
    """The policy does not answer."""

    def surrogate(self, key, state, problem, x, policy, trajectories, credit):
        del key, state, problem, x, policy, trajectories
        return jnp.zeros((), credit.dtype)


def naive(
    problem: SampledProblem, optimizer: optax.GradientTransformation | UpperLevel, *, agent: Agent, batch: int = 64
) -> Naive:
    """E[dl/dx] alone, alternated with the agent: the usual loop of reward learning from preferences.

    (Christiano et al. 2017, "Deep reinforcement learning from human preferences", alternates so.) A
    stationary point of it is in general none of the bilevel problem.

    Raises:
      InputError: batch below 1.
    """
    return Naive(problem, optimizer, agent, require_batch(batch))
