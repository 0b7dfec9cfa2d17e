"""The one iteration loop. A solver is its step. The loop stops on a proven bound, on rounding or on max_iterations."""

import abc
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bilevel_jax.core import rounding
from bilevel_jax.core.arrays import Count, PerPair, PerState, Scalar
from bilevel_jax.core.reductions import min_max
from bilevel_jax.core.rounds import Found, in_rounds, only_if
from bilevel_jax.core.validation import require_stopping
from bilevel_jax.mdp.bellman import action_values, sup_norm
from bilevel_jax.mdp.process import MDP
from bilevel_jax.mdp.regularizers import Regularizer
from bilevel_jax.solvers.certificate import (
    Bracket,
    Certificate,
    bracket,
    certify,
    contraction_only,
    excess_below,
    expected_discounts,
)


class SolveStats(eqx.Module):
    """The report of a solve: one scalar per batch element in every field.

    `iterations` counts Bellman sweeps, and `products` the products with a policy's transitions between them. `residual`
    is |T V - V|_inf at the value returned. `error_bound` bounds |value - V*|_inf, rounding included: one number for
    all states, in units of the value. It holds with every result code; it may be infinite, and with NOT_FINITE NaN.
    `suboptimality` bounds max_s V*[s] - V^policy[s], both regularized, likewise.
    """

    iterations: Int[Array, "*batch"]
    products: Int[Array, "*batch"]
    residual: Float[Array, "*batch"]
    error_bound: Float[Array, "*batch"]
    suboptimality: Float[Array, "*batch"]


class Swept(NamedTuple):
    """Where a solver stands: V[S], T V [S], and `of_q`, what it stored of Q.

    `half_width` is that of the bracket of V* after this sweep, and `needed` the half width that ends the iteration.
    """

    value: PerState
    backup: PerState
    of_q: Any
    half_width: Scalar
    needed: Scalar

    @property
    def gap(self) -> PerState:
        """T V - V, [S]."""
        return self.backup - self.value


class Solver(eqx.Module):
    """The argument `solver` of `solve`: an iteration with its `tolerance` and `max_iterations`.

    `tolerance` is a bound on |value - V*|_inf, in units of the reward. None asks for working precision: the iteration
    goes on until the equation of each state holds to a few roundings of the numbers that enter it (docs/mathematics.md,
    "Certificates"). `max_iterations` counts Bellman sweeps.
    """

    tolerance: eqx.AbstractVar[Any]
    max_iterations: eqx.AbstractVar[Any]

    def __check_init__(self):
        require_stopping(self.tolerance, self.max_iterations)

    @abc.abstractmethod
    def resolve(self, mdp: MDP) -> "tuple[Stepper, ...]":
        """Return the iterations that solve an MDP with this structure, in the order in which they run.

        The first one starts from the initial value. Each of the others takes over from the last V of the one before,
        for those problems on which that one came to its `max_iterations`. A solver that is an iteration itself returns
        only itself.
        """


class Stepper(Solver):
    """A solver that is itself an iteration, defined by its step.

    `batched_on_cpu` says whether vmap on a CPU advances a batch together if the batch shares its transitions. Where it
    is False, whole solves run one after another. It is False for solvers that fold policies into the transitions or
    solve linear systems.
    """

    batched_on_cpu: ClassVar[bool] = False

    def resolve(self, mdp):
        del mdp
        return (self,)

    @property
    def is_centred(self) -> bool:
        """Return whether the result is the middle of the bracket of V*; otherwise it is the last T V."""
        return True

    def keep(self, mdp: MDP, regularizer: Regularizer, q: PerPair) -> Any:
        """Return what a step needs of Q[S, A]."""
        del mdp, regularizer, q

    def start(self, mdp: MDP, value: PerState) -> Any:
        """Return the state that is carried from step to step, at V[S]."""
        del mdp, value

    @abc.abstractmethod
    def step(self, mdp: MDP, swept: Swept, state: Any) -> tuple[PerState, Any, Count]:
        """Return the next V[S], the next state, and the number of products that were made."""


class Walk(NamedTuple):
    """Where an iteration stands: V[S], T V [S], what was stored of Q, the width of the bracket before, and its costs so
    far.
    """

    value: PerState
    backup: PerState
    of_q: Any
    previous: Scalar
    state: Any
    iterations: Count
    products: Count


class Answer(NamedTuple):
    """V[S], Q[S, A] and T V [S] at it, and the proof that this sweep gives."""

    value: PerState
    q: PerPair
    backup: PerState
    certificate: Certificate


