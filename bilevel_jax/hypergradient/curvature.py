"""Second derivatives of phi(x) = f(x, pi*(x))."""

from typing import Any

import jax
import jax.numpy as jnp

from bilevel_jax.bilevel.problem import Problem, as_upper_variable, require_problem
from bilevel_jax.core.captures import jit
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.results import Result
from bilevel_jax.core.validation import require_instance
from bilevel_jax.hypergradient.compute import hypergradient
from bilevel_jax.hypergradient.methods.implicit import Implicit


def hessian_vector_product(
    problem: Problem, x: Any, direction: Any, *, method: Implicit | None = None
) -> tuple[Any, Any]:
    """Return (grad phi(x), Hessian of phi at x times `direction`), both pytrees like x.

    The product is the derivative of the hyper-gradient along `direction`, by the implicit function theorem once more.
    It takes two linear solves in addition to those of the gradient, whatever the size of x. The result does not depend
    on the mode of differentiation or the method. With inexact solvers it is the derivative of the exact formula at the
    inexact V and w. It is NaN where a hidden solve did not converge.

    Args:
      direction: a pytree like x.
      method: None is `Implicit()`.

    Raises:
      InputError: a direction of another structure or shape than x, or an error that `hypergradient` raises.

    Example:
      >>> problem = bj.problems.make("garnet")
      >>> x = problem.start(jax.random.key(0))
      >>> gradient, product = bj.hessian_vector_product(problem, x, jnp.ones_like(x))
      >>> product.shape
      (8, 3)
    """
    require_problem(problem)
    require_instance("method", method, Implicit | None)
    x, direction = as_upper_variable(x), as_upper_variable(direction)
    if jax.tree.structure(x) != jax.tree.structure(direction):
        raise InputError(
            f"direction: expected a tree as x, {jax.tree.structure(x)}, got {jax.tree.structure(direction)}"
        )
    shapes = [[leaf.shape for leaf in jax.tree.leaves(tree)] for tree in (x, direction)]
    if shapes[0] != shapes[1]:
        raise InputError(f"direction: expected leaves of shapes {shapes[0]}, as x, got {shapes[1]}")
    return _hessian_vector_product(problem, x, direction, method)


@jit
def _hessian_vector_product(problem, x, direction, method):
    def gradient(x):
        made = hypergradient(problem, x, method=method, with_error=False)
        if method is not None or made.stats is None:
            return made.gradient
        # Nobody sees the reports of the default method's iterations.
        converged = jnp.all(made.solution.result == Result.CONVERGED) & jnp.all(made.stats.result == Result.CONVERGED)
        return jax.tree.map(lambda leaf: jnp.where(converged, leaf, jnp.nan), made.gradient)

    direction = jax.tree.map(lambda d, leaf: d.astype(leaf.dtype), direction, x)
    return jax.jvp(gradient, (x,), (direction,))
