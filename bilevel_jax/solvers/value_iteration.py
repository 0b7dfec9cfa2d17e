"""Regularized value iteration."""

from typing import Any

from bilevel_jax.solvers.loop import Solver


class ValueIteration(Solver):
    """V <- T V. Linear, at the rate of the discount; one sweep a step and nothing else.

    Args:
      tolerance: bound on |V - V*|_inf; None asks for working precision.
      max_steps: sweeps at most.

    Raises:
      InputError: tolerance below 0 or max_steps below 1.
    """

    tolerance: Any = None
    max_steps: Any = 100_000

    def step(self, mdp, regularizer, iterate):
        del mdp, regularizer
        return iterate.backup
