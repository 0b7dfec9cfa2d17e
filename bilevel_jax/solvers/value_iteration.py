"""Regularized value iteration."""

from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp

from bilevel_jax.solvers.loop import Stepper


class ValueIteration(Stepper):
    """V <- T V: one sweep per step and nothing else. The gap falls at the rate of the discount, its span faster.

    Args:
      tolerance: bound on |value - V*|_inf; None asks for working precision.
      max_iterations: the largest number of sweeps.
      centred: return the middle of the proven bracket of V*, whose width is the span of the gap (static). False returns
        the last T V, bounded by contraction alone, which is what papers call value iteration.

    Raises:
      InputError: tolerance below 0 or max_iterations below 1.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> solution = bj.solve(mdp, bj.ShannonEntropy(0.1), solver=bj.ValueIteration())
      >>> bj.check(solution).value.shape
      (2,)
    """

    batched_on_cpu: ClassVar[bool] = True

    tolerance: Any = None
    max_iterations: Any = 100_000
    centred: bool = eqx.field(default=True, static=True)

    @property
    def is_centred(self):
        return self.centred

    def step(self, mdp, swept, state):
        del mdp
        return swept.backup, state, jnp.asarray(0, jnp.int32)
