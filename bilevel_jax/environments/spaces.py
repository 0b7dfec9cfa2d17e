"""Action spaces: the numbers 0 to n - 1, or the points of a box."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import dtypes
from jaxtyping import Array, ArrayLike, Float, Integer, Real

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.validation import as_float, as_size, is_known


class Discrete(eqx.Module):
    """The actions 0 to n - 1, int32.

    Raises:
      InputError: n is not an integer of at least 1.

    Example:
      >>> bj.environments.Discrete(4).n
      4
    """

    n: int = eqx.field(static=True)

    def __init__(self, n: int):
        self.n = as_size("n", n)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one action: ()."""
        return ()

    @property
    def dtype(self) -> np.dtype:
        """int32."""
        return np.dtype(np.int32)


class Box(eqx.Module):
    """Actions are arrays of a shape and a floating-point dtype, each entry from `low` to `high`.

    Args:
      low, high: numbers, or arrays that broadcast to `shape`; -inf and inf leave a side open.
      shape: of one action (static); None is that of `low` and `high`.
      dtype: float32 or float64 (static); None is JAX's default.

    Raises:
      InputError: bounds that do not broadcast to the shape, low above high, NaN, or a dtype that is not floating-point.

    Example:
      >>> bj.environments.Box(-1.0, 1.0, (3,)).low.shape
      (3,)
    """

    low: Float[Array, "*shape"]
    high: Float[Array, "*shape"]
    shape: tuple[int, ...] = eqx.field(static=True)
    dtype: np.dtype = eqx.field(static=True)

    def __init__(
        self,
        low: Real[ArrayLike, "..."] | Any,
        high: Real[ArrayLike, "..."] | Any,
        shape: tuple[int, ...] | None = None,
        dtype: Any = None,
    ):
        self.dtype = dtypes.canonicalize_dtype(jnp.result_type(float) if dtype is None else dtype)
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise InputError(f"dtype: expected a floating-point type, got {self.dtype}; Discrete is for numbered ones")
        bounds = [as_float(name, value).astype(self.dtype) for name, value in (("low", low), ("high", high))]
        self.shape = np.broadcast_shapes(*(b.shape for b in bounds)) if shape is None else tuple(shape)
        for name, bound in zip(("low", "high"), bounds, strict=True):
            try:
                setattr(self, name, jnp.broadcast_to(bound, self.shape))
            except ValueError:
                raise InputError(
                    f"{name}: expected an array that broadcasts to {list(self.shape)}, got {list(bound.shape)}"
                ) from None
        if is_known(self.low, self.high) and not (np.asarray(self.low) <= np.asarray(self.high)).all():
            raise InputError(f"low: expected at most high, got {np.asarray(self.low)} and {np.asarray(self.high)}")


Space = Discrete | Box
Action = Integer[Array, ""] | Float[Array, "..."]  # one of a Discrete, or one of a Box


def as_space(name: str, space: Any) -> Space:
    """Convert a space of gymnax or gymnasium to one of ours, by its attributes. One of ours is returned unchanged.

    Raises:
      InputError: neither finite from 0 on nor a box.

    Example:
      >>> class Three:  # as gymnasium.spaces.Discrete(3)
      ...     n, start, shape = 3, 0, ()
      >>> bj.environments.as_space("action_space", Three())
      Discrete(n=3)
    """
    if isinstance(space, Discrete | Box):
        return space
    count = getattr(space, "n", None)
    if count is not None and getattr(space, "shape", ()) == ():  # a MultiBinary has both
        if int(getattr(space, "start", 0)) != 0:
            raise InputError(f"{name}: its actions start from {int(space.start)}; number them from 0 on")
        return Discrete(as_count(name, count))
    parts = [getattr(space, field, None) for field in ("low", "high", "shape", "dtype")]
    if any(part is None for part in parts):
        raise InputError(f"{name}: its actions are a {type(space).__name__}, neither the numbers 0 to A - 1 nor a box")
    return Box(*parts)


def as_count(name: str, count: Any) -> int:
    """Return a number of actions as an int. Raises InputError where it is not known."""
    return as_size(name, count, "it is the number of actions, known before a run")
