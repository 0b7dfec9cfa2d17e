"""The upper level's part of every algorithm: optimizer, the set in which x stays, the schedule of the temperature."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Integer

from bilevel_jax.bilevel import Problem, as_upper_variable, at_temperature, lower_level
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.functions import as_pytree
from bilevel_jax.core.promotion import usual_promotion
from bilevel_jax.core.validation import as_float, require_computable, require_instance
from bilevel_jax.mdp.process import MDP
from bilevel_jax.mdp.regularizers import Regularizer


class UpperLevel(eqx.Module):
    """How x moves. Every algorithm takes one in place of a bare optimizer.

    Args:
      optimizer: an optax transformation. It may ask for `value` or `grad`, as `optax.polyak_sgd()` does. With the
        algorithm `implicit` it may also search along a line, as `optax.lbfgs()` does: it then asks for `value_fn`,
        which the other algorithms refuse in `init`. Build it once: a new one is a new structure.
      projection: x -> the nearest point of a closed convex set, e.g. `optax.projections.projection_simplex`
        or `jax.tree_util.Partial(optax.projections.projection_box, lower=0, upper=1)`: x is projected after
        each update of the optimizer (projected gradient), and at the start. An info's `stationarity` is then
        |x - projection(x - gradient)|_2, which is 0 exactly at points that satisfy the first-order conditions. Without
        a projection it is the gradient's norm.
      temperature: iteration -> factor that multiplies the problem's temperature, e.g. `Cooling(10, 1_000)`:
        continuation from ten times the temperature to the problem's own in a thousand iterations. Objective and
        gradient are those of the problem at the current temperature.
      hyperparameters: numbers by name that replace those of an optimizer made by `optax.inject_hyperparams`. Here they
        are leaves, so that runs that differ only in a learning rate are one program.

    Raises:
      InputError: an optimizer of another type, a projection or a schedule that is not callable; in `init`,
        hyperparameters that the optimizer does not have.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> algorithm = bj.algorithms.implicit(
      ...     problem,
      ...     bj.algorithms.UpperLevel(optax.adam(0.1), projection=optax.projections.projection_non_negative),
      ... )
      >>> state = algorithm.init(jax.random.key(0), problem.start(jax.random.key(1)))
      >>> state, info = algorithm.step(jax.random.key(2), state)
      >>> state.x.shape, info.objective.shape
      ((8, 3), ())
    """

    optimizer: optax.GradientTransformation = eqx.field(static=True)
    projection: Callable | None
    temperature: Callable | None
    hyperparameters: dict[str, Float[Array, ""]]

    def __init__(
        self,
        optimizer: optax.GradientTransformation,
        *,
        projection: Callable | None = None,
        temperature: Callable | None = None,
        hyperparameters: Mapping[str, Any] | None = None,
    ):
        require_instance("optimizer", optimizer, optax.GradientTransformation)
        self.optimizer = optimizer
        self.projection = None if projection is None else as_pytree("projection", projection)
        self.temperature = None if temperature is None else as_pytree("temperature", temperature)
        given = {} if hyperparameters is None else hyperparameters
        self.hyperparameters = {name: as_float(f"hyperparameters[{name!r}]", given[name], float) for name in given}

    def without_temperature(self) -> "UpperLevel":
        """Return the same, at the problem's own temperature."""
        return UpperLevel(self.optimizer, projection=self.projection, hyperparameters=self.hyperparameters)

    def project(self, x: Any) -> Any:
        """Return x, or the nearest point that is allowed."""
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
            state = jax.tree.map(_strongly_typed, self._with_hyperparameters(self.optimizer.init(x)))
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

    def _with_hyperparameters(self, state: Any) -> Any:
        """The optimizer's state with the numbers that were given. Raises InputError."""
        if not self.hyperparameters:
            return state
        own = getattr(state, "hyperparams", {})
        for name in self.hyperparameters:
            if name not in own:
                has = ", ".join(own) or "none; make it by optax.inject_hyperparams"
                raise InputError(f"hyperparameters: the optimizer has no {name!r}; it has {has}")
        new = {name: jnp.asarray(self.hyperparameters.get(name, old), old.dtype) for name, old in own.items()}
        return state._replace(hyperparams=new)

    def update(
        self, gradient: Any, optimizer_state: Any, x: Any, value: Float[Array, ""], value_fn: Callable | None = None
    ) -> tuple[Any, Any, Float[Array, ""]]:
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
        return self.project(optax.apply_updates(x, updates)), optimizer_state, self.stationarity(x, gradient)

    def stationarity(self, x: Any, gradient: Any) -> Float[Array, ""]:
        """|x - projection(x - gradient)|_2, and the gradient's 2-norm without a projection."""
        if self.projection is None:
            return optax.tree.norm(gradient)
        moved = jax.tree.map(lambda leaf, g: leaf - g.astype(leaf.dtype), x, gradient)
        return optax.tree.norm(jax.tree.map(lambda leaf, to: leaf - to, x, self.project(moved)))


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


def as_upper_level(optimizer: Any) -> UpperLevel:
    """Return an `UpperLevel`, also for a bare optimizer."""
    return optimizer if isinstance(optimizer, UpperLevel) else UpperLevel(optimizer)


def at_iteration(algorithm: Any, iteration: Integer[Array, ""]) -> Any:
    """Return the algorithm with the problem of an iteration, at the temperature of its schedule."""
    upper = algorithm.upper
    require_computable("problem", algorithm.problem, any_floats=True)
    if upper.temperature is None:
        return algorithm
    with usual_promotion():
        problem = at_temperature(algorithm.problem, upper.temperature(iteration))
    return dataclasses.replace(algorithm, problem=problem, upper=upper.without_temperature())
