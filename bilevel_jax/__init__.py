"""Differentiable regularized Markov decision processes and bilevel reinforcement learning in JAX."""

from bilevel_jax import algorithms, problems
from bilevel_jax.adjoint import GMRES, Descent, Direct, LinearSolver, LinearStats, Neumann, policy_value
from bilevel_jax.errors import ConvergenceError, InputError
from bilevel_jax.hypergradient import BilevelProblem, Hypergradient, Implicit, Problem, hypergradient
from bilevel_jax.mdp import MDP
from bilevel_jax.regularizers import KLDivergence, Regularizer, ShannonEntropy, TsallisEntropy
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
    "LinearSolver",
    "LinearStats",
    "Neumann",
    "PolicyIteration",
    "Problem",
    "Regularizer",
    "Result",
    "ShannonEntropy",
    "Solution",
    "SolveStats",
    "Solver",
    "SuccessorTransition",
    "Transition",
    "TsallisEntropy",
    "ValueIteration",
    "algorithms",
    "check",
    "hypergradient",
    "policy_value",
    "problems",
    "solve",
]
