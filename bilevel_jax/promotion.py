"""Promotion of dtypes and ranks: spelled out in the library, as JAX does it by default in code of others."""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp


@contextlib.contextmanager
def usual_promotion() -> Iterator[None]:
    """Run code of others, which need not be made for strict promotion of dtypes or ranks, as JAX does by default."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def with_rank(array: jax.Array, rank: int) -> jax.Array:
    """The array with axes of length 1 in front, until it has as many as `rank`."""
    return jnp.expand_dims(array, tuple(range(rank - array.ndim)))
