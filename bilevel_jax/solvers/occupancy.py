"""How often a policy visits states and actions: discounted occupancy, stationary distribution."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Real

from bilevel_jax.core import rounding
from bilevel_jax.core.arrays import Flag, PerPair, PerState
from bilevel_jax.core.batching import over_batch
from bilevel_jax.core.captures import jit
from bilevel_jax.core.reductions import matmul
from bilevel_jax.core.validation import require_instance
from bilevel_jax.linear import LinearSolver, default_linear_solver, linear_solve, residual_of
from bilevel_jax.mdp.bellman import discounted_operator
from bilevel_jax.mdp.process import MDP
from bilevel_jax.mdp.transitions import PolicyOperator, StateOperator
from bilevel_jax.solvers.policy_value import allowed_policy, checked_policy


def occupancy(
    mdp: MDP,
    policy: Real[ArrayLike, "*batch S A"] | Sequence[Any],
    *,
    normalized: bool = False,
    linear_solver: LinearSolver | None = None,
) -> Float[Array, "*batch S A"]:
    """Return the discounted state-action occupancy d[S, A] of a policy[S, A], from the initial distribution.

    d[s, a] = sum_t E[(product of the discounts before t) 1{s_t = s, a_t = a}]. It solves the flow equations sum_a d[s,
    a] = initial[s] + sum_{s', a'} discount d[s', a'] P[s', a', s] (Puterman 1994, section 6.9). Hence <d, r> is
    initial' V of the policy, and d sums to the expected discounted length of the process. If the discount is one
    number, that length is 1 / (1 - discount).

    The result is differentiable in the policy and every leaf of the MDP. Batch axes come first, as in the MDP. It is
    NaN where the linear solve did not converge, and where a policy whose values are not known (under jit) has
    probability on an action that is not available.

    Args:
      policy: [S, A], with the MDP's batch axes. Rows may be off the simplex by a tenth, so that differences in any
        direction are possible.
      normalized: divide d by its sum, so that it is a distribution. With one discount that multiplies it by 1 -
        discount, as usual. With one discount per pair (0 where the process ends) no such factor exists, and the result
        is each pair's share of the discounted length.
      linear_solver: the solver of the equations above; None chooses by the number of states.

    Raises:
      InputError: the policy's shape is not that of the reward, it is known and far from a distribution, it has
        probability on an action that is not available, or an argument has another type.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> policy = jnp.full((2, 2), 0.5)
      >>> bj.occupancy(mdp, policy, normalized=True).round(4).tolist()
      [[0.25, 0.25], [0.25, 0.25]]
    """
    require_instance("normalized", normalized, bool)
    visits = _occupancy(mdp, checked_policy(mdp, policy, linear_solver), linear_solver=linear_solver)
    return visits / jnp.sum(visits, (-2, -1), keepdims=True) if normalized else visits


@jit
@over_batch
def _occupancy(mdp, policy, *, linear_solver):
    solver = default_linear_solver(mdp.num_states) if linear_solver is None else linear_solver
    allowed = allowed_policy(mdp, policy)
    operator = discounted_operator(mdp, allowed)
    states, _ = linear_solve(solver, operator, mdp.modulus, mdp.initial, transpose=True, poison=True)
    return states[:, None] * allowed


def stationary_distribution(
    mdp: MDP, policy: Real[ArrayLike, "*batch S A"] | Sequence[Any], *, linear_solver: LinearSolver | None = None
) -> Float[Array, "*batch S"]:
    """Return the stationary distribution mu[S] of a policy[S, A]: mu' P_pi = mu', and mu sums to 1.

    The chain must have one recurrent class (unichain); it may have transient states or be periodic. mu solves the
    regular system (I - P_pi' + nu 1') mu = nu, with nu uniform. It does not depend on the reward, the discount and the
    initial distribution. The result is differentiable in the policy and the transition; batch axes come first, as in
    the MDP.

    The result is NaN where the linear solve did not converge, and where mu is not unique because the chain has several
    recurrent classes. To detect these, a second system with the same matrix and a generic right-hand side is solved. If
    there are several classes, it has no solution, or one that is eps^(-3/4) times as large (5e11 in float64, 2e5 in
    float32). The result is also NaN if there is one class, but the chain takes that many steps to enter it.

    Args:
      policy: [S, A], with the MDP's batch axes; rows sum to 1.
      linear_solver: the solver of the systems above; None chooses by the number of states.

    Raises:
      InputError: as `occupancy`.

    Example:
      >>> mdp = bj.MDP(jnp.array([[[0.5, 0.5]], [[0.5, 0.5]]]), jnp.zeros((2, 1)), 0.9)
      >>> bj.stationary_distribution(mdp, jnp.ones((2, 1))).round(3).tolist()
      [0.5, 0.5]
    """
    return _stationary(mdp, checked_policy(mdp, policy, linear_solver), linear_solver=linear_solver)


@jit
@over_batch
def _stationary(mdp, policy, *, linear_solver):
    operator = unichain_operator(mdp, allowed_policy(mdp, policy))
    return unichain_solve(mdp, linear_solver, operator, operator.border, transpose=True)


class UnichainOperator(StateOperator):
    """P_pi - 1 border', the operator of the system I - P_pi + 1 border' that averages over time need.

    For a distribution `border` [S] the system is regular exactly if P_pi has one recurrent class. The operator is no
    contraction in the sup norm, so that the error bounds of `linear_solve` do not hold for it.
    """

    operator: StateOperator
    border: PerState

    def apply(self, values):
        return self.operator.apply(values) - matmul(self.border, values)

    def apply_transpose(self, masses):
        return self.operator.apply_transpose(masses) - self.border * jnp.sum(masses)

    def matrix(self):
        return self.operator.matrix() - self.border[None]

    def diagonal(self):
        """The diagonal, [S]."""
        return self.operator.diagonal() - self.border

    @property
    def matrix_products(self):
        return self.operator.matrix_products

    def fold(self):
        return UnichainOperator(self.operator.fold(), self.border)


def unichain_operator(mdp: MDP, policy: PerPair) -> UnichainOperator:
    """The operator of a policy[S, A], with a uniform border."""
    return UnichainOperator(PolicyOperator(mdp.transition, policy), jnp.full_like(mdp.initial, 1 / mdp.num_states))


def unichain_solve(
    mdp: MDP, linear_solver: LinearSolver | None, operator: UnichainOperator, rhs: PerState, *, transpose: bool = False
) -> PerState:
    """Return x[S] with (I - P_pi + 1 border') x = rhs, or of its transpose; NaN where x is not unique, also in
    derivatives.
    """
    solver = default_linear_solver(mdp.num_states) if linear_solver is None else linear_solver
    # A modulus is for error bounds, which nobody sees here and which this operator does not have.
    return linear_solve(
        OnlyIfRegular(solver), operator, jnp.zeros((), rhs.dtype), rhs, transpose=transpose, poison=True
    )[0]


class OnlyIfRegular(LinearSolver):
    """Another solver, but with the result NaN where the system is singular or nearly so.

    The right-hand sides of interest are often in the range of a singular matrix. A solver then finds one of many
    solutions, and nothing shows it. A generic right-hand side is not in the range, so that solving for it shows it.
    """

    linear_solver: LinearSolver

    def prepare(self, operator):
        prepared = self.linear_solver.prepare(operator)
        return prepared, self._is_regular(operator, prepared)

    def solve(self, operator, prepared, rhs, guess, transpose):
        inner, regular = self.prepare(operator) if prepared is None else prepared
        attempt = self.linear_solver.solve(operator, inner, rhs, guess, transpose)
        return eqx.tree_at(lambda a: a[0], attempt, jnp.where(regular, attempt[0], jnp.nan))

    def relative_tolerance(self, dtype):
        return self.linear_solver.relative_tolerance(dtype)

    def takes_rounding(self):
        return self.linear_solver.takes_rounding()

    def _is_regular(self, operator: StateOperator, prepared: Any) -> Flag:
        state = jax.eval_shape(operator.diagonal)
        probe = jax.random.normal(jax.random.key(0), state.shape, state.dtype)
        x = self.linear_solver.solve(operator, prepared, probe, jnp.zeros_like(probe), False)[0]
        gap = jnp.linalg.norm(residual_of(operator, x, probe))
        eps = jnp.finfo(probe.dtype).eps
        tolerance = jnp.asarray(self.linear_solver.relative_tolerance(probe.dtype), probe.dtype)
        solved = gap <= 1.01 * tolerance * jnp.linalg.norm(probe) + rounding.SOLVE_FLOOR * eps * jnp.linalg.norm(x)
        return solved & rounding.is_moderate(x, probe)
