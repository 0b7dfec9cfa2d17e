"""The bilevel problem when the dynamics are only a simulator."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, Real

from bilevel_jax.core.arrays import PerPair, Scalar
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.functions import ActionFunction, OfPair, Table, as_pytree, tabulate
from bilevel_jax.core.validation import as_float, as_size, require_fraction
from bilevel_jax.environments import Discrete, Environment, TabularEnvironment, Trajectory, require_every_action
from bilevel_jax.environments.spaces import Space
from bilevel_jax.mdp.regularizers import KLDivergence, Regularizer, ShannonEntropy


class SampledProblem(eqx.Module):
    """minimise over x:  E[ loss(d_1 .. d_I; x) ],  I trajectories d_i of length H drawn under pi*(x).

    The base class of problems whose dynamics are known only as a simulator. pi*(x) is the regularized optimal policy
    of the simulator's process with the reward of x. The dynamics do not depend on x. A subclass is an
    `equinox.Module`: its numbers are leaves. If it is also derived from `bilevel_jax.Problem`, it can be solved
    exactly, too.

    A subclass has these fields or properties:
      environment: the dynamics. The rewards that it emits go into the trajectories; the agent learns from `reward`.
      discount: the lower level's discount, in [0, 1). Where a process terminates, nothing follows.
      loss_discount: the discount, up to 1, of the costs that the upper level pays at each step; it has no meaning for
        a loss that is paid as a whole.
      horizon: H (static).
      trajectories: I, the number of independent trajectories that one loss depends on (static).
    """

    environment: eqx.AbstractVar[Environment]
    discount: eqx.AbstractVar[Scalar]
    loss_discount: eqx.AbstractVar[Scalar]
    horizon: eqx.AbstractVar[int]
    trajectories: eqx.AbstractVar[int]

    @abc.abstractmethod
    def reward(self, x: Any) -> ActionFunction:
        """The lower level's reward at x: `reward(observation, action)` is a number, `reward.all(observation)` is [A].

        A `Table`, a `Linear`, a `PerAction` or an `ActionFunction` of your own.
        """

    @abc.abstractmethod
    def regularizer(self, x: Any) -> Regularizer:
        """`ShannonEntropy` or `KLDivergence` at x; its numbers must not depend on x."""

    @abc.abstractmethod
    def loss(self, key: PRNGKeyArray, x: Any, trajectories: Trajectory) -> Scalar | Float[Array, " H"]:
        """Return the upper level's loss for trajectories [I, H]: a scalar, or the costs that are paid at each step,
        [H].

        Costs are summed, discounted by `loss_discount`. Entry h may depend on steps 0 to h only (of all trajectories).
        A cost that is paid before an action is then not credited to that action, which lowers the variance. The loss
        itself leaves out steps that are not `valid`. The key is for losses that are random themselves (a teacher's
        label).
        """

    def environment_reward_weight(self) -> Scalar | None:
        """The weight with which the lower level earns the rewards that the environment emits, beside `reward(x)`.

        None, the default: it earns `reward(x)` alone. Agents with networks take a weight, those with tables refuse it.
        """
        return None

    def earned(self, x: Any, trajectories: Trajectory) -> Float[Array, "B H"]:
        """What the lower level earns in each step of trajectories [B, H]: `reward(x)`, and the weighted rewards of the
        environment.
        """
        steps = trajectories.observation, trajectories.action, trajectories.next_observation
        rewards = jax.vmap(jax.vmap(self.reward(x).of_step))(*steps)
        weight = self.environment_reward_weight()
        if weight is None:
            return rewards
        return rewards + jnp.asarray(weight, rewards.dtype) * trajectories.reward.astype(rewards.dtype)

    @property
    def earns_reward_alone(self) -> bool:
        """Whether `reward(x)` is all that the lower level earns."""
        return self.environment_reward_weight() is None

    @property
    def action_space(self) -> Space:
        """The action space of the environment: `Discrete(A)`, or a `Box` of continuous actions."""
        return self.environment.action_space

    @property
    def observation_space(self) -> Any:
        """The shapes and dtypes of an observation: a pytree of `jax.ShapeDtypeStruct`."""
        return self.environment.observation_space


class SampledBilevelProblem(SampledProblem):
    """A `SampledProblem` from its parts.

    Args:
      environment: the simulator.
      reward: x -> array [S, A] (taken as a `Table`); or x -> function of (observation, action) that returns a number;
        or x -> an `ActionFunction`, such as `PerAction(function)` for a function that returns the rewards of all
        actions.
      regularizer: a `ShannonEntropy` or `KLDivergence`.
      loss: (key, x, `Trajectory` [I, H]) -> scalar or [H].
      discount: the lower level's discount, in [0, 1).
      loss_discount: the discount of the entries of a loss [H].
      horizon, trajectories: H and I.

    Raises:
      InputError: a regularizer of another kind, a discount outside [0, 1), sizes below 1, states with fewer actions.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.zeros((2, 2)), 0.9)
      >>> problem = bj.SampledBilevelProblem(
      ...     environment=bj.environments.TabularEnvironment(mdp),
      ...     reward=lambda x: x,  # x[S, A] is the reward
      ...     regularizer=bj.ShannonEntropy(0.1),
      ...     loss=lambda key, x, trajectories: jnp.sum(trajectories.action == 0) + jnp.sum(x**2),
      ...     discount=0.9,
      ...     horizon=20,
      ... )
      >>> problem.action_space.n
      2
    """

    environment: Environment
    _reward: Callable
    _regularizer: Regularizer
    _loss: Callable
    discount: Scalar
    loss_discount: Scalar
    horizon: int = eqx.field(static=True)
    trajectories: int = eqx.field(static=True)

    def __init__(
        self,
        environment: Environment,
        reward: Callable,
        regularizer: Regularizer,
        loss: Callable,
        *,
        discount: Real[ArrayLike, ""] | Any,
        horizon: int,
        loss_discount: Real[ArrayLike, ""] | Any = 1.0,
        trajectories: int = 1,
    ):
        require_every_action(environment, "SampledBilevelProblem")
        self.environment = environment
        self._reward = as_pytree("reward", reward)
        self._regularizer = require_entropy(regularizer)
        self._loss = as_pytree("loss", loss)
        self.discount = as_float("discount", discount)
        require_fraction("discount", self.discount, "for long horizons use e.g. 0.999")
        self.loss_discount = as_float("loss_discount", loss_discount)
        for name, size in (("horizon", horizon), ("trajectories", trajectories)):
            setattr(self, name, as_size(name, size))

    def reward(self, x):
        """See `SampledProblem`; an array becomes a `Table`."""
        made = self._reward(x)
        if isinstance(made, ActionFunction):
            return made
        if not callable(made):
            return Table(made)
        space = self.action_space
        return OfPair("reward", made, space.n if isinstance(space, Discrete) else None)

    def regularizer(self, x):
        del x
        return self._regularizer

    def loss(self, key, x, trajectories):
        return self._loss(key, x, trajectories)


def require_entropy(regularizer: Regularizer) -> Regularizer:
    """Return the regularizer, if grad log pi* = (dQ* - dV*) / temperature holds for it. Raises InputError otherwise."""
    if not isinstance(regularizer, ShannonEntropy | KLDivergence):
        raise InputError(
            f"regularizer: trajectory estimators need the log-policy of ShannonEntropy or KLDivergence, got "
            f"{type(regularizer).__name__}; solve it exactly with bilevel_jax.hypergradient"
        )
    return regularizer


def require_reward_alone(problem: SampledProblem, what: str) -> None:
    """Raise InputError if the lower level earns more than `reward(x)`, which `what` does not know."""
    if not problem.earns_reward_alone:
        raise InputError(
            f"problem: {what} learns from reward(x) alone, but the agent of {type(problem).__name__} earns more "
            f"(an environment_reward_weight, or a penalty); use an agent with a network, e.g. SoftPQN()"
        )


def require_tabular(problem: SampledProblem, what: str) -> TabularEnvironment:
    """The problem's environment, if it is tabular. Raises InputError that names what needs it."""
    environment = problem.environment
    if not isinstance(environment, TabularEnvironment):
        raise InputError(
            f"environment: {what} needs a TabularEnvironment, got {type(environment).__name__}; for other "
            f"simulators use NestedRollouts or OneStep"
        )
    return environment


def reward_table(problem: SampledProblem, x: Any, num_states: int) -> PerPair:
    """r_x[S, A] of a tabular problem."""
    return tabulate(problem.reward(x), num_states).values


def temperature_of(problem: SampledProblem, x: Any) -> Scalar:
    """The temperature at x, a constant for derivatives."""
    return jax.lax.stop_gradient(require_entropy(problem.regularizer(x)).temperature)


def discounts(problem: SampledProblem, horizon: int) -> Float[Array, " H"]:
    """discount^h for h below the horizon, [H]."""
    return problem.discount ** jnp.arange(horizon, dtype=problem.discount.dtype)
