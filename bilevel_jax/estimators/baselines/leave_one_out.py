"""The mean over the other groups of a batch."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from bilevel_jax.estimators.baselines.protocol import Subtraction


class LeaveOneOut(Subtraction):
    """The mean over the other groups of the batch, at the same step. With only one group it is zero.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> response, baseline = bj.estimators.OneStep(), bj.estimators.LeaveOneOut()
      >>> algorithm = bj.algorithms.sobirl(problem, optax.adam(0.1), response=response, baseline=baseline)
    """

    def values(self, state, problem, groups, costs) -> Float[Array, "N 1 H"]:
        del state, problem, groups
        to_go = costs.returns()
        others = max(1, to_go.shape[0] - 1)
        return ((jnp.sum(to_go, 0, keepdims=True) - to_go) / others)[:, None]
