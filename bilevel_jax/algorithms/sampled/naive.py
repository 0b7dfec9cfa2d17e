"""Alternating gradient without the implicit term. It shows what is lost if the policy is treated as a constant."""

import equinox as eqx
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from bilevel_jax.agents import Agent
from bilevel_jax.algorithms.registry import register_algorithm
from bilevel_jax.algorithms.sampled.base import SampledAlgorithm, SampledEstimate, as_agent, batch_steps
from bilevel_jax.algorithms.upper import UpperLevel
from bilevel_jax.bilevel import SampledProblem
from bilevel_jax.core.validation import as_size
from bilevel_jax.estimators import NoBaseline, Response, estimate


class Naive(SampledAlgorithm):
    """See `naive`."""

    batch: int = eqx.field(static=True)

    def estimate_from_samples(self, key, state):
        made = estimate(
            key,
            self.problem,
            state.x,
            self.policy(state),
            batch=self.batch,
            response=_NoResponse(),
            baseline=NoBaseline(),
        )
        return SampledEstimate(
            value=made.value, gradient=made.gradient, memory=None, effective_sample_size=jnp.asarray(float(self.batch))
        )

    @property
    def environment_steps(self):
        return self.agent.environment_steps(self.problem) + batch_steps(self.problem, self.batch)


class _NoResponse(Response):
    """The policy does not answer."""

    def surrogate(self, key, state, problem, x, policy, trajectories, credit) -> Float[Array, ""]:
        del key, state, problem, x, policy, trajectories
        return jnp.zeros((), credit.dtype)


def naive(
    problem: SampledProblem,
    optimizer: optax.GradientTransformation | UpperLevel,
    *,
    agent: Agent | None = None,
    batch: int = 64,
) -> Naive:
    """Descend along E[dl/dx] alone, in turn with the agent: the usual loop of reward learning from preferences.

    (Christiano et al. 2017, "Deep reinforcement learning from human preferences", alternate in this way.) A stationary
    point of this loop is in general no stationary point of the bilevel problem.

    Args:
      agent: the lower level; None is `default_agent(problem)`.
      batch: groups of trajectories per iteration (static).

    Raises:
      InputError: batch below 1.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> algorithm = bj.algorithms.naive(problem, optax.adam(0.1), batch=8)
      >>> state = algorithm.init(jax.random.key(0), problem.start(jax.random.key(1)))
      >>> state, info = algorithm.step(jax.random.key(2), state)
      >>> state.x.shape, info.objective.shape
      ((8, 3), ())
    """
    return Naive(problem, optimizer, as_agent(problem, agent), as_size("batch", batch))


register_algorithm("naive", naive)
