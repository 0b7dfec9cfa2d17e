"""Linear solvers of (I - M) x = b and its transpose, M = discount * P_pi: policy evaluation and the adjoint.

`linear_solve` is differentiable in the operator and the right-hand side; each solve reports its own
result, so that an adjoint that failed cannot pass for a gradient.
"""

import abc
import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.linalg import lu_factor, lu_solve
from jax.scipy.sparse.linalg import gmres

from bilevel_jax.batching import one_at_a_time_on_cpu
from bilevel_jax.bellman import discounted_operator
from bilevel_jax.mdp import MDP, over_batch
from bilevel_jax.results import Result
from bilevel_jax.transitions import StateOperator
from bilevel_jax.validation import as_float, require_instance, require_setting

# Below this many states a factorization is cheaper than Krylov iterations (docs/performance.md).
DIRECT_LIMIT = 512


class LinearStats(eqx.Module):
    """How a linear solve went. `result` is a `Result` code, all fields are scalars a batch element.

    `residual` is |b - A x|; `error_bound` bounds |x - x*| by residual / (1 - discount). Both are in the
    sup norm for a value and in the 1-norm for an adjoint (a signed occupancy): the norms in which the
    bound holds.
    """

    result: jax.Array
    steps: jax.Array
    residual: jax.Array
    error_bound: jax.Array


class LinearSolver(eqx.Module):
    """The protocol: `prepare` once an operator, `solve` for each right-hand side."""

    def prepare(self, operator: StateOperator) -> Any:
        """What solves with M and with M' share, e.g. a factorization."""
        del operator

    @abc.abstractmethod
    def solve(
        self,
        operator: StateOperator,
        prepared: Any,
        rhs: jax.Array,
        guess: jax.Array,
        transpose: bool,
    ) -> tuple[jax.Array, jax.Array]:
        """x[S] with (I - M) x = rhs, or (I - M') x = rhs if transpose, and the number of steps taken.

        `prepared` is what `prepare` returned, or None if it was not called.
        """

    @abc.abstractmethod
    def relative_tolerance(self, dtype: Any) -> Any:
        """A residual above this fraction of |b| (2-norm) is reported as not converged."""


def residual_of(system: StateOperator, x: jax.Array, rhs: jax.Array) -> jax.Array:
    """rhs - (I - M) x, all [S]."""
    return rhs - x + system.apply(x)


class Direct(LinearSolver):
    """LU factorization of the S x S matrix, shared by all solves with it: O(S^3) time, O(S^2) memory."""

    def prepare(self, operator):
        return _factorize(operator)

    def solve(self, operator, prepared, rhs, guess, transpose):
        del guess
        if prepared is None:
            x = _solve_transpose(operator, rhs) if transpose else _solve(operator, rhs)
        else:
            x = _substitute_transpose(prepared, rhs) if transpose else _substitute(prepared, rhs)
        return x, jnp.asarray(1)

    def relative_tolerance(self, dtype):
        return float(jnp.finfo(dtype).eps) ** 0.5


def _lu(operator):
    matrix = operator.matrix()
    return lu_factor(jnp.eye(matrix.shape[-1], dtype=matrix.dtype) - matrix)


_factorize = one_at_a_time_on_cpu(_lu)
_substitute = one_at_a_time_on_cpu(lambda factors, rhs: lu_solve(factors, rhs))
_substitute_transpose = one_at_a_time_on_cpu(lambda factors, rhs: lu_solve(factors, rhs, trans=1))
_solve = one_at_a_time_on_cpu(lambda operator, rhs: lu_solve(_lu(operator), rhs))
_solve_transpose = one_at_a_time_on_cpu(lambda operator, rhs: lu_solve(_lu(operator), rhs, trans=1))


