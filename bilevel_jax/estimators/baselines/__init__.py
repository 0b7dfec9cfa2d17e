"""Baselines: a number is subtracted from a loss before it is credited to actions.

The variance falls, the mean stays.
"""

from bilevel_jax.estimators.baselines.critic_advantage import CriticAdvantage
from bilevel_jax.estimators.baselines.exact_advantage import ExactAdvantage
from bilevel_jax.estimators.baselines.learned_advantage import LearnedAdvantage
from bilevel_jax.estimators.baselines.leave_one_out import LeaveOneOut
from bilevel_jax.estimators.baselines.no_baseline import NoBaseline
from bilevel_jax.estimators.baselines.protocol import Baseline
from bilevel_jax.estimators.baselines.state_baseline import StateBaseline

__all__ = [
    "Baseline",
    "CriticAdvantage",
    "ExactAdvantage",
    "LearnedAdvantage",
    "LeaveOneOut",
    "NoBaseline",
    "StateBaseline",
]
