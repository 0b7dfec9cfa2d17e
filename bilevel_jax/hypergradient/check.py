"""`check_gradient`: run it on a new problem before you trust its gradient."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Float64, PRNGKeyArray

from bilevel_jax.bilevel.problem import Problem, as_upper_variable, lower_level, require_problem
from bilevel_jax.core.arrays import Scalar
from bilevel_jax.core.batching import over_batch
from bilevel_jax.core.captures import jit
from bilevel_jax.core.results import Result
from bilevel_jax.core.validation import require_instance, require_setting
from bilevel_jax.hypergradient.compute import hypergradient
from bilevel_jax.hypergradient.methods.implicit import Implicit
from bilevel_jax.hypergradient.methods.perturbation import FOURTH, SIXTH, default_step, require_perturbation
from bilevel_jax.hypergradient.protocol import Hypergradient
from bilevel_jax.mdp.bellman import backup
from bilevel_jax.solvers import solution_at, solve

# Differences that agree to this, relative to their size, do.
AGREES = {"float64": 1e-5, "float32": 2e-2}
# Of their own uncertainty, which two formulas on the same values tell.
SAFETY = 20
MOST_SWEEPS = 20_000
# Where a function is looked at, in steps.
POINTS = (-3, -2, -1, 1, 2, 3)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One derivative, computed in two ways: its norm along a direction in both, the norm of the difference, and the
    allowed difference.
    """

    part: str
    derivative: float
    reference: float
    difference: float
    allowed: float

    @property
    def agrees(self) -> bool:
        """Whether the difference is allowed; False also where a number is NaN."""
        return self.difference <= self.allowed


@dataclasses.dataclass(frozen=True)
class GradientCheck:
    """The result of `check_gradient`; `str` of it is the table.

    `ok` says whether everything agrees and converged. `parts` compares the parts of the gradient with differences.
    `totals` compares the whole gradient, along the random directions, with differences of phi and with other methods.
    `failures` names the iterations that did not converge. `error` is `Hypergradient.error`.
    """

    totals: tuple[Comparison, ...]
    parts: tuple[Comparison, ...]
    failures: tuple[str, ...]
    error: float

    @property
    def ok(self) -> bool:
        """Whether everything agrees and converged."""
        return not self.failures and all(row.agrees for row in (*self.totals, *self.parts))

    def __str__(self) -> str:
        rows = [*self.totals, *self.parts]
        width = max(len(row.part) for row in rows)
        lines = [f"{'':{width}}  derivative   reference  difference     allowed"]
        for row in rows:
            numbers = (row.derivative, row.reference, row.difference, row.allowed)
            mark = "" if row.agrees else "  <- disagrees"
            lines.append(f"{row.part:{width}}" + "".join(f"  {number:10.3e}" for number in numbers) + mark)
        lines += [f"error of the gradient, estimated: {self.error:.1e}", *self.failures, self._verdict()]
        return "\n".join(lines)

    def _verdict(self) -> str:
        wrong = [row.part for row in self.parts if not row.agrees]
        if wrong:
            return (
                f"The derivative of {', '.join(wrong)} is not that of its values: look there for stop_gradient, "
                f"integers, comparisons, argmax, NaN, or a custom derivative rule"
            )
        if self.failures:
            return "Derivatives of the parts agree, but an iteration did not converge: see above"
        if any(not row.agrees for row in self.totals):
            return (
                "Derivatives of the parts agree, the whole does not: phi may have a kink nearby (ties without "
                "regularization, the border of a support with Tsallis entropy, a temperature so low that a step of "
                "the differences changes the policy); try another x or a smaller step"
            )
        return "All agree"


