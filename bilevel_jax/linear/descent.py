"""Warm-started gradient descent on the least-squares form."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp

from bilevel_jax.core.validation import plain, require_setting
from bilevel_jax.linear.truncated import TruncatedSolver


class Descent(TruncatedSolver):
    """Gradient steps on |A x - b|^2 / 2 from the guess: x <- x - step_size A' (A x - b).

    This is how M-SoBiRL (Yang, Gao and Yuan 2025, Algorithm 1) solves its adjoint: `iterations` gradient steps per
    upper iteration, from the adjoint of the iteration before.

    Args:
      step_size: the step size of the gradient steps.
      iterations: the largest number of gradient steps, two products each (static).
      tolerance: |b - A x|_2 / |b|_2 at which to stop earlier, and above which the solve is reported as not converged.
        None takes all of them and always reports convergence.

    Raises:
      InputError: step_size or tolerance below 0, iterations below 1.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> policy = jnp.array([[0.5, 0.5], [1.0, 0.0]])
      >>> bj.policy_value(mdp, policy, bj.Descent(step_size=0.5, iterations=2000)).round(2).tolist()
      [2.75, 2.25]
    """

    step_size: Any = 0.5
    iterations: int = eqx.field(default=1, static=True, converter=plain("iterations"))
    tolerance: Any = None

    def __check_init__(self):
        require_setting("step_size", self.step_size, 0, "0.5 is usual")
        require_setting("iterations", self.iterations, 1, "1 is usual", whole=True)

    def solve(self, operator, prepared, rhs, guess, transpose):
        del prepared
        system = (operator.T if transpose else operator).fold()
        step_size = jnp.asarray(self.step_size, rhs.dtype)
        start = jnp.zeros_like(rhs) if guess is None else guess

        def step(x, gap):
            return x + step_size * (gap - system.T.apply(gap))

        return self.repeat(step, system, rhs, start, self.iterations, products=2)
