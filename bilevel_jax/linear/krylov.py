"""The part that the Krylov solvers share: they restart from the true residual, fall back to sweeps, stop, and run
batches.
"""

import abc
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from bilevel_jax.core.arrays import Count, Flag, PerState, Scalar
from bilevel_jax.core.cpu import one_at_a_time_on_cpu
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.rounding import KRYLOV_FLOOR, KRYLOV_NEAR_FLOOR, SOLVE_FLOOR
from bilevel_jax.core.validation import require_instance, require_setting
from bilevel_jax.linear.factorization import (
    Candidate,
    improve_if,
    is_affordable,
    operations_in_products,
    time_in_products,
)
from bilevel_jax.linear.preconditioners import Preconditioner
from bilevel_jax.linear.protocol import Attempt, LinearSolver, default_tolerance, power_of_two, residual_of
from bilevel_jax.mdp.transitions import PolicyOperator, StateOperator, TransposedOperator

# After a segment that gains nothing, SWEEPS plain sweeps x <- b + M x follow, and then another segment. For any M these
# sweeps contract in the sup norm (in the 1-norm if transposed). Their number doubles each time, up to FAILURES segments
# in a row that gain nothing. They are needed where a policy carries all mass to few states: until the mass has arrived
# there, the 2-norm of the residual grows, and no Krylov method that minimises this norm gains anything.
SWEEPS = 8
FAILURES = 9
# Where an LU factorization can take over, the products take at most as long as the factorization would. Once they have
# taken TRIAL of this time, they go on only while, at their rate so far, the rest takes no longer than that. They are
# not judged sooner, because a solve that gains nothing at first, as above, may be finished by then (goal grids of 500
# states take a quarter to a half of the time).
TRIAL = 1 / 2


class Progress(NamedTuple):
    """Where a solve stands: `x`[S] with its true residual `gap`[S], |gap|_2, and what it has cost."""

    x: PerState
    gap: PerState
    norm: Scalar
    best: tuple[PerState, PerState, Scalar]
    products: Count
    segments: Count
    failures: Count
    near: Flag


class KrylovSolver(LinearSolver):
    """A solver that runs segments of a Krylov method, each from the true residual of the last; it returns the best
    iterate.

    With `fall_back`, and up to 5,000 states, an LU factorization follows where products gain too little. It is made as
    soon as the gain per product so far says that it is the cheaper way to the end, or where a limit was reached.
    `LinearStats.products` then counts it as the number of products with the same number of operations.
    """

    tolerance: eqx.AbstractVar[Any]
    preconditioner: eqx.AbstractVar[Preconditioner | None]
    fall_back: eqx.AbstractVar[bool]

    def __check_init__(self):
        if self.tolerance is not None:
            require_setting("tolerance", self.tolerance, 0, "None chooses by the dtype")
            _require_below_one(self.tolerance)
        require_instance("preconditioner", self.preconditioner, Preconditioner | None)
        require_instance("fall_back", self.fall_back, bool)

    @abc.abstractmethod
    def segment(
        self, contraction: Callable[[PerState], PerState], gap: PerState, norm: Scalar, target: Scalar, budget: Count
    ) -> tuple[PerState, Count]:
        """Return (u[S], applications of `contraction`), where u - contraction(u) is nearer to `gap` than 0 is.

        The segment ends as soon as its estimate of the residual is at most `target`, or after about `budget` products.
        `norm` is |gap|_2, above 0.
        """

    @abc.abstractmethod
    def limits(self) -> tuple[Any, Any]:
        """Return the largest number of segments and the largest number of products."""

    def relative_tolerance(self, dtype):
        return default_tolerance(self.tolerance, dtype)

    def takes_rounding(self):
        return self.tolerance is None

    def prepare(self, operator):
        return None if self.preconditioner is None else self.preconditioner.prepare(operator)

    def solve(self, operator, prepared, rhs, guess, transpose):
        attempt, reached = _batchable(transpose)(operator, self, prepared, rhs, guess)
        if not (self.fall_back and is_affordable(rhs.shape[-1])):
            return attempt
        found = improve_if(~reached, operator, rhs, Candidate(attempt.x, attempt.gap), transpose=transpose)
        steps = attempt.products + jnp.where(reached, 0, operations_in_products(operator)).astype(jnp.int32)
        return Attempt(x=found.x, products=steps, stalled=attempt.stalled | ~reached, gap=found.gap)


