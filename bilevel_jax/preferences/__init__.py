"""Preferences between two segments: the Bradley-Terry likelihood, a teacher, and a reward model fitted to labels."""

from bilevel_jax.preferences.bradley_terry import log_likelihood, preference_probability, segment_return
from bilevel_jax.preferences.reward_models import fit_linear_reward, misordered_fraction, segment_features
from bilevel_jax.preferences.teacher import Teacher

__all__ = [
    "Teacher",
    "fit_linear_reward",
    "log_likelihood",
    "misordered_fraction",
    "preference_probability",
    "segment_features",
    "segment_return",
]
