"""Regularized value iteration."""

from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp

from bilevel_jax.solvers.loop import Stepper


class ValueIteration(Stepper):
    """V <- T V; one sweep a step and nothing else. The gap falls at the rate of the discount, its span faster.

    Args:
      tolerance: bound on |value - V*|_inf; None asks for working precision.
      max_steps: sweeps at most.
      centred: return the middle of the proven bracket of V*, whose width is the span of the gap (static).
        False returns the last T V, bounded by contraction alone: what papers call value iteration.

    Raises:
      InputError: tolerance below 0 or max_steps below 1.
    """

    batched_on_cpu: ClassVar[bool] = True

    tolerance: Any = None
    max_steps: Any = 100_000
    centred: bool = eqx.field(default=True, static=True)

    @property
    def is_centred(self):
        return self.centred

    def step(self, mdp, swept, state):
        del mdp
        return swept.backup, state, jnp.asarray(0, jnp.int32)
