"""The default: a solver by size and transition."""

import math
from typing import Any

import jax.numpy as jnp

from bilevel_jax.solvers.adaptive import AdaptivePolicyIteration
from bilevel_jax.solvers.loop import Solver
from bilevel_jax.solvers.policy_iteration import PolicyIteration
from bilevel_jax.solvers.value_iteration import ValueIteration
from bilevel_jax.transitions import DenseTransition

# Up to this many states, Newton's method with a factorization each step (docs/performance.md).
NEWTON_LIMIT = 64
# A batch over one dense transition gains by sweeping together from so many elements on; where so many sweeps did
# not do, its chains are slow, and each element is better solved by itself.
TOGETHER = 16
TRIAL = 64


class Auto(Solver):
    """`PolicyIteration` by factorizations for few states, `AdaptivePolicyIteration` for more.

    A batch that shares dense transitions begins with `ValueIteration`: a sweep is one matrix product then,
    while policies of its own would give each element a matrix of its own. What these sweeps leave unfinished goes on
    element by element. Which way of evaluation pays at more states depends on how fast the chain mixes and on
    the discount, neither of which is a part of the structure: that choice is made while solving, by measurement.

    Args:
      tolerance: bound on |value - V*|_inf; None asks for working precision.
      max_steps: sweeps at most.

    Raises:
      InputError: tolerance below 0 or max_steps below 1.
    """

    tolerance: Any = None
    max_steps: Any = 100_000

    def resolve(self, mdp):
        if mdp.num_states <= NEWTON_LIMIT:
            return (PolicyIteration(self.tolerance, self.max_steps),)
        each = AdaptivePolicyIteration(self.tolerance, self.max_steps)
        shared = isinstance(mdp.transition, DenseTransition) and mdp.transition.shape == mdp.reward.shape[-2:]
        if not shared or math.prod(mdp.batch_shape) < TOGETHER:
            return (each,)
        return ValueIteration(self.tolerance, jnp.minimum(jnp.asarray(self.max_steps), TRIAL)), each
