"""Rounds of steps that end with a proof.

A round steps as long as there is a reason to, then looks closely at the result, and steps on where the close look says
no. While it steps, an iteration computes only what costs nothing: largest and smallest entries. These can hide a part
of the problem: where one state's numbers are a million times those of another, the rounding of the first covers the
error of the second. A close look costs one or two sweeps. In most cases it is made once, when the steps may be done.
Where it says no, 1, 2, 4, ... further steps follow without any look, each such burst ending with another close look.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
from jax import lax

from bilevel_jax.core.arrays import Count, Flag, Scalar
from bilevel_jax.core.results import Result
from bilevel_jax.core.rounding import LEAST_BURST, PATIENCE

Made = TypeVar("Made")


def only_if(condition: Flag, make: Callable[[], Made], otherwise: Made) -> Made:
    """Return `make()`, a pytree of arrays, where a condition holds, and `otherwise`, one of the same shapes, elsewhere.

    It is a loop of at most one round rather than a conditional: where vmap advances a batch, a loop is skipped unless
    an element needs it, while a conditional would compute both branches.
    """

    def once(carry):
        del carry
        return make(), jnp.asarray(False)

    return lax.while_loop(lambda carry: carry[1], once, (otherwise, condition))[0]


class Found(NamedTuple):
    """The result of a close look.

    `answer` is a pytree. `accepted`: the answer is as exact as was asked. `limited`: rounding or a standstill ended the
    steps. `finite`: it makes sense to go on. `excess`: the remaining error, in units of rounding. `asked` and `extra`:
    the bound that is wanted, and the rounding of a step that the steps themselves do not see, both at this answer.
    """

    answer: Any
    accepted: Flag
    limited: Flag
    finite: Flag
    excess: Scalar
    asked: Scalar
    extra: Scalar

    @property
    def result(self) -> Count:
        """The code of an iteration that ended with it, int32."""
        ended = jnp.where(self.limited, Result.PRECISION_LIMIT, Result.MAX_ITERATIONS)
        result = jnp.where(self.accepted, Result.CONVERGED, ended)
        return jnp.where(self.finite, result, Result.NOT_FINITE).astype(jnp.int32)


class Round(NamedTuple):
    """The state of the rounds: `walk`, that of the steps, with a field `iterations`; and the last result found.

    `burst` is the number of steps that are made without a look; if it is above 0, they go on until the number `until`.
    `excess` is the smallest excess so far, and `stale` the number of rounds since; with a tolerance, the number of
    looks without a step between. `pressed` says that the last look gave a reason for another step.
    """

    walk: Any
    found: Found
    burst: Count
    until: Count
    excess: Scalar
    stale: Count
    pressed: Flag
    done: Flag


def in_rounds(
    walk: Any,
    answer: Any,
    asked: Scalar,
    max_iterations: Count,
    *,
    going: Callable[[Any, Found], Flag],
    step: Callable[[Any, Found, Flag], Any],
    find: Callable[[Any, Found], Found],
    to_working_precision: bool,
) -> tuple[Any, Found]:
    """Run the rounds, and return the last `walk` with what was found there.

    Args:
      walk: the state of the steps at the start.
      answer: arrays of the shapes and dtypes of the answer that `find` finds; their values are not used.
      asked: the error bound that is wanted, a scalar.
      max_iterations: the largest number of steps, int32.
      going: (walk, found) -> whether there is a reason for another step, cheaply computed.
      step: (walk, found, unseen) -> walk.
      find: (walk, found) -> found, a close look.
      to_working_precision: whether an answer that is not accepted is worth further steps although `going` sees no
        reason for them (static). Otherwise the rounds go on only where the last look gave `going` a reason.
    """
    zero, no = jnp.asarray(0, jnp.int32), jnp.asarray(False)
    wide = jnp.full_like(asked, jnp.inf)

    def one_round(now: Round) -> Round:
        # A compiler may compute a number twice in one program, and round it differently. That must not make rounds
        # without end: where a look gives a reason for a step, one is made, and few looks are taken without a step.
        unseen, before = now.burst > 0, now.walk.iterations

        def another(walk: Any) -> Flag:
            wanted = unseen | going(walk, now.found) | (now.pressed & (walk.iterations == before))
            return wanted & (walk.iterations < now.until) & ~now.done

        walk = lax.while_loop(
            another,
            lambda walk: step(walk, now.found, unseen),
            now.walk,
        )
        found = find(walk, now.found)
        if to_working_precision:
            burst = jnp.maximum(2 * now.burst, 1)
            until = jnp.minimum(walk.iterations + burst, max_iterations)
            long_enough = (now.burst >= LEAST_BURST).astype(jnp.int32)
            stale = jnp.where(found.excess < now.excess, 0, now.stale + long_enough)
            stuck, pressed = stale >= PATIENCE, now.pressed
        else:
            burst, until, pressed = now.burst, now.until, going(walk, found)
            stale = jnp.where(walk.iterations == before, now.stale + 1, 0)
            # Where this look asks for less than the last one did, another look at the same V may find that.
            stuck = ~pressed & ~(found.asked < now.found.asked)  # NaN, too
            stuck |= stale >= PATIENCE
        done = found.accepted | ~found.finite | stuck | (walk.iterations >= max_iterations)
        found = found._replace(limited=found.limited | stuck)
        return Round(
            walk=walk,
            found=found,
            burst=burst,
            until=until,
            excess=jnp.minimum(found.excess, now.excess),
            stale=stale,
            pressed=pressed,
            done=done,
        )

    found = Found(
        answer=answer, accepted=no, limited=no, finite=no, excess=wide, asked=asked, extra=jnp.zeros_like(asked)
    )
    start = Round(
        walk=walk, found=found, burst=zero, until=max_iterations, excess=wide, stale=zero, pressed=no, done=no
    )
    end = lax.while_loop(lambda now: ~now.done, one_round, start)
    return end.walk, end.found
