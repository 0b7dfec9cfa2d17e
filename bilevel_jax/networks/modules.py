"""Networks that are modules of equinox."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.promotion import usual_promotion
from bilevel_jax.networks.flat import numbers
from bilevel_jax.networks.protocol import Network, example


class Weights(eqx.Module):
    """The parameters of a module of equinox.

    `arrays` is the module with its floating-point arrays, and None in all other places. The static fields say what it
    was built for.
    """

    arrays: Any
    observation: tuple[jax.ShapeDtypeStruct, ...] = eqx.field(static=True)
    structure: Any = eqx.field(static=True)
    outputs: int = eqx.field(static=True)


class Module(Network):
    """A network whose module is built by `build`; a subclass writes it. The floating-point arrays of the module are the
    parameters, and everything else in it is structure.
    """

    @abc.abstractmethod
    def build(self, key: PRNGKeyArray, observation: Any, outputs: int) -> Callable[[Any], Array]:
        """Return an `equinox.Module` that is called with one observation. `observation` has zeros."""

    def init(self, key: PRNGKeyArray, observation: Any, outputs: int) -> Weights:
        with usual_promotion():
            arrays, rest = eqx.partition(self.build(key, example(observation), outputs), eqx.is_inexact_array)
        for path, leaf in jax.tree_util.tree_leaves_with_path(rest):
            if eqx.is_array(leaf):
                raise InputError(
                    f"build: its module has the {leaf.dtype} array {jax.tree_util.keystr(path)}; only floating-point "
                    f"arrays can be parameters, make it a static field"
                )
        leaves, structure = jax.tree.flatten(observation)
        shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
        params = Weights(arrays, shapes, structure, outputs)
        numbers("build", jax.eval_shape(self.apply, params, example(observation)), outputs)
        return params

    def apply(self, params: Weights, observation: Any) -> Float[Array, " outputs"]:
        shapes = jax.tree.unflatten(params.structure, params.observation)
        with usual_promotion():
            module = eqx.filter_eval_shape(self.build, jax.random.key(0), example(shapes), params.outputs)
            rest = eqx.filter(module, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct), inverse=True)
            return eqx.combine(params.arrays, rest)(observation)
