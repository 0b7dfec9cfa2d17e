"""Quotients whose derivatives stay in range."""

import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float


def quotient(x: Float[Array, "*shape"], y: Float[Array, ""]) -> Float[Array, "*shape"]:
    """Return x / y, a number y, to the bit, with a derivative in y that is right wherever it is in range.

    jax computes that derivative, -x / y^2, with the square of y. From about 1e19 on in float32, and below 1e-19, the
    square is out of range, and the derivative would be 0 or NaN. Here both numbers are first divided by a power of two
    near y.

    Example:
      >>> y = jnp.asarray(2.0**100, jnp.float32)
      >>> float(jax.grad(quotient, 1)(y, y) * y)
      -1.0
    """
    most = jnp.finfo(y.dtype).maxexp - 2  # its own power of two, and the reciprocal, are normal numbers
    exponent = jnp.clip(jnp.frexp(stop_gradient(y))[1], -most, most)
    scale = jnp.ldexp(jnp.ones_like(y), -exponent)
    return (x * scale) / (y * scale)
