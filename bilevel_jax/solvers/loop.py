"""The one iteration loop; a solver is its step. Stops on a proven bound, on rounding or on max_steps."""

import abc
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from bilevel_jax.bellman import action_values, sup_norm
from bilevel_jax.mdp import MDP
from bilevel_jax.regularizers import Regularizer
from bilevel_jax.results import Result
from bilevel_jax.validation import require_setting

# A residual of this many units in the last place of |Q| is all that rounding leaves to reach; up to
# STALL_ULPS the iteration goes on only while the residual falls.
FLOOR_ULPS = 16
STALL_ULPS = 1000


class SolveStats(eqx.Module):
    """How a solve went; scalars, one a batch element.

    `steps` counts Bellman sweeps, `residual` is |T V - V|_inf at the last V swept, and `error_bound`
    bounds |value - V*|_inf by discount / (1 - discount) * residual.
    """

    steps: jax.Array
    residual: jax.Array
    error_bound: jax.Array


class Iterate(NamedTuple):
    """Where a solver stands: V[S], its Q[S, A] and T V [S]."""

    value: jax.Array
    q: jax.Array
    backup: jax.Array


class Solver(eqx.Module):
    """The protocol: fields `tolerance` and `max_steps`, and a step.

    `tolerance` is a bound on |V - V*|_inf, in units of the reward; None asks for working precision,
    i.e. to go on until rounding leaves nothing to gain. `max_steps` counts Bellman sweeps.
    `batched_on_cpu`: whether vmap on a CPU advances all elements together. Steps that are linear
    solves run one after another there anyway; then whole solves do, each ending at its own time.
    """

    batched_on_cpu: ClassVar[bool] = True

    tolerance: eqx.AbstractVar[Any]
    max_steps: eqx.AbstractVar[Any]

    def __check_init__(self):
        if self.tolerance is not None:
            require_setting("tolerance", self.tolerance, 0, "None asks for working precision")
        require_setting("max_steps", self.max_steps, 1, "1000 is usual", whole=True)

    @abc.abstractmethod
    def step(self, mdp: MDP, regularizer: Regularizer, iterate: Iterate) -> jax.Array:
        """The next V[S]."""


def iterate(
    solver: Solver, mdp: MDP, regularizer: Regularizer, value: jax.Array
) -> tuple[jax.Array, jax.Array, SolveStats]:
    """Run `solver` from V[S] on one MDP. Returns the last T V, the result code and the stats.

    Every step costs one sweep beside its own work; the last sweep is returned, not thrown away.
    """
    modulus = mdp.modulus
    factor = modulus / (1 - modulus)
    reward_scale = sup_norm(mdp.reward)
    ulp = jnp.finfo(value.dtype).eps
    max_steps = jnp.asarray(solver.max_steps, jnp.int32)
    target = 0 if solver.tolerance is None else jnp.asarray(solver.tolerance, value.dtype)

    def sweep(value):
        q = action_values(mdp, value)
        backup = regularizer.conjugate(q)
        # Two maxima in one reduction: small sweeps pay for each operation, not for its arithmetic.
        residual, scale = jnp.max(jnp.abs(jnp.stack([backup - value, backup])), -1)
        return Iterate(value, q, backup), residual, ulp * (reward_scale + scale)

    def finished(residual, previous, ulps):
        floor = (residual <= FLOOR_ULPS * ulps) | ((residual >= previous) & (residual <= STALL_ULPS * ulps))
        # The unit knows of the rewards; where they are not finite it is neither, whatever the residual says.
        return (factor * residual <= target) | floor | ~jnp.isfinite(residual + ulps)

    def unfinished(carry):
        _, residual, previous, ulps, steps = carry
        return ~finished(residual, previous, ulps) & (steps < max_steps)

    def body(carry):
        current, residual, _, _, steps = carry
        new, new_residual, ulps = sweep(solver.step(mdp, regularizer, current))
        return new, new_residual, residual, ulps, steps + 1

    first, residual, ulps = sweep(value)
    start = (first, residual, jnp.full_like(residual, jnp.inf), ulps, jnp.asarray(1, jnp.int32))
    last, residual, previous, ulps, steps = lax.while_loop(unfinished, body, start)

    bound = factor * residual
    reached = bound <= target
    limit = Result.CONVERGED if solver.tolerance is None else Result.PRECISION_LIMIT
    result = jnp.where(
        reached, Result.CONVERGED, jnp.where(finished(residual, previous, ulps), limit, Result.MAX_STEPS)
    )
    # V may be finite where Q is not: an action that the regularizer never takes.
    finite = jnp.all(jnp.isfinite(last.backup)) & jnp.all(jnp.isfinite(last.q)) & jnp.isfinite(bound)
    result = jnp.where(finite, result, Result.NOT_FINITE).astype(jnp.int32)
    return last.backup, result, SolveStats(steps, residual, bound)


def default_solver() -> "Solver":
    """Soft policy iteration to working precision."""
    from bilevel_jax.solvers.policy_iteration import PolicyIteration

    return PolicyIteration()
