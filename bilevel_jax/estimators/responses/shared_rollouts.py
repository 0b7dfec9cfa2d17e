"""dQ* - dV* by rollouts from each pair of a table."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from bilevel_jax.bilevel.sampled_problem import require_tabular
from bilevel_jax.core.sizes import size
from bilevel_jax.environments import policy_table, rollout_from, trajectory_keys
from bilevel_jax.estimators.responses.protocol import Response
from bilevel_jax.estimators.responses.sums import centred_weights, sampled_returns


class SharedRollouts(Response):
    """`copies` rollouts from every pair of a table, shared by all its visits.

    They are independent of the trajectories, like those of `NestedRollouts`, and hence as unbiased. Their cost does not
    depend on how many steps the trajectories have: S A copies length steps. All trajectories share the noise of the
    rollouts: from some batch size on, only more `copies` lower the variance.

    Args:
      length: steps of each rollout (static).
      copies: rollouts from each pair (static).

    Raises:
      InputError: sizes below 1; the environment is not tabular.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> x = problem.start(jax.random.key(0))
      >>> policy = bj.solve(problem.mdp(x), problem.regularizer(x)).policy
      >>> response = bj.estimators.SharedRollouts(10)
      >>> made = bj.estimators.estimate(jax.random.key(1), problem, x, policy, batch=4, response=response)
      >>> made.gradient.shape
      (8, 3)
    """

    length: int = eqx.field(static=True, converter=size("length"))
    copies: int = eqx.field(default=1, static=True, converter=size("copies"))

    def surrogate(self, key, state, problem, x, policy, trajectories, credit) -> Float[Array, ""]:
        del state
        environment = require_tabular(problem, "SharedRollouts")
        pi = policy_table(policy, environment.num_states)
        weights = centred_weights(environment, pi, trajectories, credit)
        pairs = jnp.repeat(jnp.arange(weights.size, dtype=jnp.int32), self.copies)
        states, actions = jnp.divmod(pairs, environment.num_actions)
        sampled, _ = rollout_from(
            trajectory_keys(key, pairs.size), environment, policy, states, horizon=self.length, actions=actions
        )
        return jnp.sum(weights.reshape(-1)[pairs] * sampled_returns(problem, x, sampled)) / self.copies

    def environment_steps(self, problem, batch):
        del batch
        environment = require_tabular(problem, "SharedRollouts")
        return environment.num_pairs * self.copies * self.length
