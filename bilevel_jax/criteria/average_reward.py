"""Regularized MDPs by their average reward: gain and bias, differentiable.

  g + h = T h,  (T h)[s] = Omega*(r[s, :] + (P h)[s, :]).
The gain g is the largest average, per step, of the reward minus the penalty. The bias h[s] says, up to a constant, how
much it is worth to start in s (Puterman 1994, chapter 8; with a regularizer, Neu, Jonsson and Gomez 2017, "A unified
view of entropy-regularized Markov decision processes").
"""

import abc
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, Int, Real

from bilevel_jax.core import rounding
from bilevel_jax.core.arrays import Count, PerPair, PerState, Scalar
from bilevel_jax.core.batching import over_batch
from bilevel_jax.core.captures import jit
from bilevel_jax.core.cpu import one_at_a_time_on_cpu
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.reductions import matmul
from bilevel_jax.core.results import Outcome
from bilevel_jax.core.rounds import Found, in_rounds, only_if
from bilevel_jax.core.validation import as_float, require_instance, require_numbers, require_setting, require_stopping
from bilevel_jax.linear import DIRECT_LIMIT, GMRES, Direct, LinearSolver, linear_solve, zero_tangents
from bilevel_jax.linear.factorization import is_affordable, solve_if, time_in_products
from bilevel_jax.mdp.bellman import action_values, backup, check_compatible, greedy, read_policy, sizes_of, sup_norm
from bilevel_jax.mdp.process import MDP
from bilevel_jax.mdp.regularizers import Regularizer
from bilevel_jax.mdp.transitions import PolicyOperator, StateOperator
from bilevel_jax.solvers.occupancy import unichain_operator, unichain_solve

DAMPING = 0.1
# The most sweeps in place of one policy iteration, 2^10.
MOST_DOUBLINGS = 10
# The relative residual of a step's linear system that is solved by products.
ROUGH = 0.1
# So many steps later at most, what is collected is taken for what lasts.
LATER = 1000


class AverageRewardStats(eqx.Module):
    """The report of a solve: one scalar per batch element in every field.

    `iterations` counts sweeps. `lower` and `upper` are the least and the largest entry of T h - h, with an allowance
    for the rounding of that sweep (rounding.py). The optimal gain is between them, whatever h is; if the states have
    different gains, all of them are. `error_bound`, half the distance of the two, bounds |gain - g*|. The bias has
    no such bound: its error also depends on how fast the chain forgets its start.
    """

    iterations: Int[Array, "*batch"]
    lower: Float[Array, "*batch"]
    upper: Float[Array, "*batch"]
    error_bound: Float[Array, "*batch"]


class AverageRewardSolution(eqx.Module):
    """The solution of an MDP by its average reward; batch axes come first, as in the MDP.

    `gain` [], `bias` h[S] with initial' h = 0, `q` [S, A] = r + P h and `policy` = grad Omega*(q), so that Omega*(q) =
    gain + h. `result` is a `Result` code and `stats` the report; `bj.check` raises where the solver did not converge.
    """

    gain: Float[Array, "*batch"]
    bias: Float[Array, "*batch S"]
    q: Float[Array, "*batch S A"]
    policy: Float[Array, "*batch S A"]
    result: Int[Array, "*batch"]
    stats: AverageRewardStats

    def outcomes(self) -> tuple[Outcome, ...]:
        return (Outcome("solve_average_reward", self.result, self.stats.error_bound),)


class Iterate(NamedTuple):
    """Where a solver stands: h[S], its q[S, A] and T h - h [S], and how many steps failed one after another."""

    bias: PerState
    q: PerPair
    gap: PerState
    failures: Count


class Step(NamedTuple):
    """The next h[S], failures in a row, and the sweeps that it took."""

    bias: PerState
    failures: Count
    sweeps: Count


class AverageRewardSolver(eqx.Module):
    """The protocol: fields `tolerance` and `max_iterations`, and a step.

    `tolerance` is a bound on |gain - g*|, in units of the reward; None asks for working precision.
    `max_iterations` counts sweeps. `batched_on_cpu`: whether vmap on a CPU advances all elements together.
    """

    batched_on_cpu: ClassVar[bool] = True

    tolerance: eqx.AbstractVar[Any]
    max_iterations: eqx.AbstractVar[Any]

    def __check_init__(self):
        require_stopping(self.tolerance, self.max_iterations)

    @abc.abstractmethod
    def step(self, mdp: MDP, regularizer: Regularizer, iterate: Iterate) -> Step:
        """The next h[S], up to a constant. `mdp.discount` is 1."""


