"""Hyper-gradients from values alone: differences of phi between perturbed upper variables.

Slow, and independent of all derivative rules of the library: for checks.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from bilevel_jax.hypergradient.problem import Problem, lower_level
from bilevel_jax.hypergradient.protocol import Hypergradient, Method
from bilevel_jax.results import Result
from bilevel_jax.solvers import Solver, solve
from bilevel_jax.validation import as_float, plain, require_instance, require_positive, require_setting

# Of sixth and fourth order in the step, for phi(x + k h) - phi(x - k h), k = 1, 2, 3, over h.
SIXTH = (45 / 60, -9 / 60, 1 / 60)
FOURTH = (8 / 12, -1 / 12, 0.0)
# Independent errors of the rises move the difference of the formulas by a sixth of what they move the fourth-order one.
SAFETY = 8


class FiniteDifferences(Method):
    """Central differences along each entry of x, of fourth order: six solves an entry, each from the V at x.

    `error`: eight times what a sixth-order formula on the same values changes. Where the step's own error
    prevails that is eight times as large as it, where noise in the values does (solves that end early, rounding)
    as large.

    Args:
      step: in units of x; None is eps^(1/5), 7e-4 in float64 and 0.04 in float32. Slow chains at low temperatures
        bend phi within that; `error` tells, and a smaller step helps.
      solver: of the lower level; None is `Auto()`. What it leaves unsolved is divided by the step.

    Raises:
      InputError: step not above 0, or a solver of another type.
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

    Two solves a sample, whatever the size of x; the variance grows with that size.
    `error`: twice the standard error of the mean, in the 2-norm; the bias, of second order in the step, is
    not in it. The same key gives the same signs: a new one needs `SimultaneousPerturbation(new_key)`.

    Args:
      key: of the signs.
      samples: how many (static), at least 2.
      step: in units of x; None is eps^(1/3), 6e-6 in float64 and 5e-3 in float32.
      solver: of the lower level; None is `Auto()`.

    Raises:
      InputError: samples below 2, step not above 0, or a solver of another type.
    """

    key: jax.Array
    samples: int = eqx.field(default=32, static=True, converter=plain)
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
    """phi at x and around it, each point solved from the V at x."""

    def __init__(self, problem: Problem, x: Any, solver: Solver | None, start: jax.Array | None):
        self.flat, self._unravel = ravel_pytree(x)
        self._problem, self._x, self._solver = problem, x, solver
        self._solution = solve(*lower_level(problem, x), solver=solver, initial_value=start)
        self._value = problem.objective(x, self._solution)

    def rise(self, direction: jax.Array, step: jax.Array) -> jax.Array:
        """phi(x + step direction) - phi(x - step direction)."""
        return self._at(self.flat + step * direction) - self._at(self.flat - step * direction)

    def _at(self, point: jax.Array) -> jax.Array:
        x = self._unravel(point)
        solution = solve(*lower_level(self._problem, x), solver=self._solver, initial_value=self._solution.value)
        phi = self._problem.objective(x, solution)
        # What a solver of the user's leaves unsolved is in `error`; `Auto()` is to solve.
        solved = (self._solver is not None) | jnp.all(solution.result == Result.CONVERGED)
        return jnp.where(solved, phi, jnp.nan)

    def report(self, gradient: jax.Array, error: jax.Array | None) -> Hypergradient:
        return Hypergradient(self._value, self._unravel(gradient), self._solution, None, None, error)


def require_perturbation(step: Any, solver: Any) -> None:
    """Raise InputError unless `step`, where it is known, is None or above 0, and `solver` a solver or None."""
    if step is not None:
        require_setting("step", step, 0, "None chooses by the precision")
        require_positive("step", as_float("step", step), "None chooses by the precision")
    require_instance("solver", solver, Solver | None)


def default_step(flat: jax.Array, power: float) -> float:
    """eps^power, of the precision of x."""
    return float(jnp.finfo(flat.dtype).eps) ** power
