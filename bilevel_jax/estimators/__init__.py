"""Hyper-gradients from trajectories: the estimator and its parts."""

from bilevel_jax.estimators.baselines import Baseline, LearnedAdvantage, LeaveOneOut, NoBaseline, StateBaseline
from bilevel_jax.estimators.costs import Costs
from bilevel_jax.estimators.estimate import Estimate, estimate, estimate_from, group_costs, regroup, sample_groups
from bilevel_jax.estimators.importance import Weights, importance_weights
from bilevel_jax.estimators.responses import (
    Exact,
    LearnedCritic,
    LearnedModel,
    NestedRollouts,
    OneStep,
    Response,
    SharedRollouts,
)

__all__ = [
    "Baseline",
    "Costs",
    "Estimate",
    "Exact",
    "LearnedAdvantage",
    "LearnedCritic",
    "LearnedModel",
    "LeaveOneOut",
    "NestedRollouts",
    "NoBaseline",
    "OneStep",
    "Response",
    "SharedRollouts",
    "StateBaseline",
    "Weights",
    "estimate",
    "estimate_from",
    "group_costs",
    "importance_weights",
    "regroup",
    "sample_groups",
]
