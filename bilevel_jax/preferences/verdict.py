"""What labels judge, outcomes or decisions: told by which model predicts them better where they were held out."""

import math
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import ArrayLike, Real
from scipy.stats import t as student

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.validation import as_numpy, require_at_least, require_finite

Kind = Literal["outcomes", "decisions", "unclear"]


class Verdict(NamedTuple):
    """What labels judge, and by what that is told. `text` says it in words.

    `difference` is the held-out loss of the model of outcomes less that of the model of decisions, and `margin` half
    the width of its interval. `pairs` counts those that were judged.
    """

    kind: Kind
    text: str
    outcome_loss: float
    decision_loss: float
    difference: float
    standard_error: float
    margin: float
    pairs: int


def judged_by(
    outcome_losses: Real[ArrayLike, " P"] | Any,
    decision_losses: Real[ArrayLike, " P"] | Any,
    weight: Real[ArrayLike, " P"] | Any | None = None,
    *,
    confidence: float = 0.95,
) -> Verdict:
    """Say whether labels judge outcomes or decisions, from the losses of two models on the same held-out pairs.

    The losses are compared pair by pair. The interval is Student's, from the standard error over the pairs, which it
    takes for independent: pairs that share segments, or people, make it too narrow. A model is named only if the
    interval leaves 0 out and it predicts better than a coin, whose loss is log 2. If the labels say nothing about
    which, 1 - confidence of all verdicts name one.

    Args:
      outcome_losses: `pair_losses` of the model of outcomes, on pairs that neither model was fitted to, [P].
      decision_losses: those of the model of decisions, [P].
      weight: of each pair, at least 0, [P]; None is 1 for all.
      confidence: of the interval, above 0 and below 1.

    Raises:
      InputError: shapes that do not fit, losses of judged pairs that are not finite, a negative weight, a confidence
        that is none.

    Example:
      >>> outcome, decision = np.full(40, 0.58), np.full(40, 0.25) + np.tile([0.1, -0.1], 20)
      >>> verdict = bj.preferences.judged_by(outcome, decision)
      >>> verdict.kind
      'decisions'
      >>> print(verdict.text)
      the labels judge decisions (held-out loss 0.250 against 0.580, difference 0.330 +- 0.032)
    """
    outcome, decision = as_numpy("outcome_losses", outcome_losses), as_numpy("decision_losses", decision_losses)
    if outcome.ndim != 1 or outcome.shape != decision.shape:
        raise InputError(
            f"decision_losses: expected one for each pair as outcome_losses, [P], got shapes {list(outcome.shape)} and "
            f"{list(decision.shape)}"
        )
    weights = np.ones(outcome.shape) if weight is None else as_numpy("weight", weight).astype(np.float64)
    if weights.shape != outcome.shape:
        raise InputError(f"weight: expected shape {list(outcome.shape)}, got {list(weights.shape)}")
    require_finite("weight", weights)
    require_at_least("weight", weights, 0, "0 is a pair that was not judged")
    if not 0 < confidence < 1:
        raise InputError(f"confidence: expected a number above 0 and below 1, got {confidence!r}; 0.95 is usual")
    judged = weights > 0
    outcome, decision = (losses[judged].astype(np.float64) for losses in (outcome, decision))
    remedy = "a rationality that ran to infinity gives them: fit it to more pairs, or give one"
    require_finite("outcome_losses", outcome, remedy)
    require_finite("decision_losses", decision, f"{remedy}; or a policy lacks an action")
    share = weights[judged] / max(weights.sum(), np.finfo(float).tiny)
    pairs = int(judged.sum())
    of_outcome, of_decision = float(share @ outcome), float(share @ decision)
    if pairs < 2:
        text = f"these labels do not tell: {pairs} held-out pairs were judged"
        nan = math.nan
        none = nan if not pairs else of_outcome - of_decision
        losses = (of_outcome, of_decision) if pairs else (nan, nan)
        return Verdict("unclear", text, *losses, none, nan, nan, pairs)
    difference = of_outcome - of_decision
    spread = share @ (share * (outcome - decision - difference) ** 2)
    error = math.sqrt(spread * pairs / (pairs - 1))
    return verdict_of(of_outcome, of_decision, error, pairs, confidence=confidence)


def verdict_of(
    outcome_loss: float, decision_loss: float, standard_error: float, pairs: int, *, confidence: float = 0.95
) -> Verdict:
    """Say what `judged_by` says, from the mean losses of at least two pairs and the standard error of their difference.

    Example:
      >>> bj.preferences.verdict_of(0.25, 0.58, 0.1, 40).kind
      'outcomes'
    """
    difference = outcome_loss - decision_loss
    margin = float(student.ppf((1 + confidence) / 2, pairs - 1)) * standard_error
    better, worse = sorted((outcome_loss, decision_loss))
    compared = f"held-out loss {better:.3f} against {worse:.3f}, difference {abs(difference):.3f} +- {margin:.3f}"
    if better >= math.log(2):
        kind, text = "unclear", f"these labels do not tell: neither model predicts them better than a coin ({compared})"
    elif abs(difference) <= margin:
        kind, text = "unclear", f"these labels do not tell ({compared})"
    else:
        kind = "decisions" if difference > 0 else "outcomes"
        text = f"the labels judge {kind} ({compared})"
    return Verdict(kind, text, outcome_loss, decision_loss, difference, standard_error, margin, pairs)
