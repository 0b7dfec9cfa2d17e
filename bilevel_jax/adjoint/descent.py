"""Warm-started gradient descent on the least-squares form."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import lax

from bilevel_jax.adjoint.protocol import LinearSolver, residual_of
from bilevel_jax.validation import require_setting


class Descent(LinearSolver):
    """Gradient steps on |A x - b|^2 / 2 from the guess: x <- x - step_size A' (A x - b).

    The adjoint of M-SoBiRL (Yang, Gao and Yuan 2025, Algorithm 1) with `steps` steps an upper
    iteration (static), warm-started by the algorithm. Always reported as converged.
    """

    step_size: Any = 0.5
    steps: int = eqx.field(default=1, static=True)

    def __check_init__(self):
        require_setting("step_size", self.step_size, 0, "0.5 is usual")
        require_setting("steps", self.steps, 1, "1 is usual", whole=True)

    def relative_tolerance(self, dtype):
        del dtype
        return jnp.inf

    def solve(self, operator, prepared, rhs, guess, transpose):
        del prepared
        system = (operator.T if transpose else operator).fold()
        step_size = jnp.asarray(self.step_size, rhs.dtype)

        def step(_, x):
            gap = residual_of(system, x, rhs)
            return x + step_size * (gap - system.T.apply(gap))

        return lax.fori_loop(0, self.steps, step, guess), jnp.asarray(self.steps)
