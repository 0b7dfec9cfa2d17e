"""A problem at another temperature than its own, which a schedule of the temperature gives to an algorithm."""

from typing import Any, TypeVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Real

from bilevel_jax.bilevel.problem import Problem
from bilevel_jax.bilevel.sampled_problem import SampledProblem
from bilevel_jax.bilevel.wrapper import WrappedModel, WrappedSimulator, Wrapper, kinds
from bilevel_jax.core.errors import InputError
from bilevel_jax.mdp.regularizers import Regularizer

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
    model, simulator = kinds(problem)
    kind: Any = _Both if model and simulator else _Model if model else _Simulator
    return kind(problem, jnp.asarray(factor))


class _Heated(Wrapper):
    factor: Real[Array, ""]

    def regularizer(self, x: Any) -> Regularizer:
        regularizer = self.problem.regularizer(x)
        if not regularizer.smooth:
            raise InputError(f"temperature: {type(regularizer).__name__} has none to multiply; leave the schedule out")
        own = regularizer.temperature
        return eqx.tree_at(lambda r: r.temperature, regularizer, own * jnp.asarray(self.factor, own.dtype))


class _Model(_Heated, WrappedModel):
    pass


class _Simulator(_Heated, WrappedSimulator):
    pass


class _Both(_Model, _Simulator):
    pass
