"""`hypergradient`: value and gradient of the upper level, by any method."""

import functools
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import ArrayLike, Real

from bilevel_jax.bilevel.problem import Problem, as_upper_variable, require_problem_kind
from bilevel_jax.core.captures import jit
from bilevel_jax.core.results import are_finite
from bilevel_jax.core.validation import as_float, require_computable, require_kind, require_numbers
from bilevel_jax.hypergradient.methods.implicit import Implicit
from bilevel_jax.hypergradient.protocol import Hypergradient, Method


def hypergradient(
    problem: Problem,
    x: Any,
    *,
    method: Method | None = None,
    initial_value: Real[ArrayLike, "*batch S"] | Sequence[Any] | None = None,
    initial_adjoint: Real[ArrayLike, "*batch S"] | Sequence[Any] | None = None,
    with_error: bool = True,
) -> Hypergradient:
    """Return f(x, pi*(x)) and its gradient in x (Yang, Gao and Yuan 2025, for any regularizer and parameter).

    A solve that does not converge raises nothing. Outside jit, call `bj.check` and compare `error` with the norm of the
    gradient. Inside, read `solution.result` and `stats.result`, which are 0 where they converged, and `error`, which is
    infinite where value or gradient are not finite.

    Args:
      problem: a `Problem`. It is compiled once for each structure (a new lambda is a new structure), and again
        after a value that its functions read was edited (docs/composition.md).
      x: any pytree of floating-point arrays.
      method: None is `Implicit()`. Others: `Unrolled`, `ExpectedTrajectories`, `FiniteDifferences`,
        `SimultaneousPerturbation`.
      initial_value, initial_adjoint: warm starts, e.g. `solution.value` and `adjoint` of a call nearby.
        Methods without an adjoint ignore the latter.
      with_error: also estimate the gradient's error (static); without, `error` is None. In a larger jitted program
        that does not read `error` it costs nothing either way.

    Returns:
      `Hypergradient`. Itself differentiable in x: a jvp of its gradient is a Hessian-vector product.

    Raises:
      InputError: x has leaves that are not floating point, the objective is not a scalar, a warm start
        has another shape, or an argument another type.

    Example:
      >>> problem = bj.problems.make("garnet")
      >>> x = problem.start(jax.random.key(0))
      >>> made = bj.check(bj.hypergradient(problem, x))
      >>> made.value.shape, made.gradient.shape
      ((), (8, 3))
    """
    require_problem_kind(problem)
    require_kind("method", method, Method | None)
    require_kind("with_error", with_error, bool)
    starts = {"initial_value": initial_value, "initial_adjoint": initial_adjoint}
    starts = {name: as_float(name, start) for name, start in starts.items() if start is not None}
    if list(starts) == ["initial_value"]:  # zeros is where an adjoint starts: one program for both warm starts
        value = starts["initial_value"]
        starts["initial_adjoint"] = jnp.zeros(value.shape, value.dtype)
    return _hypergradient(problem, as_upper_variable(x), method, with_error=with_error, **starts)


@functools.partial(jit, static_argnames="with_error")
def _hypergradient(problem, x, method, initial_value=None, initial_adjoint=None, *, with_error):
    require_computable("method", method)
    require_numbers("method", method)
    method = Implicit() if method is None else method
    made = method.estimate(problem, x, initial_value, initial_adjoint, with_error)
    if made.error is None:
        return made
    # The error is computed from other numbers; it must not be small beside a value that is none.
    error = jnp.where(are_finite(made.value, made.gradient), made.error, jnp.inf)
    return eqx.tree_at(lambda made: made.error, made, stop_gradient(error))
