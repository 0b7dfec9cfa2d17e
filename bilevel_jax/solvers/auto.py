"""The default solver, which chooses by size and transition."""

import math
from typing import Any

import jax.numpy as jnp

from bilevel_jax.mdp.transitions import DenseTransition
from bilevel_jax.solvers.adaptive import AdaptivePolicyIteration
from bilevel_jax.solvers.loop import Solver
from bilevel_jax.solvers.policy_iteration import PolicyIteration
from bilevel_jax.solvers.value_iteration import ValueIteration

# Up to this many states, Newton's method with a factorization each step (docs/performance.md).
NEWTON_LIMIT = 64
# A batch over one dense transition gains by sweeping together from so many elements on; where so many sweeps did
# not do, its chains are slow, and each element is better solved by itself.
TOGETHER = 16
TRIAL = 64


class Auto(Solver):
    """`PolicyIteration` by factorizations for few states, `AdaptivePolicyIteration` for more.

    A batch that shares a dense transition begins with `ValueIteration`: there a sweep is one matrix product for the
    whole batch, while a policy would give each element a matrix of its own. Elements that these sweeps do not finish go
    on one by one. For more states, the faster way to evaluate a policy depends on the discount and on how fast the
    chain mixes. Neither is known from shapes: that choice is made while solving, by measurement.

    Args:
      tolerance: bound on |value - V*|_inf; None asks for working precision.
      max_iterations: the largest number of sweeps.

    Raises:
      InputError: tolerance below 0 or max_iterations below 1.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> solution = bj.solve(mdp, bj.ShannonEntropy(0.1), solver=bj.Auto(tolerance=1e-3))
      >>> bj.check(solution).value.shape
      (2,)
    """

    tolerance: Any = None
    max_iterations: Any = 100_000

    def resolve(self, mdp):
        if mdp.num_states <= NEWTON_LIMIT:
            return (PolicyIteration(self.tolerance, self.max_iterations),)
        each = AdaptivePolicyIteration(self.tolerance, self.max_iterations)
        shared = isinstance(mdp.transition, DenseTransition) and mdp.transition.shape == mdp.reward.shape[-2:]
        if not shared or math.prod(mdp.batch_shape) < TOGETHER:
            return (each,)
        return ValueIteration(self.tolerance, jnp.minimum(jnp.asarray(self.max_iterations), TRIAL)), each
