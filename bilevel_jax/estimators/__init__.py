"""Hyper-gradients from trajectories: the estimator and its parts."""

from bilevel_jax.estimators import guards
from bilevel_jax.estimators.baselines import (
    Baseline,
    CriticAdvantage,
    ExactAdvantage,
    LearnedAdvantage,
    LeaveOneOut,
    NoBaseline,
    StateBaseline,
)
from bilevel_jax.estimators.costs import Costs
from bilevel_jax.estimators.estimate import Estimate, estimate, estimate_from, group_costs, regroup, sample_groups
from bilevel_jax.estimators.importance import Weights, importance_weights
from bilevel_jax.estimators.responses import (
    EligibilityTrace,
    Exact,
    LearnedCritic,
    LearnedModel,
    NestedRollouts,
    OneStep,
    Response,
    SharedRollouts,
    SuccessorFeatures,
    last_layer,
)

__all__ = [
    "Baseline",
    "Costs",
    "CriticAdvantage",
    "EligibilityTrace",
    "Estimate",
    "Exact",
    "ExactAdvantage",
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
    "SuccessorFeatures",
    "Weights",
    "estimate",
    "estimate_from",
    "group_costs",
    "guards",
    "importance_weights",
    "last_layer",
    "regroup",
    "sample_groups",
]
