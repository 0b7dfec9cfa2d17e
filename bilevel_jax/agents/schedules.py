"""Step sizes of learning agents: numbers, functions of the steps made, functions of a pair's own visits."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from bilevel_jax.functions import as_pytree
from bilevel_jax.validation import as_float, require_at_least, require_positive


class Polynomial(eqx.Module):
    """initial / (1 + count / scale)^power; power 0 is a constant.

    Args:
      initial: the step size at count 0, above 0.
      scale: the count from which on it decays, above 0.
      power: at least 0. Above 1/2 and up to 1 the noise dies out and what was learned first is forgotten.

    Raises:
      InputError: a number out of its range (where it is known).
    """

    initial: jax.Array
    scale: jax.Array
    power: jax.Array

    def __init__(self, initial: Any = 1.0, scale: Any = 1.0, power: Any = 0.8):
        self.initial = as_float("initial", initial, float)
        self.scale = as_float("scale", scale, float)
        self.power = as_float("power", power, float)
        require_positive("initial", self.initial, "step sizes are usually in (0, 1]")
        require_positive("scale", self.scale, "1 decays from the first step on")
        require_at_least("power", self.power, 0, "0 is a constant step size")

    def __call__(self, count: jax.Array) -> jax.Array:
        return self.initial * (1 + count.astype(self.scale.dtype) / self.scale) ** -self.power


class ByVisits(eqx.Module):
    """`schedule`, its count being how often the corrected pair was visited before, not the steps made.

    With features, the visits of a weight are the sum of |f_i| |f|_1 over the steps that corrected it,
    f being the features there: with one-hot features, the visits of the pair.

    Raises:
      InputError: schedule is not a function.
    """

    schedule: Callable

    def __init__(self, schedule: Callable):
        self.schedule = as_pytree("schedule", schedule)

    def __call__(self, count: jax.Array) -> jax.Array:
        return self.schedule(count)


def as_schedule(name: str, value: Any) -> Callable:
    """A number as a constant schedule, a function as one that is a pytree. Raises InputError."""
    if callable(value):
        return as_pytree(name, value)
    constant = as_float(name, value, float)
    require_positive(name, constant, "step sizes are usually in (0, 1]")
    return Polynomial(constant, 1.0, 0.0)


def evaluate(schedule: Callable, counts: jax.Array, dtype: Any) -> jax.Array:
    """The step size at each of the counts, in `dtype`; the schedule sees one count at a time."""
    flat = jax.vmap(lambda count: jnp.asarray(schedule(count), dtype))(counts.reshape(-1))
    return flat.reshape(counts.shape)