def _require_below_one(tolerance):
    if not isinstance(tolerance, Tracer) and np.max(np.asarray(tolerance)) >= 1:
        raise InputError(
            f"tolerance must be below 1, got {np.max(np.asarray(tolerance)):g}: it is relative to |b|, and x = 0 has a "
            f"residual of 1; 1e-6 is usual, and GMRES(restart=50) sets the restart"
        )


def _run(fold, transpose, operator, solver, prepared, rhs, guess):
    scale = power_of_two(rhs) if guess is None else power_of_two(rhs, guess)
    if prepared is None:
        prepared = solver.prepare(operator)
    system = operator.T if transpose else operator
    system = system.fold() if fold else system
    guess = None if guess is None else guess / scale
    # Where a factorization can take over, how many products are worth making instead.
    patience = time_in_products(operator) if solver.fall_back and is_affordable(rhs.shape[-1]) else None
    (x, steps, stalled, gap), reached = _restarted(solver, system, prepared, rhs / scale, guess, transpose, patience)
    return Attempt(x=x * scale, products=steps, stalled=stalled, gap=None if gap is None else gap * scale), reached


def _restarted(solver, system, prepared, rhs, guess, transpose, patience):
    dtype = rhs.dtype
    eps = jnp.finfo(dtype).eps
    target = jnp.asarray(solver.relative_tolerance(dtype), dtype) * jnp.linalg.norm(rhs)
    most_segments, most_steps = (jnp.asarray(limit, jnp.int32) for limit in solver.limits())
    worth = 0.0 if patience is None else patience
    if patience is not None:
        most_steps = jnp.minimum(most_steps, round(worth))
    preconditioner = solver.preconditioner

    if preconditioner is None:
        contraction, expand, extra = system.apply, lambda u: u, 0
    else:

        def expand(u):
            return preconditioner.apply(prepared, u, transpose)

        def contraction(u):
            z = expand(u)
            return u - z + system.apply(z)

        extra = preconditioner.products

    def stop_at(x):
        # Without a tolerance of one's own, what rounding leaves is enough.
        return jnp.maximum(target, KRYLOV_FLOOR * eps * jnp.linalg.norm(x)) if solver.takes_rounding() else target

    def unfinished(p):
        going = (p.norm > stop_at(p.x)) & (p.segments < most_segments) & (p.products < most_steps)
        going &= (p.failures < FAILURES) & ~p.near
        return going if patience is None else going & ~slower(p)

    def slower(p):
        """Whether what was gained a product so far says that the rest takes longer than a factorization."""
        gained, left = jnp.log(first / p.best[2]), jnp.log(p.best[2] / stop_at(p.x))
        steps = p.products.astype(dtype)
        return (steps >= TRIAL * worth) & (left * steps > gained * worth)

    def body(p):
        u, applied = solver.segment(contraction, p.gap, p.norm, stop_at(p.x), (most_steps - p.products) // (1 + extra))
        x = p.x + expand(u)
        gap = residual_of(system, x, rhs)
        norm = jnp.linalg.norm(gap)
        steps = p.products + applied * (1 + extra) + extra + 1
        gained = norm < p.norm  # False also for NaN
        level = eps * jnp.linalg.norm(p.x)

        def accept(_):
            return x, gap, norm, steps, p.failures

        def sweep(_):
            sweeps = jnp.minimum(SWEEPS << p.failures, jnp.maximum(most_steps - steps, 1))
            x, gap = lax.fori_loop(0, sweeps, lambda _, c: (c[0] + c[1], system.apply(c[1])), (p.x, p.gap))
            x = x + extrapolation(gap, system.apply(gap))[0]
            gap = residual_of(system, x, rhs)
            return x, gap, jnp.linalg.norm(gap), steps + sweeps + 2, p.failures + 1

        x, gap, norm, steps, failures = lax.cond(gained, accept, sweep, None)
        better = norm < p.best[2]
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), (x, gap, norm), p.best)
        near = ~(norm < 0.9 * p.norm) & (p.norm <= KRYLOV_NEAR_FLOOR * level)
        # Sweeps may raise the 2-norm for a while; only a new best ends the row of failures.
        return Progress(
            x=x,
            gap=gap,
            norm=norm,
            best=best,
            products=steps,
            segments=p.segments + 1,
            failures=jnp.where(better, 0, failures),
            near=near,
        )

    zero = jnp.asarray(0, jnp.int32)
    if guess is None:
        x, gap = jnp.zeros_like(rhs), rhs
    else:
        x, gap = guess, residual_of(system, guess, rhs)
    norm = first = jnp.linalg.norm(gap)
    start = Progress(
        x=x,
        gap=gap,
        norm=norm,
        best=(x, gap, norm),
        products=zero,
        segments=zero,
        failures=zero,
        near=jnp.asarray(False),
    )
    out = lax.while_loop(unfinished, body, start)
    x, gap, norm = out.best
    # Plain sweeps of finite numbers are finite: where the last one was not, the operator or the right-hand side is not.
    finite = jnp.isfinite(out.norm)
    # A tolerance of one's own that rounding keeps out of reach is so for a factorization, too.
    level = eps * jnp.linalg.norm(x)
    allowed = SOLVE_FLOOR * level
    hidden = jnp.asarray(False) if solver.takes_rounding() else out.near & (target < allowed)
    reached = (norm <= 1.01 * target) | (solver.takes_rounding() & (norm <= allowed)) | hidden | ~finite
    attempt = Attempt(
        x=jnp.where(finite, x, jnp.nan), products=out.products, stalled=(out.failures >= FAILURES) | out.near, gap=gap
    )
    return attempt, reached


