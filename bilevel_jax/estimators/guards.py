"""The two parts of a hyper-gradient, by which it is watched and bounded: dl/dx, and what the policy's answer adds.

Where the temperature is low or the answer is estimated from few samples, the second part is by far the larger, and is
mostly noise.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Real

from bilevel_jax.core.promotion import usual_promotion
from bilevel_jax.core.validation import as_float, require_at_least


class Parts(NamedTuple):
    """The 2-norms of the direct and the implicit part of a gradient, and the cosine of the angle between them, 0 where
    one of them is zero.
    """

    direct_norm: Float[Array, ""]
    implicit_norm: Float[Array, ""]
    cosine: Float[Array, ""]


def compare(direct: Any, implicit: Any) -> Parts:
    """Compare the two parts of a gradient, pytrees like x.

    Example:
      >>> direct, implicit = {"a": jnp.array([3.0, 0.0])}, {"a": jnp.array([0.0, 4.0])}
      >>> made = bj.estimators.guards.compare(direct, implicit)
      >>> [round(float(part), 3) for part in made]
      [3.0, 4.0, 0.0]
    """
    first, second = norm(direct), norm(implicit)
    both = (first > 0) & (second > 0)
    with usual_promotion():
        units = [
            jax.tree.leaves(jax.tree.map(lambda leaf, size=size: leaf / jnp.where(size > 0, size, 1), tree))
            for tree, size in ((direct, first), (implicit, second))
        ]
        inner = sum(jnp.sum(one * other) for one, other in zip(*units, strict=True))
    return Parts(first, second, jnp.where(both, inner, jnp.zeros_like(first)))


def bounded(direct: Any, implicit: Any, max_ratio: Real[ArrayLike, ""] = jnp.inf) -> Any:
    """Return direct + implicit, the latter made as small that its 2-norm is at most max_ratio times that of the former.

    Where the direct part is zero, a finite ratio leaves nothing of the implicit part.

    Args:
      direct, implicit: the parts of a gradient, pytrees like x.
      max_ratio: at least 0; infinity does not bound. A leaf.

    Raises:
      InputError: max_ratio is below 0 or NaN (where it is known).

    Example:
      >>> direct, implicit = {"a": jnp.array([3.0, 0.0])}, {"a": jnp.array([0.0, 4.0])}
      >>> [round(entry, 3) for entry in bj.estimators.guards.bounded(direct, implicit, 0.5)["a"].tolist()]
      [3.0, 1.5]
    """
    first, second = norm(direct), norm(implicit)
    ratio = as_float("max_ratio", max_ratio).astype(first.dtype)
    require_at_least("max_ratio", ratio, 0, "1 allows for parts of one size, infinity does not bound")
    ratio = jnp.where(ratio >= 0, ratio, jnp.nan)  # of a traced one nothing was known
    most = jnp.where(jnp.isinf(ratio), jnp.inf, jnp.where(jnp.isinf(ratio), 1, ratio) * first)
    factor = jnp.where(second > most, most / jnp.where(second > most, second, 1), 1)
    factor = jnp.where(jnp.isnan(ratio), jnp.nan, factor)
    return jax.tree.map(lambda one, other: one + factor.astype(other.dtype) * other, direct, implicit)


def norm(tree: Any) -> Float[Array, ""]:
    """The 2-norm of a pytree, []; squares do not overflow."""
    with usual_promotion():
        leaves = jax.tree.leaves(tree)
        peak = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf), initial=0) for leaf in leaves]))
        unit = jnp.where((peak > 0) & jnp.isfinite(peak), peak, 1)
        # In two steps: the reciprocal of the largest numbers is one that processors may take for 0.
        root = 1 / jnp.sqrt(unit)
        return unit * jnp.sqrt(sum(jnp.sum((leaf * root * root) ** 2) for leaf in leaves))
