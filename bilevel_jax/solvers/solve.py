"""`solve`: the optimal value, action values and policy of a regularized MDP, differentiable."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int, Real

from bilevel_jax.core.batching import over_batch
from bilevel_jax.core.captures import jit
from bilevel_jax.core.cpu import one_at_a_time_on_cpu
from bilevel_jax.core.results import Outcome, Result
from bilevel_jax.core.validation import as_float, require_computable, require_kind, require_numbers
from bilevel_jax.linear import LinearSolver, default_linear_solver, linear_solve, zero_tangents
from bilevel_jax.mdp.bellman import action_values, backup, check_compatible, read_policy
from bilevel_jax.mdp.process import MDP
from bilevel_jax.mdp.regularizers import Regularizer
from bilevel_jax.solvers.auto import Auto
from bilevel_jax.solvers.evaluation import improve, policy_operator
from bilevel_jax.solvers.loop import Solver, SolveStats, iterate


class Solution(eqx.Module):
    """The solution of an MDP; batch axes come first, as in the MDP.

    `value` V[S], `q` Q[S, A] and `policy` pi[S, A] belong together: q = r + discount P value and policy = grad
    Omega*(q). `result` is a `Result` code and `stats` the solver's report. `bj.check(solution)` raises where the solver
    did not converge.
    """

    value: Float[Array, "*batch S"]
    q: Float[Array, "*batch S A"]
    policy: Float[Array, "*batch S A"]
    result: Int[Array, "*batch"]
    stats: SolveStats

    def outcomes(self) -> tuple[Outcome, ...]:
        return (Outcome("solve", self.result, self.stats.error_bound),)


def solve(
    mdp: MDP,
    regularizer: Regularizer,
    *,
    solver: Solver | None = None,
    adjoint: LinearSolver | None = None,
    initial_value: Real[ArrayLike, "*batch S"] | Sequence[Any] | None = None,
) -> Solution:
    """Solve V = T V and return value, action values and policy.

    The result has derivatives of any order and mode, in every floating-point leaf of `mdp` and `regularizer`. They come
    from the implicit function theorem at V*: dV* = (I - discount P_pi)^-1 dT(V*). Their cost does not depend on the
    number of iterations. Where the linear solve of a derivative fails, the derivative is NaN, because it has no other
    way to report this; `hypergradient` returns a report. Where `result` is not CONVERGED, the derivative is taken at
    another V than V*. It may be finite and wrong: return `result` beside it, e.g. by `jax.grad(..., has_aux=True)`.

    Args:
      mdp: the process, with any batch axes; every field of the result then has them.
      regularizer: with the same batch axes or shared.
      solver: None is `Auto()`, which solves to working precision and chooses the method by size and transition.
      adjoint: the linear solver of the derivatives; None chooses by the number of states.
      initial_value: V[S] to start from; None is zeros. It is not differentiated.

    Returns:
      `Solution`.

    Raises:
      InputError: shapes that disagree, or an argument of another type.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> solution = bj.check(bj.solve(mdp, bj.ShannonEntropy(0.1)))
      >>> solution.value.shape, solution.policy.shape
      ((2,), (2, 2))
      >>> jax.grad(lambda mdp: bj.solve(mdp, bj.ShannonEntropy(0.1)).value.sum())(mdp).reward.shape
      (2, 2)
    """
    require_kind("mdp", mdp, MDP)
    require_kind("regularizer", regularizer, Regularizer)
    require_kind("solver", solver, Solver | None)
    require_kind("adjoint", adjoint, LinearSolver | None)
    if mdp.available is not None:  # values count there; the rest is looked at once a compilation, in `_solve`
        check_compatible(mdp, regularizer)
    if initial_value is not None:
        initial_value = as_float("initial_value", initial_value, mdp.reward.dtype, mdp.reward.shape[:-1])
    return _solve(mdp, regularizer, initial_value, solver, adjoint)


@jit
def _solve(mdp, regularizer, initial_value, solver, adjoint):
    parts = {"mdp": mdp, "regularizer": regularizer, "solver": solver, "adjoint": adjoint}
    for name, part in parts.items():
        require_computable(name, part)
    require_numbers("solver", solver)
    require_numbers("adjoint", adjoint)
    check_compatible(mdp, regularizer)
    solvers = (Auto() if solver is None else solver).resolve(mdp)
    adjoint = default_linear_solver(mdp.num_states) if adjoint is None else adjoint
    return _solve_one(mdp, regularizer, initial_value, solvers=solvers, adjoint=adjoint)


@over_batch
def _solve_one(mdp, regularizer, initial_value, *, solvers, adjoint):
    start = None if initial_value is None else lax.stop_gradient(initial_value)
    numbers = jax.tree.map(jnp.asarray, (solvers, adjoint))
    value, q, result, stats = _fixed_point(*numbers, mdp, regularizer, start)
    return Solution(value=value, q=q, policy=read_policy(regularizer, q), result=result, stats=stats)


@jax.custom_jvp
def _fixed_point(solvers, adjoint, mdp, regularizer, start):
    del adjoint
    first, *others = solvers
    run = _sweeps_may_share if first.batched_on_cpu else _one_at_a_time
    made = run(first, mdp, regularizer, start)
    for solver in others:
        made = _go_on(solver, mdp, regularizer, made)
    return made


def _shares_transitions(solver, mdp, regularizer, start) -> bool:
    del solver, regularizer, start
    return not any(jax.tree.leaves(mdp.transition))


@one_at_a_time_on_cpu
def _go_on(solver, mdp, regularizer, made):
    """Return `made` where it is done; elsewhere, where it came to its `max_iterations`, go on from its V."""
    value, _, result, before = made

    def unfinished():
        value_after, q, result, after = iterate(solver, mdp, regularizer, value)
        counts = (before.iterations + after.iterations, before.products + after.products)
        return value_after, q, result, eqx.tree_at(lambda s: (s.iterations, s.products), after, counts)

    return lax.cond(result == Result.MAX_ITERATIONS, unfinished, lambda: made)


# With transitions of its own, each element ends at its own time and keeps its numbers in cache; sharing them, a
# batch is swept by one product.
_sweeps_may_share = one_at_a_time_on_cpu(iterate, unless=_shares_transitions)
_one_at_a_time = one_at_a_time_on_cpu(iterate)


@_fixed_point.defjvp
def _fixed_point_jvp(primals, tangents):
    solvers, adjoint, mdp, regularizer, start = primals
    _, _, mdp_dot, regularizer_dot, _ = tangents
    # Called again, not closed over: a further derivative meets the same rule.
    value, q, *report = _fixed_point(solvers, adjoint, mdp, regularizer, start)
    _, backup_dot = jax.jvp(lambda m, r: backup(m, r, value), (mdp, regularizer), (mdp_dot, regularizer_dot))
    operator = policy_operator(mdp, improve(regularizer, q))
    value_dot, _ = linear_solve(adjoint, operator, mdp.modulus, backup_dot, poison=True)
    _, q_dot = jax.jvp(action_values, (mdp, value), (mdp_dot, value_dot))
    return (value, q, *report), (value_dot, q_dot, *zero_tangents(tuple(report)))


def solution_at(
    mdp: MDP, regularizer: Regularizer, value: Float[Array, "*batch S"], result: Int[Array, "*batch"], stats: SolveStats
) -> Solution:
    """Return the `Solution` that V[S] implies, as a differentiable function of V and the problem's leaves.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> solution = bj.solve(mdp, bj.ShannonEntropy(0.1))
      >>> same = bj.solvers.solution_at(mdp, bj.ShannonEntropy(0.1), solution.value, solution.result, solution.stats)
      >>> bool(jnp.allclose(same.policy, solution.policy))
      True
    """

    @over_batch
    def read(mdp, regularizer, value):
        q = action_values(mdp, value)
        return q, read_policy(regularizer, q)

    q, policy = read(mdp, regularizer, value)
    return Solution(value=value, q=q, policy=policy, result=result, stats=stats)
