"""The expectation of SoBiRL's trajectory estimator."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp

from bilevel_jax.core.validation import plain, require_instance, require_setting
from bilevel_jax.hypergradient.methods.implicit import Implicit
from bilevel_jax.hypergradient.protocol import Method
from bilevel_jax.linear.truncated import TruncatedSolver
from bilevel_jax.solvers import Solver


class ExpectedTrajectories(Method):
    """The mean of SoBiRL's estimator (Yang, Gao and Yuan 2025, section 5), computed on the exact model.

      grad = df/dx + sum_sa df/dpi[s, a] dpi[s, a],   d log pi = (dQ - E_pi dQ) / temperature,

    where dQ[s, a] is the discounted sum of dr along `length` steps from (s, a) under pi. `length=1` is the one-step
    form of the authors' Atari code. The steps that are left out have a total weight of discount^length. x may be in
    any part of the MDP: dr is then dQ at fixed V*, as in the exact formula. f may depend on value and q.

    In terms of the adjoint, these are the first length - 1 summands of its Neumann series.

    Args:
      length: steps of each trajectory (static).
      solver: of the lower level; None is `Auto()`.

    Raises:
      InputError: length below 1, or a solver of another type.

    Example:
      >>> problem = bj.problems.make("garnet")
      >>> x = problem.start(jax.random.key(0))
      >>> bj.hypergradient(problem, x, method=bj.ExpectedTrajectories(50)).gradient.shape
      (8, 3)
    """

    length: int = eqx.field(static=True, converter=plain("length"))
    solver: Solver | None = None

    def __check_init__(self):
        require_setting("length", self.length, 1, "1 is the one-step form", whole=True)
        require_instance("solver", self.solver, Solver | None)

    def estimate(self, problem, x, initial_value, initial_adjoint, with_error):
        method = Implicit(self.solver, _Summands(count=self.length - 1))
        return method.estimate(problem, x, initial_value, initial_adjoint, with_error)


class _Summands(TruncatedSolver):
    """The first `count` summands of sum_k M^k b; 0 if `count` is 0."""

    count: int = eqx.field(static=True)
    tolerance: Any = None

    def solve(self, operator, prepared, rhs, guess, transpose):
        del prepared, guess
        system = (operator.T if transpose else operator).fold()
        return self.repeat(lambda x, gap: x + gap, system, rhs, jnp.zeros_like(rhs), self.count, products=1)
