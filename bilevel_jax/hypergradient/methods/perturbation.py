"""Hyper-gradients from values alone: differences of phi between perturbed upper variables.

They are slow, and independent of all derivative rules of the library. Use them for checks.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from bilevel_jax.bilevel.problem import Problem, lower_level
from bilevel_jax.core.arrays import Scalar
from bilevel_jax.core.results import Result
from bilevel_jax.core.validation import as_float, plain, require_instance, require_positive, require_setting
from bilevel_jax.hypergradient.protocol import Hypergradient, Method
from bilevel_jax.solvers import Solver, solve

# Weights of sixth and fourth order in the step h, for (phi(x + k h) - phi(x - k h)) / h with k = 1, 2, 3.
SIXTH = (45 / 60, -9 / 60, 1 / 60)
FOURTH = (8 / 12, -1 / 12, 0.0)
# Suppose that the values of phi have independent errors. The error of the difference between the two formulas is then a
# sixth of the error of the fourth-order formula.
SAFETY = 8


class FiniteDifferences(Method):
    """Central differences of fourth order along each entry of x: six solves per entry, each started from the V at x.

    `error` is eight times the difference between this formula and one of sixth order on the same values. Two errors are
    in it. If the error of the step prevails, `error` is about eight times as large as the true error. If noise in the
    values prevails, because of rounding or of solves that end early, `error` is about as large as the true error.

    Args:
      step: the step in units of x; None is eps^(1/5), 7e-4 in float64 and 0.04 in float32. Slow chains at low
        temperatures bend phi within that distance: `error` shows it, and a smaller step helps.
      solver: the solver of the lower level; None is `Auto()`. Any error that it leaves is divided by the step.

    Raises:
      InputError: step not above 0, or a solver of another type.

    Example:
      >>> problem = bj.problems.make("garnet")
      >>> x = problem.start(jax.random.key(0))
      >>> bj.hypergradient(problem, x, method=bj.FiniteDifferences()).gradient.shape
      (8, 3)
    """

    step: Any = None
    solver: Solver | None = None

    def __check_init__(self):
        require_perturbation(self.step, self.solver)

    def estimate(self, problem, x, initial_value, initial_adjoint, with_error):
        del initial_adjoint
        near = _Near(problem, x, self.solver, initial_value)
        step = jnp.asarray(default_step(near.flat, 1 / 5) if self.step is None else self.step, near.flat.dtype)

        def along(direction):
            rises = jnp.stack([near.rise(direction, k * step) for k in (1, 2, 3)]) / step
            return jnp.asarray(FOURTH, rises.dtype) @ rises, jnp.asarray(SIXTH, rises.dtype) @ rises

        fourth, sixth = lax.map(along, jnp.eye(near.flat.size, dtype=near.flat.dtype))
        return near.report(fourth, SAFETY * jnp.linalg.norm(sixth - fourth) if with_error else None)


class SimultaneousPerturbation(Method):
    """The mean of z (phi(x + h z) - phi(x - h z)) / (2 h) over random signs z (Spall 1992).

    It takes two solves per sample, whatever the size of x; the variance grows with that size. `error` is twice the
    standard error of the mean, in the 2-norm. The bias, which is of second order in the step, is not in it. The same
    key gives the same signs: new ones need `SimultaneousPerturbation(new_key)`.

    Args:
      key: the key of the signs.
      samples: the number of samples (static), at least 2.
      step: h, in units of x; None is eps^(1/3), 6e-6 in float64 and 5e-3 in float32.
      solver: the solver of the lower level; None is `Auto()`.

    Raises:
      InputError: samples below 2, step not above 0, or a solver of another type.

    Example:
      >>> problem = bj.problems.make("garnet")
      >>> x = problem.start(jax.random.key(0))
      >>> method = bj.SimultaneousPerturbation(jax.random.key(1), samples=8)
      >>> bj.hypergradient(problem, x, method=method).gradient.shape
      (8, 3)
    """

    key: jax.Array
    samples: int = eqx.field(default=32, static=True, converter=plain("samples"))
    step: Any = None
    solver: Solver | None = None

    def __check_init__(self):
        require_setting("samples", self.samples, 2, "32 is usual", whole=True)
        require_perturbation(self.step, self.solver)

    def estimate(self, problem, x, initial_value, initial_adjoint, with_error):
        del initial_adjoint
        near = _Near(problem, x, self.solver, initial_value)
        step = jnp.asarray(default_step(near.flat, 1 / 3) if self.step is None else self.step, near.flat.dtype)

        def sample(key):
            signs = jax.random.rademacher(key, near.flat.shape, near.flat.dtype)
            return near.rise(signs, step) / (2 * step) * signs

        each = lax.map(sample, jax.random.split(self.key, self.samples))
        standard_error = jnp.std(each, 0, ddof=1) / self.samples**0.5
        return near.report(jnp.mean(each, 0), 2 * jnp.linalg.norm(standard_error) if with_error else None)


class _Near:
    """phi at x and around it. Each point is solved from the V at x."""

    def __init__(self, problem: Problem, x: Any, solver: Solver | None, start: Float[Array, "*batch S"] | None):
        self.flat, self._unravel = ravel_pytree(x)
        self._problem, self._x, self._solver = problem, x, solver
        self._solution = solve(*lower_level(problem, x), solver=solver, initial_value=start)
        self._value = problem.objective(x, self._solution)

    def rise(self, direction: Float[Array, " N"], step: Scalar) -> Scalar:
        """phi(x + step direction) - phi(x - step direction)."""
        return self._at(self.flat + step * direction) - self._at(self.flat - step * direction)

    def _at(self, point: Float[Array, " N"]) -> Scalar:
        x = self._unravel(point)
        solution = solve(*lower_level(self._problem, x), solver=self._solver, initial_value=self._solution.value)
        phi = self._problem.objective(x, solution)
        # A user's own solver may stop early: `error` then contains what it left. `Auto()` is expected to solve.
        solved = (self._solver is not None) | jnp.all(solution.result == Result.CONVERGED)
        return jnp.where(solved, phi, jnp.nan)

    def report(self, gradient: Float[Array, " N"], error: Scalar | None) -> Hypergradient:
        return Hypergradient(
            value=self._value,
            gradient=self._unravel(gradient),
            solution=self._solution,
            adjoint=None,
            stats=None,
            error=error,
        )


def require_perturbation(step: Any, solver: Any) -> None:
    """Raise InputError unless `step`, where it is known, is None or above 0, and `solver` a solver or None."""
    if step is not None:
        require_setting("step", step, 0, "None chooses by the precision")
        require_positive("step", as_float("step", step), "None chooses by the precision")
    require_instance("solver", solver, Solver | None)


def default_step(flat: Float[Array, " N"], power: float) -> float:
    """Return eps^power, where eps is that of x's dtype."""
    return float(jnp.finfo(flat.dtype).eps) ** power
