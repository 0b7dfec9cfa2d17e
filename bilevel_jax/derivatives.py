"""A derivative that is an error: what is piecewise constant must not pass for having derivative 0."""

import jax
import jax.extend
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

from bilevel_jax.errors import InputError


@jax.custom_jvp
def without_derivative(constant: jax.Array, argument: jax.Array) -> jax.Array:
    """`constant`, of the same shape as the `argument` that it was read off, and with no derivative in it.

    In reverse mode a cotangent that reaches it is an InputError, where the gradient is traced; a result
    that is not used gets none. In forward mode the tangent is NaN, since it may be of no use.
    """
    del argument
    return constant


@without_derivative.defjvp
def _without_derivative_jvp(primals, tangents):
    return without_derivative(*primals), _no_tangent.bind(tangents[1])


def _nan(tangent: jax.Array) -> jax.Array:
    return jnp.full_like(tangent, jnp.nan)


def _refuse(cotangent, operand):
    del cotangent, operand
    raise InputError(
        "policy: the policy of an unregularized MDP is piecewise constant and has no derivative; use "
        "ShannonEntropy(temperature) with a small temperature, or an objective of value or q"
    )


# A primitive, since only its transpose rule is told whether there is a cotangent at all.
_no_tangent = jax.extend.core.Primitive("no_tangent")
_no_tangent.def_impl(_nan)
_no_tangent.def_abstract_eval(lambda tangent: tangent)
mlir.register_lowering(_no_tangent, mlir.lower_fun(_nan, multiple_results=False))
batching.defvectorized(_no_tangent)
ad.deflinear2(_no_tangent, _refuse)
