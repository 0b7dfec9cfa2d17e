"""Differentiable regularized Markov decision processes and bilevel reinforcement learning in JAX."""

from bilevel_jax import agents, algorithms, environments, estimators, preferences, problems
from bilevel_jax.adjoint import (
    GMRES,
    BiCGStab,
    ConstantDeflation,
    Descent,
    Direct,
    Jacobi,
    LinearSolver,
    LinearStats,
    Neumann,
    NeumannPreconditioner,
    Preconditioner,
)
from bilevel_jax.average_reward import (
    AverageRewardSolution,
    AverageRewardSolver,
    AverageRewardStats,
    RelativePolicyIteration,
    RelativeValueIteration,
    solve_average_reward,
)
from bilevel_jax.errors import ConvergenceError, InputError
from bilevel_jax.estimators import SampledBilevelProblem, SampledProblem
from bilevel_jax.evaluation import policy_value
from bilevel_jax.finite_horizon import FiniteHorizonSolution, finite_horizon_occupancy, solve_finite_horizon
from bilevel_jax.functions import Linear, Table
from bilevel_jax.hypergradient import BilevelProblem, Hypergradient, Implicit, Problem, hypergradient
from bilevel_jax.mdp import MDP
from bilevel_jax.occupancy import occupancy, regularized_policy_value, stationary_distribution
from bilevel_jax.regularizers import KLDivergence, Regularizer, ShannonEntropy, TsallisEntropy, Unregularized
from bilevel_jax.results import MESSAGES, Result, check
from bilevel_jax.solvers import (
    AdaptivePolicyIteration,
    AndersonIteration,
    Auto,
    ModifiedPolicyIteration,
    NewtonKrylov,
    PolicyIteration,
    Solution,
    Solver,
    SolveStats,
    ValueIteration,
    solve,
)
from bilevel_jax.transitions import (
    DenseTransition,
    MatrixFreeTransition,
    StencilTransition,
    SuccessorTransition,
    Transition,
)

__all__ = [
    "GMRES",
    "MDP",
    "MESSAGES",
    "AdaptivePolicyIteration",
    "AndersonIteration",
    "Auto",
    "AverageRewardSolution",
    "AverageRewardSolver",
    "AverageRewardStats",
    "BiCGStab",
    "BilevelProblem",
    "ConstantDeflation",
    "ConvergenceError",
    "DenseTransition",
    "Descent",
    "Direct",
    "FiniteHorizonSolution",
    "Hypergradient",
    "Implicit",
    "InputError",
    "Jacobi",
    "KLDivergence",
    "Linear",
    "LinearSolver",
    "LinearStats",
    "MatrixFreeTransition",
    "ModifiedPolicyIteration",
    "Neumann",
    "NeumannPreconditioner",
    "NewtonKrylov",
    "PolicyIteration",
    "Preconditioner",
    "Problem",
    "Regularizer",
    "RelativePolicyIteration",
    "RelativeValueIteration",
    "Result",
    "SampledBilevelProblem",
    "SampledProblem",
    "ShannonEntropy",
    "Solution",
    "SolveStats",
    "Solver",
    "StencilTransition",
    "SuccessorTransition",
    "Table",
    "Transition",
    "TsallisEntropy",
    "Unregularized",
    "ValueIteration",
    "agents",
    "algorithms",
    "check",
    "environments",
    "estimators",
    "finite_horizon_occupancy",
    "hypergradient",
    "occupancy",
    "policy_value",
    "preferences",
    "problems",
    "regularized_policy_value",
    "solve",
    "solve_average_reward",
    "solve_finite_horizon",
    "stationary_distribution",
]
