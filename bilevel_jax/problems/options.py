"""Checks of options that several problems have: sizes, seeds and numbers."""

import dataclasses
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.memory import require_room
from bilevel_jax.core.validation import (
    as_float,
    is_known,
    require_at_least,
    require_finite,
    require_fraction,
    require_positive,
)
from bilevel_jax.linear.factorization import FALL_BACK_LIMIT

MOST = 10_000
MOST_STEPS = 1_000_000  # of a trajectory
MOST_WIDTH = 4096  # of the hidden layers of a network
TABLES = 16  # [S, A] that a solve and its gradient hold: rewards, Q, policies, occupancies and what each is made of


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number; True, which Python takes for 1, is none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def as_sequence(name: str, values: Any, what: str) -> tuple[Any, ...]:
    """The values of an option that has several. Raises InputError, with `what` they are, if it has none."""
    try:
        return tuple(values)
    except TypeError:
        raise InputError(f"{name}: expected a list of {what}, got {values!r}") from None


def require_whole(options: Any, *names: str) -> None:
    """Raise InputError if one of the options is no whole number."""
    for name in names:
        if not is_whole(getattr(options, name)):
            raise InputError(f"{name}: expected a whole number, got {getattr(options, name)!r}")


def require_size(options: Any, name: str, *, least: int = 1, most: int = MOST, why: str = "") -> None:
    """Raise InputError if the option is no whole number from `least` to `most`; `why` explains the limits."""
    size = getattr(options, name)
    if not is_whole(size) or not least <= size <= most:
        raise InputError(f"{name} must be a whole number from {least} to {most}{why and f' ({why})'}, got {size!r}")


def refuse_unused(options: Any, names: tuple[str, ...], why: str) -> None:
    """Raise InputError if one of the options, none of which has an effect for the reason given, is not the default."""
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    for name in names:
        value = getattr(options, name)
        value = tuple(value) if isinstance(value, list) else value
        traced = isinstance(value, jax.Array) and not is_known(value)  # a sweep's, which has checked its points
        if not traced and not np.array_equal(np.asarray(value), np.asarray(defaults[name])):
            raise InputError(f"{name}: {why}; leave it out")


def require_room_for(name: str, *shape: int, copies: int = 1) -> None:
    """Raise InputError if a floating-point array of a shape, held in so many copies at a time, has no room.

    `name` is that of the options that make it large.
    """
    size = copies * math.prod(map(operator.index, shape)) * jnp.result_type(float).itemsize
    require_room(name, size, f"{'an array' if copies == 1 else f'{copies} arrays'} {list(shape)}", "take smaller sizes")


def require_room_to_solve(name: str, *batch_states_actions: int) -> None:
    """Raise InputError if tables [..., S, A] have no room, as many as a hyper-gradient by default holds at a time.

    Up to so many states it may factorise matrices [..., S, S], one per element of the batch.
    """
    *batch, states, _ = batch_states_actions
    require_room_for(name, *batch_states_actions, copies=TABLES)
    if states <= FALL_BACK_LIMIT:
        require_room_for(name, *batch, states, states, copies=3)


def require_count(name: str, count: int, most: int, what: str, remedy: str) -> None:
    """Raise InputError if a product of sizes, that of the option `name` among them, is more than `most`.

    `what` has the place {count} for the product; `remedy` says what is counted and which sizes to lower.
    """
    if count > most:
        written = str(count) if count < 10**15 else f"about 10^{int(math.log10(count))}"  # it may have 10,000 digits
        raise InputError(f"{name}: {what.format(count=written)}, at most {most} {remedy}")


def require_seed(options: Any) -> None:
    """Raise InputError if the option `seed` is known to be none; a traced one passes."""
    if isinstance(options.seed, jax.Array):
        return
    require_whole(options, "seed")
    if not 0 <= options.seed < 2**32:
        raise InputError(f"seed must be at least 0 and below 2^32, got {options.seed}")


def as_number(options: Any, name: str, least: float, remedy: str, *, most: float = math.inf) -> Float[Array, ""]:
    """The option as an array. Raises InputError if it is known not to be a finite number from `least` to `most`."""
    number = as_float(name, getattr(options, name), float, ())
    require_finite(name, number)
    require_at_least(name, number, least, remedy)
    if is_known(number) and not number <= most:
        raise InputError(f"{name} must be at most {most:g}, got {number:g}; {remedy}")
    return number


def as_positive(options: Any, name: str, remedy: str) -> Float[Array, ""]:
    """The option as an array. Raises InputError if it is known not to be a finite number above 0."""
    number = as_float(name, getattr(options, name), float, ())
    require_positive(name, number, remedy)
    return number


def as_fraction(options: Any, name: str, remedy: str) -> Float[Array, ""]:
    """The option as an array. Raises InputError if it is known not to be in [0, 1)."""
    number = as_float(name, getattr(options, name), float, ())
    require_fraction(name, number, remedy)
    return number
