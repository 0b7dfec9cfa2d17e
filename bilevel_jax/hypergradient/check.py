"""`check_gradient`: what to run on a new problem before trusting its gradient."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from bilevel_jax.hypergradient.compute import hypergradient
from bilevel_jax.hypergradient.implicit import Implicit
from bilevel_jax.hypergradient.lagrangian import sweep
from bilevel_jax.hypergradient.perturbation import FOURTH, SIXTH, default_step, require_perturbation
from bilevel_jax.hypergradient.problem import Problem, as_upper_variable, lower_level, require_problem
from bilevel_jax.hypergradient.protocol import Hypergradient
from bilevel_jax.results import MESSAGES, Result
from bilevel_jax.solvers import read_out, solve
from bilevel_jax.validation import require_instance, require_setting

# Differences that agree to this, relative to their size, do.
AGREES = {"float64": 1e-5, "float32": 2e-2}
# Of their own uncertainty, which two formulas on the same values tell.
SAFETY = 20
MOST_SWEEPS = 20_000


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One derivative by two routes: norms of both along a direction, of their difference, and what is allowed."""

    part: str
    derivative: float
    reference: float
    difference: float
    allowed: float

    @property
    def agrees(self) -> bool:
        """False also where a number is NaN."""
        return self.difference <= self.allowed


@dataclasses.dataclass(frozen=True)
class GradientCheck:
    """What `check_gradient` found; `str` of it is the table.

    `ok`: everything agrees and everything converged. `parts` that the gradient is made of, each against
    differences; `totals`: the whole of it along the random directions, against differences of phi and
    against other methods; `failures`: iterations that did not converge; `error`: `Hypergradient.error`.
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
    key: jax.Array | None = None,
    directions: int = 3,
    step: float | None = None,
    verbose: bool = True,
) -> GradientCheck:
    """Compare the hyper-gradient with other routes to it, and each of its parts with differences.

    Along random directions of x: the gradient against central differences of phi, and against the derivative of
    Bellman sweeps (20,000 at most: at discounts that ask for more, from about 0.999 on, that row is left out). And
    what it is made of, each by automatic differentiation against differences: every leaf of mdp(x) and
    regularizer(x), T_x V at fixed V, the objective in x at a fixed solution, the objective in V at fixed x. Use
    float64: differences say little in float32. Call it outside jit; some twenty solves a direction.

    Args:
      method: of the gradient that is checked; None is `Implicit()`.
      key: of the directions; None is `jax.random.key(0)`.
      directions: how many.
      step: of the differences, in units of x along a direction of length 1; None chooses by the precision.
      verbose: print the table.

    Returns:
      `GradientCheck`; nothing is raised for a gradient that is wrong.

    Raises:
      InputError: what `hypergradient` raises, or an argument out of range.
    """
    require_problem(problem)
    require_instance("method", method, Implicit | None)
    require_setting("directions", directions, 1, "3 is usual", whole=True)
    require_perturbation(step, None)
    x = as_upper_variable(x)
    made = hypergradient(problem, x, method=method)
    compare = _Comparer(x, step)
    keys = jax.random.split(jax.random.key(0) if key is None else key, directions)
    totals, parts = [], []
    for number, d in enumerate(_directions(keys, x)):
        totals += _totals(problem, x, made, d, compare, f"direction {number + 1}")
    along = next(_directions(keys[:1], x))
    parts += _leaves(problem, x, along, compare)
    parts += _summands(problem, x, made, along, compare, keys[0])
    failures = tuple(
        f"{outcome.what}: {MESSAGES[Result(int(code))]}"
        for outcome in made.outcomes()
        for code in np.unique(np.asarray(outcome.result))
        if code != Result.CONVERGED
    )
    report = GradientCheck(tuple(totals), tuple(parts), failures, float(made.error))
    if verbose:
        print(report)
    return report


def _directions(keys, x):
    """A direction for each key: normal entries, of length 1 in all."""
    flat, unravel = ravel_pytree(x)
    for key in keys:
        drawn = jax.random.normal(key, flat.shape, flat.dtype)
        yield unravel(drawn / jnp.linalg.norm(drawn))


class _Comparer:
    """Differences along a direction, and what may be expected of them."""

    def __init__(self, x: Any, step: float | None):
        self.flat = ravel_pytree(x)[0]
        self.step = default_step(self.flat, 1 / 5) if step is None else step
        self.tolerance = AGREES.get(self.flat.dtype.name, AGREES["float32"])

    def differences(self, function: Callable, point: Any, direction: Any) -> tuple[np.ndarray, np.ndarray]:
        """The directional derivative of a pytree-valued function, flat, and its uncertainty."""
        size = max(1.0, float(optax.tree.norm(point)) / math.sqrt(max(1, ravel_pytree(point)[0].size)))

        def at(t):
            moved = jax.tree.map(lambda leaf, d: leaf + (t * size) * d, point, direction)
            return np.asarray(ravel_pytree(function(moved))[0], dtype=np.float64)

        rises = np.stack([at(k * self.step) - at(-k * self.step) for k in (1, 2, 3)]) / (self.step * size)
        return np.array(SIXTH) @ rises, np.abs((np.array(SIXTH) - np.array(FOURTH)) @ rises)

    def against(self, part: str, derivative: Any, reference: np.ndarray, uncertainty: np.ndarray) -> Comparison:
        flat = np.asarray(ravel_pytree(derivative)[0], dtype=np.float64)
        sizes = np.linalg.norm(flat), np.linalg.norm(reference)
        allowed = self.tolerance * max(sizes) + SAFETY * np.linalg.norm(uncertainty) + float(np.finfo(np.float64).tiny)
        return Comparison(part, *map(float, (*sizes, np.linalg.norm(flat - reference), allowed)))

    def __call__(self, part: str, function: Callable, point: Any, direction: Any) -> Comparison:
        """A function's own derivative along a direction against its differences."""
        derivative = jax.jvp(function, (point,), (direction,))[1]
        return self.against(part, derivative, *self.differences(function, point, direction))


