"""The Lagrangian of a bilevel problem at one x. Every part of a hyper-gradient is one of its derivatives.

  L(x, V, w) = f(x, the solution that V implies) + w' (T_x V - V)

dL/dw = 0 is the equation of the lower level, and dL/dV = 0 is the adjoint equation (I - discount P_pi)' w = df/dV. At
the V* and w* that solve them, dL/dx is the hyper-gradient. At any other V and w it is an estimate of the
hyper-gradient.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from bilevel_jax.bilevel.problem import Problem, lower_level
from bilevel_jax.core import rounding
from bilevel_jax.core.arrays import PerState, Scalar
from bilevel_jax.core.batching import over_batch
from bilevel_jax.core.derivatives import derivative_of
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.reductions import sum_last
from bilevel_jax.core.validation import as_float
from bilevel_jax.linear import LinearSolver, LinearStats, linear_solve
from bilevel_jax.mdp.bellman import action_values, backup, discounted_operator, read_policy
from bilevel_jax.mdp.process import MDP
from bilevel_jax.mdp.regularizers import Regularizer
from bilevel_jax.solvers import Solution

SolutionAt = Callable[[MDP, Regularizer, Float[Array, "*batch S"]], Solution]


class ObjectiveAt(NamedTuple):
    """f at one V, and its derivatives: in x directly, in the leaves of MDP and regularizer, and in V[S]."""

    value: Scalar
    of_x: Any
    of_theta: Any
    of_value: Float[Array, "*batch S"]


class Parts(NamedTuple):
    """The summands of dL/dx, each a pytree like x.

    `direct` is df/dx with everything else fixed. `read` is df/dtheta, where theta are the leaves of MDP and regularizer
    and the solution is computed from a fixed V. `backup` is w' dT/dtheta. `size` measures how large the numbers are
    that `read` and `backup` sum up, over x's share in theta and over the states: each of their terms enters with its
    absolute value and an arbitrary sign, and is at least as large as the numbers at which digits begin to be lost.
    """

    direct: Any
    read: Any
    backup: Any
    size: Any

    def total(self) -> Any:
        return jax.tree.map(lambda a, b, c: a + b + c, self.direct, self.read, self.backup)


class Lagrangian:
    """The Lagrangian at one x, see the module.

    Its derivatives in x pass once through theta, the leaves of MDP and regularizer.

    Args:
      read: the solution as a function of (mdp, regularizer, V), with the derivative that f is to see.
    """

    def __init__(self, problem: Problem, x: Any, read: SolutionAt):
        def leaves_at(x):
            return eqx.partition(lower_level(problem, x), eqx.is_inexact_array)

        self._theta, self._pull, self._rest = jax.vjp(leaves_at, x, has_aux=True)
        self._problem, self._x, self._read = problem, x, read

    def lower(self, theta: Any = None) -> tuple[MDP, Regularizer]:
        """Return MDP and regularizer, with other floating-point leaves if `theta` is given."""
        return eqx.combine(self._theta if theta is None else theta, self._rest)

    def objective_at(self, value: Float[Array, "*batch S"]) -> ObjectiveAt:
        """Return f at V[S] and its derivatives. Raises InputError if f is no scalar."""

        def upper(x, theta, value):
            made = self._problem.objective(x, self._read(*self.lower(theta), value))
            objective = as_float("objective(x, solution)", made)
            if objective.shape != ():
                raise InputError(f"objective(x, solution) must return a scalar, got shape {list(objective.shape)}")
            return objective

        objective, pull = jax.vjp(upper, self._x, self._theta, value)
        of_x, of_theta, of_value = pull(jnp.ones_like(objective))
        return ObjectiveAt(value=objective, of_x=of_x, of_theta=of_theta, of_value=of_value)

    def gradient(self, objective: ObjectiveAt, value: Float[Array, "*batch S"], w: Float[Array, "*batch S"]) -> Any:
        """dL/dx at V and w, both [S]."""
        of_theta = jax.tree.map(jnp.add, objective.of_theta, self._of_backup(value, w))
        return jax.tree.map(jnp.add, objective.of_x, *self._pull(of_theta))

    def parts(self, objective: ObjectiveAt, value: Float[Array, "*batch S"], w: Float[Array, "*batch S"]) -> Parts:
        """Return the summands of `gradient`."""
        mdp, regularizer = self.lower()
        temperature = jnp.min(jnp.asarray(regularizer.temperature, value.dtype))
        lost = rounding.least_derivative(mdp.num_actions, temperature)

        def stacked(read, backup, summed_read, summed_backup):
            least = lost.astype(read.dtype)
            sizes = jnp.maximum(jnp.abs(read), summed_read) + jnp.maximum(jnp.abs(backup), summed_backup) + least
            return jnp.stack([read, backup, scattered_signs(read) * sizes])

        each = jax.tree.map(stacked, objective.of_theta, self._of_backup(value, w), *self._summed(value, w))
        (pulled,) = jax.vmap(self._pull)(each)  # in one pass, which reads the data of x's derivatives once
        read, of_backup, size = (jax.tree.map(lambda leaf, i=i: leaf[i], pulled) for i in range(3))
        return Parts(direct=objective.of_x, read=read, backup=of_backup, size=size)

    def _summed(self, value: Float[Array, "*batch S"], w: Float[Array, "*batch S"]) -> tuple[Any, Any]:
        """Return how large the numbers are whose sums over states, or over a batch, are df/dtheta and w' dT/dtheta.

        Numbers of either sign may cancel. The sums are made again with other signs of states and pairs, the second one
        also with |w|, and with |V| of the successors; the largest counts. It is zero for leaves that are not summed: an
        entry per pair or more, in each problem of a batch.
        """
        lower = self.lower()
        largest, batch = value.size * lower[0].num_actions, value.ndim - 1

        def is_summed(leaf, own):
            return jnp.size(leaf) < largest or jnp.ndim(leaf) - own < batch

        which = jax.tree.map(is_summed, lower, tuple(part.event_ndim() for part in lower))
        summed, others = eqx.partition(self._theta, which)

        solution = self._read(*lower, value)

        def with_signs(summed, signs):
            of_states, of_pairs = signs
            mdp, regularizer = self.lower(eqx.combine(summed, others))
            q = _with_signs(over_batch(action_values)(mdp, value), of_pairs)
            policy = _with_signs(over_batch(read_policy, batch)(regularizer, q), of_states[..., None])
            read = dataclasses.replace(solution, q=q, policy=policy)
            return self._problem.objective(self._x, read)

        # One after the other, so that f is not vmapped.
        patterns = _patterns(value), _patterns(solution.q)
        each = lax.map(lambda signs: jax.grad(with_signs)(summed, signs), patterns)
        of_read = jax.tree.map(lambda leaf: jnp.max(jnp.abs(leaf), 0), each)
        _, pull = jax.vjp(lambda summed: over_batch(backup)(*self.lower(eqx.combine(summed, others)), value), summed)
        expected = over_batch(_collected)

        def of_sizes(summed):
            return expected(self.lower(eqx.combine(summed, others))[0], solution.policy, jnp.abs(value))

        (by_size,), (by_sign,) = pull(jnp.abs(w)), pull(scattered_signs(w) * w)
        (by_successor,) = jax.vjp(of_sizes, summed)[1](jnp.abs(w))
        of_backup = jax.tree.map(
            lambda *sums: functools.reduce(jnp.maximum, map(jnp.abs, sums)), by_size, by_sign, by_successor
        )
        zeros = jax.tree.map(jnp.zeros_like, others)
        return eqx.combine(of_read, zeros), eqx.combine(of_backup, zeros)

    def size_of_right_hand_side(self, value: Float[Array, "*batch S"]) -> Float[Array, "*batch S"]:
        """Return how large the numbers are that df/dV sums, [S]: those of each action value, with absolute values."""
        mdp, regularizer = self.lower()
        solution = self._read(mdp, regularizer, value)

        def of(value, q):
            policy = over_batch(read_policy, value.ndim - 1)(regularizer, q)
            return self._problem.objective(self._x, dataclasses.replace(solution, value=value, q=q, policy=policy))

        of_value, of_q = jax.grad(of, (0, 1))(value, solution.q)
        of_q = jnp.where(jnp.isfinite(solution.q), of_q, 0)
        _, pull = jax.vjp(lambda value: over_batch(action_values)(mdp, value), value)
        return jnp.abs(of_value) + pull(jnp.abs(of_q))[0]

    def _of_backup(self, value: Float[Array, "*batch S"], w: Float[Array, "*batch S"]) -> Any:
        _, pull = jax.vjp(lambda theta: over_batch(backup)(*self.lower(theta), value), self._theta)
        return pull(w)[0]

    def residual(self, value: Float[Array, "*batch S"]) -> Float[Array, "*batch S"]:
        """dL/dw = T V - V, [S]."""
        return over_batch(backup)(*self.lower(), value) - value

    def adjoint_residual(
        self, policy: Float[Array, "*batch S A"], of_value: Float[Array, "*batch S"], w: Float[Array, "*batch S"]
    ) -> Float[Array, "*batch S"]:
        """dL/dV = df/dV - (I - discount P_pi)' w, [S], under a policy[S, A]."""
        return of_value - w + over_batch(_push)(self.lower()[0], policy, w)

    def solve_adjoint(
        self,
        linear_solver: LinearSolver,
        policy: Float[Array, "*batch S A"],
        rhs: Float[Array, "*batch S"],
        initial_adjoint: Float[Array, "*batch S"] | None,
    ) -> tuple[Float[Array, "*batch S"], LinearStats]:
        """w[S] with (I - discount P_pi)' w = rhs, from `initial_adjoint` [S] (zeros if None)."""
        return _solve_adjoint(self.lower()[0], policy, rhs, initial_adjoint, linear_solver=linear_solver)