class GMRES(LinearSolver):
    """Restarted GMRES (`jax.scipy.sparse.linalg.gmres`, one cycle at a time, the true residual checked).

    Args:
      tolerance: |b - A x|_2 / |b|_2 at which to stop; None means 1e-10 in float64, 1e-5 in float32.
      restart: Krylov dimension of a cycle (static).
      max_cycles: cycles at most.

    Raises:
      InputError: restart below 1, tolerance or max_cycles below 0.
    """

    tolerance: Any = None
    restart: int = eqx.field(default=30, static=True)
    max_cycles: Any = 100

    def __check_init__(self):
        if self.tolerance is not None:
            require_setting("tolerance", self.tolerance, 0, "None chooses by the dtype")
        require_setting("restart", self.restart, 1, "20 to 50 is usual", whole=True)
        require_setting("max_cycles", self.max_cycles, 0, "100 is usual", whole=True)

    def relative_tolerance(self, dtype):
        if self.tolerance is None:
            return 1e-10 if dtype == jnp.float64 else 1e-5
        return self.tolerance

    def solve(self, operator, prepared, rhs, guess, transpose):
        del prepared
        return _restarted_gmres(self, operator.T if transpose else operator, rhs, guess)


@one_at_a_time_on_cpu
def _restarted_gmres(solver, system, rhs, guess):
    system = system.fold()
    target = jnp.asarray(solver.relative_tolerance(rhs.dtype), rhs.dtype) * jnp.linalg.norm(rhs)

    def cycle(carry):
        x, gap, _, cycles = carry
        update, _ = gmres(
            lambda v: v - system.apply(v),
            gap,
            tol=0.0,
            atol=target / 2,  # its own count of the residual runs a little ahead of the true one
            restart=solver.restart,
            maxiter=1,
            solve_method="incremental",
        )
        new = residual_of(system, x + update, rhs)
        # A cycle that gains nothing will not gain later either: rounding, or a breakdown.
        gained = jnp.linalg.norm(new) < jnp.linalg.norm(gap)
        return jnp.where(gained, x + update, x), jnp.where(gained, new, gap), gained, cycles + 1

    def unfinished(carry):
        _, gap, gained, cycles = carry
        return gained & (jnp.linalg.norm(gap) > target) & (cycles < max_cycles)

    max_cycles = jnp.asarray(solver.max_cycles, jnp.int32)
    start = (guess, residual_of(system, guess, rhs), jnp.asarray(True), jnp.asarray(0, jnp.int32))
    x, _, _, cycles = lax.while_loop(unfinished, cycle, start)
    return x, cycles


class Neumann(LinearSolver):
    """The truncated series sum_k M^k b, with `terms` products after the first term (static).

    Always reported as converged, since it does what was asked; its residual is in the stats.
    """

    terms: int = eqx.field(static=True)

    def __check_init__(self):
        require_setting("terms", self.terms, 0, "0 keeps the first term alone", whole=True)

    def relative_tolerance(self, dtype):
        del dtype
        return jnp.inf

    def solve(self, operator, prepared, rhs, guess, transpose):
        del prepared, guess
        system = (operator.T if transpose else operator).fold()
        return lax.fori_loop(0, self.terms, lambda _, x: rhs + system.apply(x), rhs), jnp.asarray(self.terms)


class Descent(LinearSolver):
    """Gradient steps on |A x - b|^2 / 2 from the guess: x <- x - step_size A' (A x - b).

    The adjoint of M-SoBiRL (Yang, Gao and Yuan 2025, Algorithm 1) with `steps` steps an upper
    iteration (static), warm-started by the algorithm. Always reported as converged.
    """

    step_size: Any = 0.5
    steps: int = eqx.field(default=1, static=True)

    def __check_init__(self):
        require_setting("step_size", self.step_size, 0, "0.5 is usual")
        require_setting("steps", self.steps, 1, "1 is usual", whole=True)

    def relative_tolerance(self, dtype):
        del dtype
        return jnp.inf

    def solve(self, operator, prepared, rhs, guess, transpose):
        del prepared
        system = (operator.T if transpose else operator).fold()
        step_size = jnp.asarray(self.step_size, rhs.dtype)

        def step(_, x):
            gap = residual_of(system, x, rhs)
            return x + step_size * (gap - system.T.apply(gap))

        return lax.fori_loop(0, self.steps, step, guess), jnp.asarray(self.steps)


def default_linear_solver(num_states: int) -> LinearSolver:
    """Direct up to `DIRECT_LIMIT` states, GMRES above."""
    return Direct() if num_states <= DIRECT_LIMIT else GMRES()


