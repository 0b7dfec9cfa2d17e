"""The truncated Neumann series."""

from typing import Any

import equinox as eqx

from bilevel_jax.core.validation import plain, require_setting
from bilevel_jax.linear.truncated import TruncatedSolver


class Neumann(TruncatedSolver):
    """The truncated series sum_k M^k b, with `terms` products after the first term.

    Args:
      terms: the number of products (static).
      tolerance: |b - A x|_2 / |b|_2 at which to stop earlier, and above which the solve is reported as not converged.
        None takes all terms and always reports convergence, because that is what was asked for; the residual is in the
        stats.

    Raises:
      InputError: terms or tolerance below 0.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> policy = jnp.array([[0.5, 0.5], [1.0, 0.0]])
      >>> bj.policy_value(mdp, policy, bj.Neumann(terms=200)).round(2).tolist()
      [2.75, 2.25]
    """

    terms: int = eqx.field(static=True, converter=plain("terms"))
    tolerance: Any = None

    def __check_init__(self):
        require_setting("terms", self.terms, 0, "0 keeps the first term alone", whole=True)

    def solve(self, operator, prepared, rhs, guess, transpose):
        del prepared, guess
        system = (operator.T if transpose else operator).fold()
        return self.repeat(lambda x, gap: x + gap, system, rhs, rhs, self.terms, products=1)