class RelativeValueIteration(AverageRewardSolver):
    """h <- h + (1 - damping) (T h - h), minus a constant (White 1963; damped, Schweitzer 1971).

    It converges linearly, at the rate at which the damped chain forgets where it started. Without damping it does not
    converge where optimal chains are periodic.

    Args:
      tolerance: bound on |gain - g*|; None asks for working precision.
      max_iterations: the largest number of sweeps.
      damping: the probability with which the damped chain stays where it is, in [0, 1). A chain that is known to be
        aperiodic converges faster with less.

    Raises:
      InputError: tolerance below 0, max_iterations below 1, or damping outside [0, 1).

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)  # the discount is not used
      >>> solution = bj.solve_average_reward(mdp, bj.Unregularized(), solver=bj.RelativeValueIteration())
      >>> round(float(bj.check(solution).gain), 4)
      1.0
    """

    tolerance: Any = None
    max_iterations: Any = 100_000
    damping: Any = DAMPING

    def __check_init__(self):
        require_setting("damping", self.damping, 0, "0.1 is usual")
        if not isinstance(self.damping, Tracer) and np.max(np.asarray(self.damping)) >= 1:
            raise InputError(f"damping must be below 1, got {np.max(np.asarray(self.damping)):g}; 0.1 is usual")

    def step(self, mdp, regularizer, iterate):
        del mdp, regularizer
        bias = iterate.bias + (1 - jnp.asarray(self.damping, iterate.gap.dtype)) * iterate.gap
        return Step(bias, iterate.failures, jnp.asarray(0, jnp.int32))


class RelativePolicyIteration(AverageRewardSolver):
    """Newton's method on g + h = T h: h <- h + x, (I - P_pi + 1 nu') x = T h - h, pi the policy at h.

    Howard's policy iteration with regularized evaluation, nu uniform; quadratic near the solution. A step that does not
    shrink the span of T h - h, or whose system is singular because a policy on the way has several recurrent classes,
    is replaced by sweeps of `RelativeValueIteration`, twice as many each time in a row: it converges where those do, at
    no more than a few times their cost.

    Args:
      tolerance: bound on |gain - g*|; None asks for working precision.
      max_iterations: sweeps at most (a few more may be made before it is noticed).
      linear_solver: None is direct up to 512 states, and above one cycle of GMRES at most, to a relative residual of
        0.1; where the rest would take longer than a factorization, that is made up to 5,000 states.

    Raises:
      InputError: tolerance below 0 or max_iterations below 1, or no `LinearSolver`.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)  # the discount is not used
      >>> solution = bj.solve_average_reward(mdp, bj.Unregularized(), solver=bj.RelativePolicyIteration())
      >>> round(float(bj.check(solution).gain), 4)
      1.0
    """

    tolerance: Any = None
    max_iterations: Any = 20_000
    linear_solver: LinearSolver | None = None
    batched_on_cpu: ClassVar[bool] = False

    def __check_init__(self):
        require_instance("linear_solver", self.linear_solver, LinearSolver | None)

    def step(self, mdp, regularizer, iterate):
        bias, q, gap, failures = iterate
        operator = unichain_operator(mdp, regularizer.policy(q))
        centered = gap - (jnp.max(gap) + jnp.min(gap)) / 2
        correction = _correction(self.linear_solver, operator, centered)
        new = bias + jnp.where(rounding.is_moderate(correction, centered), correction, 0)
        better = jnp.ptp(backup(mdp, regularizer, new) - new) < jnp.ptp(gap)

        def sweep(_, bias):
            bias = bias - jnp.mean(bias)
            return bias + (1 - DAMPING) * (backup(mdp, regularizer, bias) - bias)

        sweeps = jnp.where(better, 0, 2 ** jnp.minimum(failures, MOST_DOUBLINGS)).astype(jnp.int32)
        new = lax.fori_loop(0, sweeps, sweep, jnp.where(better, new, bias))
        return Step(new, jnp.where(better, 0, failures + 1), sweeps + 1)


