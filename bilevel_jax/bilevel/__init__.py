"""The two kinds of bilevel problem: `Problem`, whose model is known, and `SampledProblem`, which has a simulator."""

from bilevel_jax.bilevel.penalized import Penalized
from bilevel_jax.bilevel.problem import BilevelProblem, Problem, as_upper_variable, lower_level, require_problem
from bilevel_jax.bilevel.reparameterized import reparameterized
from bilevel_jax.bilevel.sampled_problem import SampledBilevelProblem, SampledProblem
from bilevel_jax.bilevel.temperature import at_temperature

__all__ = [
    "BilevelProblem",
    "Penalized",
    "Problem",
    "SampledBilevelProblem",
    "SampledProblem",
    "as_upper_variable",
    "at_temperature",
    "lower_level",
    "reparameterized",
    "require_problem",
]