def iterate(
    solver: Stepper, mdp: MDP, regularizer: Regularizer, value: PerState | None
) -> tuple[PerState, PerPair, Count, SolveStats]:
    """Run `solver` from V[S], or from zeros, on one MDP; return V, Q[S, A], the result code and the stats.

    Steps go on until the bracket of V* is as narrow as was asked, or as rounding allows. One more sweep, at the value
    that is to be returned, then proves how exact it is and computes Q there. At working precision, a value is accepted
    if the equation of each state holds to that state's own rounding, because the scale of one part of a process says
    nothing about another part. Where the value is not accepted, more steps follow (`in_rounds`).
    """
    discounts = expected_discounts(mdp) if solver.is_centred else contraction_only(mdp)
    dtype = mdp.reward.dtype
    to_working_precision = solver.tolerance is None
    wanted = jnp.asarray(0 if to_working_precision else solver.tolerance, dtype)
    reached = rounding.REACHED if to_working_precision else rounding.REACHED_BUT_NOT_ASKED

    def rounding_of(size):
        """The rounding of a sweep whose numbers are all at most `size`."""
        zero = jnp.zeros_like(size)
        return rounding.of_sweep(mdp.transition.sums(size), discounts.most * size, 2 * size, zero)

    def bracket_at(walk: Walk, found: Found):
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
        seen, _, _ = bracket_at(walk, found)
        bound = width(seen) + seen.rounding
        return (bound > found.asked) & ~at_rounding(seen, walk.previous) & jnp.isfinite(bound)

    def step(walk: Walk, found: Found, unseen) -> Walk:
        seen, _, _ = bracket_at(walk, found)
        # What a step is asked for must be above rounding: within it, products would go on for ever.
        needed = jnp.maximum(found.asked - seen.rounding, rounding.REACHED * seen.rounding)
        # Unseen steps are for states whose share of the bracket is too small to be seen: no step may be saved on.
        half_width = jnp.where(unseen, jnp.inf, seen.half_width)
        swept = Swept(value=walk.value, backup=walk.backup, of_q=walk.of_q, half_width=half_width, needed=needed)
        value, state, used = solver.step(mdp, swept, walk.state)
        q = action_values(mdp, value)
        of_q = solver.keep(mdp, regularizer, q)
        return Walk(
            value=value,
            backup=regularizer.conjugate(q),
            of_q=of_q,
            previous=width(seen),
            state=state,
            iterations=walk.iterations + 1,
            products=walk.products + used,
        )

    def find(walk: Walk, found: Found) -> Found:
        seen, residual, noise = bracket_at(walk, found)
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
            accepted = excess <= 1
            accepted &= proven.error_bound <= rounding.SAYS_SOMETHING * proven.implied
        else:
            asked = jnp.minimum(wanted, proven.implied)
            accepted = proven.error_bound <= asked
        # V may be finite where Q is not: an action that the regularizer never takes.
        known = jnp.isfinite(q) if mdp.available is None else jnp.isfinite(q) | ~mdp.available
        finite = jnp.all(known) & jnp.all(jnp.isfinite(backup)) & ~jnp.isnan(proven.error_bound)
        # A bound may be infinite although the problem is not: where rounding of a row's sum reaches 1 - discount.
        boundless = ~jnp.isfinite(proven.error_bound)
        accepted &= ~boundless  # what is implied may be out of range, too
        finite &= ~boundless | (mdp.modulus < 1)
        # To working precision, rounding of the largest numbers says nothing of the others: bursts that gain nothing do.
        limited = boundless | (limited & (not to_working_precision))
        return Found(
            answer=Answer(value=value, q=q, backup=backup, certificate=proven),
            accepted=accepted,
            limited=limited,
            finite=finite,
            excess=proven.excess,
            asked=asked,
            extra=extra,
        )

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
    walk = Walk(
        value=value,
        backup=backup,
        of_q=solver.keep(mdp, regularizer, q),
        previous=unknown,
        state=solver.start(mdp, value),
        iterations=one,
        products=zero,
    )
    walk, found = in_rounds(
        walk,
        Answer(value=value, q=q, backup=backup, certificate=Certificate(*(unknown for _ in Certificate._fields))),
        wanted,
        jnp.where(usable, jnp.asarray(solver.max_iterations, jnp.int32), one),
        going=going,
        step=step,
        find=find,
        to_working_precision=to_working_precision,
    )
    answer = found.answer
    proven = answer.certificate
    stats = SolveStats(
        iterations=walk.iterations,
        products=walk.products,
        residual=proven.residual,
        error_bound=proven.error_bound,
        suboptimality=proven.suboptimality,
    )
    return answer.value, answer.q, found.result, stats
