"""The methods for a hyper-gradient, one per file, behind `hypergradient/protocol.py`."""

from bilevel_jax.hypergradient.methods.implicit import Implicit, implicit_gradient
from bilevel_jax.hypergradient.methods.perturbation import FiniteDifferences, SimultaneousPerturbation
from bilevel_jax.hypergradient.methods.trajectories import ExpectedTrajectories
from bilevel_jax.hypergradient.methods.unrolled import Unrolled

__all__ = [
    "ExpectedTrajectories",
    "FiniteDifferences",
    "Implicit",
    "SimultaneousPerturbation",
    "Unrolled",
    "implicit_gradient",
]
