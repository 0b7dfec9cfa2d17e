"""A transition kernel that is a function of the user."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Shaped

from bilevel_jax.core.arrays import PerPair, PerState
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.validation import as_array, as_size, is_known
from bilevel_jax.mdp.transitions.protocol import PolicyOperator, Transition

# Columns of a matrix that are made at a time.
COLUMNS = 64


class MatrixFreeOperator(PolicyOperator):
    """M of weights[S, A], computed by the user's function. `matrix` and `diagonal` take S products each."""

    def matrix(self):
        states = jnp.arange(self.weights.shape[0], dtype=jnp.int32)

        def column(state):
            return self.apply((states == state).astype(self.weights.dtype))

        # Some at a time: what the function makes on its way is larger than a column.
        return lax.map(column, states, batch_size=COLUMNS).T

    @property
    def matrix_products(self):
        return self.weights.shape[0]

    def fold(self):
        return self


class MatrixFreeTransition(Transition):
    """Expectations by a function: `function(parameters, values[S]) -> [S, A]`, linear in the values.

    Args:
      function: pure and hashable, E[v(s') | s, a] of values v. It is static: the same function object
        means no new compilation, unless what it reads was edited. The transposed product is derived from it by
        `jax.linear_transpose`.
      parameters: a pytree of arrays, what the function computes with; the kernel's differentiable leaves.
      num_states, num_actions: S and A; static.

    The parameters are those of one MDP: batch axes come by vmap only. Nothing is stored that could be
    folded, so that each product of an operator costs one call; `matrix` and `diagonal` cost S of them.

    Raises:
      InputError: a function that is not hashable or gives another shape; or, where the parameters are
        known, expectations of a few values that are not finite, not linear, do not keep ones, or are
        outside the range of the values (`validate` tries some values, it cannot try all).

    Example:
      >>> def walk(probability, values):  # on a ring of 5 states: the first action stays, the second one may move on
      ...     ahead = probability * jnp.roll(values, -1) + (1 - probability) * values
      ...     return jnp.stack([values, ahead], axis=-1)
      >>> transition = bj.MatrixFreeTransition(walk, jnp.asarray(0.8), num_states=5, num_actions=2)
      >>> bj.MDP(transition, jnp.zeros((5, 2)), 0.9).num_states
      5
    """

    function: Callable[[Any, PerState], PerPair] = eqx.field(static=True)
    parameters: Any
    num_states: int = eqx.field(static=True)
    num_actions: int = eqx.field(static=True)

    def __init__(
        self, function: Callable[[Any, PerState], PerPair], parameters: Any, num_states: int, num_actions: int
    ):
        try:
            hash(function)
        except TypeError:
            raise InputError(
                f"function: {type(function).__name__} cannot be hashed; give a plain function, its arrays as parameters"
            ) from None
        self.function = function
        self.parameters = jax.tree_util.tree_map_with_path(
            lambda path, leaf: as_array(f"parameters{jax.tree_util.keystr(path)}", leaf), parameters
        )
        self.num_states, self.num_actions = as_size("num_states", num_states), as_size("num_actions", num_actions)
        made = jax.eval_shape(function, self.parameters, self._values())
        if getattr(made, "shape", None) != self.shape or not jnp.issubdtype(made.dtype, jnp.floating):
            raise InputError(
                f"function: expected real expectations of shape [S, A] = {list(self.shape)} from values "
                f"[{self.num_states}], got {made}"
            )
        self.validate()

    @property
    def shape(self):
        return (self.num_states, self.num_actions)

    @property
    def dtype(self):
        """The widest floating-point type among the parameters, jax's own where there is none."""
        kinds = [leaf.dtype for leaf in jax.tree.leaves(self.parameters) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        with jax.numpy_dtype_promotion("standard"):
            return jnp.result_type(*kinds) if kinds else jnp.result_type(float)

    @property
    def terms(self):
        return self.num_states

    def astype(self, dtype):
        def cast(leaf: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
            return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

        return eqx.tree_at(lambda t: t.parameters, self, jax.tree.map(cast, self.parameters))

    def event_ndim(self):
        return eqx.tree_at(lambda t: t.parameters, self, jax.tree.map(jnp.ndim, self.parameters))

    def validate(self):
        if not is_known(*jax.tree.leaves(self.parameters)):
            return
        rng = np.random.default_rng(0)
        with jax.ensure_compile_time_eval():
            first, second = (jnp.asarray(rng.uniform(0, 1, self.num_states), self.dtype) for _ in range(2))
            spike = jnp.zeros(self.num_states, self.dtype).at[int(rng.integers(self.num_states))].set(1)
            of = [np.asarray(self.expect(v)) for v in (jnp.ones_like(first), first, second, spike, first - 2 * second)]
        tolerance = max(1e-6, 100 * float(jnp.finfo(self.dtype).eps))
        if not all(np.isfinite(one).all() for one in of):
            raise InputError("function: its expectations of finite values are not all finite; check the parameters")
        if np.abs(of[4] - (of[1] - 2 * of[2])).max() > 10 * tolerance:
            raise InputError("function: not linear in the values; it has to be an expectation, without offset")
        off = np.abs(of[0] - 1)
        if off.max() > tolerance:
            where = [int(i) for i in np.unravel_index(off.argmax(), off.shape)]
            raise InputError(
                f"function: the expectation of ones is {of[0][tuple(where)]:.9g} at {where}, not 1; its weights must "
                f"be probabilities"
            )
        for one, values in zip(
            of[1:4], map(np.asarray, (first, second, spike)), strict=True
        ):  # numpy's: also in a trace
            least, most = values.min(), values.max()
            if one.min() < least - tolerance or one.max() > most + tolerance:
                raise InputError(
                    f"function: expectations from {one.min():g} to {one.max():g} of values from {least:g} to "
                    f"{most:g}; its weights must be probabilities, none negative"
                )

    def expect(self, values):
        return self.function(self.parameters, jnp.asarray(values))

    def push(self, masses):
        transpose = jax.linear_transpose(lambda values: self.function(self.parameters, values), self._values())
        return transpose(jnp.asarray(masses))[0]

    def under(self, weights):
        return MatrixFreeOperator(self, weights)

    def diagonal(self):
        def stay(state):
            spike = jnp.zeros(self.num_states, self.dtype).at[state].set(1)
            return self.expect(spike)[state]

        return lax.map(stay, jnp.arange(self.num_states))

    def _values(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.num_states,), self.dtype)
