"""Losses of labels: the Bradley-Terry model of outcomes and of decisions, and how rational the labels are."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Real

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.promotion import usual_promotion
from bilevel_jax.core.validation import as_float, require_at_least, require_finite, require_probability
from bilevel_jax.environments.policies import as_policy
from bilevel_jax.preferences.bradley_terry import log_likelihood, segment_return
from bilevel_jax.preferences.dataset import Preferences
from bilevel_jax.preferences.segments import Segments, relabelled

STEPS = 200  # of Newton's method and of bisection, at most; a bisection to float64's last digit takes 53


def outcome_scores(reward: Any, segments: Segments) -> Float[Array, "N H"]:
    """Return the reward of each step, [N, H]; the score of a segment that is judged by its outcome is their sum.

    Args:
      reward: an `ActionFunction`, or a function of one observation, action and next observation.

    Example:
      >>> segments = bj.preferences.Segments(
      ...     jnp.zeros((3, 5), jnp.int32), jnp.zeros((3, 5), jnp.int32), valid=jnp.ones((3, 5), bool)
      ... )
      >>> bj.preferences.outcome_scores(bj.Table([[2.0, 1.0]]), segments)[0].tolist()
      [2.0, 2.0, 2.0, 2.0, 2.0]
    """
    return relabelled(reward, Segments(*_steps(segments), valid=segments.valid)).reward


def decision_scores(
    policy: Any, segments: Segments, temperature: Real[ArrayLike, ""] | Any = 1.0
) -> Float[Array, "N H"]:
    """Return temperature log pi(a|s) of each step, [N, H]; the score of a segment judged by its decisions is their sum.

    At the soft-optimal policy of a reward it is the soft advantage Q - V of what was done (Knox et al. 2022; the model
    of contrastive preference learning, Hejna et al. 2024). With a `KLDivergence` it is that plus temperature log
    reference.

    Labels tell the product of this temperature and the rationality, but neither of the two: give one, or fit the
    product, as the rationality at temperature 1.

    Args:
      policy: a `Policy`, or an argument of `as_policy`.
      temperature: that of the agent.

    Example:
      >>> segments = bj.preferences.Segments(
      ...     jnp.zeros((3, 5), jnp.int32), jnp.zeros((3, 5), jnp.int32), valid=jnp.ones((3, 5), bool)
      ... )
      >>> scores = bj.preferences.decision_scores(jnp.array([[0.25, 0.75]]), segments, temperature=0.5)
      >>> round(float(scores[0, 0]), 3)
      -0.693
    """
    policy = as_policy(policy)

    def score(observation, action):
        return policy.distribution(observation).log_prob(action)

    with usual_promotion():
        logs = jax.vmap(jax.vmap(score))(segments.observation, segments.action)
    logs = jnp.where(segments.valid, logs, 0)
    return as_float("temperature", temperature, logs.dtype, ()) * logs


def gains(preferences: Preferences, scores: Real[ArrayLike, "N H"] | Any) -> Float[Array, " P"]:
    """Return how much higher the first segment of each pair scores, [P], from the scores of all steps, [N, H].

    Steps that are not valid do not count and may hold anything.

    Raises:
      InputError: scores of another shape.

    Example:
      >>> segments = bj.preferences.Segments(jnp.zeros((2, 3)), jnp.zeros((2, 3)), valid=jnp.ones((2, 3), bool))
      >>> data = bj.preferences.Preferences(segments, [[0, 1]], [1.0])
      >>> bj.preferences.gains(data, jnp.array([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]])).tolist()
      [3.0]
    """
    scores = as_float("scores", scores, None, preferences.segments.valid.shape)
    total = segment_return(scores, preferences.segments.valid)
    return total[preferences.pairs[:, 0]] - total[preferences.pairs[:, 1]]


def pair_losses(
    preferences: Preferences, scores: Real[ArrayLike, "N H"] | Any, rationality: Real[ArrayLike, ""] | Any = 1.0
) -> Float[Array, " P"]:
    """Return -log P(label) of each pair, [P], at least 0, where P(first) = sigmoid(rationality gain).

    The weights of the pairs are not in it.

    Args:
      scores: those of all steps, [N, H]: `outcome_scores`, `decision_scores`, or advantages.
      rationality: inverse temperature of the labels, at least 0, in units of 1 / score; inf is always right. To learn
        it with other parameters, give jnp.exp of a parameter; to fit it alone, see `fit_rationality`.

    Raises:
      InputError: scores of another shape, or a rationality that is known to be negative.

    Example:
      >>> segments = bj.preferences.Segments(jnp.zeros((2, 3)), jnp.zeros((2, 3)), valid=jnp.ones((2, 3), bool))
      >>> data = bj.preferences.Preferences(segments, [[0, 1]], [1.0])
      >>> losses = bj.preferences.pair_losses(data, jnp.array([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]]))
      >>> losses.shape, round(float(losses[0]), 3)
      ((1,), 0.049)
    """
    gain = gains(preferences, scores)
    rationality = as_float("rationality", rationality, gain.dtype, ())
    require_at_least("rationality", rationality, 0, "0 predicts a fair coin")
    return _losses(gain, preferences.label.astype(gain.dtype), rationality)


def preference_loss(
    preferences: Preferences, scores: Real[ArrayLike, "N H"] | Any, rationality: Real[ArrayLike, ""] | Any = 1.0
) -> Float[Array, ""]:
    """Return the weighted mean of `pair_losses`, []; 0 if no pair was judged.

    On pairs that were held out it is the held-out loss. log 2 = 0.693 is that of a fair coin.

    Example:
      >>> segments = bj.preferences.Segments(jnp.zeros((2, 3)), jnp.zeros((2, 3)), valid=jnp.ones((2, 3), bool))
      >>> data = bj.preferences.Preferences(segments, [[0, 1], [1, 0]], [1.0, 0.5], weight=[1.0, 0.0])
      >>> round(float(bj.preferences.preference_loss(data, jnp.zeros((2, 3)))), 3)
      0.693
    """
    losses = pair_losses(preferences, scores, rationality)
    weight = preferences.weight.astype(losses.dtype)
    return _mean(losses, weight)


class RationalityFit(NamedTuple):
    """The rationality under which labels are likeliest, given the scores.

    Exactly one of four holds: none of the flags, and `rationality` is inside; `at_zero`: the labels do not follow the
    scores, or contradict them, and it is 0; `at_infinity`: the labels never contradict the scores, and it is infinite;
    `undetermined`: no pair was judged, or all gains are 0, and it is NaN.
    `loss` is the weighted mean loss there (at infinity, its limit). `standard_error` is that of the rationality inside,
    from the curvature, for weights that count labels; NaN elsewhere.
    """

    rationality: Float[Array, ""]
    loss: Float[Array, ""]
    standard_error: Float[Array, ""]
    at_zero: Bool[Array, ""]
    at_infinity: Bool[Array, ""]
    undetermined: Bool[Array, ""]


def fit_rationality(
    gain: Real[ArrayLike, " P"] | Any,
    label: Real[ArrayLike, " P"] | Any,
    weight: Real[ArrayLike, " P"] | Any | None = None,
) -> RationalityFit:
    """Fit the rationality to labels: minimise sum_p weight_p -log P(label_p) over rationality >= 0.

    The problem is convex and of one dimension. Newton's method, kept within a bracket by bisection, ends where it no
    longer moves by more than rounding. First derivatives in gain, label and weight are those of the minimum, by the
    implicit function theorem. Where it is 0 or infinite they are 0.

    Args:
      gain: of each pair, see `gains`, [P].
      label: in [0, 1], [P].
      weight: at least 0, [P]; None is 1 for all.

    Raises:
      InputError: shapes that do not fit, or (where they are known) gains that are not finite, labels outside [0, 1],
        negative weights.

    Example:
      >>> fit = bj.preferences.fit_rationality(jnp.array([1.0, 1.0, 1.0, 2.0]), jnp.array([1.0, 1.0, 0.0, 1.0]))
      >>> round(float(fit.rationality), 2), bool(fit.at_infinity)
      (1.05, False)
      >>> bool(bj.preferences.fit_rationality(jnp.array([1.0, -2.0]), jnp.array([1.0, 0.0])).at_infinity)
      True
    """
    gain = as_float("gain", gain)
    if gain.ndim != 1:
        raise InputError(f"gain: expected [pairs], got shape {list(gain.shape)}; vmap over more axes")
    label = as_float("label", label, gain.dtype, gain.shape)
    weight = jnp.ones_like(gain) if weight is None else as_float("weight", weight, gain.dtype, gain.shape)
    require_probability("label", label, "1 where the first segment is better, 0 where the second is")
    require_finite("weight", weight)
    require_at_least("weight", weight, 0, "0 is a pair that was not judged")
    gain = jnp.where(weight > 0, gain, 0)  # of pairs that were not judged it may be anything
    require_finite("gain", gain)
    return _fit(gain, label, weight)


@jax.jit
def _fit(gain: Float[Array, " P"], label: Float[Array, " P"], weight: Float[Array, " P"]) -> RationalityFit:
    counts = (weight > 0) & (gain != 0)
    # In units in which the largest gain is 1.
    unit = lax.stop_gradient(jnp.max(jnp.where(counts, jnp.abs(gain), 0), initial=0))
    unit = jnp.where(unit > 0, unit, 1)
    total = jnp.sum(weight)
    share = weight / jnp.where(total > 0, total, 1)
    scaled = jnp.where(counts, gain / unit, 0)

    def slope(rationality):
        return jnp.sum(share * scaled * (jax.nn.sigmoid(rationality * scaled) - label))

    def curvature(rationality):
        chance = jax.nn.sigmoid(rationality * scaled)
        return jnp.sum(share * scaled**2 * chance * (1 - chance))

    # Of the slope at 0 and at infinity; the latter's terms are all at least 0.
    at_0 = jnp.sum(share * scaled * (0.5 - label))
    at_end = jnp.sum(share * jnp.where(scaled > 0, scaled * (1 - label), -scaled * label))
    undetermined = ~jnp.any(counts)
    at_zero = (at_0 >= 0) & ~undetermined
    found, bracketed = _root(*map(lax.stop_gradient, (share, scaled, label)))
    at_infinity = ~undetermined & ~at_zero & ((at_end == 0) | ~bracketed)
    inside = ~(undetermined | at_zero | at_infinity)
    found = jnp.where(inside, found, 1)
    steepness = lax.stop_gradient(curvature(found))
    steepness = jnp.where(steepness > 0, steepness, 1)
    # One more step of Newton's, which also carries the derivatives.
    found = found - jnp.where(inside, slope(found), 0) / steepness
    outside = jnp.where(at_zero, 0, jnp.where(at_infinity, jnp.inf, jnp.nan)).astype(gain.dtype)
    rationality = jnp.where(inside, found / unit, outside)
    losses = _losses(jnp.where(counts, gain, 0), label, jnp.where(undetermined, 0, rationality))
    loss = jnp.where(jnp.any(weight > 0), _mean(losses, weight), jnp.nan)
    error = jnp.where(inside, lax.rsqrt(steepness * jnp.where(total > 0, total, 1)) / unit, jnp.nan)
    return RationalityFit(rationality, loss, error, at_zero, at_infinity, undetermined)


def _root(
    share: Float[Array, " P"], gain: Float[Array, " P"], label: Float[Array, " P"]
) -> tuple[Float[Array, ""], Bool[Array, ""]]:
    """Where the slope, which rises, is 0, and whether it is positive anywhere. Gains are at most 1."""
    info = jnp.finfo(gain.dtype)

    def slope(rationality):
        return jnp.sum(share * gain * (jax.nn.sigmoid(rationality * gain) - label))

    def doubled(bracket):
        return bracket[1], bracket[1] * 2

    one = jnp.ones((), gain.dtype)
    low, high = lax.while_loop(lambda b: (slope(b[1]) < 0) & (b[1] < info.max / 4), doubled, (0 * one, one))
    bracketed = slope(high) >= 0

    def step(carry):
        low, high, at, _, count = carry
        chance = jax.nn.sigmoid(at * gain)
        rise = jnp.sum(share * gain * (chance - label))
        curvature = jnp.sum(share * gain**2 * chance * (1 - chance))
        low, high = jnp.where(rise < 0, at, low), jnp.where(rise < 0, high, at)
        new = at - rise / jnp.where(curvature > 0, curvature, 1)
        new = jnp.where((new > low) & (new < high) & (curvature > 0), new, low + (high - low) / 2)
        return low, high, new, jnp.abs(new - at), count + 1

    def goes_on(carry):
        _, _, at, moved, count = carry
        return (moved > 4 * info.eps * at) & (count < STEPS)

    first = (low, high, low + (high - low) / 2, jnp.asarray(jnp.inf, gain.dtype), jnp.asarray(0, jnp.int32))
    return lax.while_loop(goes_on, step, first)[2], bracketed


def _losses(gain: Float[Array, " P"], label: Float[Array, " P"], rationality: Float[Array, ""]) -> Float[Array, " P"]:
    endless = jnp.isinf(rationality)
    # The better one always: no loss, an infinite one, or log 2 where the scores tie.
    agrees = jnp.where(gain > 0, label == 1, label == 0)
    coin = jnp.log(jnp.asarray(2, gain.dtype))
    limit = jnp.where(gain == 0, coin, jnp.where(agrees, 0, jnp.inf).astype(gain.dtype))
    return jnp.where(
        endless, limit, -log_likelihood(jnp.where(endless, 1, rationality) * gain, jnp.zeros_like(gain), label)
    )


def _mean(losses: Float[Array, " P"], weight: Float[Array, " P"]) -> Float[Array, ""]:
    """The weighted mean; what has weight 0 may be anything."""
    total = jnp.sum(weight)
    return jnp.sum(jnp.where(weight > 0, weight * losses, 0)) / jnp.where(total > 0, total, 1)


def _steps(segments: Segments) -> tuple[Any, Any, Any]:
    return segments.observation, segments.action, segments.next_observation
