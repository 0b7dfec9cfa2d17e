"""Criteria other than the discounted sum of rewards, one per file: finite horizons and average rewards."""

from bilevel_jax.criteria.average_reward import (
    AverageRewardSolution,
    AverageRewardSolver,
    AverageRewardStats,
    RelativePolicyIteration,
    RelativeValueIteration,
    solve_average_reward,
)
from bilevel_jax.criteria.finite_horizon import FiniteHorizonSolution, finite_horizon_occupancy, solve_finite_horizon

__all__ = [
    "AverageRewardSolution",
    "AverageRewardSolver",
    "AverageRewardStats",
    "FiniteHorizonSolution",
    "RelativePolicyIteration",
    "RelativeValueIteration",
    "finite_horizon_occupancy",
    "solve_average_reward",
    "solve_finite_horizon",
]