def _correction(solver: LinearSolver | None, operator: StateOperator, rhs: PerState) -> PerState:
    """Return x[S] with (I - M) x = rhs, M of a policy, as exactly as a step of policy iteration needs."""
    unused = jnp.zeros((), rhs.dtype)  # a modulus, for an error bound that nobody reads
    if solver is not None or rhs.shape[0] <= DIRECT_LIMIT:
        return linear_solve(Direct() if solver is None else solver, operator, unused, rhs, share=False)[0]
    x, stats = linear_solve(GMRES(tolerance=ROUGH, max_cycles=1), operator, unused, rhs, share=False)
    if not is_affordable(rhs.shape[0]):
        return x
    ratio = stats.residual / jnp.max(jnp.abs(rhs))
    # At what it gained a product, would the rest take longer than a factorization?
    left = jnp.log(ratio / ROUGH) * stats.products.astype(rhs.dtype)
    slow = left > -jnp.log(ratio) * time_in_products(operator)
    return solve_if(slow, operator, rhs, x)


def solve_average_reward(
    mdp: MDP,
    regularizer: Regularizer,
    *,
    solver: AverageRewardSolver | None = None,
    adjoint: LinearSolver | None = None,
    initial_bias: Real[ArrayLike, "*batch S"] | Sequence[Any] | None = None,
) -> AverageRewardSolution:
    """Solve g + h = T h: find the largest average of reward minus penalty per step, and the policy that attains it.

    It assumes that every policy which the regularizer can return has one recurrent class (unichain): with Shannon
    entropy, that some state can be reached from everywhere. Otherwise there is no one gain: the bounds on it do not
    close, and the result is MAX_ITERATIONS, with bounds on the gains of all states.

    Derivatives of any order and mode, in every floating-point leaf of `mdp` and `regularizer`, come from the implicit
    function theorem: (I - P_pi + 1 nu') x = dT(h), dg = nu' x and dh = x - dg up to a constant. They cost two linear
    solves, one of which tests whether the system is regular. Where it is not, or a solve fails, they are NaN.

    Args:
      mdp: the process, with any batch axes. Its discount must be one number per problem and is not used: this
        criterion is the limit of (1 - discount) V as the discount goes to 1.
      regularizer: with the same batch axes or shared.
      solver: None is `RelativePolicyIteration()`: to working precision.
      adjoint: linear solver of the derivatives; None chooses by the number of states.
      initial_bias: h[S] to start from; None is zeros. Not differentiated.

    Raises:
      InputError: shapes that disagree, a discount for each pair, or an argument of another type.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)  # the discount is not used
      >>> solution = bj.check(bj.solve_average_reward(mdp, bj.ShannonEntropy(0.1)))
      >>> round(float(solution.gain), 3), solution.bias.shape
      (1.0, (2,))
    """
    require_instance("mdp", mdp, MDP)
    require_instance("regularizer", regularizer, Regularizer)
    require_instance("solver", solver, AverageRewardSolver | None)
    require_numbers("solver", solver)
    require_instance("adjoint", adjoint, LinearSolver | None)
    require_numbers("adjoint", adjoint)
    check_compatible(mdp, regularizer)
    if mdp.discount.ndim > len(mdp.batch_shape):
        raise InputError(
            f"discount: shape {list(mdp.discount.shape)} has one for each pair, but an average over time has no "
            f"discount and a process that ends no average; give one number (it is not used) and let what ends "
            f"start anew by the transition"
        )
    if initial_bias is not None:
        initial_bias = as_float("initial_bias", initial_bias, mdp.reward.dtype, mdp.reward.shape[:-1])
    return _solve(mdp, regularizer, initial_bias, solver, adjoint)


@jit
def _solve(mdp, regularizer, initial_bias, solver, adjoint):
    solver = RelativePolicyIteration() if solver is None else solver
    mdp = eqx.tree_at(lambda m: m.discount, mdp, jnp.ones_like(mdp.discount))
    return _solve_one(mdp, regularizer, initial_bias, solver=solver, adjoint=adjoint)


