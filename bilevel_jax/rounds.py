"""Rounds of steps that end on a proof: step while there is reason to, look closely at what was found, go on if need be.

While it steps, an iteration sees only what costs nothing: largest and smallest entries. What that says of the whole
may hide a part: where one state's numbers are a million times those of another, the rounding of the first covers the
error of the second. A close look costs a sweep or two and is made once, where steps may be done, in most cases. Where
it says no, further steps follow unseen: 1, 2, 4 and so on, each burst followed by another look.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bilevel_jax.results import Result
from bilevel_jax.rounding import LEAST_BURST, PATIENCE


def only_if(condition: jax.Array, make: Callable[[], jax.Array], otherwise: jax.Array) -> jax.Array:
    """`make()` where a condition holds, or `otherwise`.

    A loop of one round, not a condition: where vmap advances a batch, it is left out unless an element needs it.
    """

    def once(carry):
        del carry
        return make(), jnp.asarray(False)

    return lax.while_loop(lambda carry: carry[1], once, (otherwise, condition))[0]


class Found(NamedTuple):
    """What a close look found.

    `answer`, a pytree. `accepted`: it is what was asked for. `limited`: rounding or a standstill ended the steps.
    `finite`: whether going on makes sense. `excess`, what is left in units of rounding. `asked` and `extra`: the bound
    that is wanted, and the rounding of a step beyond what the steps see, in the light of this answer.
    """

    answer: Any
    accepted: jax.Array
    limited: jax.Array
    finite: jax.Array
    excess: jax.Array
    asked: jax.Array
    extra: jax.Array

    @property
    def result(self) -> jax.Array:
        """The code of an iteration that ended with it, int32."""
        ended = jnp.where(self.limited, Result.PRECISION_LIMIT, Result.MAX_STEPS)
        result = jnp.where(self.accepted, Result.CONVERGED, ended)
        return jnp.where(self.finite, result, Result.NOT_FINITE).astype(jnp.int32)


class Round(NamedTuple):
    """Where the rounds stand: the steps' state `walk`, with a field `steps`, and what was found last.

    `burst` steps are made unseen, up to the number `until`, if it is above 0; `excess` is the least so far and `stale`
    the number of rounds since.
    """

    walk: Any
    found: Found
    burst: jax.Array
    until: jax.Array
    excess: jax.Array
    stale: jax.Array
    done: jax.Array


def in_rounds(
    walk: Any,
    answer: Any,
    asked: jax.Array,
    max_steps: jax.Array,
    *,
    going: Callable[[Any, Found], jax.Array],
    step: Callable[[Any, Found, jax.Array], Any],
    find: Callable[[Any, Found], Found],
    to_working_precision: bool,
) -> tuple[Any, Found]:
    """The last `walk` and what was found there.

    Args:
      walk: the steps' state at the start.
      answer: of the shapes and dtypes of what `find` finds; its numbers are not read.
      asked: the error bound that is wanted, a scalar.
      max_steps: steps at most, int32.
      going: (walk, found) -> whether there is reason for a step, seen cheaply.
      step: (walk, found, unseen) -> walk.
      find: (walk, found) -> found, a close look.
      to_working_precision: whether an answer that is not accepted is worth further steps although `going` sees no
        reason for them (static). Otherwise rounds go on only where the last look gave `going` a reason.
    """
    zero, no = jnp.asarray(0, jnp.int32), jnp.asarray(False)
    wide = jnp.full_like(asked, jnp.inf)

    def one_round(now: Round) -> Round:
        unseen = now.burst > 0
        walk = lax.while_loop(
            lambda walk: (unseen | going(walk, now.found)) & (walk.steps < now.until) & ~now.done,
            lambda walk: step(walk, now.found, unseen),
            now.walk,
        )
        found = find(walk, now.found)
        if to_working_precision:
            burst = jnp.maximum(2 * now.burst, 1)
            until = jnp.minimum(walk.steps + burst, max_steps)
            long_enough = (now.burst >= LEAST_BURST).astype(jnp.int32)
            stale = jnp.where(found.excess < now.excess, 0, now.stale + long_enough)
            stuck = stale >= PATIENCE
        else:
            burst, until, stale = now.burst, now.until, now.stale
            # Where this look asks for less than the last one did, another look at the same V may find that.
            stuck = ~going(walk, found) & ~(found.asked < now.found.asked)  # NaN, too
        done = found.accepted | ~found.finite | stuck | (walk.steps >= max_steps)
        found = found._replace(limited=found.limited | stuck)
        return Round(walk, found, burst, until, jnp.minimum(found.excess, now.excess), stale, done)

    found = Found(answer, no, no, no, wide, asked, jnp.zeros_like(asked))
    start = Round(walk, found, zero, max_steps, wide, zero, no)
    end = lax.while_loop(lambda now: ~now.done, one_round, start)
    return end.walk, end.found
