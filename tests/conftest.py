"""Tests run in float64 with strict promotion; float32 is asked for where it is tested."""

import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
