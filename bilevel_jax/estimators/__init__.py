"""Hyper-gradients from trajectories: the sampled problem, the estimator, and its parts."""

from bilevel_jax.estimators.baselines import (
    Baseline,
    LearnedAdvantage,
    LeaveOneOut,
    NoBaseline,
    StateBaseline,
)
from bilevel_jax.estimators.costs import Costs
from bilevel_jax.estimators.estimate import Estimate, estimate, estimate_from, paid, regroup, sample_groups
from bilevel_jax.estimators.importance import Weights, importance_weights
from bilevel_jax.estimators.problem import SampledBilevelProblem, SampledProblem
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
    "SampledBilevelProblem",
    "SampledProblem",
    "SharedRollouts",
    "StateBaseline",
    "Weights",
    "estimate",
    "estimate_from",
    "importance_weights",
    "paid",
    "regroup",
    "sample_groups",
]
