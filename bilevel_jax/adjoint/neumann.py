"""The truncated Neumann series."""

import equinox as eqx
import jax.numpy as jnp
from jax import lax

from bilevel_jax.adjoint.protocol import LinearSolver
from bilevel_jax.validation import require_setting


class Neumann(LinearSolver):
    """The truncated series sum_k M^k b, with `terms` products after the first term (static).

    Always reported as converged, since it does what was asked; its residual is in the stats.
    """

    terms: int = eqx.field(static=True)

    def __check_init__(self):
        require_setting("terms", self.terms, 0, "0 keeps the first term alone", whole=True)

    def relative_tolerance(self, dtype):
        del dtype
        return jnp.inf

    def solve(self, operator, prepared, rhs, guess, transpose):
        del prepared, guess
        system = (operator.T if transpose else operator).fold()
        return lax.fori_loop(0, self.terms, lambda _, x: rhs + system.apply(x), rhs), jnp.asarray(self.terms)
