"""The upper level's side of every algorithm: optimizer, the set that x stays in, the temperature's schedule."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from bilevel_jax.errors import InputError
from bilevel_jax.functions import as_pytree
from bilevel_jax.hypergradient import Problem, as_upper_variable, lower_level
from bilevel_jax.mdp import MDP
from bilevel_jax.promotion import usual_promotion
from bilevel_jax.regularizers import Regularizer
from bilevel_jax.solvers import Solution
from bilevel_jax.validation import as_float, require_computable, require_instance, require_positive


class UpperLevel(eqx.Module):
    """How x moves. Every algorithm takes one in place of a bare optimizer.

    Args:
      optimizer: an optax transformation, also one that asks for `value` or `grad`, such as `optax.polyak_sgd()`;
        for the algorithm `implicit` also one that searches along a line, such as `optax.lbfgs()`: it asks for
        `value_fn`, which others refuse in `init`. Build it once: a new one is a new structure.
      projection: x -> the nearest point of a closed convex set, e.g. `optax.projections.projection_simplex`
        or `jax.tree_util.Partial(optax.projections.projection_box, lower=0, upper=1)`: x is projected after
        each update of the optimizer (projected gradient), and at the start. An info's `stationarity`
        is then |x - projection(x - gradient)|_2, which is 0 exactly at points that satisfy the first-order
        conditions; without a projection it is the gradient's norm.
      temperature: iteration -> factor that multiplies the problem's temperature, e.g. `Cooling(10, 1_000)`:
        continuation from ten times the temperature to the problem's own in a thousand iterations. Objective and
        gradient are those of the problem at the current temperature.

    Raises:
      InputError: an optimizer of another type, a projection or a schedule that is not callable.
    """

    optimizer: optax.GradientTransformation = eqx.field(static=True)
    projection: Callable | None
    temperature: Callable | None

    def __init__(
        self,
        optimizer: optax.GradientTransformation,
        *,
        projection: Callable | None = None,
        temperature: Callable | None = None,
    ):
        require_instance("optimizer", optimizer, optax.GradientTransformation)
        self.optimizer = optimizer
        self.projection = None if projection is None else as_pytree("projection", projection)
        self.temperature = None if temperature is None else as_pytree("temperature", temperature)

    def project(self, x: Any) -> Any:
        """x, or the nearest point that is allowed."""
        if self.projection is None:
            return x
        with usual_promotion():  # optax's code need not keep to a strict one
            projected = self.projection(x)
        return jax.tree.map(lambda to, leaf: to.astype(leaf.dtype), projected, x)

    def start(self, problem: Problem, x: Any) -> tuple[Any, MDP, Regularizer]:
        """x as arrays and projected, with the lower level there.

        Raises:
          InputError: x is not floating point; outside jit, if the MDP or the regularizer at x is not valid.
        """
        x = self.project(as_upper_variable(x))
        return x, *lower_level(problem, x)

    def init(self, x: Any, value_fn: Callable | None = None) -> Any:
        """The optimizer's state at x, its leaves of the types that `update` keeps.

        Args:
          value_fn: what `update` will get, of the same types; None where there is none.

        Raises:
          InputError: the optimizer's update asks for what the algorithm does not have.
        """
        with usual_promotion():
            state = jax.tree.map(_strongly_typed, self.optimizer.init(x))
        if isinstance(self.optimizer, optax.GradientTransformationExtraArgs):
            value = jnp.zeros((), jnp.result_type(*jax.tree.leaves(x)) if jax.tree.leaves(x) else float)
            try:
                jax.eval_shape(lambda state, x: self.update(x, state, x, value, value_fn), state, x)
            except TypeError as error:
                if "required keyword" not in str(error):
                    raise
                raise InputError(
                    f"optimizer: {error}; of such arguments there are `value` and `grad`, and for the algorithm "
                    f"`implicit` `value_fn`"
                ) from None
        return state

    def update(
        self, gradient: Any, optimizer_state: Any, x: Any, value: jax.Array, value_fn: Callable | None = None
    ) -> tuple[Any, Any, jax.Array]:
        """(next x, next state of the optimizer, stationarity at x).

        Args:
          value: of the function at x whose gradient, or an estimate of it, is given.
          value_fn: that function, for optimizers that search along a line; None where it is not known.

        Raises:
          InputError: the optimizer evaluates the function, which is not known.
        """
        optimizer = optax.with_extra_args_support(self.optimizer)
        values = {"value": value, "grad": gradient, "value_fn": _no_value if value_fn is None else value_fn}
        before = optimizer_state
        with usual_promotion():
            updates, optimizer_state = optimizer.update(gradient, before, x, **values)
        # Of another type, the next iteration would be another program.
        optimizer_state = jax.tree.map(_strongly_typed, optimizer_state, before)
        moved = jax.tree.map(lambda leaf, g: leaf - g.astype(leaf.dtype), x, gradient)
        step = jax.tree.map(lambda leaf, to: leaf - to, x, self.project(moved))
        stationarity = optax.tree.norm(gradient if self.projection is None else step)
        return self.project(optax.apply_updates(x, updates)), optimizer_state, stationarity


def _no_value(*args: Any, **kwargs: Any) -> Any:
    del args, kwargs
    raise InputError(
        "optimizer: it evaluates the objective at points of its own (value_fn), which this algorithm does not; use "
        "bilevel_jax.algorithms.implicit, or an optimizer without a line search"
    )


def _strongly_typed(leaf: Any, like: Any = None) -> Any:
    """A leaf of an optimizer's state as an array that is not weakly typed, of the dtype of another one if given."""
    leaf = jnp.asarray(leaf)
    dtype = leaf.dtype if like is None else like.dtype
    return leaf if jnp.issubdtype(dtype, jax.dtypes.extended) else leaf.astype(dtype)


