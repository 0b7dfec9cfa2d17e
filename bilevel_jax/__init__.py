"""Differentiable regularized Markov decision processes and bilevel reinforcement learning in JAX."""

from bilevel_jax import agents, algorithms, environments, estimators, preferences, problems
from bilevel_jax.adjoint import GMRES, Descent, Direct, LinearSolver, LinearStats, Neumann
from bilevel_jax.errors import ConvergenceError, InputError
from bilevel_jax.estimators import SampledBilevelProblem, SampledProblem
from bilevel_jax.evaluation import policy_value
from bilevel_jax.functions import Linear, Table
from bilevel_jax.hypergradient import BilevelProblem, Hypergradient, Implicit, Problem, hypergradient
from bilevel_jax.mdp import MDP
from bilevel_jax.regularizers import KLDivergence, Regularizer, ShannonEntropy, TsallisEntropy, Unregularized
from bilevel_jax.results import MESSAGES, Result, check
from bilevel_jax.solvers import PolicyIteration, Solution, Solver, SolveStats, ValueIteration, solve
from bilevel_jax.transitions import DenseTransition, SuccessorTransition, Transition

__all__ = [
    "GMRES",
    "MDP",
    "MESSAGES",
    "BilevelProblem",
    "ConvergenceError",
    "DenseTransition",
    "Descent",
    "Direct",
    "Hypergradient",
    "Implicit",
    "InputError",
    "KLDivergence",
    "Linear",
    "LinearSolver",
    "LinearStats",
    "Neumann",
    "PolicyIteration",
    "Problem",
    "Regularizer",
    "Result",
    "SampledBilevelProblem",
    "SampledProblem",
    "ShannonEntropy",
    "Solution",
    "SolveStats",
    "Solver",
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
    "hypergradient",
    "policy_value",
    "preferences",
    "problems",
    "solve",
]
