"""No baseline."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from bilevel_jax.estimators.baselines.protocol import Subtraction


class NoBaseline(Subtraction):
    """Zero: the costs from each step on are credited as they are.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> response, baseline = bj.estimators.OneStep(), bj.estimators.NoBaseline()
      >>> algorithm = bj.algorithms.sobirl(problem, optax.adam(0.1), response=response, baseline=baseline)
    """

    def values(self, state, problem, groups, costs) -> Float[Array, "N 1 H"]:
        del state, problem, groups
        return jnp.zeros_like(costs.each)[:, None]
