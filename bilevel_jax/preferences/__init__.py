"""Preferences between two segments: data, on disk too, teachers, the Bradley-Terry likelihood of outcomes and of
decisions, which pairs to ask about, and a reward model fitted to labels.
"""

from bilevel_jax.preferences.bradley_terry import log_likelihood, preference_probability, segment_return
from bilevel_jax.preferences.dataset import (
    PreferenceBuffer,
    Preferences,
    compacted,
    concatenate,
    draw,
    minibatches,
    split,
    subset,
)
from bilevel_jax.preferences.file import PreferenceFile, Reading
from bilevel_jax.preferences.likelihood import (
    RationalityFit,
    decision_scores,
    fit_rationality,
    gains,
    outcome_scores,
    pair_losses,
    preference_loss,
)
from bilevel_jax.preferences.lines import Header, RefusedLine
from bilevel_jax.preferences.problem import PreferenceProblem
from bilevel_jax.preferences.queries import disagreement, label_counts, near_on_policy_pairs, select, uniform_pairs
from bilevel_jax.preferences.reward_models import fit_linear_reward, misordered_fraction, segment_features
from bilevel_jax.preferences.segments import Cut, Segments, cut_segments, relabelled
from bilevel_jax.preferences.teachers import Judgement, ScriptedTeacher, Teacher, labelled
from bilevel_jax.preferences.verdict import Verdict, judged_by, verdict_of
from bilevel_jax.preferences.waiting import wait_for_labels

__all__ = [
    "Cut",
    "Header",
    "Judgement",
    "PreferenceBuffer",
    "PreferenceFile",
    "PreferenceProblem",
    "Preferences",
    "RationalityFit",
    "Reading",
    "RefusedLine",
    "ScriptedTeacher",
    "Segments",
    "Teacher",
    "Verdict",
    "compacted",
    "concatenate",
    "cut_segments",
    "decision_scores",
    "disagreement",
    "draw",
    "fit_linear_reward",
    "fit_rationality",
    "gains",
    "judged_by",
    "label_counts",
    "labelled",
    "log_likelihood",
    "minibatches",
    "misordered_fraction",
    "near_on_policy_pairs",
    "outcome_scores",
    "pair_losses",
    "preference_loss",
    "preference_probability",
    "relabelled",
    "segment_features",
    "segment_return",
    "select",
    "split",
    "subset",
    "uniform_pairs",
    "verdict_of",
    "wait_for_labels",
]