@over_batch
def _solve_one(mdp, regularizer, initial_bias, *, solver, adjoint):
    start = jnp.zeros_like(mdp.reward[:, 0]) if initial_bias is None else lax.stop_gradient(initial_bias)
    numbers = jax.tree.map(jnp.asarray, (solver, adjoint))
    gain, bias, result, stats = _fixed_point(*numbers, mdp, regularizer, start)
    bias = bias - matmul(mdp.initial, bias)
    q = action_values(mdp, bias)
    return AverageRewardSolution(
        gain=gain, bias=bias, q=q, policy=read_policy(regularizer, q), result=result, stats=stats
    )


@jax.custom_jvp
def _fixed_point(solver, adjoint, mdp, regularizer, start):
    del adjoint
    run = _iterate if solver.batched_on_cpu else _iterate_one_at_a_time
    return run(solver, mdp, regularizer, start)


@_fixed_point.defjvp
def _fixed_point_jvp(primals, tangents):
    solver, adjoint, mdp, regularizer, start = primals
    _, _, mdp_dot, regularizer_dot, _ = tangents
    gain, bias, result, stats = _fixed_point(solver, adjoint, mdp, regularizer, start)
    _, backup_dot = jax.jvp(lambda m, r: backup(m, r, bias), (mdp, regularizer), (mdp_dot, regularizer_dot))
    operator = unichain_operator(mdp, greedy(mdp, regularizer, bias)[1])
    x = unichain_solve(mdp, adjoint, operator, backup_dot)
    # The border is the mean, which of `bias` is 0 whatever the parameters are.
    gain_dot = matmul(operator.border, x)
    return (gain, bias, result, stats), (gain_dot, x - gain_dot, *zero_tangents((result, stats)))


class Walk(NamedTuple):
    """Where an iteration stands, half the span of T h - h before it, and the sweeps made."""

    iterate: Iterate
    previous: Scalar
    iterations: Count


class Answer(NamedTuple):
    """h[S] of mean 0, the gain in the middle of its bounds, and the rounding in these."""

    bias: PerState
    gain: Scalar
    lower: Scalar
    upper: Scalar


def _later(mdp: MDP, policy: PerPair, *numbers: PerState) -> tuple[PerState, ...]:
    """Return the expectations of numbers [S] at a later time, by the start: after S steps, or 1,000 if S is larger."""
    operator = PolicyOperator(mdp.transition, policy).fold()

    def step(_, now):
        return tuple(operator.apply(each) for each in now)

    return lax.fori_loop(0, min(mdp.num_states, LATER), step, numbers)


