"""dQ* - dV* by the model."""

import equinox as eqx
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from bilevel_jax.bilevel import Problem
from bilevel_jax.bilevel.sampled_problem import require_tabular
from bilevel_jax.core.batching import over_batch
from bilevel_jax.core.errors import InputError
from bilevel_jax.environments import policy_table
from bilevel_jax.estimators.responses.protocol import Response
from bilevel_jax.estimators.responses.sums import centred_weights
from bilevel_jax.mdp.bellman import action_values
from bilevel_jax.solvers.policy_value import policy_value


class Exact(Response):
    """dQ* - dV* of the model: the reference for all others. Where the model is known, it lowers the variance.

    The problem must be a `bilevel_jax.Problem` as well.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> x = problem.start(jax.random.key(0))
      >>> policy = bj.solve(problem.mdp(x), problem.regularizer(x)).policy
      >>> response = bj.estimators.Exact()
      >>> made = bj.estimators.estimate(jax.random.key(1), problem, x, policy, batch=4, response=response)
      >>> made.gradient.shape
      (8, 3)
    """

    def surrogate(self, key, state, problem, x, policy, trajectories, credit) -> Float[Array, ""]:
        del key, state
        if not isinstance(problem, Problem):
            raise InputError(
                f"problem: Exact() needs the model, but {type(problem).__name__} has no mdp(x) and objective; use "
                f"NestedRollouts or OneStep"
            )
        environment = require_tabular(problem, "Exact()")
        mdp = problem.mdp(x)
        mdp = eqx.tree_at(lambda m: m.reward, stop_gradient(mdp), mdp.reward)
        pi = policy_table(policy, environment.num_states)
        weights = centred_weights(environment, pi, trajectories, credit).reshape(mdp.reward.shape)
        value = policy_value(mdp, pi.reshape(mdp.reward.shape).astype(mdp.reward.dtype))
        q = over_batch(action_values)(mdp, value)
        return jnp.sum(weights * q)
