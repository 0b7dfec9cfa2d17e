"""The one iteration loop; a solver is its step. Stops on a proven bound, on rounding or on max_steps."""

import abc
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from bilevel_jax.bellman import action_values, sup_norm
from bilevel_jax.mdp import MDP
from bilevel_jax.reductions import min_max
from bilevel_jax.regularizers import Regularizer
from bilevel_jax.results import Result
from bilevel_jax.solvers.certificate import (
    Bracket,
    Discounts,
    bracket,
    contraction_only,
    expected_discounts,
    rounding_of_sweep,
)
from bilevel_jax.validation import require_stopping

# Where the bracket is within so many times what rounding allows, a step that does not narrow it is the last.
STALL = 64


class SolveStats(eqx.Module):
    """How a solve went; scalars, one a batch element.

    `steps` counts Bellman sweeps, `products` the products with a policy's transitions between them.
    `residual` is |T V - V|_inf at the last V swept. `error_bound` bounds |value - V*|_inf, rounding
    included. `suboptimality` bounds max_s V*[s] - V^policy[s], both regularized.
    """

    steps: jax.Array
    products: jax.Array
    residual: jax.Array
    error_bound: jax.Array
    suboptimality: jax.Array


class Swept(NamedTuple):
    """Where a solver stands: V[S], T V [S], and what it kept of Q.

    `half_width` is what the bracket of V* had after this sweep, `needed` what would end the iteration.
    """

    value: jax.Array
    backup: jax.Array
    kept: Any
    half_width: jax.Array
    needed: jax.Array

    @property
    def gap(self) -> jax.Array:
        """T V - V, [S]."""
        return self.backup - self.value


class Solver(eqx.Module):
    """What `solve` takes: `tolerance` and `max_steps`, and the iteration that they are for.

    `tolerance` is a bound on |value - V*|_inf, in units of the reward; None asks for working precision,
    i.e. to go on until rounding leaves nothing to gain. `max_steps` counts Bellman sweeps.
    """

    tolerance: eqx.AbstractVar[Any]
    max_steps: eqx.AbstractVar[Any]

    def __check_init__(self):
        require_stopping(self.tolerance, self.max_steps)

    @abc.abstractmethod
    def resolve(self, mdp: MDP) -> "tuple[Stepper, ...]":
        """The iterations to run on such MDPs, by their structure: each where the one before came to its `max_steps`."""


class Stepper(Solver):
    """A solver that is an iteration: its step.

    `batched_on_cpu`: whether vmap on a CPU advances a batch together where it shares its transitions. Else,
    and for solvers that fold policies into them or solve linear systems, whole solves run one after another.
    """

    batched_on_cpu: ClassVar[bool] = False

    def resolve(self, mdp):
        del mdp
        return (self,)

    @property
    def is_centred(self) -> bool:
        """Whether the result is the middle of the bracket of V*, or else the last T V as it is."""
        return True

    def keep(self, mdp: MDP, regularizer: Regularizer, q: jax.Array) -> Any:
        """What a step needs of Q[S, A]."""
        del mdp, regularizer, q

    def start(self, mdp: MDP, value: jax.Array) -> Any:
        """State carried from step to step, at V[S]."""
        del mdp, value

    @abc.abstractmethod
    def step(self, mdp: MDP, swept: Swept, state: Any) -> tuple[jax.Array, Any, jax.Array]:
        """The next V[S], the next state, and the number of products that were made."""