def _iterate(solver, mdp, regularizer, bias):
    """Run `solver` from h[S] on one MDP: the gain, h of mean 0, the result code and the stats.

    As `solvers.loop.iterate`: steps until the bounds on the gain are as near as was asked or rounding allows, then a
    close look at the rounding of each state's own equation.
    """
    dtype = bias.dtype
    sums = mdp.transition.sums(bias)
    to_working_precision = solver.tolerance is None
    wanted = jnp.asarray(0 if to_working_precision else solver.tolerance, dtype)

    def sweep(bias, failures):
        bias = bias - jnp.mean(bias)
        q = action_values(mdp, bias)
        return Iterate(bias=bias, q=q, gap=regularizer.conjugate(q) - bias, failures=failures)

    def rounding_of(size):
        """The rounding of a sweep whose numbers are all at most `size`."""
        return rounding.of_sweep(sums, size, 2 * size, jnp.zeros_like(size))

    def half_span_at(walk: Walk, found: Found):
        """Half the span of T h - h, and the rounding of one entry."""
        bias, _, gap, _ = walk.iterate
        return jnp.ptp(gap) / 2, rounding_of(jnp.maximum(sup_norm(bias), sup_norm(bias + gap))) + found.extra

    def at_rounding(half, noise, previous):
        return (half <= noise) | ((half >= previous) & (half <= rounding.STALL * noise))

    def going(walk: Walk, found: Found):
        half, noise = half_span_at(walk, found)
        return (half + noise > found.asked) & ~at_rounding(half, noise, walk.previous) & jnp.isfinite(half)

    def step(walk: Walk, found: Found, unseen) -> Walk:
        del unseen
        half, _ = half_span_at(walk, found)
        bias, failures, sweeps = solver.step(mdp, regularizer, walk.iterate)
        return Walk(sweep(bias, failures), half, walk.iterations + sweeps + 1)

    def find(walk: Walk, found: Found) -> Found:
        bias, q, gap, _ = walk.iterate
        half, seen = half_span_at(walk, found)
        sizes = sizes_of(mdp, regularizer, bias, q, bias + gap)
        own = sizes._replace(q=sizes.q + jnp.abs(bias) + jnp.abs(gap))  # of g + h = T h, h and g are numbers, too
        noise = rounding.of_sweep(sums, sup_norm(bias), jnp.max(own.q), jnp.max(own.spread)) + jnp.max(own.lost)
        gain = (jnp.max(gap) + jnp.min(gap)) / 2
        times = jnp.asarray(rounding.AT_WORKING_PRECISION, dtype)
        excess = jnp.max(jnp.abs(gap - gain) / own.allowed(sums, own.expected(), times))
        lower, upper = jnp.min(gap) - noise, jnp.max(gap) + noise
        bound = half + noise

        # Any gain is between the least and the most that is collected in a step. A bias that drifts, as it does where
        # states have several gains, covers any difference by its rounding in the end: a gain is known to working
        # precision only where its bounds say much more than that.
        def says_something(scale, size):
            least = rounding.of_equation(sums, size, 2 * size, jnp.zeros_like(size), jnp.max(own.lost), times)
            return rounding.KNOWN * scale + least if to_working_precision else jnp.minimum(wanted, scale + least)

        collected = jnp.abs(sizes.collected)
        lowest = jnp.min(jnp.where(collected > 0, collected, jnp.inf))
        lowest = jnp.where(jnp.isfinite(lowest), lowest, 0)
        scale, size = jnp.maximum(jnp.ptp(sizes.collected) / 2, lowest), jnp.max(collected)
        near = bound <= says_something(scale, size)
        if to_working_precision:
            near &= excess <= 1

        # What is collected on the way to where the process stays is no part of a gain, however much it is. So bounds
        # are compared with how far from the gain is what is collected in the long run; or with the least that any state
        # collects, if that is more: where all ends at nothing, nothing else is there.
        def lasting():
            later = _later(mdp, regularizer.policy(q), jnp.abs(sizes.collected - gain), collected)
            return jnp.stack([jnp.max(numbers) for numbers in later])

        far, size = only_if(near, lasting, jnp.stack([scale, size]))
        at_most = says_something(jnp.maximum(far, lowest), size)
        accepted = near & (bound <= at_most)
        asked = found.asked if to_working_precision else at_most
        # h may be finite where q is not: an action that the regularizer never takes.
        known = jnp.isfinite(q) if mdp.available is None else jnp.isfinite(q) | ~mdp.available
        extra = jnp.maximum(noise - (seen - found.extra), 0)
        limited = at_rounding(half, noise, walk.previous) & (not to_working_precision)
        finite = jnp.all(known) & jnp.isfinite(bound)
        return Found(
            answer=Answer(bias=bias, gain=gain, lower=lower, upper=upper),
            accepted=accepted,
            limited=limited,
            finite=finite,
            excess=excess,
            asked=asked,
            extra=extra,
        )

    unknown = jnp.asarray(jnp.inf, dtype)
    walk, found = in_rounds(
        Walk(sweep(bias, jnp.asarray(0, jnp.int32)), unknown, jnp.asarray(1, jnp.int32)),
        Answer(bias=bias, gain=unknown, lower=unknown, upper=unknown),
        wanted,
        jnp.asarray(solver.max_iterations, jnp.int32),
        going=going,
        step=step,
        find=find,
        to_working_precision=to_working_precision,
    )
    answer = found.answer
    bound = (answer.upper - answer.lower) / 2
    return (
        answer.gain,
        answer.bias,
        found.result,
        AverageRewardStats(iterations=walk.iterations, lower=answer.lower, upper=answer.upper, error_bound=bound),
    )


_iterate_one_at_a_time = one_at_a_time_on_cpu(_iterate)
