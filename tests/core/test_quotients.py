"""Quotients: to the bit, and with derivatives that no square takes out of range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bilevel_jax.core.quotients import quotient

NORMAL = st.floats(2.0**-60, 2.0**60, width=32)


@given(st.tuples(NORMAL, st.sampled_from([-1.0, 1.0])), NORMAL)
def test_to_the_bit(x, y):
    number, divisor = np.float32(x[0] * x[1]), np.float32(y)
    assert float(quotient(jnp.asarray(number), jnp.asarray(divisor))) == float(number / divisor)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("part", [-0.98, -0.6, 0.0, 0.6, 0.98])
def test_derivatives_near_both_ends(part, dtype):
    y = dtype(1.5 * 2.0 ** int(part * np.finfo(dtype).maxexp))
    x = dtype(0.75) * y
    of_x, of_y = jax.grad(quotient, (0, 1))(jnp.asarray(x), jnp.asarray(y))
    assert float(of_y) == -float(dtype(x / y) / y)
    assert float(of_x) == float(1 / y)
    # In units of y all derivatives are of the order of one.
    second = jax.grad(jax.grad(lambda factor: quotient(jnp.asarray(x), jnp.asarray(y) * factor)))(dtype(1))
    np.testing.assert_allclose(second, 2 * 0.75, rtol=1e-6)


def test_what_is_not_a_number_shows():
    for y in (np.nan, 0.0):
        assert not np.isfinite(quotient(jnp.asarray(1.0), jnp.asarray(y)))
    assert float(quotient(jnp.asarray(1.0), jnp.asarray(np.inf))) == 0
