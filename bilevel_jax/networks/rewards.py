"""Reward models: a network whose parameters are the upper variable."""

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.functions import ActionFunction
from bilevel_jax.core.sizes import size
from bilevel_jax.core.validation import as_float, require_finite, require_positive
from bilevel_jax.environments.protocol import Environment
from bilevel_jax.environments.spaces import Box, Space
from bilevel_jax.networks.protocol import Network, example

Inputs = Literal["state", "state_action", "next_state"]


class RewardNetwork(eqx.Module):
    """A reward model: `init` draws the upper variable x, and `model(x)` is the reward at x, an `ActionFunction`.

    Args:
      network: its outputs are the rewards: one, or for numbered actions and "state_action" one per action.
      inputs: what the reward depends on (static): "state" is r(s); "state_action" r(s, a); "next_state" r(s'), of the
        state that a step leads to. A reward of the next state has no number for an action that was not taken: the
        response `OneStep` refuses it, `NestedRollouts` and `EligibilityTrace` do not.
      space: the action space of the environment.
      scale: multiplies the network's outputs.
      bound: rewards are in (-bound, bound): bound tanh(scale output / bound). None does not bound them.

    Example:
      >>> space = bj.environments.Discrete(2)
      >>> model = bj.networks.RewardNetwork(bj.networks.MLP(width=8), "state_action", space)
      >>> x = model.init(jax.random.key(0), jnp.zeros(3))
      >>> model(x).all(jnp.ones(3)).shape
      (2,)
    """

    network: Network
    inputs: Inputs = eqx.field(static=True)
    space: Space
    scale: Any = 1.0
    bound: Any = None

    def __check_init__(self):
        if self.inputs not in ("state", "state_action", "next_state"):
            raise InputError(f"inputs: expected state, state_action or next_state, got {self.inputs!r}")
        if self.bound is not None:
            bound = as_float("bound", self.bound, float)
            require_positive("bound", bound, "None does not bound")
            require_finite("bound", bound)

    @classmethod
    def of(
        cls, environment: Environment, network: Network, inputs: Inputs, scale: Any = 1.0, bound: Any = None
    ) -> "RewardNetwork":
        """The reward model for an environment."""
        return cls(network, inputs, environment.action_space, scale, bound)

    @property
    def outputs(self) -> int:
        """The number of outputs of the network."""
        numbered = self.inputs == "state_action" and not isinstance(self.space, Box)
        return self.space.n if numbered and not isinstance(self.space, Box) else 1

    def init(self, key: PRNGKeyArray, observation: Any) -> Any:
        """Draw x. `observation` is one, or its shapes and dtypes (`Environment.observation_space`)."""
        return self.network.init(key, self._input(example(observation), _some_action(self.space)), self.outputs)

    def __call__(self, x: Any) -> "NetworkReward":
        return NetworkReward(self, x)

    def numbers(self, x: Any, observation: Any, action: Any) -> Float[Array, " outputs"]:
        """The scaled and bounded outputs of the network. `action` counts where the space is a `Box`."""
        made = self.network.apply(x, self._input(observation, action))
        made = made * jnp.asarray(self.scale, made.dtype)
        if self.bound is None:
            return made
        bound = jnp.asarray(self.bound, made.dtype)
        return bound * jnp.tanh(made / bound)

    def _input(self, observation: Any, action: Any) -> Any:
        both = self.inputs == "state_action" and isinstance(self.space, Box)
        return {"observation": observation, "action": action} if both else observation


class NetworkReward(ActionFunction):
    """The reward of a `RewardNetwork` at one x."""

    model: RewardNetwork
    x: Any

    def __call__(self, observation, action):
        if self.model.inputs == "next_state":
            raise InputError(
                "reward: it is a function of the next state, and is asked for the number of an action; use "
                "NestedRollouts or EligibilityTrace, or a model of inputs='state_action'"
            )
        made = self.model.numbers(self.x, observation, action)
        return made[0] if self.model.outputs == 1 else made[action]

    def all(self, observation):
        if isinstance(self.model.space, Box):
            raise InputError("reward: it is asked for all actions, but they are no finite set (the space is a Box)")
        if self.model.inputs == "state_action":
            return self.model.numbers(self.x, observation, None)
        return jnp.broadcast_to(self(observation, 0), (self.model.space.n,))

    def of_step(self, observation, action, next_observation):
        if self.model.inputs == "next_state":
            return self.model.numbers(self.x, next_observation, action)[0]
        return self(observation, action)


class Ensemble(eqx.Module):
    """Several copies of a reward model, drawn independently; x has a leading axis [members].

    The reward is the mean of the members.

    Args:
      model: the model of each member.
      members: their number (static).

    Raises:
      InputError: members below 1.

    Example:
      >>> space = bj.environments.Discrete(2)
      >>> one = bj.networks.RewardNetwork(bj.networks.MLP(width=8), "state", space)
      >>> model = bj.networks.Ensemble(one, 3)
      >>> x = model.init(jax.random.key(0), jnp.zeros(3))
      >>> model(x).all(jnp.ones(3)).shape, model.members_of(x, jnp.ones(3), 0, jnp.ones(3)).shape
      ((2,), (3,))
    """

    model: RewardNetwork
    members: int = eqx.field(static=True, converter=size("members"))

    def init(self, key: PRNGKeyArray, observation: Any) -> Any:
        """Draw x, all members."""
        return jax.vmap(lambda key: self.model.init(key, observation))(jax.random.split(key, self.members))

    def __call__(self, x: Any) -> "MeanReward":
        return MeanReward(self.model, x)

    def members_of(self, x: Any, observation: Any, action: Any, next_observation: Any) -> Float[Array, " members"]:
        """The reward of one step under each member, [members]; their spread says how sure the ensemble is."""
        return jax.vmap(lambda x: self.model(x).of_step(observation, action, next_observation))(x)


class MeanReward(ActionFunction):
    """The mean of the rewards of a model over the leading axis of x."""

    model: RewardNetwork
    x: Any

    def __call__(self, observation, action):
        return jnp.mean(jax.vmap(lambda x: self.model(x)(observation, action))(self.x))

    def all(self, observation):
        return jnp.mean(jax.vmap(lambda x: self.model(x).all(observation))(self.x), 0)

    def of_step(self, observation, action, next_observation):
        return jnp.mean(jax.vmap(lambda x: self.model(x).of_step(observation, action, next_observation))(self.x))


def _some_action(space: Space) -> Any:
    return jnp.zeros(space.shape, space.dtype)