def iterate(
    solver: Stepper, mdp: MDP, regularizer: Regularizer, value: jax.Array | None
) -> tuple[jax.Array, jax.Array, SolveStats, Discounts]:
    """Run `solver` from V[S], or from zeros, on one MDP.

    Returns V, the result code, the stats, and the discounts that its bounds are made of.

    Every step costs one sweep beside its own work; the last sweep is returned, not thrown away.
    """
    discounts = expected_discounts(mdp) if solver.is_centred else contraction_only(mdp)
    reward_scale = sup_norm(mdp.reward)
    max_steps = jnp.asarray(solver.max_steps, jnp.int32)
    dtype = mdp.reward.dtype
    target = jnp.asarray(0 if solver.tolerance is None else solver.tolerance, dtype)

    def look(value, backup):
        """The bracket that a sweep proves, the half width that will do, and the residual."""
        gap = backup - value
        low, high = min_max(gap)
        least, largest = min_max(backup)
        scale = reward_scale + jnp.maximum(-least, largest)
        now = bracket(discounts, low, high, rounding_of_sweep(mdp, scale))
        # The result is T V + middle, and rounds as numbers of that size do.
        now = now._replace(rounding=now.rounding * (1 + jnp.abs(now.middle) / scale))
        return now, jnp.maximum(target - now.rounding, now.rounding), jnp.maximum(high, -low)

    def width(now: Bracket):
        return now.half_width if solver.is_centred else jnp.maximum(now.upper, -now.lower)

    def at_rounding(now: Bracket, previous):
        return (width(now) <= now.rounding) | ((width(now) >= previous) & (width(now) <= STALL * now.rounding))

    def finished(now: Bracket, previous):
        bound = width(now) + now.rounding
        return (bound <= target) | at_rounding(now, previous) | ~jnp.isfinite(bound)

    # What a sweep proves is read off in the condition, where V and T V are arrays that lie in memory: in the body,
    # XLA's CPU would compute the sweep once more for each maximum (docs/performance.md).
    def unfinished(carry):
        value, backup, _, previous, _, steps, _ = carry
        return ~finished(look(value, backup)[0], previous) & (steps < max_steps)

    def body(carry):
        value, backup, kept, _, state, steps, products = carry
        now, needed, _ = look(value, backup)
        value, state, used = solver.step(mdp, Swept(value, backup, kept, now.half_width, needed), state)
        q = action_values(mdp, value)
        kept = solver.keep(mdp, regularizer, q)
        return value, regularizer.conjugate(q), kept, width(now), state, steps + 1, products + used

    if value is None:  # the first Q is the reward, no product needed
        value = jnp.zeros_like(mdp.reward[:, 0])
        q = mdp.reward if mdp.available is None else jnp.where(mdp.available, mdp.reward, -jnp.inf)
    else:
        q = action_values(mdp, value)
    first = value, regularizer.conjugate(q), solver.keep(mdp, regularizer, q)
    counts = jnp.asarray(1, jnp.int32), jnp.asarray(0, jnp.int32)
    start = (*first, jnp.asarray(jnp.inf, dtype), solver.start(mdp, value), *counts)
    value, backup, _, previous, _, steps, products = lax.while_loop(unfinished, body, start)

    now, _, residual = look(value, backup)
    bound = width(now) + now.rounding
    limit = Result.CONVERGED if solver.tolerance is None else Result.PRECISION_LIMIT
    ended = jnp.where(at_rounding(now, previous), limit, Result.MAX_STEPS)
    result = jnp.where(bound <= target, Result.CONVERGED, ended)
    finite = jnp.all(jnp.isfinite(backup)) & jnp.isfinite(bound)
    result = jnp.where(finite, result, Result.NOT_FINITE).astype(jnp.int32)
    value = backup + now.middle if solver.is_centred else backup
    # A policy greedy at a V within e of V* loses 2 e discount / (1 - discount) at most.
    loss = bracket(discounts, -bound, bound, bound)
    return value, result, SolveStats(steps, products, residual, bound, loss.upper - loss.lower), discounts


def suboptimality(mdp: MDP, discounts: Discounts, value: jax.Array, backup: jax.Array) -> jax.Array:
    """Bounds max_s V*[s] - V^pi[s] for pi greedy at V[S], given T V [S].

    T_pi V = T V there, so the bracket that V and T V prove holds V^pi as well as V*.
    """
    gap = backup - value
    scale = sup_norm(mdp.reward) + sup_norm(value)
    proven = bracket(discounts, *min_max(gap), rounding_of_sweep(mdp, scale))
    return 2 * (proven.half_width + proven.rounding)
