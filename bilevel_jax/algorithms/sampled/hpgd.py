"""HPGD: hyper policy gradient descent (Thoma, Pasztor, Krause, Ramponi and Hu, NeurIPS 2024)."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.lax import stop_gradient

from bilevel_jax.agents import Agent
from bilevel_jax.algorithms.registry import register_algorithm
from bilevel_jax.algorithms.sampled.base import SampledAlgorithm, SampledEstimate, as_agent, batch_steps
from bilevel_jax.algorithms.sampled.returns import policy_term, reward_returns
from bilevel_jax.algorithms.upper import UpperLevel
from bilevel_jax.bilevel import SampledProblem
from bilevel_jax.bilevel.sampled_problem import require_tabular, temperature_of
from bilevel_jax.core.batching import merge_axes
from bilevel_jax.core.validation import as_size
from bilevel_jax.environments import Visits
from bilevel_jax.estimators import group_costs, sample_groups


class HPGD(SampledAlgorithm):
    """See `hpgd`."""

    tabular: ClassVar[bool] = True

    batch: int = eqx.field(static=True)

    def estimate_from_samples(self, key, state):
        problem = self.problem
        environment = require_tabular(problem, "HPGD")
        for_groups, for_loss = jax.random.split(key)
        groups = sample_groups(for_groups, problem, self.policy(state), self.batch)
        flat = merge_axes(groups)
        visits = Visits.of(environment, flat)

        def surrogate(x):
            costs = group_costs(for_loss, problem, x, groups)
            value = jnp.sum(costs.factors[None] * costs.each) / self.batch
            ahead = jnp.repeat(stop_gradient(costs).returns(), problem.trajectories, 0)
            advantage = visits.pair_means(ahead)[visits.pair] - visits.state_means(ahead)[visits.state]
            earned = reward_returns(problem, x, flat)
            answer = visits.pair_means(earned)[visits.pair] - visits.state_means(earned)[visits.state]
            answered = policy_term(advantage, answer, visits, costs.factors) * problem.trajectories
            return value + answered / temperature_of(problem, x), value

        gradient, value = jax.grad(surrogate, has_aux=True)(state.x)
        return SampledEstimate(
            value=value, gradient=gradient, memory=None, effective_sample_size=jnp.asarray(float(self.batch))
        )

    @property
    def environment_steps(self):
        return self.agent.environment_steps(self.problem) + batch_steps(self.problem, self.batch)


def hpgd(
    problem: SampledProblem,
    optimizer: optax.GradientTransformation | UpperLevel,
    *,
    agent: Agent | None = None,
    batch: int = 64,
) -> HPGD:
    """HPGD (arXiv 2406.01575, Theorem 3 and Algorithm 1).

      grad = E[ dl/dx ] + E[ sum_h discount^h A_upper(s_h, a_h) (dQ - dV)(s_h, a_h) ] / temperature

    Choices that the paper leaves open are those of the authors' `train_stochastic_bilevel_opt.py` ("on_policy"):
    A_upper, dQ and dV are means over all visits of the same batch, so that their product is biased by the noise that
    they share. Their tables of size |x| x S x A are one backward pass here. Two choices differ: episodes are cut at the
    horizon instead of being restarted until the batch is full, and each trajectory draws its own context instead of one
    context per iteration. A loss that is paid as a whole (not [H]) counts as paid at the last step.

    Args:
      agent: the lower level; None is `default_agent(problem)`.
      batch: groups of trajectories per iteration (static).

    Raises:
      InputError: batch below 1; under jit, if the environment is not tabular.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> algorithm = bj.algorithms.hpgd(problem, optax.adam(0.1), batch=8)
      >>> state = algorithm.init(jax.random.key(0), problem.start(jax.random.key(1)))
      >>> state, info = algorithm.step(jax.random.key(2), state)
      >>> state.x.shape, info.objective.shape
      ((8, 3), ())
    """
    return HPGD(problem, optimizer, as_agent(problem, agent), as_size("batch", batch))


register_algorithm("hpgd", hpgd)
