"""dQ* by a table that learns it from earlier batches."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from bilevel_jax.bilevel.problem import as_upper_variable
from bilevel_jax.bilevel.sampled_problem import require_tabular, reward_table
from bilevel_jax.core.sizes import size
from bilevel_jax.environments import policy_table
from bilevel_jax.estimators.counts import Counts
from bilevel_jax.estimators.responses.protocol import Response
from bilevel_jax.estimators.responses.sums import centred_weights


class LearnedCritic(Response):
    """A table G[S, A, |x|] of dQ*, learned by expected SARSA on dr from the batches that went before.

      G[s, a] <- G[s, a] + alpha (dr[s, a] + discount sum_a' pi[s', a'] G[s', a'] - G[s, a])

    It makes `sweeps` passes over a batch, each with the mean correction over the visits of a pair. alpha is
    `step_size`, but at least 1 / (number of batches that visited the pair). G is carried from one upper iteration to
    the next, and is biased until it has caught up with x.

    Args:
      sweeps: the number of passes over a batch (static).
      step_size: the smallest alpha, in (0, 1]; a small one averages over many batches.

    Raises:
      InputError: sweeps below 1; the environment is not tabular.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> algorithm = bj.algorithms.sobirl(problem, optax.adam(0.1), response=bj.estimators.LearnedCritic())
    """

    sweeps: int = eqx.field(default=20, static=True, converter=size("sweeps"))
    step_size: Any = 0.1

    def init(self, problem, x):
        environment = require_tabular(problem, "LearnedCritic")
        flat = ravel_pytree(as_upper_variable(x))[0]
        pairs = environment.num_pairs
        return jnp.zeros((pairs, flat.size), flat.dtype), jnp.zeros(pairs, flat.dtype)

    def update(self, state, problem, x, policy, groups):
        environment = require_tabular(problem, "LearnedCritic")
        critic, batches = state
        flat, unravel = ravel_pytree(as_upper_variable(x))
        jacobian = jax.jacobian(lambda f: reward_table(problem, unravel(f), environment.num_states).reshape(-1))(flat)
        pi = policy_table(policy, environment.num_states).astype(flat.dtype)
        seen = Counts.of(environment, groups, flat.dtype)
        batches = batches + (seen.visits > 0).astype(flat.dtype)
        least = jnp.asarray(self.step_size, flat.dtype)
        rate = jnp.where(seen.visits > 0, jnp.maximum(1 / jnp.maximum(batches, 1), least), 0)
        follows = problem.discount.astype(flat.dtype) * seen.transition()

        def sweep(critic, _):
            expected = jnp.einsum("sa,san->sn", pi, critic.reshape(*pi.shape, -1))
            return critic + rate[:, None] * (jacobian + follows @ expected - critic), None

        critic, _ = jax.lax.scan(sweep, critic, None, length=self.sweeps)
        return critic, batches

    def surrogate(self, key, state, problem, x, policy, trajectories, credit) -> Float[Array, ""]:
        del key
        environment = require_tabular(problem, "LearnedCritic")
        pi = policy_table(policy, environment.num_states)
        weights = centred_weights(environment, pi, trajectories, credit).reshape(-1)
        gradient = stop_gradient(weights.astype(state[0].dtype) @ state[0])
        return gradient @ ravel_pytree(x)[0]