def check_gradient(
    problem: Problem,
    x: Any,
    *,
    method: Implicit | None = None,
    key: PRNGKeyArray | None = None,
    directions: int = 3,
    step: float | None = None,
    verbose: bool = True,
) -> GradientCheck:
    """Compare the hyper-gradient with other routes to it, and each of its parts with differences.

    Along random directions of x, the gradient is compared with central differences of phi and with the derivative of
    Bellman sweeps. At most 20,000 sweeps are made: at discounts that need more, from about 0.999 on, that row is left
    out. The parts of the gradient, computed by automatic differentiation, are compared with differences: every leaf
    of mdp(x) and regularizer(x), T_x V at fixed V, the objective in x at a fixed solution, and the objective in V at
    fixed x. Use float64, because differences say little in float32. Call it outside jit. It makes some twenty solves
    per direction.

    Args:
      method: the method of the gradient that is checked; None is `Implicit()`.
      key: the key of the random directions; None is `jax.random.key(0)`.
      directions: the number of directions.
      step: the step of the differences, in units of x along a direction of length 1; None chooses by the precision.
      verbose: print the table.

    Returns:
      `GradientCheck`; nothing is raised for a gradient that is wrong.

    Raises:
      InputError: what `hypergradient` raises, or an argument out of range.

    Example:
      >>> problem = bj.problems.make("garnet")
      >>> x = problem.start(jax.random.key(0))
      >>> with jax.enable_x64(True):
      ...     problem = bj.problems.make("garnet")
      ...     checked = bj.check_gradient(problem, problem.start(jax.random.key(0)), directions=1, verbose=False)
      >>> checked.ok
      True
    """
    require_problem(problem)
    require_instance("method", method, Implicit | None)
    require_setting("directions", directions, 1, "3 is usual", whole=True)
    require_perturbation(step, None)
    x = as_upper_variable(x)
    made = hypergradient(problem, x, method=method)
    compare = _Comparer(x, step)
    keys = jax.random.split(jax.random.key(0) if key is None else key, directions)
    drawn = _directions(keys, x)
    totals = _totals(problem, x, made, drawn, compare)
    along = jax.tree.map(lambda leaf: leaf[0], drawn)
    parts = _parts(problem, x, made, along, keys[0], compare)
    failures = tuple(sentence for outcome in made.outcomes() for sentence in outcome.failures())
    report = GradientCheck(tuple(totals), tuple(parts), failures, float(made.error))
    if verbose:
        print(report)
    return report


class _Along(NamedTuple):
    """A pytree-valued function along a direction: its own derivative, and its values at six points, [6, ...]."""

    derivative: Any
    values: Any
    size: Scalar


def _along(function: Callable, point: Any, direction: Any, step: Scalar) -> _Along:
    """At the points `point` + k step size direction, k = -3, -2, -1, 1, 2, 3; `size` is about that of an entry."""
    count = max(1, sum(leaf.size for leaf in jax.tree.leaves(point)))
    size = jnp.maximum(1, optax.tree.norm(point).astype(step.dtype) / math.sqrt(count))

    def at(k):
        far = k * step * size
        return function(jax.tree.map(lambda leaf, d: leaf + far.astype(leaf.dtype) * d, point, direction))

    values = lax.map(at, jnp.asarray(POINTS, step.dtype))
    return _Along(jax.jvp(function, (point,), (direction,))[1], values, size)


@jit
def _directions(keys, x):
    """A direction for each key, [keys, ...]: normal entries, of length 1 in all."""
    flat, unravel = ravel_pytree(x)

    def draw(key):
        drawn = jax.random.normal(key, flat.shape, flat.dtype)
        return unravel(drawn / jnp.linalg.norm(drawn))

    return lax.map(draw, keys)


class _Comparer:
    """Differences along a direction, and what may be expected of them."""

    def __init__(self, x: Any, step: float | None):
        flat = ravel_pytree(x)[0]
        self.step = jnp.asarray(default_step(flat, 1 / 5) if step is None else step, flat.dtype)
        self.tolerance = AGREES.get(flat.dtype.name, AGREES["float32"])

    def differences(self, values: Any, size: Any) -> tuple[Float64[np.ndarray, " N"], Float64[np.ndarray, " N"]]:
        """The directional derivative, flat, of values [6, ...] as `_along` gives them, and its uncertainty."""
        values = np.asarray(values, np.float64).reshape(len(POINTS), -1)
        rises = np.stack([values[3 + k] - values[2 - k] for k in range(3)]) / (float(self.step) * float(size))
        return np.array(SIXTH) @ rises, np.abs((np.array(SIXTH) - np.array(FOURTH)) @ rises)

    def against(
        self, part: str, derivative: Any, reference: Float64[np.ndarray, " N"], uncertainty: Float64[np.ndarray, " N"]
    ) -> Comparison:
        flat = np.asarray(derivative, np.float64).reshape(-1)
        sizes = np.linalg.norm(flat), np.linalg.norm(reference)
        allowed = self.tolerance * max(sizes) + SAFETY * np.linalg.norm(uncertainty) + float(np.finfo(np.float64).tiny)
        return Comparison(part, *map(float, (*sizes, np.linalg.norm(flat - reference), allowed)))

    def __call__(self, part: str, derivative: Any, values: Any, size: Any) -> Comparison:
        """An array's own derivative along a direction against the differences of its values."""
        return self.against(part, derivative, *self.differences(values, size))


