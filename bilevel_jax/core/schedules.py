"""Numbers that change with the iteration: step sizes of agents, factors of a temperature."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Real

from bilevel_jax.core.arrays import Scalar
from bilevel_jax.core.functions import as_pytree
from bilevel_jax.core.validation import as_float, require_at_least, require_positive


class Schedule(eqx.Module):
    """A function of a count, such as the number of iterations. It is a pytree: its numbers are leaves."""

    @abc.abstractmethod
    def __call__(self, count: Real[Array, ""]) -> Scalar:
        """The number at a count, []."""


class Polynomial(Schedule):
    """initial / (1 + count / scale)^power; power 0 is a constant.

    Args:
      initial: the step size at count 0, above 0.
      scale: the count from which on it decays, above 0.
      power: at least 0. Above 1/2 and up to 1 the noise dies out and what was learned first is forgotten.

    Raises:
      InputError: a number out of its range (where it is known).

    Example:
      >>> step_size = bj.agents.Polynomial(1.0, 10.0, 0.5)
      >>> float(step_size(jnp.array(30)))
      0.5
    """

    initial: Float[Array, "*batch"]
    scale: Float[Array, "*batch"]
    power: Float[Array, "*batch"]

    def __init__(self, initial: Any = 1.0, scale: Any = 1.0, power: Any = 0.8):
        self.initial = as_float("initial", initial, float)
        self.scale = as_float("scale", scale, float)
        self.power = as_float("power", power, float)
        require_positive("initial", self.initial, "step sizes are usually in (0, 1]")
        require_positive("scale", self.scale, "1 decays from the first step on")
        require_at_least("power", self.power, 0, "0 is a constant step size")

    def __call__(self, count: Real[Array, ""]) -> Float[Array, "*batch"]:
        return self.initial * (1 + count.astype(self.scale.dtype) / self.scale) ** -self.power


class LinearDecay(Schedule):
    """A number that falls, or grows, along a line: `initial` at count 0, `final` from `count` on.

    Args:
      initial, final: above 0.
      count: above 0.

    Raises:
      InputError: a number out of its range (where it is known).

    Example:
      >>> learning_rate = bj.agents.LinearDecay(1.0, 0.2, 100)
      >>> round(float(learning_rate(jnp.array(50))), 3), round(float(learning_rate(jnp.array(500))), 3)
      (0.6, 0.2)
    """

    initial: Float[Array, "*batch"]
    final: Float[Array, "*batch"]
    count: Float[Array, "*batch"]

    def __init__(self, initial: Any = 1e-3, final: Any = 5e-5, count: Any = 1000):
        self.initial = as_float("initial", initial, float)
        self.final = as_float("final", final, float)
        self.count = as_float("count", count, float)
        require_positive("initial", self.initial, "learning rates of networks are usually 1e-4 to 1e-2")
        require_positive("final", self.final, "give a small number, e.g. a twentieth of the initial one")
        require_positive("count", self.count, "it is the number of updates until the final one")

    def __call__(self, count: Real[Array, ""]) -> Float[Array, "*batch"]:
        part = jnp.minimum(count.astype(self.count.dtype) / self.count, 1)
        return self.initial + part * (self.final - self.initial)


class ByVisits(Schedule):
    """`schedule` as a function of how often the corrected pair was visited before, instead of the number of steps made.

    With features, the number of visits of a weight is the sum of |f_i| |f|_1 over the steps that corrected it, where f
    are the features of the step's state. For one-hot features that is the number of visits of the pair.

    Raises:
      InputError: schedule is not a function.

    Example:
      >>> agent = bj.agents.SoftQLearning(step_size=bj.agents.ByVisits(lambda visits: 1 / (1 + visits)))
    """

    schedule: Callable

    def __init__(self, schedule: Callable):
        self.schedule = as_pytree("schedule", schedule)

    def __call__(self, count: Real[Array, ""]) -> Scalar:
        return self.schedule(count)


class Cooling(Schedule):
    """A schedule of the temperature: the factor start^(1 - n / iterations) at iteration n, and 1 later on.

    Raises:
      InputError: a start or iterations that are not above 0.

    Example:
      >>> cooling = bj.algorithms.Cooling(10.0, 100)
      >>> round(float(cooling(jnp.array(0))), 3), round(float(cooling(jnp.array(200))), 3)
      (10.0, 1.0)
    """

    start: Float[Array, "*batch"]
    iterations: Float[Array, "*batch"]

    def __init__(self, start: Any, iterations: Any):
        self.start = as_float("start", start, float)
        self.iterations = as_float("iterations", iterations, float)
        require_positive("start", self.start, "10 begins at ten times the temperature")
        require_positive(
            "iterations", self.iterations, "it is the number of iterations until the problem's own temperature"
        )

    def __call__(self, count: Real[ArrayLike, ""]) -> Float[Array, "*batch"]:
        return self.start ** jnp.maximum(0, 1 - count / self.iterations)


class Attenuation(Schedule):
    """A factor of the temperature: start / (1 + iteration / scale)^power, down to `end`.

    See `UpperLevel.temperature`.

    Example:
      >>> schedule = bj.algorithms.Attenuation()
      >>> bool(schedule(jnp.array(100)) < schedule(jnp.array(0)))
      True
    """

    decay: Polynomial
    end: Float[Array, "*batch"]

    def __init__(self, start: Any = 4.0, scale: Any = 20.0, power: Any = 0.5, end: Any = 1.0):
        self.decay = Polynomial(start, scale, power)
        self.end = as_float("end", end, float)

    def __call__(self, count: Real[Array, ""]) -> Float[Array, "*batch"]:
        return jnp.maximum(self.decay(count), self.end)


def as_schedule(name: str, value: Any) -> Callable:
    """Return a number as a constant schedule, and a function as a schedule that is a pytree. Raises InputError."""
    if callable(value):
        return as_pytree(name, value)
    constant = as_float(name, value, float)
    require_positive(name, constant, "step sizes are usually in (0, 1]")
    return Polynomial(constant, 1.0, 0.0)


def evaluate(schedule: Callable, counts: Real[Array, "*shape"], dtype: Any) -> Float[Array, "*shape"]:
    """Return the step size at each of the counts, in `dtype`. The schedule is called with one count at a time."""
    flat = jax.vmap(lambda count: jnp.asarray(schedule(count), dtype))(counts.reshape(-1))
    return flat.reshape(counts.shape)
