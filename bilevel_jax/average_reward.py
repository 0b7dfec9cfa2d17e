"""Regularized MDPs by their average reward: gain and bias, differentiable.

  g + h = T h,  (T h)[s] = Omega*(r[s, :] + (P h)[s, :]):  the gain g is the largest average of reward less penalty
  a step, the bias h[S] what it is worth to start in s, up to a constant.
(Puterman 1994, chapter 8; with a regularizer, Neu, Jonsson and Gomez 2017, "A unified view of entropy-regularized
Markov decision processes".)
"""

import abc
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from bilevel_jax.adjoint import DIRECT_LIMIT, GMRES, Direct, LinearSolver, linear_solve, zero_tangents
from bilevel_jax.batching import one_at_a_time_on_cpu
from bilevel_jax.bellman import action_values, backup, check_compatible, greedy, read_policy
from bilevel_jax.captures import jit
from bilevel_jax.errors import InputError
from bilevel_jax.mdp import MDP, over_batch
from bilevel_jax.occupancy import is_moderate, unichain_operator, unichain_solve
from bilevel_jax.regularizers import Regularizer
from bilevel_jax.results import Outcome, Result
from bilevel_jax.validation import as_float, require_instance, require_setting, require_stopping

# Half the span of T h - h, in units in the last place of the largest |r| + |h|: what rounding leaves to reach,
# and up to where an iteration that has stopped to gain is taken to have stopped for rounding.
FLOOR_ULPS = 16
STALL_ULPS = 1000
DAMPING = 0.1
# The most sweeps in place of one policy iteration, 2^10.
MOST_DOUBLINGS = 10


class AverageRewardStats(eqx.Module):
    """How a solve went; scalars, one a batch element.

    `steps` counts sweeps. `lower` and `upper` are the least and the largest entry of T h - h, with an
    allowance for rounding of 16 units in the last place of the largest |r| + |h|: the optimal gain is
    between them, whatever h is, and that of every state is if they differ. `error_bound`, half their
    distance, bounds |gain - g*|. The bias has no such bound: its error also depends on how fast the
    chain forgets.
    """

    steps: jax.Array
    lower: jax.Array
    upper: jax.Array
    error_bound: jax.Array


class AverageRewardSolution(eqx.Module):
    """The solved MDP; batch axes first, as in the MDP.

    `gain` [], `bias` h[S] with initial' h = 0, `q` [S, A] = r + P h and `policy` = grad Omega*(q), so that
    Omega*(q) = gain + h. `result` is a `Result` code, `stats` the report; `bj.check` raises where it did
    not converge.
    """

    gain: jax.Array
    bias: jax.Array
    q: jax.Array
    policy: jax.Array
    result: jax.Array
    stats: AverageRewardStats

    def outcomes(self) -> tuple[Outcome, ...]:
        return (Outcome("solve_average_reward", self.result, self.stats.error_bound),)


class Iterate(NamedTuple):
    """Where a solver stands: h[S], its q[S, A] and T h - h [S], and how many steps failed one after another."""

    bias: jax.Array
    q: jax.Array
    gap: jax.Array
    failures: jax.Array


class Step(NamedTuple):
    """The next h[S], failures in a row, and the sweeps that it took."""

    bias: jax.Array
    failures: jax.Array
    sweeps: jax.Array


class AverageRewardSolver(eqx.Module):
    """The protocol: fields `tolerance` and `max_steps`, and a step.

    `tolerance` is a bound on |gain - g*|, in units of the reward; None asks for working precision.
    `max_steps` counts sweeps. `batched_on_cpu`: whether vmap on a CPU advances all elements together.
    """

    batched_on_cpu: ClassVar[bool] = True

    tolerance: eqx.AbstractVar[Any]
    max_steps: eqx.AbstractVar[Any]

    def __check_init__(self):
        require_stopping(self.tolerance, self.max_steps)

    @abc.abstractmethod
    def step(self, mdp: MDP, regularizer: Regularizer, iterate: Iterate) -> Step:
        """The next h[S], up to a constant. `mdp.discount` is 1."""