def _totals(problem: Problem, x: Any, made: Hypergradient, drawn: Any, compare: _Comparer) -> list[Comparison]:
    """Compare the gradient along each direction with differences of phi, and with the derivative of sweeps from V*.

    The latter is left out where the discount needs more than `MOST_SWEEPS`: fewer would disagree with a gradient that
    is right.
    """
    discount = float(_modulus(problem, x))
    wanted = math.log(compare.tolerance * (1 - discount) / 10) / math.log(discount) if discount > 0 else 1
    count = max(1, math.ceil(wanted))
    by_sweeping = count <= MOST_SWEEPS
    settings = np.int32(count if by_sweeping else 0), compare.step
    slopes, phis, by_sweeps = jax.device_get(_along_each(problem, x, made.gradient, made.solution, drawn, *settings))
    rows = []
    for i, slope in enumerate(slopes):
        name = f"direction {i + 1}"
        rows.append(compare(f"{name}: differences of phi", slope, phis.values[i], phis.size[i]))
        if by_sweeping:
            swept = np.asarray(by_sweeps[i], np.float64).reshape(1)
            rows.append(compare.against(f"{name}: {count} sweeps, differentiated", slope, swept, np.zeros(1)))
    return rows


@jit
def _modulus(problem, x):
    return jnp.max(lower_level(problem, x)[0].modulus)


# Every program takes the problem as an argument: the same check of another x, or once more, compiles nothing.
@jit
def _along_each(problem, x, gradient, solution, drawn, count, step):
    def phi(x):
        here = solve(*lower_level(problem, x), initial_value=solution.value)
        converged = jnp.all(here.result == Result.CONVERGED)
        return jnp.where(converged, problem.objective(x, here), jnp.nan)

    def swept(x):
        mdp, regularizer = lower_level(problem, x)
        value = lax.fori_loop(0, count, lambda _, v: over_batch(backup)(mdp, regularizer, v), solution.value)
        return problem.objective(x, solution_at(mdp, regularizer, value, solution.result, solution.stats))

    def one(d):
        values = _along(phi, x, d, step)._replace(derivative=None)  # phi's is the gradient that is checked
        return optax.tree.vdot(gradient, d), values, jax.jvp(swept, (x,), (d,))[1]

    return lax.map(one, drawn)


def _parts(
    problem: Problem, x: Any, made: Hypergradient, d: Any, key: PRNGKeyArray, compare: _Comparer
) -> list[Comparison]:
    """Every floating-point leaf of mdp(x) and regularizer(x); T_x V at fixed V; f in x and in V, the other fixed."""
    solution = lax.stop_gradient(made.solution)
    in_value = jax.random.normal(key, solution.value.shape, solution.value.dtype)
    in_value = in_value / jnp.linalg.norm(in_value)
    found = jax.device_get(_along_parts(problem, x, solution, d, in_value, compare.step))
    rows = []
    for name in ("mdp", "regularizer"):
        derivatives, values, size = found.pop(name)
        labels = [
            f"{name}(x){jax.tree_util.keystr(path)}" for path, _ in jax.tree_util.tree_leaves_with_path(derivatives)
        ]
        for label, derivative, six in zip(labels, jax.tree.leaves(derivatives), jax.tree.leaves(values), strict=True):
            row = compare(label, derivative, six, size)
            if row.derivative or row.reference or not row.agrees:  # what x does not move says nothing
                rows.append(row)
    return rows + [compare(label, one.derivative, one.values, one.size) for label, one in found.items()]


@jit
def _along_parts(problem, x, solution, d, in_value, step):
    def floats(name):
        return lambda x: eqx.filter(getattr(problem, name)(x), eqx.is_inexact_array)

    def swept(x):
        return over_batch(backup)(*lower_level(problem, x), solution.value)

    def of_value(value):
        return problem.objective(x, solution_at(*lower_level(problem, x), value, solution.result, solution.stats))

    return {
        "mdp": _along(floats("mdp"), x, d, step),
        "regularizer": _along(floats("regularizer"), x, d, step),
        "T_x V* at fixed V*": _along(swept, x, d, step),
        "objective in x, solution fixed": _along(lambda x: problem.objective(x, solution), x, d, step),
        "objective in V, x fixed": _along(of_value, solution.value, in_value, step.astype(solution.value.dtype)),
    }
