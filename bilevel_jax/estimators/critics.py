"""A network of the state with numbers for each action, fitted to targets: what learned credits and answers share."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Integer, PRNGKeyArray

from bilevel_jax.core.promotion import usual_promotion
from bilevel_jax.core.sizes import size
from bilevel_jax.networks import Network


class CriticState(eqx.Module):
    """The parameters, the state of Adam, and the units: values are shift + scale times the outputs of the network.

    The units are those of the first targets that were not all equal; before, scale is 0.
    """

    params: Any
    optimizer_state: Any
    shift: Float[Array, " F"]
    scale: Float[Array, ""]


class Critic(eqx.Module):
    """A network with F numbers for each of A actions, fitted by least squares with Adam.

    Args:
      network: its outputs are [A F].
      learning_rate: of Adam, on targets of mean 0 and variance 1.
      steps: steps of Adam for each batch (static).
      minibatches: each step takes every m-th part of the batch (static).

    Raises:
      InputError: sizes below 1.
    """

    network: Network
    learning_rate: Any
    steps: int = eqx.field(static=True, converter=size("steps"))
    minibatches: int = eqx.field(static=True, converter=size("minibatches"))

    def init(self, key: PRNGKeyArray, observation: Any, actions: int, features: int) -> CriticState:
        """The state before anything was learned. `observation` is one, or its shapes and dtypes."""
        params = self.network.init(key, observation, actions * features)
        dtype = jax.tree.leaves(params)[0].dtype
        with usual_promotion():
            optimizer_state = jax.tree.map(jnp.asarray, optax.scale_by_adam().init(params))
        return CriticState(params, optimizer_state, jnp.zeros(features, dtype), jnp.zeros((), dtype))

    def values(self, state: CriticState, observation: Any) -> Float[Array, "A F"]:
        """The numbers of all actions for one observation, [A, F]."""
        outputs = self.network.apply(state.params, observation).astype(state.scale.dtype)
        return state.shift[None] + state.scale * outputs.reshape(-1, state.shift.size)

    def fitted(
        self,
        state: CriticState,
        observations: Any,
        actions: Integer[Array, " n"],
        targets: Float[Array, "n F"],
        valid: Bool[Array, " n"],
    ) -> CriticState:
        """After `steps` steps towards targets [n, F] of the pairs [n] that are valid."""
        state = _with_units(state, targets, valid)
        units = jnp.where(state.scale > 0, state.scale, 1)
        wanted = (targets - state.shift[None]) / units
        some = max(1, actions.size // self.minibatches)
        rate = jnp.asarray(self.learning_rate, targets.dtype)

        def loss(params, observations, actions, wanted, valid):
            outputs = jax.vmap(self.network.apply, (None, 0))(params, observations)
            outputs = outputs.reshape(outputs.shape[0], -1, wanted.shape[1])
            taken = jax.vmap(lambda row, action: row[action])(outputs, actions).astype(wanted.dtype)
            weight = valid.astype(wanted.dtype)[:, None]
            count = jnp.maximum(jnp.sum(weight), 1) * wanted.shape[1]
            return jnp.sum(weight * (taken - wanted) ** 2) / (2 * count)

        def step(carry, number):
            params, optimizer_state = carry
            places = (jnp.arange(some) * self.minibatches + number) % actions.size
            data = jax.tree.map(lambda leaf: leaf[places], (observations, actions, wanted, valid))
            gradient = jax.grad(loss)(params, *data)
            with usual_promotion():
                moves, after = optax.scale_by_adam().update(gradient, optimizer_state, params)
                moved = jax.tree.map(lambda leaf, move: (leaf - rate * move).astype(leaf.dtype), params, moves)
            after = jax.tree.map(lambda new, old: new.astype(old.dtype), after, optimizer_state)
            return (moved, after), None

        numbers = jnp.arange(self.steps) % self.minibatches
        (params, optimizer_state), _ = jax.lax.scan(step, (state.params, state.optimizer_state), numbers)
        return CriticState(params, optimizer_state, state.shift, state.scale)


def _with_units(state: CriticState, targets: Float[Array, "n F"], valid: Bool[Array, " n"]) -> CriticState:
    """The units of these targets, if there are none yet."""
    weight = valid.astype(targets.dtype)[:, None]
    count = jnp.maximum(jnp.sum(weight), 1)
    mean = jnp.sum(weight * targets, 0) / count
    spread = jnp.sqrt(jnp.sum(weight * (targets - mean[None]) ** 2) / (count * targets.shape[1]))
    set_now = state.scale == 0
    shift = jnp.where(set_now, mean, state.shift)
    scale = jnp.where(set_now, spread, state.scale)
    return CriticState(state.params, state.optimizer_state, shift, scale)
