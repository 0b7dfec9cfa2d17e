"""BC-HG: Boltzmann covariance hyper-gradient (Kudo, Tanabe, Wachi and Akimoto, ICAPS 2026)."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from bilevel_jax.agents import Agent
from bilevel_jax.algorithms.registry import register_algorithm
from bilevel_jax.algorithms.sampled.base import SampledAlgorithm, SampledEstimate, as_agent, batch_steps
from bilevel_jax.algorithms.sampled.returns import policy_term, reward_returns
from bilevel_jax.algorithms.upper import UpperLevel
from bilevel_jax.bilevel import SampledProblem
from bilevel_jax.bilevel.sampled_problem import require_tabular, temperature_of
from bilevel_jax.core.batching import merge_axes
from bilevel_jax.core.validation import as_float, as_size, require_positive
from bilevel_jax.environments import TabularPolicy, Visits, policy_table
from bilevel_jax.estimators import group_costs, sample_groups
from bilevel_jax.estimators.costs import returns


class BCHG(SampledAlgorithm):
    """See `bc_hg`. Its memory is the upper level's Q[S, A]."""

    tabular: ClassVar[bool] = True

    critic_step_size: Float[Array, ""]
    batch: int = eqx.field(static=True)

    def init_estimator(self, x):
        del x
        environment = require_tabular(self.problem, "BC-HG")
        return jnp.zeros((environment.num_states, environment.num_actions), self.problem.discount.dtype)

    def estimate_from_samples(self, key, state):
        problem = self.problem
        environment = require_tabular(problem, "BC-HG")
        for_groups, for_loss = jax.random.split(key)
        policy = TabularPolicy(policy_table(self.policy(state), environment.num_states))
        groups = sample_groups(for_groups, problem, policy, self.batch)
        flat = merge_axes(groups)
        visits = Visits.of(environment, flat)

        def surrogate(x):
            costs = group_costs(for_loss, problem, x, groups)
            value = jnp.sum(costs.factors[None] * costs.each) / self.batch
            each = jnp.repeat(stop_gradient(costs.each), problem.trajectories, 0)
            critic = self._sarsa(state.memory.estimator, visits, each, costs.discount)
            upper = critic - jnp.sum(policy.probabilities.astype(critic.dtype) * critic, -1, keepdims=True)
            advantage = upper.reshape(-1)[visits.pair].astype(costs.each.dtype)
            answer = visits.pair_means(reward_returns(problem, x, flat))[visits.pair]
            answered = policy_term(advantage, answer, visits, costs.factors) * problem.trajectories
            return value + answered / temperature_of(problem, x), (value, critic)

        gradient, (value, critic) = jax.grad(surrogate, has_aux=True)(state.x)
        return SampledEstimate(
            value=value, gradient=gradient, memory=critic, effective_sample_size=jnp.asarray(float(self.batch))
        )

    def _sarsa(
        self, critic: Float[Array, "S A"], visits: Visits, costs: Float[Array, "B H"], discount: Float[Array, ""]
    ) -> Float[Array, "S A"]:
        """Make one pass over the batch's transitions. n visits of a pair count as n steps towards their mean."""
        q = critic.reshape(-1)
        ahead = jnp.concatenate([q[visits.pair[:, 1:]], jnp.zeros_like(q[visits.pair[:, :1]])], 1)
        goes_on = jnp.concatenate([visits.valid[:, 1:], jnp.zeros_like(visits.valid[:, :1])], 1)
        costs, discount = costs.astype(q.dtype), discount.astype(q.dtype)
        # The last step that was made pays for what falls due after the end as well.
        target = jnp.where(goes_on, costs + discount * ahead, returns(costs, discount))
        count = visits.pair_counts(q.dtype)
        rate = 1 - (1 - jnp.minimum(self.critic_step_size.astype(q.dtype), 1)) ** count
        return (q + rate * (visits.pair_means(target) - q)).reshape(critic.shape)

    @property
    def environment_steps(self):
        return self.agent.environment_steps(self.problem) + batch_steps(self.problem, self.batch)


def bc_hg(
    problem: SampledProblem,
    optimizer: optax.GradientTransformation | UpperLevel,
    *,
    agent: Agent | None = None,
    batch: int = 64,
    critic_step_size: Any = 0.3,
) -> BCHG:
    """BC-HG (arXiv 2603.14867): the hyper-gradient as a covariance of the upper value and dQ under the policy.

      grad = E[ dl/dx ] + E[ sum_h discount^h (Q_upper - V_upper)(s_h, a_h) dQ(s_h, a_h) ] / temperature

    With the upper advantage centred, dV drops out. Choices that the paper leaves open are those of the authors'
    `train_four_rooms_bchg.py`: Q_upper is a SARSA table carried across iterations, V_upper its mean under the policy,
    and dQ the mean of discounted returns of dr over all visits of the batch. One choice differs: they pass over the
    transitions one after another in random order. Here the visits of a pair are taken together, with the weight
    1 - (1 - critic_step_size)^visits, which the same number of single steps would have. Episodes and contexts are as in
    `hpgd`.

    Args:
      agent: the lower level; None is `default_agent(problem)`.
      critic_step_size: step size of SARSA, in (0, 1] (published grid: 0.1 to 1).

    Raises:
      InputError: batch below 1, critic_step_size not above 0, an environment that is not tabular.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> algorithm = bj.algorithms.bc_hg(problem, optax.adam(0.1), batch=8)
      >>> state = algorithm.init(jax.random.key(0), problem.start(jax.random.key(1)))
      >>> state, info = algorithm.step(jax.random.key(2), state)
      >>> state.x.shape, info.objective.shape
      ((8, 3), ())
    """
    critic_step_size = as_float("critic_step_size", critic_step_size)
    require_positive("critic_step_size", critic_step_size, "0.1 to 1 is usual")
    return BCHG(problem, optimizer, as_agent(problem, agent), critic_step_size, as_size("batch", batch))


register_algorithm("bc_hg", bc_hg)
