"""Two tools for derivatives: a zero that has a derivative, and a value whose derivative is refused because it
has none.
"""

import jax
import jax.extend
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float

from bilevel_jax.core.errors import InputError


def derivative_of(x: Float[Array, "..."], where: Bool[Array, "..."]) -> Float[Array, "..."]:
    """Return a number that is 0 but has the derivative of x, where `where` is True. It is NaN where x is not finite.

    This is no custom derivative rule, because such rules lose second derivatives in a scan with checkpoints. It is the
    difference of x and itself, taken after a selection: a compiler cannot contract that into a multiply-add, whose
    rounding would be left over.
    """
    selected = jnp.where(where, x, 0)
    return selected - stop_gradient(selected)


@jax.custom_jvp
def without_derivative(constant: Float[Array, "*shape"], argument: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return `constant`, and refuse to differentiate it with respect to `argument`, from which it was computed.

    Use it for results that are piecewise constant: their derivative, 0 almost everywhere, would be mistaken for an
    answer. Both arrays have the same shape. In reverse mode InputError is raised while the gradient is traced, if a
    cotangent reaches the result; a result that is not used receives none. In forward mode the tangent is NaN, because
    there it is not known whether the tangent will be used.
    """
    del argument
    return constant


@without_derivative.defjvp
def _without_derivative_jvp(primals, tangents):
    return without_derivative(*primals), _no_tangent.bind(tangents[1])


def _nan(tangent: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
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
