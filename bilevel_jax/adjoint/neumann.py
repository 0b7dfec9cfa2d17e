"""The truncated Neumann series."""

from typing import Any

import equinox as eqx

from bilevel_jax.adjoint.truncated import TruncatedSolver
from bilevel_jax.validation import plain, require_setting


class Neumann(TruncatedSolver):
    """The truncated series sum_k M^k b, with `terms` products after the first term (static).

    Args:
      terms: products at most.
      tolerance: |b - A x|_2 / |b|_2 at which to stop earlier, and above which the solve is reported as
        not converged. None takes all terms and always reports convergence, since it does what was
        asked; the residual is in the stats.

    Raises:
      InputError: terms or tolerance below 0.
    """

    terms: int = eqx.field(static=True, converter=plain)
    tolerance: Any = None

    def __check_init__(self):
        require_setting("terms", self.terms, 0, "0 keeps the first term alone", whole=True)

    def solve(self, operator, prepared, rhs, guess, transpose):
        del prepared, guess
        system = (operator.T if transpose else operator).fold()
        return self.repeat(lambda x, gap: x + gap, system, rhs, rhs, self.terms, products=1)
