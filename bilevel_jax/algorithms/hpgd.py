"""HPGD: hyper policy gradient descent (Thoma, Pasztor, Krause, Ramponi and Hu, NeurIPS 2024)."""

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
from bilevel_jax.estimators.problem import require_tabular, temperature_of


class HPGD(SampledAlgorithm):
    """See `hpgd`."""

    batch: int = eqx.field(static=True)

    def estimate(self, key, state):
        problem = self.problem
        environment = require_tabular(problem, "HPGD")
        for_groups, for_loss = jax.random.split(key)
        groups = sample_groups(for_groups, problem, self.policy(state), self.batch)
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), groups)
        visits = Visits.of(environment, flat)

        def surrogate(x):
            costs = paid(for_loss, problem, x, groups)
            value = jnp.sum(costs.factors[None] * costs.each) / self.batch
            ahead = jnp.repeat(stop_gradient(costs).returns(), problem.trajectories, 0)
            advantage = visits.pair_means(ahead)[visits.pair] - visits.state_means(ahead)[visits.state]
            earned = reward_returns(problem, x, flat)
            answer = visits.pair_means(earned)[visits.pair] - visits.state_means(earned)[visits.state]
            answered = policy_term(advantage, answer, visits, costs.factors) * problem.trajectories
            return value + answered / temperature_of(problem, x), value

        gradient, value = jax.grad(surrogate, has_aux=True)(state.x)
        return SampledEstimate(value, gradient, None, jnp.asarray(float(self.batch)))

    @property
    def environment_steps(self):
        return self.agent.environment_steps(self.problem) + batch_steps(self.problem, self.batch)


def hpgd(
    problem: SampledProblem, optimizer: optax.GradientTransformation | UpperLevel, *, agent: Agent, batch: int = 64
) -> HPGD:
    """HPGD (arXiv 2406.01575, Theorem 3 and Algorithm 1).

      grad = E[ dl/dx ] + E[ sum_h discount^h A_upper(s_h, a_h) (dQ - dV)(s_h, a_h) ] / temperature

    What the paper leaves open is as in the authors' `train_stochastic_bilevel_opt.py`
    ("on_policy"): A_upper, dQ and dV are means over all visits of the same batch, so that the
    product of the two is biased by what they share. Their |x| x S x A tables are one backward pass
    here. Different: episodes are cut at the horizon instead of being restarted until the batch is
    full; each trajectory draws its own context instead of one an iteration. A loss that is paid as a
    whole (not [H]) is taken as paid at the last step.

    Raises:
      InputError: batch below 1; under jit, if the environment is not tabular.
    """
    return HPGD(problem, optimizer, agent, require_batch(batch))
