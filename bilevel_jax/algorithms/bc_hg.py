"""BC-HG: Boltzmann covariance hyper-gradient (Kudo, Tanabe, Wachi and Akimoto, ICAPS 2026)."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.lax import stop_gradient

from bilevel_jax.agents import Agent
from bilevel_jax.algorithms.sampled import SampledAlgorithm, SampledEstimate, batch_steps, require_batch
from bilevel_jax.algorithms.upper import UpperLevel
from bilevel_jax.algorithms.visits import Visits, policy_term, reward_returns
from bilevel_jax.estimators import SampledProblem, paid, sample_groups
from bilevel_jax.estimators.costs import returns
from bilevel_jax.estimators.problem import require_tabular, temperature_of
from bilevel_jax.functions import tabulate
from bilevel_jax.validation import as_float, require_positive


class BCHG(SampledAlgorithm):
    """See `bc_hg`. Its memory is the upper level's Q[S, A]."""

    critic_rate: jax.Array
    batch: int = eqx.field(static=True)

    def init_memory(self, x):
        del x
        environment = require_tabular(self.problem, "BC-HG")
        return jnp.zeros((environment.num_states, environment.num_actions), self.problem.discount.dtype)

    def estimate(self, key, state):
        problem = self.problem
        environment = require_tabular(problem, "BC-HG")
        for_groups, for_loss = jax.random.split(key)
        policy = tabulate(self.policy(state), environment.num_states)
        groups = sample_groups(for_groups, problem, policy, self.batch)
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), groups)
        visits = Visits.of(environment, flat)

        def surrogate(x):
            costs = paid(for_loss, problem, x, groups)
            value = jnp.sum(costs.factors[None] * costs.each) / self.batch
            each = jnp.repeat(stop_gradient(costs.each), problem.trajectories, 0)
            critic = self._sarsa(state.memory, visits, each, costs.discount)
            upper = critic - jnp.sum(policy.values.astype(critic.dtype) * critic, -1, keepdims=True)
            advantage = upper.reshape(-1)[visits.pair].astype(costs.each.dtype)
            answer = visits.pair_means(reward_returns(problem, x, flat))[visits.pair]
            answered = policy_term(advantage, answer, visits, costs.factors) * problem.trajectories
            return value + answered / temperature_of(problem, x), (value, critic)

        gradient, (value, critic) = jax.grad(surrogate, has_aux=True)(state.x)
        return SampledEstimate(value, gradient, critic, jnp.asarray(float(self.batch)))

    def _sarsa(self, critic: jax.Array, visits: Visits, costs: jax.Array, discount: jax.Array) -> jax.Array:
        """One pass over the batch's transitions; n visits of a pair count as n steps towards their mean."""
        q = critic.reshape(-1)
        ahead = jnp.concatenate([q[visits.pair[:, 1:]], jnp.zeros_like(q[visits.pair[:, :1]])], 1)
        goes_on = jnp.concatenate([visits.valid[:, 1:], jnp.zeros_like(visits.valid[:, :1])], 1)
        costs, discount = costs.astype(q.dtype), discount.astype(q.dtype)
        # The last step that was made pays for what falls due after the end as well.
        target = jnp.where(goes_on, costs + discount * ahead, returns(costs, discount))
        count = jnp.zeros_like(q).at[visits.pair].add(visits.valid.astype(q.dtype))
        rate = 1 - (1 - jnp.minimum(self.critic_rate.astype(q.dtype), 1)) ** count
        return (q + rate * (visits.pair_means(target) - q)).reshape(critic.shape)

    @property
    def environment_steps(self):
        return self.agent.environment_steps(self.problem) + batch_steps(self.problem, self.batch)


def bc_hg(
    problem: SampledProblem,
    optimizer: optax.GradientTransformation | UpperLevel,
    *,
    agent: Agent,
    batch: int = 64,
    critic_rate: Any = 0.3,
) -> BCHG:
    """BC-HG (arXiv 2603.14867): the hyper-gradient as a covariance of the upper value and dQ under the policy.

      grad = E[ dl/dx ] + E[ sum_h discount^h (Q_upper - V_upper)(s_h, a_h) dQ(s_h, a_h) ] / temperature

    With the upper advantage centred, dV drops out. What the paper leaves open is as in the authors'
    `train_four_rooms_bchg.py`: Q_upper is a SARSA table carried across iterations, V_upper its mean under
    the policy, dQ the mean of discounted returns of dr over all visits of the batch. Different: they
    pass over the transitions one after another in random order; here the visits of a pair are taken
    together, with the weight 1 - (1 - critic_rate)^visits that as many steps would have. Episodes and
    contexts as in `hpgd`.

    Args:
      critic_rate: step size of SARSA, in (0, 1] (published grid: 0.1 to 1).

    Raises:
      InputError: batch below 1, critic_rate not above 0, an environment that is not tabular.
    """
    critic_rate = as_float("critic_rate", critic_rate)
    require_positive("critic_rate", critic_rate, "0.1 to 1 is usual")
    return BCHG(problem, optimizer, agent, critic_rate, require_batch(batch))
