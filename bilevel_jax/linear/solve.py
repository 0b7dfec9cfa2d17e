"""`linear_solve`: one solve with its report, differentiable in the operator and the right-hand side."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import ArrayLike, Real

from bilevel_jax.core import rounding
from bilevel_jax.core.arrays import PerState
from bilevel_jax.core.captures import jit
from bilevel_jax.core.results import Result
from bilevel_jax.linear.adaptive import AdaptiveKrylov
from bilevel_jax.linear.direct import Direct
from bilevel_jax.linear.protocol import Attempt, LinearSolver, LinearStats, power_of_two, residual_of
from bilevel_jax.mdp.transitions import PolicyOperator, StateOperator, TransposedOperator

# Below this many states a factorization is cheaper than Krylov iterations (docs/performance.md).
DIRECT_LIMIT = 512
# A relative residual of 1 is that of x = 0.
LOOSEST = 0.1


def default_linear_solver(num_states: int, tolerance: Any = None) -> LinearSolver:
    """Return `Direct` up to `DIRECT_LIMIT` states, and above that `AdaptiveKrylov` to a relative residual of
    `tolerance`.

    A tolerance in units of the reward, such as that of a solver, may be any number. Here 0.1 is the loosest.

    Example:
      >>> bj.linear.default_linear_solver(10)
      Direct()
    """
    if num_states <= DIRECT_LIMIT:
        return Direct()
    return AdaptiveKrylov(None if tolerance is None else jnp.minimum(tolerance, LOOSEST))


def linear_solve(
    linear_solver: LinearSolver,
    operator: StateOperator,
    modulus: Real[ArrayLike, ""],
    rhs: PerState,
    *,
    transpose: bool = False,
    guess: PerState | None = None,
    share: bool = True,
    poison: bool = False,
) -> tuple[PerState, LinearStats]:
    """Solve (I - M) x = rhs, or (I - M') x = rhs, for an operator M with |M|_inf <= modulus < 1.

    Args:
      linear_solver: a `LinearSolver`.
      operator, rhs: M and b[S]; differentiable, in forward and reverse mode and repeatedly.
      transpose: solve with the transpose.
      guess: where an iterative solver starts for this right-hand side, [S]; zeros if None. Derivatives solve for
        other right-hand sides: they neither use nor differentiate it.
      share: prepare once for this solve and its derivatives. False prepares again in each of them, which is
        cheaper where no derivative follows, because nothing has to be kept.
      poison: return NaN in x, and in the hidden solves of derivatives, where a solve did not converge. Use it for
        solves whose stats nobody reads.

    Returns:
      x[S] and `LinearStats`.

    Example:
      >>> operator = bj.DenseTransition(jnp.full((2, 1, 2), 0.5)).under(jnp.full((2, 1), 0.9))  # M = 0.9 P
      >>> x, stats = bj.linear.linear_solve(bj.Direct(), operator, jnp.asarray(0.9), jnp.ones(2))
      >>> x.round(3).tolist()
      [10.0, 10.0]
    """
    return _linear_solve(linear_solver, operator, modulus, rhs, guess, transpose=transpose, share=share, poison=poison)


@functools.partial(jit, static_argnames=("transpose", "share", "poison"))
def _linear_solve(solver, operator, modulus, rhs, guess, *, transpose, share, poison):
    solver = jax.tree.map(jnp.asarray, solver)
    if guess is not None:
        return _solve_from((transpose, share, poison), solver, operator, modulus, rhs, guess)
    frozen, frozen_solver, modulus = lax.stop_gradient((operator, solver, modulus))
    prepared = frozen_solver.prepare(frozen) if share else None

    def solve(b, flip):
        return _solve_once(frozen_solver, prepared, frozen, modulus, b, None, flip, poison)

    system = operator.T if transpose else operator
    return lax.custom_linear_solve(
        lambda x: x - system.apply(x),
        rhs,
        solve=lambda _, b: solve(b, transpose),
        transpose_solve=lambda _, b: solve(b, not transpose),
        has_aux=True,
    )


def _solve_once(solver, prepared, operator, modulus, rhs, guess, transpose, poison):
    attempt = solver.solve(operator, prepared, rhs, guess, transpose)
    # Rows of P sum to 1 up to what is accepted of them: M's own say how far a residual reaches.
    rows = jnp.max(jnp.abs(operator.apply(jnp.ones_like(rhs))))
    sums = rounding.of_matrix_product(_terms(operator), rhs.dtype)
    modulus = jnp.maximum(modulus, rows * (1 + rounding.of_row_sums(sums, rhs.dtype)))
    stats = _stats(solver, operator.T if transpose else operator, modulus, attempt, rhs, transpose)
    x = jnp.where(stats.result == Result.CONVERGED, attempt.x, jnp.nan) if poison else attempt.x
    return x, stats


# `custom_linear_solve` has one `solve` for the right-hand side and for its tangents; a guess is right for one.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _solve_from(options, solver, operator, modulus, rhs, guess):
    transpose, _, poison = options
    return _solve_once(solver, None, operator, modulus, rhs, guess, transpose, poison)


@_solve_from.defjvp
def _solve_from_jvp(options, primals, tangents):
    solver, operator, modulus, rhs, _ = primals
    _, operator_dot, _, rhs_dot, _ = tangents
    transpose, share, poison = options
    x, stats = _solve_from(options, *primals)

    def gap(operator, rhs):
        return residual_of(operator.T if transpose else operator, x, rhs)

    # A x = b, hence A dx = db - dA x.
    _, gap_dot = jax.jvp(gap, (operator, rhs), (operator_dot, rhs_dot))
    x_dot, _ = linear_solve(solver, operator, modulus, gap_dot, transpose=transpose, share=share, poison=poison)
    return (x, stats), (x_dot, zero_tangents(stats))


def zero_tangents(tree: Any) -> Any:
    """Return the tangents of a pytree that is not differentiated.

    Example:
      >>> bj.linear.zero_tangents(jnp.ones(2)).tolist()
      [0.0, 0.0]
    """

    def zero(leaf):
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.zeros_like(leaf) if floating else np.zeros(leaf.shape, jax.dtypes.float0)

    return jax.tree.map(zero, tree)


def _stats(solver, system, modulus, attempt: Attempt, rhs, transpose) -> LinearStats:
    x = attempt.x
    gap = residual_of(system, x, rhs) if attempt.gap is None else attempt.gap
    eps = jnp.finfo(rhs.dtype).eps
    scale = power_of_two(rhs, x)  # squares of what is finite must not overflow
    length, asked, size = (jnp.linalg.norm(vector / scale) for vector in (gap, rhs, x))
    tolerance = jnp.asarray(solver.relative_tolerance(rhs.dtype), rhs.dtype)
    allowed = rounding.SOLVE_FLOOR * eps * size
    # A residual has the rounding of x: where all of its entries come out as 0, it shows no more than that.
    shown = jnp.maximum(length, eps / 4 * size)
    ok = (shown <= 1.01 * tolerance * asked) | (solver.takes_rounding() & (length <= allowed))
    near = length <= rounding.SOLVE_NEAR_FLOOR * eps * (size + asked)
    limited = (length <= allowed) | (attempt.stalled & near)
    result = jnp.where(ok, Result.CONVERGED, jnp.where(limited, Result.PRECISION_LIMIT, Result.MAX_ITERATIONS))
    result = jnp.where(jnp.all(jnp.isfinite(x)), result, Result.NOT_FINITE)

    def norm(vector):
        return jnp.sum(jnp.abs(vector)) if transpose else jnp.max(jnp.abs(vector))

    noise = rounding.of_linear_residual(_terms(system), modulus, norm(x), norm(rhs))
    residual = norm(gap)
    bound = jnp.where(modulus < 1, (residual + noise) / (1 - modulus), jnp.inf)
    return LinearStats(result=result.astype(jnp.int32), products=attempt.products, residual=residual, error_bound=bound)


def _terms(operator: StateOperator) -> int:
    """Return about how many summands an entry of M x has; for a transpose, the average."""
    if isinstance(operator, TransposedOperator):
        return _terms(operator.operator)
    if isinstance(operator, PolicyOperator):
        return operator.transition.terms + operator.weights.shape[-1]
    entries = sum(leaf.size for leaf in jax.tree.leaves(operator) if jnp.issubdtype(leaf.dtype, jnp.floating))
    return -(-entries // jax.eval_shape(operator.diagonal).shape[0])
