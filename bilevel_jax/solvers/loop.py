"""The one iteration loop; a solver is its step. Stops on a proven bound, on rounding or on max_steps."""

import abc
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from bilevel_jax import rounding
from bilevel_jax.bellman import action_values, sup_norm
from bilevel_jax.mdp import MDP
from bilevel_jax.reductions import min_max
from bilevel_jax.regularizers import Regularizer
from bilevel_jax.rounds import Found, in_rounds, only_if
from bilevel_jax.solvers.certificate import (
    Bracket,
    Certificate,
    bracket,
    certify,
    contraction_only,
    excess_below,
    expected_discounts,
)
from bilevel_jax.validation import require_stopping


class SolveStats(eqx.Module):
    """How a solve went; scalars, one a batch element.

    `steps` counts Bellman sweeps, `products` the products with a policy's transitions between them.
    `residual` is |T V - V|_inf at the value returned. `error_bound` bounds |value - V*|_inf, rounding
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
    i.e. to go on until the equation of each state holds to a few roundings of the numbers that it is made of
    (docs/mathematics.md, "Certificates"). `max_steps` counts Bellman sweeps.
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


class Walk(NamedTuple):
    """Where an iteration stands: V[S], T V [S], what was kept of Q; the width of the bracket before; its costs."""

    value: jax.Array
    backup: jax.Array
    kept: Any
    previous: jax.Array
    state: Any
    steps: jax.Array
    products: jax.Array


class Answer(NamedTuple):
    """V[S], Q[S, A] and T V [S] at it, and what that sweep proves."""

    value: jax.Array
    q: jax.Array
    backup: jax.Array
    certificate: Certificate


def iterate(
    solver: Stepper, mdp: MDP, regularizer: Regularizer, value: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array, SolveStats]:
    """Run `solver` from V[S], or from zeros, on one MDP: V, Q[S, A], the result code and the stats.

    Steps go on until the bracket of V* is as narrow as was asked, or as rounding allows. One more sweep, at the value
    to be returned, then proves what it is worth, and Q is read off there. To working precision, a value is accepted
    if the equation of each state holds to that state's own rounding: the scale of one part of a process says nothing
    about another. Where it is not, more steps follow (`in_rounds`).
    """
    discounts = expected_discounts(mdp) if solver.is_centred else contraction_only(mdp)
    dtype = mdp.reward.dtype
    to_working_precision = solver.tolerance is None
    wanted = jnp.asarray(0 if to_working_precision else solver.tolerance, dtype)
    reached = rounding.REACHED if to_working_precision else rounding.REACHED_BUT_NOT_ASKED

    def rounding_of(size):
        """The rounding of a sweep whose numbers are all at most `size`."""
        zero = jnp.zeros_like(size)
        return rounding.of_sweep(mdp.transition.terms, discounts.most * size, 2 * size, zero)

    def look(walk: Walk, found: Found):
        """The bracket that a sweep proves, the largest |T V - V|, and the rounding in it."""
        low, high = min_max(walk.backup - walk.value)
        least, largest = min_max(walk.backup)
        noise = rounding_of(jnp.maximum(-least, largest)) + found.extra
        return bracket(discounts, low, high, noise), jnp.maximum(high, -low), noise

    def width(seen: Bracket):
        return seen.half_width if solver.is_centred else seen.reach

    def at_rounding(seen: Bracket, previous):
        stalled = (width(seen) >= previous) & (width(seen) <= rounding.STALL * seen.rounding)
        return (width(seen) <= reached * seen.rounding) | stalled

    # What a sweep proves is read off in the condition, where V and T V are arrays that lie in memory: in the body,
    # XLA's CPU would compute the sweep once more for each maximum (docs/performance.md).
    def going(walk: Walk, found: Found):
        seen, _, _ = look(walk, found)
        bound = width(seen) + seen.rounding
        return (bound > found.asked) & ~at_rounding(seen, walk.previous) & jnp.isfinite(bound)

    def step(walk: Walk, found: Found, unseen) -> Walk:
        seen, _, _ = look(walk, found)
        # What a step is asked for must be above rounding: within it, products would go on for ever.
        needed = jnp.maximum(found.asked - seen.rounding, rounding.REACHED * seen.rounding)
        # Unseen steps are for states whose share of the bracket is too small to be seen: no step may be saved on.
        half_width = jnp.where(unseen, jnp.inf, seen.half_width)
        swept = Swept(walk.value, walk.backup, walk.kept, half_width, needed)
        value, state, used = solver.step(mdp, swept, walk.state)
        q = action_values(mdp, value)
        kept = solver.keep(mdp, regularizer, q)
        return Walk(value, regularizer.conjugate(q), kept, width(seen), state, walk.steps + 1, walk.products + used)

    def find(walk: Walk, found: Found) -> Found:
        seen, residual, noise = look(walk, found)
        limited = at_rounding(seen, walk.previous)
        shift, wide, centred = jnp.zeros_like(residual), seen.reach, jnp.asarray(False)
        if solver.is_centred:
            # The middle of the bracket, unless it is noise: an absorbing end pins the level, and so may others.
            near = seen.reach + seen.rounding <= found.asked
            idle = residual <= rounding.NOISE * noise if to_working_precision else near
            centred = ~idle & jnp.isfinite(seen.middle)
            shift, wide = jnp.where(centred, seen.middle, 0), jnp.where(centred, seen.half_width, wide)
        value = walk.backup + shift
        q = action_values(mdp, value)
        backup = regularizer.conjugate(q)
        by_state = limited if to_working_precision else None
        proven, allowed = certify(mdp, regularizer, discounts, value, q, backup, by_state)
        extra = jnp.maximum(proven.noise - rounding_of(sup_norm(value)), 0)
        # Both sweeps prove something, the last one and that at the value itself.
        before = wide + bracket(discounts, residual, residual, jnp.maximum(proven.noise, noise)).rounding
        proven = proven._replace(error_bound=jnp.minimum(proven.error_bound, before))
        if to_working_precision:
            asked = found.asked
            excess = only_if(
                centred & limited,
                lambda: jnp.maximum(
                    proven.excess, excess_below(mdp, regularizer, discounts, walk.value, walk.backup, shift, allowed)
                ),
                proven.excess,
            )
            proven = proven._replace(excess=excess)
            accepted = excess <= rounding.working_precision(mdp.modulus, dtype)
            accepted &= proven.error_bound <= rounding.SAYS_SOMETHING * proven.implied
        else:
            asked = jnp.minimum(wanted, proven.implied)
            accepted = proven.error_bound <= asked
        # V may be finite where Q is not: an action that the regularizer never takes.
        known = jnp.isfinite(q) if mdp.available is None else jnp.isfinite(q) | ~mdp.available
        finite = jnp.all(known) & jnp.all(jnp.isfinite(backup)) & ~jnp.isnan(proven.error_bound)
        # A bound may be infinite although the problem is not: where rounding of a row's sum reaches 1 - discount.
        boundless = ~jnp.isfinite(proven.error_bound)
        finite &= ~boundless | (mdp.modulus < 1)
        # To working precision, rounding of the largest numbers says nothing of the others: bursts that gain nothing do.
        limited = boundless | (limited & (not to_working_precision))
        return Found(Answer(value, q, backup, proven), accepted, limited, finite, proven.excess, asked, extra)

    if value is None:  # the first Q is the reward, no product needed
        value = jnp.zeros_like(mdp.reward[:, 0])
        q = mdp.reward if mdp.available is None else jnp.where(mdp.available, mdp.reward, -jnp.inf)
    else:
        q = action_values(mdp, value)
    zero, one = jnp.asarray(0, jnp.int32), jnp.asarray(1, jnp.int32)
    unknown = jnp.asarray(jnp.inf, dtype)
    # No step mends a reward that is not finite, of an action that is never taken, too.
    usable = jnp.all(jnp.isfinite(mdp.reward) if mdp.available is None else jnp.isfinite(mdp.reward) | ~mdp.available)
    backup = regularizer.conjugate(q)
    walk = Walk(value, backup, solver.keep(mdp, regularizer, q), unknown, solver.start(mdp, value), one, zero)
    walk, found = in_rounds(
        walk,
        Answer(value, q, backup, Certificate(*(unknown for _ in Certificate._fields))),
        wanted,
        jnp.where(usable, jnp.asarray(solver.max_steps, jnp.int32), one),
        going=going,
        step=step,
        find=find,
        to_working_precision=to_working_precision,
    )
    answer = found.answer
    proven = answer.certificate
    stats = SolveStats(walk.steps, walk.products, proven.residual, proven.error_bound, proven.suboptimality)
    return answer.value, answer.q, found.result, stats
