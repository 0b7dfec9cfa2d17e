"""A linear reward model by maximum likelihood from labels on pairs of segments, and how well it ranks them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Real

from bilevel_jax.core.cpu import one_at_a_time_on_cpu
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.validation import as_float, require_finite, require_positive, require_probability
from bilevel_jax.preferences.bradley_terry import log_likelihood, preference_probability

STEPS = 100  # of Newton's method, at most
SIZES = 8  # of a step are tried: all of it, a quarter, a sixteenth, ... (far from the minimum it is much too long)

_solve = one_at_a_time_on_cpu(jnp.linalg.solve)


def segment_features(problem: Any) -> Float[Array, "N F"]:
    """Return the matrix [N, F] for which features @ x are the returns of the N segments of a tabular_rlhf problem at
    x[F].

    Args:
      problem: has `segments(policy, reward)`, `hidden_reward` and a reward that is linear in x.

    Example:
      >>> problem = bj.problems.make("tabular_rlhf", states=4, starts=2, actions=2, length=2)
      >>> bj.preferences.segment_features(problem).shape
      (16, 8)
    """
    policy = jnp.full_like(problem.hidden_reward, 1 / problem.hidden_reward.shape[-1])
    size = jax.eval_shape(problem.start, jax.random.key(0)).size

    def returns(x):
        return problem.segments(policy, problem.reward(x).values)[1]

    return jax.vmap(returns, out_axes=-1)(jnp.eye(size, dtype=policy.dtype))


def fit_linear_reward(
    features: Real[ArrayLike, "n F"] | Any,
    label: Real[ArrayLike, " n"] | Any,
    ridge: Real[ArrayLike, ""] | Any,
    start: Real[ArrayLike, " F"] | Any,
) -> Float[Array, " F"]:
    """Return the weights x[F] that minimise ridge |x|^2 / 2 - sum_n log_likelihood(features_n @ x, 0, label_n).

    Newton's method, with the best of eight sizes of each step, goes on until a step is shorter than sqrt(eps). The
    error is then of the order of eps. The ridge makes the objective strongly convex: it has exactly one minimum, even
    for labels that a line separates. Derivatives are those of the minimum, by the implicit function theorem.

    Args:
      features: those of the first segment of each pair minus those of the second, [n, F].
      label: 1 where the first is better, 0 where the second is, 1/2 for a tie, or anything between, [n].
      ridge: weight of the penalty, a number above 0.
      start: where Newton's method starts, [F].

    Returns:
      [F], of the dtype of `features`; NaN if 100 steps were not enough.

    Raises:
      InputError: shapes that do not fit, or, where they are known, a ridge not above 0 or a label outside [0, 1].

    Example:
      >>> features = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]])
      >>> x = bj.preferences.fit_linear_reward(features, jnp.array([1.0, 0.0, 1.0]), 0.1, jnp.zeros(2))
      >>> bool(x[0] > x[1])
      True
    """
    features = as_float("features", features)
    if features.ndim != 2:
        raise InputError(f"features: expected [pairs, features], got shape {list(features.shape)}; vmap over more axes")
    pairs, size = features.shape
    label = as_float("label", label, features.dtype, (pairs,))
    ridge = as_float("ridge", ridge, features.dtype, ())
    start = lax.stop_gradient(as_float("start", start, features.dtype, (size,)))
    require_finite("features", features)
    require_probability("label", label, "1 where the first segment is better, 0 where the second is")
    require_positive("ridge", ridge, "few labels alone leave the weights free")

    def slope(x):
        gain = features @ x
        return (preference_probability(gain, jnp.zeros_like(gain)) - label) @ features + ridge * x

    def minimise(_, x):
        return _newton(features, label, ridge, x)

    def solve_tangent(linear, right):
        matrix = jax.jacfwd(linear)(right)
        return lax.custom_linear_solve(linear, right, lambda _, b: _solve(matrix, b), symmetric=True)

    return lax.custom_root(slope, start, minimise, solve_tangent)


def _newton(
    features: Float[Array, "n F"], label: Float[Array, " n"], ridge: Float[Array, ""], start: Float[Array, " F"]
) -> Float[Array, " F"]:
    eps = jnp.finfo(start.dtype).eps
    close = eps**0.5
    sizes = jnp.asarray(0.25, start.dtype) ** jnp.arange(SIZES, dtype=start.dtype)

    def step(carry):
        x, _, count = carry
        gain = features @ x
        chance = preference_probability(gain, jnp.zeros_like(gain))
        slope = (chance - label) @ features + ridge * x
        spread = chance * (1 - chance)
        curvature = (features * spread[:, None]).T @ features + ridge * jnp.eye(x.size, dtype=x.dtype)
        direction = -_solve(curvature, slope)
        length = jnp.max(jnp.abs(direction))
        gains = gain[None] + sizes[:, None] * (features @ direction)[None]
        prices = ridge * jnp.sum((x[None] + sizes[:, None] * direction[None]) ** 2, -1) / 2
        losses = prices - jnp.sum(log_likelihood(gains, jnp.zeros_like(gains), label), -1)
        # The largest of the best: near the minimum they differ by rounding only.
        best = jnp.argmax(losses <= jnp.min(losses) * (1 + 64 * eps))
        return x + sizes[best] * direction, length, count + 1

    def goes_on(carry):
        _, length, count = carry
        return (length > close) & (count < STEPS)

    first = (start, jnp.asarray(jnp.inf, start.dtype), jnp.asarray(0, jnp.int32))
    x, length, _ = lax.while_loop(goes_on, step, first)
    return jnp.where(length <= close, x, jnp.nan)


def misordered_fraction(
    learned: Real[ArrayLike, " N"] | Any, hidden: Real[ArrayLike, " N"] | Any, weights: Real[ArrayLike, "W N"] | Any
) -> Float[Array, " W"]:
    """Return the fraction of pairs of segments that `learned` puts into another order than `hidden` does, [W].

    It is (1 - Kendall's tau) / 2 if neither has ties. Pairs that tie in `hidden`, apart from rounding, do not count.
    Among the others, those that tie in `learned` count half. The result is NaN if all pairs tie.

    Args:
      learned: returns of the segments under the model, [N].
      hidden: returns of the segments under the reward behind the labels, [N].
      weights: [W, N]; for each row, the pair i, j has the product of both weights.

    Raises:
      InputError: shapes that do not fit.

    Example:
      >>> learned, hidden = jnp.array([1.0, 3.0, 2.0]), jnp.array([1.0, 2.0, 3.0])
      >>> fraction = bj.preferences.misordered_fraction(learned, hidden, jnp.ones((1, 3)))
      >>> round(float(fraction[0]), 2)
      0.33
    """
    hidden = as_float("hidden", hidden)
    if hidden.ndim != 1:
        raise InputError(f"hidden: expected [segments], got shape {list(hidden.shape)}; vmap over more axes")
    learned = as_float("learned", learned, hidden.dtype, hidden.shape)
    weights = as_float("weights", weights, hidden.dtype)
    if weights.ndim != 2 or weights.shape[1] != hidden.size:
        raise InputError(f"weights: expected [weightings, {hidden.size}], got shape {list(weights.shape)}")
    tie = jnp.finfo(hidden.dtype).eps ** 0.5 * jnp.max(jnp.abs(hidden))

    def against_all(one):
        gain, truth = one[0] - learned, one[1] - hidden
        counts = (jnp.abs(truth) > tie).astype(weights.dtype)
        wrong = (1 - jnp.sign(gain * truth)) / 2 * counts
        return weights @ wrong, weights @ counts

    wrong, counts = lax.map(against_all, (learned, hidden), batch_size=128)  # [N, W] each
    return jnp.sum(weights.T * wrong, 0) / jnp.sum(weights.T * counts, 0)