def _totals(problem, x, made: Hypergradient, d, compare: _Comparer, name: str) -> list[Comparison]:
    """The gradient along d against differences of phi, and against the derivative of sweeps from V*.

    The latter is left out where the discount asks for more than `MOST_SWEEPS`.
    """
    slope = optax.tree.vdot(made.gradient, d)

    @jax.jit
    def phi(x):
        solution = solve(*lower_level(problem, x), initial_value=made.solution.value)
        converged = jnp.all(solution.result == Result.CONVERGED)
        return jnp.where(converged, problem.objective(x, solution), jnp.nan)

    discount = float(jnp.max(lower_level(problem, x)[0].modulus))
    wanted = math.log(compare.tolerance * (1 - discount) / 10) / math.log(discount) if discount > 0 else 1
    count = max(1, math.ceil(wanted))
    by_differences = compare.against(f"{name}: differences of phi", slope, *compare.differences(phi, x, d))
    if count > MOST_SWEEPS:  # fewer would disagree with a gradient that is right
        return [by_differences]

    @jax.jit
    def unrolled(x):
        mdp, regularizer = lower_level(problem, x)
        value = sweep(mdp, regularizer, made.solution.value, jnp.zeros_like(made.solution.value), count=count)
        return problem.objective(x, read_out(mdp, regularizer, value, made.solution.result, made.solution.stats))

    by_sweeps = np.asarray(jax.jvp(unrolled, (x,), (d,))[1], dtype=np.float64).reshape(1)
    return [
        by_differences,
        compare.against(f"{name}: {count} sweeps, differentiated", slope, by_sweeps, np.zeros(1)),
    ]


def _leaves(problem, x, d, compare: _Comparer) -> list[Comparison]:
    """Every floating-point leaf of mdp(x) and regularizer(x)."""
    rows = []
    for name in ("mdp", "regularizer"):
        numbers = jax.jit(lambda x, name=name: eqx.filter(getattr(problem, name)(x), eqx.is_inexact_array))
        for path, _ in jax.tree_util.tree_leaves_with_path(numbers(x)):
            label = f"{name}(x){jax.tree_util.keystr(path)}"

            def leaf(x, path=path, numbers=numbers):
                return dict(jax.tree_util.tree_leaves_with_path(numbers(x)))[path]

            row = compare(label, leaf, x, d)
            if row.derivative or row.reference or not row.agrees:  # what x does not move says nothing
                rows.append(row)
    return rows


def _summands(problem, x, made: Hypergradient, d, compare: _Comparer, key) -> list[Comparison]:
    """T_x V at fixed V; f in x at a fixed solution; f in V at fixed x."""
    solution = jax.lax.stop_gradient(made.solution)

    @jax.jit
    def backup(x):
        mdp, regularizer = lower_level(problem, x)
        return sweep(mdp, regularizer, solution.value, jnp.zeros_like(solution.value), count=1)

    @jax.jit
    def of_value(value):
        return problem.objective(x, read_out(*lower_level(problem, x), value, solution.result, solution.stats))

    drawn = jax.random.normal(key, solution.value.shape, solution.value.dtype)
    return [
        compare("T_x V* at fixed V*", backup, x, d),
        compare("objective in x, solution fixed", jax.jit(lambda x: problem.objective(x, solution)), x, d),
        compare("objective in V, x fixed", of_value, solution.value, drawn / jnp.linalg.norm(drawn)),
    ]