def scattered_signs(like: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return 1 and -1 without a pattern, in the shape of `like`: a bit of a multiplicative hash of each entry's
    place.
    """
    place = lax.iota(jnp.uint32, like.size) * jnp.uint32(2654435769)
    bit = (place ^ (place >> 15)) * jnp.uint32(2246822519) >> 31
    return (1 - 2 * bit.astype(like.dtype)).reshape(like.shape)


def _patterns(like: Float[Array, "*shape"]) -> Float[Array, "patterns ..."]:
    """Return patterns of signs in the shape of `like`: by turns, in turns of two, and `scattered_signs`.

    Of entries that follow each other, two differ in one of the first two patterns.
    """
    place = lax.iota(jnp.int32, like.size).reshape(like.shape)
    turns = [1 - 2 * ((place // length) % 2).astype(like.dtype) for length in (1, 2)]
    return jnp.stack([*turns, scattered_signs(like)])


def _with_signs(x: Float[Array, "*shape"], signs: Float[Array, "*#shape"]) -> Float[Array, "*shape"]:
    """x, with its derivative times signs."""
    return stop_gradient(x) + signs.astype(x.dtype) * derivative_of(x, jnp.isfinite(x))


def _collected(mdp: MDP, policy: Float[Array, "S A"], value: PerState) -> PerState:
    """What a policy collects: sum_a pi Q[s, a] at V[S]."""
    return sum_last(jnp.where(policy > 0, policy * action_values(mdp, value), 0))


def _push(mdp, policy, w):
    return discounted_operator(mdp, policy).apply_transpose(w)


@over_batch
def _solve_adjoint(mdp, policy, rhs, initial_adjoint, *, linear_solver):
    operator = discounted_operator(mdp, policy)
    return linear_solve(linear_solver, operator, mdp.modulus, rhs, transpose=True, guess=initial_adjoint, share=False)


@over_batch
def sweep(mdp: MDP, regularizer: Regularizer, value: PerState, shift: PerState, *, count: int) -> PerState:
    """Return V after `count` times V <- T V + shift, all [S].

    Derivatives pass through this loop as they do through any.
    """
    return lax.scan(lambda v, _: (backup(mdp, regularizer, v) + shift, None), value, length=count)[0]
