"""Iterative differentiation: the derivative of the result of a number of Bellman sweeps."""

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from bilevel_jax.bilevel.problem import lower_level
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.validation import plain, require_setting
from bilevel_jax.hypergradient.error import error_bound
from bilevel_jax.hypergradient.lagrangian import Lagrangian, sweep
from bilevel_jax.hypergradient.protocol import Hypergradient, Method
from bilevel_jax.linear.protocol import Attempt
from bilevel_jax.linear.truncated import TruncatedSolver
from bilevel_jax.solvers import ValueIteration, solution_at, solve


class Unrolled(Method):
    """The exact derivative of f at V_K, the K-th Bellman sweep from V = 0 or a warm start.

    It is an independent way to the hyper-gradient, without a linear system or the implicit function theorem. Reverse
    mode keeps every V_k that it differentiates, K S numbers in all. It returns as `adjoint` the sum of the cotangents
    that passed through the sweeps, which is the truncated Neumann series of the implicit adjoint. Forward mode keeps
    nothing and takes one derivative per entry of x; it has no adjoint.

    Args:
      sweeps: K (static). The lower level reports MAX_ITERATIONS unless they were enough.
      differentiated_sweeps: how many of the last sweeps are differentiated (static); None is all of them. The others
        are run without being differentiated (Shaban et al. 2019, "Truncated back-propagation for bilevel
        optimization").
      mode: "reverse" or "forward" (static).

    Raises:
      InputError: sweeps below 1, differentiated_sweeps not from 0 to sweeps, another mode.

    Example:
      >>> problem = bj.problems.make("garnet")
      >>> x = problem.start(jax.random.key(0))
      >>> bj.hypergradient(problem, x, method=bj.Unrolled(200)).gradient.shape
      (8, 3)
    """

    sweeps: int = eqx.field(static=True, converter=plain("sweeps"))
    differentiated_sweeps: int | None = eqx.field(default=None, static=True, converter=plain("differentiated_sweeps"))
    mode: Literal["reverse", "forward"] = eqx.field(default="reverse", static=True)

    def __check_init__(self):
        require_setting("sweeps", self.sweeps, 1, "100 suffice at discount 0.9", whole=True)
        if self.differentiated_sweeps is not None:
            require_setting("differentiated_sweeps", self.differentiated_sweeps, 0, "None is all sweeps", whole=True)
            if self.differentiated_sweeps > self.sweeps:
                raise InputError(
                    f"differentiated_sweeps: {self.differentiated_sweeps} is more than the {self.sweeps} sweeps"
                )
        if self.mode not in ("reverse", "forward"):
            raise InputError(f"mode: expected 'reverse' or 'forward', got {self.mode!r}")

    def estimate(self, problem, x, initial_value, initial_adjoint, with_error):
        del initial_adjoint
        last = self.sweeps if self.differentiated_sweeps is None else self.differentiated_sweeps
        frozen = lax.stop_gradient(lower_level(problem, x))
        start = jnp.zeros_like(frozen[0].reward[..., 0]) if initial_value is None else lax.stop_gradient(initial_value)
        start = sweep(*frozen, start, jnp.zeros_like(start), count=self.sweeps - max(last, 1))
        # The last sweep alone, for what a solver says of it.
        before = sweep(*frozen, start, jnp.zeros_like(start), count=max(last, 1) - 1)
        report = solve(*frozen, solver=ValueIteration(max_iterations=1, centred=False), initial_value=before)
        report = eqx.tree_at(lambda s: s.stats.iterations, report, report.stats.iterations + self.sweeps - 1)

        def read(mdp, regularizer, value):
            return solution_at(mdp, regularizer, value, report.result, report.stats)

        def objective_of(x, shift):
            mdp, regularizer = lower_level(problem, x)
            value = sweep(mdp, regularizer, start, shift, count=last) if last else report.value
            solution = read(mdp, regularizer, value)
            return problem.objective(x, solution), solution

        shift = jnp.zeros_like(start)
        if self.mode == "forward":
            flat, unravel = ravel_pytree(x)

            def along(direction):
                return jax.jvp(lambda x: objective_of(x, shift)[0], (x,), (unravel(direction),))[1]

            objective, solution = objective_of(x, shift)
            gradient = unravel(jax.vmap(along)(jnp.eye(flat.size, dtype=flat.dtype)).astype(flat.dtype))
            w, stats = None, None
        else:
            objective, pull, solution = jax.vjp(objective_of, x, shift, has_aux=True)
            gradient, given = pull(jnp.ones_like(objective))
            here = Lagrangian(problem, x, read)
            of_value = here.objective_at(solution.value).of_value
            w, stats = here.solve_adjoint(_Given(products=last), solution.policy, of_value, given)
        error = error_bound(problem, x, gradient, solution.value, w) if with_error else None
        return Hypergradient(value=objective, gradient=gradient, solution=solution, adjoint=w, stats=stats, error=error)


class _Given(TruncatedSolver):
    """The guess itself, reported as the result of `products` products that were made elsewhere."""

    products: int = eqx.field(static=True)
    tolerance: Any = None

    def solve(self, operator, prepared, rhs, guess, transpose):
        del operator, prepared, transpose
        given = jnp.zeros_like(rhs) if guess is None else guess
        return Attempt(x=given, products=jnp.asarray(self.products, jnp.int32), stalled=jnp.asarray(False))