class RelativeValueIteration(AverageRewardSolver):
    """h <- h + (1 - damping) (T h - h), less a constant (White 1963; damped, Schweitzer 1971).

    Linear, at the rate at which the damped chain forgets where it started. Without damping it does not
    converge where optimal chains are periodic.

    Args:
      tolerance: bound on |gain - g*|; None asks for working precision.
      max_steps: sweeps at most.
      damping: the probability with which the damped chain stays where it is, in [0, 1). A chain that is
        known to be aperiodic converges faster with less.

    Raises:
      InputError: tolerance below 0, max_steps below 1, or damping outside [0, 1).
    """

    tolerance: Any = None
    max_steps: Any = 100_000
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

    Howard's policy iteration with regularized evaluation, nu uniform; quadratic near the solution. A step
    that does not shrink the span of T h - h, or whose system is singular because a policy on the way has
    several recurrent classes, is replaced by sweeps of `RelativeValueIteration`, twice as many each time
    in a row: it converges where those do, at no more than a few times their cost.

    Args:
      tolerance: bound on |gain - g*|; None asks for working precision.
      max_steps: sweeps at most (a few more may be made before it is noticed).
      linear_solver: None is direct up to 512 states, and above one cycle of GMRES at most, to a relative
        residual of 0.1.

    Raises:
      InputError: tolerance below 0 or max_steps below 1, or no `LinearSolver`.
    """

    tolerance: Any = None
    max_steps: Any = 20_000
    linear_solver: LinearSolver | None = None
    batched_on_cpu: ClassVar[bool] = False

    def __check_init__(self):
        require_instance("linear_solver", self.linear_solver, LinearSolver | None)

    def step(self, mdp, regularizer, iterate):
        solver = self.linear_solver
        if solver is None:
            solver = Direct() if mdp.num_states <= DIRECT_LIMIT else GMRES(tolerance=0.1, max_cycles=1)
        bias, q, gap, failures = iterate
        operator = unichain_operator(mdp, regularizer.policy(q))
        centered = gap - (jnp.max(gap) + jnp.min(gap)) / 2
        unused = jnp.zeros((), gap.dtype)  # a modulus, for an error bound that nobody reads
        correction, _ = linear_solve(solver, operator, unused, centered, share=False)
        new = bias + jnp.where(is_moderate(correction, centered), correction, 0)
        better = jnp.ptp(backup(mdp, regularizer, new) - new) < jnp.ptp(gap)

        def sweep(_, bias):
            bias = bias - jnp.mean(bias)
            return bias + (1 - DAMPING) * (backup(mdp, regularizer, bias) - bias)

        sweeps = jnp.where(better, 0, 2 ** jnp.minimum(failures, MOST_DOUBLINGS)).astype(jnp.int32)
        new = lax.fori_loop(0, sweeps, sweep, jnp.where(better, new, bias))
        return Step(new, jnp.where(better, 0, failures + 1), sweeps + 1)


def solve_average_reward(
    mdp: MDP,
    regularizer: Regularizer,
    *,
    solver: AverageRewardSolver | None = None,
    adjoint: LinearSolver | None = None,
    initial_bias: jax.Array | None = None,
) -> AverageRewardSolution:
    """Solve g + h = T h: the largest average of reward less penalty a step, and the policy that attains it.

    Assumes that every policy which the regularizer can return has one recurrent class (unichain): with
    Shannon entropy, that some state can be reached from everywhere. Otherwise there is no one gain: the
    bounds on it do not close, and the result is MAX_STEPS, with bounds on the gains of all states.

    Derivatives of any order and mode, in every floating-point leaf of `mdp` and `regularizer`, come from
    the implicit function theorem: (I - P_pi + 1 nu') x = dT(h), dg = nu' x and dh = x - dg up to a constant.
    They cost two linear solves, one of them to know that the system is regular; where it is not, or a
    solve fails, they are NaN.

    Args:
      mdp: the process, with any batch axes. Its discount must be a number a problem and is not used: this
        criterion is the limit of (1 - discount) V as the discount goes to 1.
      regularizer: with the same batch axes or shared.
      solver: None is `RelativePolicyIteration()`: to working precision.
      adjoint: linear solver of the derivatives; None chooses by the number of states.
      initial_bias: h[S] to start from; None is zeros. Not differentiated.

    Returns:
      `AverageRewardSolution`.

    Raises:
      InputError: shapes that disagree, a discount for each pair, or an argument of another type.
    """
    require_instance("mdp", mdp, MDP)
    require_instance("regularizer", regularizer, Regularizer)
    require_instance("solver", solver, AverageRewardSolver | None)
    require_instance("adjoint", adjoint, LinearSolver | None)
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
    bias = bias - mdp.initial @ bias
    q = action_values(mdp, bias)
    return AverageRewardSolution(gain, bias, q, read_policy(regularizer, q), result, stats)


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
    gain_dot = operator.border @ x
    return (gain, bias, result, stats), (gain_dot, x - gain_dot, *zero_tangents((result, stats)))


def _iterate(solver, mdp, regularizer, bias):
    """Run `solver` from h[S] on one MDP: the gain, h of mean 0, the result code and the stats."""
    ulp = jnp.finfo(bias.dtype).eps
    max_steps = jnp.asarray(solver.max_steps, jnp.int32)
    target = 0 if solver.tolerance is None else jnp.asarray(solver.tolerance, bias.dtype)
    used = mdp.reward if mdp.available is None else jnp.where(mdp.available, mdp.reward, 0)
    reward_scale = jnp.max(jnp.abs(used))

    def sweep(bias, failures):
        bias = bias - jnp.mean(bias)
        q = action_values(mdp, bias)
        gap = regularizer.conjugate(q) - bias
        ulps = ulp * (reward_scale + jnp.max(jnp.abs(bias)))
        return Iterate(bias, q, gap, failures), jnp.ptp(gap) / 2, ulps

    def stopped_by_rounding(half, previous, ulps):
        return (half <= FLOOR_ULPS * ulps) | ((half >= previous) & (half <= STALL_ULPS * ulps))

    def unfinished(carry):
        _, half, previous, ulps, steps = carry
        bound = half + FLOOR_ULPS * ulps
        done = (bound <= target) | stopped_by_rounding(half, previous, ulps) | ~jnp.isfinite(bound)
        return ~done & (steps < max_steps)

    def body(carry):
        current, half, _, _, steps = carry
        bias, failures, sweeps = solver.step(mdp, regularizer, current)
        new, new_half, ulps = sweep(bias, failures)
        return new, new_half, half, ulps, steps + sweeps + 1

    first, half, ulps = sweep(bias, jnp.asarray(0, jnp.int32))
    start = (first, half, jnp.full_like(half, jnp.inf), ulps, jnp.asarray(1, jnp.int32))
    last, half, previous, ulps, steps = lax.while_loop(unfinished, body, start)

    rounding = FLOOR_ULPS * ulps
    lower, upper = jnp.min(last.gap) - rounding, jnp.max(last.gap) + rounding
    bound = half + rounding
    limit = Result.CONVERGED if solver.tolerance is None else Result.PRECISION_LIMIT
    result = jnp.where(stopped_by_rounding(half, previous, ulps), limit, Result.MAX_STEPS)
    result = jnp.where(bound <= target, Result.CONVERGED, result)
    # h may be finite where q is not: an action that the regularizer never takes.
    q = last.q if mdp.available is None else jnp.where(mdp.available, last.q, 0)
    finite = jnp.all(jnp.isfinite(q)) & jnp.isfinite(bound)
    result = jnp.where(finite, result, Result.NOT_FINITE).astype(jnp.int32)
    gain = (jnp.max(last.gap) + jnp.min(last.gap)) / 2
    return gain, last.bias, result, AverageRewardStats(steps, lower, upper, bound)


_iterate_one_at_a_time = one_at_a_time_on_cpu(_iterate)
