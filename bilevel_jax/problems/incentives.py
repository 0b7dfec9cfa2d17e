"""Incentives by a network, for an agent in classic control that only avoids effort.

A principal cannot choose the agent's actions. It pays for the states that the agent reaches (Holmstrom 1979 has the
general problem; the bilevel form follows Yang, Gao and Yuan 2025).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from bilevel_jax.bilevel import SampledProblem
from bilevel_jax.core.functions import ActionFunction
from bilevel_jax.core.options import require_choices
from bilevel_jax.core.validation import (
    as_float,
    plain,
    require_at_least,
    require_finite,
    require_fraction,
    require_positive,
)
from bilevel_jax.environments import Box, Environment
from bilevel_jax.mdp.regularizers import ShannonEntropy
from bilevel_jax.networks import MLP, RewardNetwork, Scaled, as_vector
from bilevel_jax.problems.options import MOST_STEPS, MOST_WIDTH, refuse_unused, require_size
from bilevel_jax.problems.registry import register
from bilevel_jax.problems.simulators import CLASSIC, Classic


@dataclasses.dataclass(frozen=True)
class IncentivesOptions:
    """Incentives by a network: payments for states that lead an agent, which only avoids effort, to do a task.

    environment: "cart_pole", where the principal gains each step until the pole falls; "mountain_car", where it gains
      the height of the car and loses one per step until the car is over the hill; "pendulum", with continuous actions,
      where it gains the reward of the usual task, scaled to [-1, 0].
    inputs: what the payment depends on, the "state" before the step, the "next_state", or "state_action".
    effort: cost of the strongest action to the agent; not of cart_pole, which is pushed in every step.
    price: cost of a payment of one to the principal.
    max_payment: payments are between minus and plus this number.
    width: of the hidden layers of the network.
    temperature: of the agent's entropy, in units of a payment.
    discount: of the agent and of the principal.
    horizon: the most steps of an episode.
    """

    environment: Classic = "cart_pole"
    inputs: Literal["state", "next_state", "state_action"] = "next_state"
    effort: float = 0.05
    price: float = 0.1
    max_payment: float = 1.0
    width: int = 32
    temperature: float = 0.1
    discount: float = 0.95
    horizon: int = 100


class _Work(NamedTuple):
    """What is particular to an environment: the size of observations, effort(action) in [0, 1], and the principal's
    gain of a step, (observation, action, next observation, reward) -> number.
    """

    scale: tuple[float, ...]
    effort: Callable[[Any], Any]
    gain: Callable[[Any, Any, Any, Any], Any]


WORK = {
    "cart_pole": _Work((1.0, 1.0, 0.1, 1.0), jnp.zeros_like, lambda observation, action, after, reward: reward),
    "mountain_car": _Work(
        (0.5, 0.03),
        lambda action: jnp.abs(action - 1),
        lambda observation, action, after, reward: (jnp.sin(3 * after[0]) - 1) / 2,
    ),
    "pendulum": _Work(
        (1.0, 1.0, 4.0),
        lambda action: (action[0] / 2) ** 2,
        lambda observation, action, after, reward: reward / 16.3,
    ),
}


class Incentives(SampledProblem):
    """The problem. The upper variable x is the parameters of a network, whose output p is a payment: at s', at s, or at
    (s, a), by `inputs`.

    The agent earns p - effort(a) and the entropy of its policy; p is between -max_payment and max_payment. Without
    payments it avoids effort, or where there is none it is indifferent. The principal minimises the discounted sum of
    price |p| - gain(s, a, s'): a negative payment has its price, too.

    At a price of 0 the loss does not depend on x directly: its gradient is all in the agent's answer. Where the payment
    depends on the state alone, the one-step estimate of that answer is zero, too, as no single action changes the
    payment for the state in which it is taken.
    """

    environment: Environment
    model: RewardNetwork
    effort: Float[Array, ""]
    price: Float[Array, ""]
    temperature: Float[Array, ""]
    discount: Float[Array, ""]
    work: str = eqx.field(static=True)
    horizon: int = eqx.field(static=True, converter=plain("horizon"))

    def __init__(self, options: IncentivesOptions):
        require_choices(options)
        require_size(options, "width", most=MOST_WIDTH)
        require_size(options, "horizon", most=MOST_STEPS)
        if options.environment == "cart_pole":
            refuse_unused(options, ("effort",), "has no effect on cart_pole, which is pushed in every step")
        self.work = options.environment
        self.environment = CLASSIC[self.work]()
        max_payment = as_float("max_payment", options.max_payment, float)
        require_positive("max_payment", max_payment, "it bounds the payments")
        scale, actions = jnp.asarray(WORK[self.work].scale), self.environment.action_space
        if options.inputs == "state_action" and isinstance(actions, Box):  # then the network is given the action, too
            scale = as_vector({"observation": scale, "action": actions.high}, scale.dtype)
        network = Scaled(scale, network=MLP(options.width, layer_norm=False, activation="silu"))
        self.model = RewardNetwork.of(self.environment, network, options.inputs, bound=max_payment)
        self.effort = as_float("effort", options.effort, float)
        self.price = as_float("price", options.price, float)
        for name, number in (("effort", self.effort), ("price", self.price)):
            require_finite(name, number)
            require_at_least(name, number, 0, "0 makes it free")
        self.temperature = ShannonEntropy(options.temperature).temperature
        self.discount = as_float("discount", options.discount, float)
        require_fraction("discount", self.discount, "for long horizons use e.g. 0.999")
        self.horizon = int(options.horizon)

    @property
    def trajectories(self) -> int:
        """The number of trajectories per loss: 1."""
        return 1

    @property
    def loss_discount(self) -> Float[Array, ""]:
        """The principal discounts as the agent does."""
        return self.discount

    def start(self, key: PRNGKeyArray) -> Any:
        """Parameters drawn at random, whose payments are small."""
        return self.model.init(key, self.environment.observation_space)

    def payment(self, x: Any) -> ActionFunction:
        """What the principal pays for a step: `payment(x).of_step(observation, action, next_observation)`."""
        return self.model(x)

    def reward(self, x):
        return _Earnings(self.model(x), self.effort, self.work)

    def regularizer(self, x):
        del x
        return ShannonEntropy(self.temperature)

    def loss(self, key, x, trajectories) -> Float[Array, " H"]:
        del key
        each = jax.tree.map(lambda leaf: leaf[0], trajectories._replace(state=None))
        steps = each.observation, each.action, each.next_observation
        paid = jax.vmap(self.payment(x).of_step)(*steps)
        gained = jax.vmap(WORK[self.work].gain)(*steps, each.reward).astype(paid.dtype)
        return jnp.where(each.valid, self.price.astype(paid.dtype) * jnp.abs(paid) - gained, 0)


class _Earnings(ActionFunction):
    """The agent's reward: a payment less the effort."""

    payment: ActionFunction
    effort: Float[Array, ""]
    work: str = eqx.field(static=True)

    def __call__(self, observation, action):
        return self.payment(observation, action) - self._cost(action)

    def all(self, observation):
        made = self.payment.all(observation)
        return made - jax.vmap(self._cost)(jnp.arange(made.shape[0])).astype(made.dtype)

    def of_step(self, observation, action, next_observation):
        return self.payment.of_step(observation, action, next_observation) - self._cost(action)

    def _cost(self, action: Any) -> Float[Array, ""]:
        return self.effort * jnp.asarray(WORK[self.work].effort(action), self.effort.dtype)


register("incentives", IncentivesOptions, Incentives)
