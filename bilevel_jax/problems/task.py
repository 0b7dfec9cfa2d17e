"""A reinforcement-learning task as a problem: an environment and its own rewards, with nothing for the upper level."""

import dataclasses
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from bilevel_jax.bilevel import SampledProblem
from bilevel_jax.core.functions import Zero
from bilevel_jax.core.options import require_choices
from bilevel_jax.core.validation import as_float, as_size, require_fraction
from bilevel_jax.environments import Environment, require_every_action
from bilevel_jax.mdp.regularizers import Regularizer, ShannonEntropy
from bilevel_jax.problems.options import MOST_STEPS, refuse_unused, require_size
from bilevel_jax.problems.registry import register
from bilevel_jax.problems.simulators import CLASSIC, Classic, of_gymnax


@dataclasses.dataclass(frozen=True)
class TaskOptions:
    """A reinforcement-learning task for an agent alone: classic control, or an environment of gymnax.

    environment: a task of classic control.
    gymnax: the name of an environment of gymnax instead, such as "Breakout-MinAtar"; needs the extra gymnax.
    temperature: of the agent's entropy, in units of the scaled reward.
    scale: multiplies the rewards that the agent learns from.
    discount: of the agent.
    horizon: the most steps of an episode.
    """

    environment: Classic = "cart_pole"
    gymnax: str = ""
    temperature: float = 0.05
    scale: float = 0.1
    discount: float = 0.99
    horizon: int = 500


class Task(SampledProblem):
    """An agent's task, for agents that are trained alone. The loss is minus the sum of the environment's rewards.

    The agent earns `scale` times the rewards that the environment emits; x has no effect. With networks, what counts is
    the ratio of scale and temperature, and that values of Q are of the order of one.

    Args:
      environment: the simulator.
      regularizer: of the agent; None is `ShannonEntropy(temperature)`.
      temperature: of the entropy, in units of the scaled reward.
      scale: multiplies the rewards that the agent learns from; 0.1 by default where the problem is made by its name.
      discount: of the agent, in [0, 1).
      horizon: the most steps of an episode (static); 500 by default where the problem is made by its name.

    Raises:
      InputError: a discount outside [0, 1), a temperature not above 0, a horizon below 1.

    Example:
      >>> task = bj.problems.Task(bj.environments.classic.CartPole(), temperature=0.05, scale=0.1, horizon=500)
      >>> agent = bj.agents.SoftPQN(bj.networks.MLP(width=16), processes=4, steps=8)
      >>> state = agent.init(jax.random.key(0), task, task.start(jax.random.key(0)))
      >>> state.processes[0].shape
      (4, 4)
    """

    environment: Environment
    _regularizer: Regularizer
    scale: Float[Array, ""]
    discount: Float[Array, ""]
    loss_discount: Float[Array, ""]
    horizon: int = eqx.field(static=True)

    def __init__(
        self,
        environment: Environment,
        *,
        regularizer: Regularizer | None = None,
        temperature: Any = 0.05,
        scale: Any = 1.0,
        discount: Any = 0.99,
        horizon: int = 1000,
    ):
        require_every_action(environment, "Task")
        self.environment = environment
        self._regularizer = ShannonEntropy(temperature) if regularizer is None else regularizer
        self.scale = as_float("scale", scale, float)
        self.discount = as_float("discount", discount, float)
        require_fraction("discount", self.discount, "for long horizons use e.g. 0.999")
        self.loss_discount = jnp.ones_like(self.discount)
        self.horizon = as_size("horizon", horizon)

    @property
    def trajectories(self) -> int:
        """The number of trajectories per loss: 1."""
        return 1

    def start(self, key) -> Float[Array, ""]:
        """Return zero: x has no effect."""
        del key
        return jnp.zeros(())

    def reward(self, x):
        del x
        return Zero(getattr(self.environment.action_space, "n", None))  # a Box has none

    def environment_reward_weight(self):
        return self.scale

    def regularizer(self, x):
        del x
        return self._regularizer

    def loss(self, key, x, trajectories):
        del key, x
        return -jnp.where(trajectories.valid, trajectories.reward, 0)[0]


def _build(options: TaskOptions) -> Task:
    require_choices(options)
    require_size(options, "horizon", most=MOST_STEPS)
    if options.gymnax != "":
        refuse_unused(options, ("environment",), "has no effect where gymnax names the environment")
    return Task(
        of_gymnax(options.gymnax) if options.gymnax else CLASSIC[options.environment](),
        temperature=options.temperature,
        scale=options.scale,
        discount=options.discount,
        horizon=options.horizon,
    )


register("task", TaskOptions, _build)