class Cooling(eqx.Module):
    """A schedule of the temperature: the factor start^(1 - iteration / steps), and 1 from `steps` iterations on.

    Raises:
      InputError: a start or steps that are not above 0.
    """

    start: jax.Array
    steps: jax.Array

    def __init__(self, start: Any, steps: Any):
        self.start, self.steps = as_float("start", start, float), as_float("steps", steps, float)
        require_positive("start", self.start, "10 begins at ten times the temperature")
        require_positive("steps", self.steps, "it is the number of iterations until the problem's own temperature")

    def __call__(self, iteration: Any) -> jax.Array:
        return self.start ** jnp.maximum(0, 1 - iteration / self.steps)


def as_upper_level(optimizer: Any) -> UpperLevel:
    """An `UpperLevel`, of a bare optimizer if that is what was given."""
    return optimizer if isinstance(optimizer, UpperLevel) else UpperLevel(optimizer)


def at_iteration(algorithm: Any, iteration: jax.Array) -> Any:
    """The algorithm with the problem of that iteration, as its schedule of the temperature has it."""
    upper = algorithm.upper
    require_computable("problem", algorithm.problem, any_floats=True)
    if upper.temperature is None:
        return algorithm
    kind = _ModelAtTemperature if isinstance(algorithm.problem, Problem) else _AtTemperature
    with usual_promotion():
        problem = kind(algorithm.problem, upper.temperature(iteration))
    return dataclasses.replace(
        algorithm, problem=problem, upper=UpperLevel(upper.optimizer, projection=upper.projection)
    )


class _AtTemperature(eqx.Module):
    """A problem with its temperature multiplied by `factor`; the rest is its own."""

    problem: Any
    factor: jax.Array

    def regularizer(self, x: Any) -> Regularizer:
        """The problem's, at the other temperature. Raises InputError if it has none."""
        regularizer = self.problem.regularizer(x)
        if not regularizer.smooth:
            raise InputError(f"temperature: {type(regularizer).__name__} has none to multiply; leave the schedule out")
        own = regularizer.temperature
        return eqx.tree_at(lambda r: r.temperature, regularizer, own * jnp.asarray(self.factor, own.dtype))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("problem", "factor"):  # what Python and JAX look for is not forwarded
            raise AttributeError(name)
        return getattr(self.problem, name)


class _ModelAtTemperature(_AtTemperature):
    """One that can be solved exactly: a `Problem`, which is told by its methods."""

    def mdp(self, x: Any) -> MDP:
        return self.problem.mdp(x)

    def objective(self, x: Any, solution: Solution) -> jax.Array:
        return self.problem.objective(x, solution)
