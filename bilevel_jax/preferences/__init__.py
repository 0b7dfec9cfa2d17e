"""Preferences between pairs of segments: the Bradley-Terry likelihood, and a synthetic teacher that labels them."""

from bilevel_jax.preferences.bradley_terry import log_likelihood, preference_probability, segment_return
from bilevel_jax.preferences.teacher import Teacher

__all__ = ["Teacher", "log_likelihood", "preference_probability", "segment_return"]
