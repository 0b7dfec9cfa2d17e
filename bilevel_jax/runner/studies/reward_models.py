"""A reward model by maximum likelihood from labels on pairs of segments, and how well it ranks them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bilevel_jax.batching import one_at_a_time_on_cpu
from bilevel_jax.preferences import log_likelihood, preference_probability

STEPS = 100  # of Newton's method, at most
SIZES = 8  # of a step are tried: all of it, a quarter, a sixteenth, ... (far from the minimum it is much too long)

_solve = one_at_a_time_on_cpu(jnp.linalg.solve)


def segment_features(problem: Any) -> jax.Array:
    """The matrix [N, F] that gives the returns of a tabular_rlhf's N segments under the weights x[F]: features @ x."""
    policy = jnp.full_like(problem.hidden_reward, 1 / problem.hidden_reward.shape[-1])
    size = jax.eval_shape(problem.start, jax.random.key(0)).size

    def returns(x):
        return problem.segments(policy, problem.reward(x).values)[1]

    return jax.vmap(returns, out_axes=-1)(jnp.eye(size, dtype=policy.dtype))


def fit(features: jax.Array, label: jax.Array, ridge: Any, start: jax.Array) -> jax.Array:
    """The x[F] that minimises ridge |x|^2 / 2 - sum_n log_likelihood(features_n @ x, 0, label_n).

    By Newton's method with the best of eight step sizes, until a step is shorter than sqrt(eps), after
    which the error is of the order of eps. The objective is ridge-strongly convex, so that
    one exists for labels that a line separates too. NaN if 100 steps were not enough.

    Args:
      features: of the first segment less those of the second, [n, F].
      label: [n].
      ridge: above 0.
      start: [F].
    """
    eps = jnp.finfo(start.dtype).eps
    close = eps**0.5
    sizes = jnp.asarray(0.25, start.dtype) ** jnp.arange(SIZES, dtype=start.dtype)

    def newton(carry):
        x, _, count = carry
        gain = features @ x
        chance = preference_probability(gain, jnp.zeros_like(gain))
        slope = (chance - label) @ features + ridge * x
        spread = chance * (1 - chance)
        step = -_solve((features * spread[:, None]).T @ features + ridge * jnp.eye(x.size, dtype=x.dtype), slope)
        length = jnp.max(jnp.abs(step))
        gains = gain[None] + sizes[:, None] * (features @ step)[None]
        prices = ridge * jnp.sum((x[None] + sizes[:, None] * step[None]) ** 2, -1) / 2
        losses = prices - jnp.sum(log_likelihood(gains, jnp.zeros_like(gains), label), -1)
        # The largest of the best: near the minimum they differ by rounding only.
        best = jnp.argmax(losses <= jnp.min(losses) * (1 + 64 * eps))
        return x + sizes[best] * step, length, count + 1

    def going(carry):
        return (carry[1] > close) & (carry[2] < STEPS)

    first = (start, jnp.full_like(start[0], jnp.inf), jnp.asarray(0, jnp.int32))
    x, length, _ = lax.while_loop(going, newton, first)
    return jnp.where(length <= close, x, jnp.nan)


def misordered(learned: jax.Array, hidden: jax.Array, weights: jax.Array) -> jax.Array:
    """The fraction of pairs of segments that `learned` puts into another order than `hidden` does, [W].

    (1 - Kendall's tau) / 2 if neither has ties. Pairs that tie in `hidden`, but for rounding, do not
    count; among the others, those that tie in `learned` count half. NaN if all tie.

    Args:
      learned, hidden: returns, [N].
      weights: [W, N]; under each, the pair i, j weighs the product of both.
    """
    tie = jnp.finfo(hidden.dtype).eps ** 0.5 * jnp.max(jnp.abs(hidden))

    def against_all(one):
        gain, truth = one[0] - learned, one[1] - hidden
        counts = (jnp.abs(truth) > tie).astype(weights.dtype)
        wrong = (1 - jnp.sign(gain * truth)) / 2 * counts
        return weights @ wrong, weights @ counts

    wrong, counts = lax.map(against_all, (learned, hidden), batch_size=128)  # [N, W] each
    return jnp.sum(weights.T * wrong, 0) / jnp.sum(weights.T * counts, 0)
