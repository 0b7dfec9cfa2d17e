"""Preferences between two segments: data, on disk too, teachers, the Bradley-Terry likelihood of outcomes and of
decisions, which pairs to ask about, and a reward model fitted to labels.
"""

from bilevel_jax.preferences.bradley_terry import log_likelihood, preference_probability, segment_return
from bilevel_jax.preferences.dataset import (
    PreferenceBuffer,
    Preferences,
    compacted,
    concatenate,
    minibatches,
    split,
    subset,
)
from bilevel_jax.preferences.reward_models import fit_linear_reward, misordered_fraction, segment_features
from bilevel_jax.preferences.segments import Cut, Segments, cut_segments, relabelled
from bilevel_jax.preferences.teachers import Judgement, ScriptedTeacher, Teacher, labelled

__all__ = [
    "Cut",
    "Judgement",
    "PreferenceBuffer",
    "Preferences",
    "ScriptedTeacher",
    "Segments",
    "Teacher",
    "compacted",
    "concatenate",
    "cut_segments",
    "fit_linear_reward",
    "labelled",
    "log_likelihood",
    "minibatches",
    "misordered_fraction",
    "preference_probability",
    "relabelled",
    "segment_features",
    "segment_return",
    "split",
    "subset",
]
