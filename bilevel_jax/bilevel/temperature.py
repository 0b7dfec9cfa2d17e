"""A problem at another temperature than its own, which a schedule of the temperature gives to an algorithm."""

from typing import Any, TypeVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, Real

from bilevel_jax.bilevel.problem import Problem
from bilevel_jax.bilevel.sampled_problem import SampledProblem
from bilevel_jax.core.arrays import Scalar
from bilevel_jax.core.errors import InputError
from bilevel_jax.environments import Environment, Trajectory
from bilevel_jax.mdp.process import MDP
from bilevel_jax.mdp.regularizers import Regularizer
from bilevel_jax.solvers import Solution

P = TypeVar("P", Problem, SampledProblem)


def at_temperature(problem: P, factor: Real[ArrayLike, ""] | Any) -> P:
    """The problem with its regularizer's temperature multiplied by `factor`, a number that may be traced.

    It is a `Problem`, a `SampledProblem` or both, as the given one is.

    Raises:
      InputError: in `regularizer`, where the problem's has no temperature.

    Example:
      >>> problem = bj.problems.make("four_rooms", temperature=0.05)
      >>> hot = bj.bilevel.at_temperature(problem, 10.0)
      >>> x = problem.start(jax.random.key(0))
      >>> float(hot.regularizer(x).temperature)
      0.5
    """
    both = isinstance(problem, Problem) and isinstance(problem, SampledProblem)
    kind: Any = _Both if both else _WithModel if isinstance(problem, Problem) else _WithSimulator
    return kind(problem, jnp.asarray(factor))


class _Heated(eqx.Module):
    problem: Any
    factor: Real[Array, ""]

    def regularizer(self, x: Any) -> Regularizer:
        regularizer = self.problem.regularizer(x)
        if not regularizer.smooth:
            raise InputError(f"temperature: {type(regularizer).__name__} has none to multiply; leave the schedule out")
        own = regularizer.temperature
        return eqx.tree_at(lambda r: r.temperature, regularizer, own * jnp.asarray(self.factor, own.dtype))


class _WithModel(_Heated, Problem):
    def mdp(self, x: Any) -> MDP:
        return self.problem.mdp(x)

    def objective(self, x: Any, solution: Solution) -> Scalar:
        return self.problem.objective(x, solution)


class _WithSimulator(_Heated, SampledProblem):
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

    def reward(self, x: Any) -> Any:
        return self.problem.reward(x)

    def loss(self, key: PRNGKeyArray, x: Any, trajectories: Trajectory) -> Scalar | Float[Array, " H"]:
        return self.problem.loss(key, x, trajectories)


class _Both(_WithModel, _WithSimulator):
    pass
