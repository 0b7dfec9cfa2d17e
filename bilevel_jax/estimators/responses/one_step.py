"""dQ* - dV* by the reward of one step."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from bilevel_jax.core.batching import merge_axes
from bilevel_jax.environments import as_policy
from bilevel_jax.environments.policies import finite
from bilevel_jax.environments.spaces import Action
from bilevel_jax.estimators.responses.protocol import Response


class OneStep(Response):
    """dQ* - dV* ~ dr(s, a) - E_pi dr(s, .): the authors' code (`SoBiPreferenceModel.rewards`, reduce_var).

    Exact for discount 0; otherwise biased, see docs/sampling.md for how much.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> x = problem.start(jax.random.key(0))
      >>> policy = bj.solve(problem.mdp(x), problem.regularizer(x)).policy
      >>> response = bj.estimators.OneStep()
      >>> made = bj.estimators.estimate(jax.random.key(1), problem, x, policy, batch=4, response=response)
      >>> made.gradient.shape
      (8, 3)
    """

    def surrogate(self, key, state, problem, x, policy, trajectories, credit) -> Float[Array, ""]:
        del key, state
        reward, policy = problem.reward(x), as_policy(policy)

        def advantage(observation: Any, action: Action) -> Float[Array, ""]:
            rewards = reward.all(observation)
            chances = finite(policy.distribution(observation)).probabilities
            return rewards[action] - jnp.sum(stop_gradient(chances) * rewards)

        flat = merge_axes((trajectories.observation, trajectories.action))
        return jnp.sum(credit.reshape(-1) * jax.vmap(advantage)(*flat))