def extrapolation(term: PerState, following: PerState) -> tuple[PerState, PerState, Scalar]:
    """Return the sum of a geometric series that starts with `term` and goes on with `following` = M term.

    The ratio is the least-squares one. Once the other modes have died out, it is the ratio of the slowest mode. The
    function returns the sum [S], the residual [S] that the sum leaves of `term`, and the 2-norm of that residual.
    """
    square = jnp.sum(term * term)
    ratio = jnp.sum(term * following) / jnp.where(square == 0, 1, square)
    ratio = jnp.where(jnp.abs(ratio) < 1, ratio, 0)
    left = (following - ratio * term) / (1 - ratio)
    return term / (1 - ratio), left, jnp.linalg.norm(left)


def _shared(operator_batched: StateOperator) -> bool:
    """Return whether a batch shares its transitions. A product with them is then one product with several vectors."""
    if isinstance(operator_batched, TransposedOperator):
        return _shared(operator_batched.operator)
    part = operator_batched.transition if isinstance(operator_batched, PolicyOperator) else operator_batched
    return not any(jax.tree.leaves(part))


@functools.cache
def _batchable(transpose: bool):
    """Return `_run` with a batching rule: in lockstep where transitions are shared, else as `one_at_a_time_on_cpu`
    says.

    In lockstep the transitions are read once for the whole batch. With transitions of its own, an element gains nothing
    from the others, and is better off ending when it has converged.
    """
    single = jax.jit(functools.partial(_run, True, transpose))
    apart = one_at_a_time_on_cpu(single)
    mapped = jax.custom_batching.custom_vmap(single)

    @mapped.def_vmap
    def rule(axis_size, in_batched, *args):
        del axis_size
        in_axes = jax.tree.map(lambda batched: 0 if batched else None, list(in_batched))
        if not _shared(in_batched[0]):
            out = jax.vmap(apart, tuple(in_axes))(*args)
        else:
            # Folding a policy an element in would give each transitions of its own.
            function = functools.partial(_run, not any(jax.tree.leaves(in_batched[0])), transpose)
            # Further batch axes around this one are further batches of whole solves.
            out = one_at_a_time_on_cpu(lambda *a: jax.vmap(function, tuple(in_axes))(*a))(*args)
        return out, jax.tree.map(lambda _: True, out)

    return mapped
