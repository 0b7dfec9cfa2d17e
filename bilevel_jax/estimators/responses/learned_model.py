"""dQ* - dV* by the transitions counted so far."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bilevel_jax.bilevel.problem import as_upper_variable
from bilevel_jax.bilevel.sampled_problem import require_tabular, reward_table
from bilevel_jax.environments import policy_table
from bilevel_jax.estimators.counts import Counts
from bilevel_jax.estimators.responses.protocol import Response
from bilevel_jax.estimators.responses.sums import centred_weights


class LearnedModel(Response):
    """dQ* under the transition frequencies that were counted so far.

    The dynamics do not depend on x, so that the counts of all batches remain valid. This is certainty equivalence:
    `Exact` with the empirical transitions instead of the model. A pair that was never visited counts as the end of the
    process. The estimate is consistent, with a bias proportional to 1 / visits.

    Args:
      current: count a batch before it is used (static). The response then shares noise with the credits that it is
        multiplied by. That is a bias of the same order, which helps while little is known (docs/sampling.md).

    Raises:
      InputError: the environment is not tabular.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> algorithm = bj.algorithms.sobirl(problem, optax.adam(0.1), response=bj.estimators.LearnedModel())
    """

    current: bool = eqx.field(default=True, static=True)

    @property
    def learns_first(self):
        return self.current

    def init(self, problem, x):
        environment = require_tabular(problem, "LearnedModel")
        return Counts.none(environment, jnp.result_type(*jax.tree.leaves(as_upper_variable(x))))

    def update(self, state, problem, x, policy, groups):
        del x, policy
        new = Counts.of(require_tabular(problem, "LearnedModel"), groups, state.visits.dtype)
        return jax.tree.map(jnp.add, state, new)

    def surrogate(self, key, state, problem, x, policy, trajectories, credit) -> Float[Array, ""]:
        del key
        environment = require_tabular(problem, "LearnedModel")
        dtype = state.visits.dtype
        pi = policy_table(policy, environment.num_states).astype(dtype)
        weights = centred_weights(environment, pi, trajectories, credit).astype(dtype)
        reward = reward_table(problem, x, environment.num_states).astype(dtype)
        return jnp.sum(weights * state.action_values(pi, reward, problem.discount))
