"""Warm-started gradient descent on the least-squares form."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp

from bilevel_jax.adjoint.truncated import TruncatedSolver
from bilevel_jax.validation import plain, require_setting


class Descent(TruncatedSolver):
    """Gradient steps on |A x - b|^2 / 2 from the guess: x <- x - step_size A' (A x - b).

    The adjoint of M-SoBiRL (Yang, Gao and Yuan 2025, Algorithm 1) with `steps` steps an upper
    iteration (static), warm-started by the algorithm.

    Args:
      step_size: of a gradient step.
      steps: gradient steps at most, two products each.
      tolerance: |b - A x|_2 / |b|_2 at which to stop earlier, and above which the solve is reported as
        not converged. None takes all steps and always reports convergence.

    Raises:
      InputError: step_size or tolerance below 0, steps below 1.
    """

    step_size: Any = 0.5
    steps: int = eqx.field(default=1, static=True, converter=plain)
    tolerance: Any = None

    def __check_init__(self):
        require_setting("step_size", self.step_size, 0, "0.5 is usual")
        require_setting("steps", self.steps, 1, "1 is usual", whole=True)

    def solve(self, operator, prepared, rhs, guess, transpose):
        del prepared
        system = (operator.T if transpose else operator).fold()
        step_size = jnp.asarray(self.step_size, rhs.dtype)
        start = jnp.zeros_like(rhs) if guess is None else guess

        def step(x, gap):
            return x + step_size * (gap - system.T.apply(gap))

        return self.repeat(step, system, rhs, start, self.steps, products=2)
