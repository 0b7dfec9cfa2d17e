"""Problems that wrap another one, and pass on what they do not change."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import Array, Float, PRNGKeyArray

from bilevel_jax.bilevel.problem import Problem
from bilevel_jax.bilevel.sampled_problem import SampledProblem
from bilevel_jax.core.arrays import Scalar
from bilevel_jax.core.errors import InputError
from bilevel_jax.environments import Environment, Trajectory
from bilevel_jax.mdp.process import MDP
from bilevel_jax.mdp.regularizers import Regularizer
from bilevel_jax.solvers import Solution


class Wrapper(eqx.Module):
    """A wrapped problem. Subclasses override `inner` or `regularizer`."""

    problem: Any

    def inner(self, x: Any) -> Any:
        """The upper variable of the wrapped problem."""
        return x

    def regularizer(self, x: Any) -> Regularizer:
        """See `Problem`."""
        return self.problem.regularizer(self.inner(x))


class WrappedModel(Wrapper, Problem):
    """The part of a wrapper for a problem whose model is known."""

    def mdp(self, x: Any) -> MDP:
        return self.problem.mdp(self.inner(x))

    def objective(self, x: Any, solution: Solution) -> Scalar:
        return self.problem.objective(self.inner(x), solution)


class WrappedSimulator(Wrapper, SampledProblem):
    """The part of a wrapper for a problem that is a simulator."""

    @property
    def environment(self) -> Environment:
        return self.problem.environment

    @property
    def discount(self) -> Scalar:
        return self.problem.discount

    @property
    def loss_discount(self) -> Scalar:
        return self.problem.loss_discount

    @property
    def horizon(self) -> int:
        return self.problem.horizon

    @property
    def trajectories(self) -> int:
        return self.problem.trajectories

    @property
    def features(self) -> Callable | None:
        """Those of the wrapped problem, for agents with linear values; None where it has none."""
        return getattr(self.problem, "features", None)

    def environment_reward_weight(self) -> Scalar | None:
        return self.problem.environment_reward_weight()

    def earned(self, x: Any, trajectories: Trajectory) -> Float[Array, "B H"]:
        return self.problem.earned(self.inner(x), trajectories)

    @property
    def earns_reward_alone(self) -> bool:
        return self.problem.earns_reward_alone

    def reward(self, x: Any) -> Any:
        return self.problem.reward(self.inner(x))

    def loss(self, key: PRNGKeyArray, x: Any, trajectories: Trajectory) -> Scalar | Float[Array, " H"]:
        return self.problem.loss(key, self.inner(x), trajectories)


def kinds(problem: Any) -> tuple[bool, bool]:
    """Whether a problem has a model, and whether it has a simulator. Raises InputError if it has neither."""
    made = isinstance(problem, Problem), isinstance(problem, SampledProblem)
    if not any(made):
        raise InputError(f"problem: expected a Problem or a SampledProblem, got {type(problem).__name__}")
    return made
