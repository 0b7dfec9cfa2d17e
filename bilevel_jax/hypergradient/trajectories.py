"""What the trajectory estimator of SoBiRL is on average."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp

from bilevel_jax.adjoint.truncated import TruncatedSolver
from bilevel_jax.hypergradient.implicit import Implicit
from bilevel_jax.hypergradient.protocol import Method
from bilevel_jax.solvers import Solver
from bilevel_jax.validation import plain, require_instance, require_setting


class ExpectedTrajectories(Method):
    """The mean of SoBiRL's estimator (Yang, Gao and Yuan 2025, section 5), computed on the exact model.

      grad = df/dx + sum_sa df/dpi[s, a] dpi[s, a],   d log pi = (dQ - E_pi dQ) / temperature,

    with dQ[s, a] the discounted sum of dr along `length` steps from (s, a) under pi. `length=1` is the
    one-step form of the authors' Atari code. What is left out has a weight of discount^length. x may
    stand anywhere: dr is then dQ at fixed V*, as in the exact formula, and f may depend on value and q.

    In terms of the adjoint: the first length - 1 summands of its Neumann series.

    Args:
      length: steps of each trajectory (static).
      solver: of the lower level; None is `Auto()`.

    Raises:
      InputError: length below 1, or a solver of another type.
    """

    length: int = eqx.field(static=True, converter=plain)
    solver: Solver | None = None

    def __check_init__(self):
        require_setting("length", self.length, 1, "1 is the one-step form", whole=True)
        require_instance("solver", self.solver, Solver | None)

    def estimate(self, problem, x, initial_value, initial_adjoint, with_error):
        method = Implicit(self.solver, _Summands(count=self.length - 1))
        return method.estimate(problem, x, initial_value, initial_adjoint, with_error)


class _Summands(TruncatedSolver):
    """The first `count` summands of sum_k M^k b; none is 0."""

    count: int = eqx.field(static=True)
    tolerance: Any = None

    def solve(self, operator, prepared, rhs, guess, transpose):
        del prepared, guess
        system = (operator.T if transpose else operator).fold()
        return self.repeat(lambda x, gap: x + gap, system, rhs, jnp.zeros_like(rhs), self.count, products=1)