def linear_solve(
    solver: LinearSolver,
    operator: StateOperator,
    modulus: jax.Array,
    rhs: jax.Array,
    *,
    transpose: bool = False,
    guess: jax.Array | None = None,
    share: bool = True,
    poison: bool = False,
) -> tuple[jax.Array, LinearStats]:
    """Solve (I - M) x = rhs, or (I - M') x = rhs, for an operator M with |M|_inf <= modulus < 1.

    Args:
      solver: a `LinearSolver`.
      operator, rhs: M and b[S]; differentiable, in forward and reverse mode and repeatedly.
      transpose: solve with the transpose.
      guess: start of an iterative solver for this right-hand side, [S]; zeros if None. Derivatives solve
        for others: there it is neither used nor differentiated.
      share: prepare once for this solve and its derivatives. False prepares anew in each, which is
        cheaper where no derivative follows: nothing has to be kept.
      poison: return NaN in x, and in the hidden solves of derivatives, where a solve did not
        converge. For solves whose stats nobody sees.

    Returns:
      x[S] and `LinearStats`.
    """
    solver = jax.tree.map(jnp.asarray, solver)
    if guess is not None:
        return _solve_from((transpose, share, poison), solver, operator, modulus, rhs, guess)
    frozen, frozen_solver, modulus = lax.stop_gradient((operator, solver, modulus))
    prepared = frozen_solver.prepare(frozen) if share else None

    def solve(b, flip):
        return _solve_once(frozen_solver, prepared, frozen, modulus, b, jnp.zeros_like(b), flip, poison)

    system = operator.T if transpose else operator
    return lax.custom_linear_solve(
        lambda x: x - system.apply(x),
        rhs,
        solve=lambda _, b: solve(b, transpose),
        transpose_solve=lambda _, b: solve(b, not transpose),
        has_aux=True,
    )


def _solve_once(solver, prepared, operator, modulus, rhs, guess, transpose, poison):
    x, steps = solver.solve(operator, prepared, rhs, guess, transpose)
    stats = _stats(solver, operator.T if transpose else operator, modulus, x, rhs, steps, transpose)
    return (jnp.where(stats.result == Result.CONVERGED, x, jnp.nan) if poison else x), stats


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
    """The tangents of what is not differentiated."""

    def zero(leaf):
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.zeros_like(leaf) if floating else np.zeros(leaf.shape, jax.dtypes.float0)

    return jax.tree.map(zero, tree)


def _stats(solver, system, modulus, x, rhs, steps, transpose) -> LinearStats:
    gap = residual_of(system, x, rhs)
    residual = jnp.sum(jnp.abs(gap)) if transpose else jnp.max(jnp.abs(gap))
    tolerance = jnp.asarray(solver.relative_tolerance(rhs.dtype), rhs.dtype)
    rounding = 8 * jnp.finfo(rhs.dtype).eps * jnp.linalg.norm(x)
    ok = jnp.linalg.norm(gap) <= 1.01 * tolerance * jnp.linalg.norm(rhs) + rounding
    result = jnp.where(ok, Result.CONVERGED, Result.MAX_STEPS)
    result = jnp.where(jnp.all(jnp.isfinite(x)), result, Result.NOT_FINITE)
    return LinearStats(result.astype(jnp.int32), steps, residual, residual / (1 - modulus))


def policy_value(mdp: MDP, policy: jax.Array, adjoint: LinearSolver | None = None) -> jax.Array:
    """The value V[S] of a policy[S, A] for the MDP's own reward, without regularization.

    Solves V = sum_a pi (r + discount P V). Differentiable in policy and every leaf of the MDP; batch
    axes first, as in the MDP. NaN where the linear solve did not converge.

    Raises:
      InputError: the policy's shape is not that of the reward, or an argument of another type.
    """
    require_instance("mdp", mdp, MDP)
    require_instance("adjoint", adjoint, LinearSolver | None)
    policy = as_float("policy", policy, mdp.reward.dtype, mdp.reward.shape)
    return _policy_value(mdp, _NoRegularizer(), policy, adjoint=adjoint)


@over_batch
def _policy_value(mdp, regularizer, policy, *, adjoint):
    del regularizer
    solver = default_linear_solver(mdp.num_states) if adjoint is None else adjoint
    rewards = jnp.sum(policy * mdp.reward, -1)
    return linear_solve(solver, discounted_operator(mdp, policy), mdp.modulus, rewards, poison=True)[0]


class _NoRegularizer(eqx.Module):
    """Stands in where `over_batch` wants a regularizer and the function has none."""

    def event_ndim(self):
        return self
