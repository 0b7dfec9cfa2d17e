"""Where a policy goes: discounted occupancy, stationary distribution, regularized value of any policy."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from bilevel_jax import rounding
from bilevel_jax.adjoint import LinearSolver, default_linear_solver, linear_solve, residual_of
from bilevel_jax.bellman import check_compatible, discounted_operator
from bilevel_jax.captures import jit
from bilevel_jax.mdp import MDP, over_batch
from bilevel_jax.reductions import matmul
from bilevel_jax.regularizers import Regularizer, Unregularized
from bilevel_jax.transitions import PolicyOperator, StateOperator
from bilevel_jax.validation import as_float, require_instance, require_numbers


def occupancy(
    mdp: MDP, policy: jax.Array, *, normalized: bool = False, adjoint: LinearSolver | None = None
) -> jax.Array:
    """Discounted state-action occupancy of a policy[S, A], d[S, A], from the initial distribution.

    d[s, a] = sum_t E[(product of the discounts before t) 1{s_t = s, a_t = a}], the solution of the flow
    equations sum_a d[s, a] = initial[s] + sum_{s', a'} discount d[s', a'] P[s', a', s] (Puterman 1994,
    section 6.9). So <d, r> = initial' V of the policy, and d sums to the expected discounted length of
    the process: 1 / (1 - discount) where the discount is one number.

    Differentiable in policy and every leaf of the MDP; batch axes first, as in the MDP. NaN where the linear
    solve did not converge, and where a policy that is not known (under jit) has probability on an action
    that is not available.

    Args:
      policy: [S, A], with the MDP's batch axes. Rows may be off the simplex by a tenth, so that differences
        in any direction make sense.
      normalized: divide d by its sum, so that it is a distribution. With one discount this is the usual
        factor 1 - discount; with one a pair (0 where the process ends) no such factor exists, and it is the
        share of the discounted length.
      adjoint: the linear solver; None chooses by the number of states.

    Raises:
      InputError: the policy's shape is not that of the reward, it is known and no distribution by far, it has
        probability on an action that is not available, or an argument of another type.
    """
    require_instance("normalized", normalized, bool)
    visits = _occupancy(*_checked(mdp, policy, adjoint), adjoint=adjoint)
    return visits / jnp.sum(visits, (-2, -1), keepdims=True) if normalized else visits


@jit
@over_batch
def _occupancy(mdp, regularizer, policy, *, adjoint):
    del regularizer
    solver = default_linear_solver(mdp.num_states) if adjoint is None else adjoint
    allowed = _allowed(mdp, policy)
    operator = discounted_operator(mdp, allowed)
    states, _ = linear_solve(solver, operator, mdp.modulus, mdp.initial, transpose=True, poison=True)
    return states[:, None] * allowed


def stationary_distribution(mdp: MDP, policy: jax.Array, *, adjoint: LinearSolver | None = None) -> jax.Array:
    """The stationary distribution mu[S] of a policy[S, A]: mu' P_pi = mu', sum of mu 1.

    For chains with one recurrent class (unichain; transient states and periodic chains are fine), from
    the regular system (I - P_pi' + nu 1') mu = nu, nu uniform. It does not depend on reward, discount
    and initial distribution. Differentiable in policy and transition; batch axes first, as in the MDP.

    NaN where mu is not unique, and where the linear solve did not converge. To know the first, a system
    with a generic right-hand side is solved beside: it has no solution, or one that is eps^(-3/4) times as
    large (5e11 in float64, 2e5 in float32), if there are several classes, and also if there is one but it
    takes as many steps to be left behind.

    Args:
      policy: [S, A], with the MDP's batch axes; rows sum to 1.
      adjoint: the linear solver; None chooses by the number of states.

    Raises:
      InputError: as `occupancy`.
    """
    return _stationary(*_checked(mdp, policy, adjoint), adjoint=adjoint)


@jit
@over_batch
def _stationary(mdp, regularizer, policy, *, adjoint):
    del regularizer
    operator = unichain_operator(mdp, _allowed(mdp, policy))
    return unichain_solve(mdp, adjoint, operator, operator.border, transpose=True)


def regularized_policy_value(
    mdp: MDP, regularizer: Regularizer, policy: jax.Array, *, adjoint: LinearSolver | None = None
) -> jax.Array:
    """The value V[S] of a policy[S, A] with its penalty: V = sum_a pi (r + discount P V) - Omega(pi).

    At most the V of `solve`, in every state. Differentiable in policy and every leaf of the MDP and of the
    regularizer; batch axes first. NaN as in `occupancy`.

    Raises:
      InputError: as `occupancy`, or a regularizer that does not fit the MDP.
    """
    require_instance("regularizer", regularizer, Regularizer)
    mdp, _, policy = _checked(mdp, policy, adjoint)
    check_compatible(mdp, regularizer)
    return _regularized_value(mdp, regularizer, policy, adjoint=adjoint)


@jit
@over_batch
def _regularized_value(mdp, regularizer, policy, *, adjoint):
    solver = default_linear_solver(mdp.num_states) if adjoint is None else adjoint
    allowed = _allowed(mdp, policy)
    rewards = jnp.sum(allowed * mdp.reward, -1) - regularizer.penalty(allowed)
    return linear_solve(solver, discounted_operator(mdp, allowed), mdp.modulus, rewards, poison=True)[0]


def _checked(mdp: MDP, policy: Any, adjoint: Any) -> tuple[MDP, Regularizer, jax.Array]:
    require_instance("mdp", mdp, MDP)
    require_instance("adjoint", adjoint, LinearSolver | None)
    require_numbers("adjoint", adjoint)
    policy = as_float("policy", policy, mdp.reward.dtype, mdp.reward.shape)
    mdp.require_available(policy)
    return mdp, Unregularized(), policy  # `over_batch` wants a regularizer; this one has no numbers


def _allowed(mdp: MDP, policy: jax.Array) -> jax.Array:
    """The policy, NaN in states where it has probability on an action that is not available."""
    if mdp.available is None:
        return policy
    allowed = jnp.where(mdp.available, policy, 0)
    return jnp.where(jnp.all(allowed == policy, -1, keepdims=True), allowed, jnp.nan)


class UnichainOperator(StateOperator):
    """P_pi - 1 border', of the system I - P_pi + 1 border' that averages over time need.

    For a distribution `border` [S] it is regular exactly if P_pi has one recurrent class. Not a
    contraction of the sup norm: the error bounds of `linear_solve` do not hold for it.
    """

    operator: StateOperator
    border: jax.Array

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


def unichain_operator(mdp: MDP, policy: jax.Array) -> UnichainOperator:
    """The operator of a policy[S, A], with a uniform border."""
    return UnichainOperator(PolicyOperator(mdp.transition, policy), jnp.full_like(mdp.initial, 1 / mdp.num_states))


def unichain_solve(
    mdp: MDP, adjoint: LinearSolver | None, operator: UnichainOperator, rhs: jax.Array, *, transpose: bool = False
) -> jax.Array:
    """x[S] with (I - P_pi + 1 border') x = rhs, or its transpose; NaN where that is not one x, also in derivatives."""
    solver = default_linear_solver(mdp.num_states) if adjoint is None else adjoint
    # A modulus is for error bounds, which nobody sees here and which this operator does not have.
    return linear_solve(
        OnlyIfRegular(solver), operator, jnp.zeros((), rhs.dtype), rhs, transpose=transpose, poison=True
    )[0]


class OnlyIfRegular(LinearSolver):
    """Another solver, which returns NaN where the system is singular or as good as that.

    Right-hand sides that matter are often in the range of a singular matrix, and then a solver finds one
    of many solutions and all looks well. A generic right-hand side is not.
    """

    solver: LinearSolver

    def prepare(self, operator):
        prepared = self.solver.prepare(operator)
        return prepared, self._is_regular(operator, prepared)

    def solve(self, operator, prepared, rhs, guess, transpose):
        inner, regular = self.prepare(operator) if prepared is None else prepared
        attempt = self.solver.solve(operator, inner, rhs, guess, transpose)
        return eqx.tree_at(lambda a: a[0], attempt, jnp.where(regular, attempt[0], jnp.nan))

    def relative_tolerance(self, dtype):
        return self.solver.relative_tolerance(dtype)

    def takes_rounding(self):
        return self.solver.takes_rounding()

    def _is_regular(self, operator: StateOperator, prepared: Any) -> jax.Array:
        state = jax.eval_shape(operator.diagonal)
        probe = jax.random.normal(jax.random.key(0), state.shape, state.dtype)
        x = self.solver.solve(operator, prepared, probe, jnp.zeros_like(probe), False)[0]
        gap = jnp.linalg.norm(residual_of(operator, x, probe))
        eps = jnp.finfo(probe.dtype).eps
        tolerance = jnp.asarray(self.solver.relative_tolerance(probe.dtype), probe.dtype)
        solved = gap <= 1.01 * tolerance * jnp.linalg.norm(probe) + rounding.SOLVE_FLOOR * eps * jnp.linalg.norm(x)
        return solved & rounding.is_moderate(x, probe)
