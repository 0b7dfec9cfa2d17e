"""Promotion of dtypes and ranks. The library spells it out; the code of users runs with JAX's default promotion."""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@contextlib.contextmanager
def usual_promotion() -> Iterator[None]:
    """Run a user's code, which may rely on it, with JAX's default promotion of dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def with_rank(array: Float[Array, "..."], rank: int) -> Float[Array, "..."]:
    """The array with axes of length 1 in front, until it has as many as `rank`."""
    return jnp.expand_dims(array, tuple(range(rank - array.ndim)))
