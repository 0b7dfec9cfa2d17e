"""The bilevel problem when the dynamics are only a simulator."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp

from bilevel_jax.environments import Environment, TabularEnvironment, Trajectory, require_every_action
from bilevel_jax.errors import InputError
from bilevel_jax.functions import ActionFunction, Table, as_pytree, tabulate
from bilevel_jax.regularizers import KLDivergence, Regularizer, ShannonEntropy
from bilevel_jax.validation import as_float, as_size, require_fraction


@runtime_checkable
class SampledProblem(Protocol):
    """minimise over x:  E[ loss(d_1 .. d_I; x) ],  I trajectories d_i of length H drawn under pi*(x).

    pi*(x) is the regularized optimal policy of the simulator's process with the reward of x. The
    dynamics do not depend on x. An object with these members that is a pytree keeps its numbers as
    leaves. One that also has the methods of `bilevel_jax.Problem` can be solved exactly, too.
    """

    @property
    def environment(self) -> Environment:
        """The dynamics. Rewards that it emits go into the trajectories; the agent learns from `reward`."""
        ...

    @property
    def discount(self) -> jax.Array:
        """Of the lower level, in [0, 1). Where a process terminates, nothing follows."""
        ...

    @property
    def loss_discount(self) -> jax.Array:
        """Of what the upper level pays at each step, up to 1; without meaning for a loss paid as a whole."""
        ...

    @property
    def horizon(self) -> int:
        """H (static)."""
        ...

    @property
    def trajectories(self) -> int:
        """I, how many independent trajectories one loss looks at (static)."""
        ...

    def reward(self, x: Any) -> ActionFunction:
        """The lower level's reward at x: a function of the observation that gives all actions' rewards [A]."""
        ...

    def regularizer(self, x: Any) -> Regularizer:
        """`ShannonEntropy` or `KLDivergence` at x; its numbers must not depend on x."""
        ...

    def loss(self, key: jax.Array, x: Any, trajectories: Trajectory) -> jax.Array:
        """What the upper level pays for trajectories [I, H]: a scalar, or what is paid at each step, [H].

        The latter is summed, discounted by `loss_discount`. Entry h may depend on steps 0 to h only (of
        all trajectories): what is paid before an action is then not credited to it, which lowers the
        variance. Steps that are not `valid` are the loss's own to leave out. The key is for losses that
        are random themselves (a teacher's label).
        """
        ...


class SampledBilevelProblem(eqx.Module):
    """A `SampledProblem` from its parts.

    Args:
      environment: the simulator.
      reward: x -> function of the observation giving [A], or x -> array [S, A] (taken as a `Table`).
      regularizer: a `ShannonEntropy` or `KLDivergence`.
      loss: (key, x, `Trajectory` [I, H]) -> scalar or [H].
      discount: of the lower level, in [0, 1).
      loss_discount: of the entries of a loss [H].
      horizon, trajectories: H and I.

    Raises:
      InputError: a regularizer of another kind, a discount outside [0, 1), sizes below 1, states with fewer actions.
    """

    environment: Environment
    _reward: Callable
    _regularizer: Regularizer
    _loss: Callable
    discount: jax.Array
    loss_discount: jax.Array
    horizon: int = eqx.field(static=True)
    trajectories: int = eqx.field(static=True)

    def __init__(
        self,
        environment: Environment,
        reward: Callable,
        regularizer: Regularizer,
        loss: Callable,
        *,
        discount: Any,
        horizon: int,
        loss_discount: Any = 1.0,
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
        return made if callable(made) else Table(made)

    def regularizer(self, x):
        del x
        return self._regularizer

    def loss(self, key, x, trajectories):
        return self._loss(key, x, trajectories)


def require_entropy(regularizer: Regularizer) -> Regularizer:
    """The regularizer, if grad log pi* = (dQ* - dV*) / temperature holds for it. Raises InputError."""
    if not isinstance(regularizer, ShannonEntropy | KLDivergence):
        raise InputError(
            f"regularizer: trajectory estimators need the log-policy of ShannonEntropy or KLDivergence, got "
            f"{type(regularizer).__name__}; solve it exactly with bilevel_jax.hypergradient"
        )
    return regularizer


def require_tabular(problem: SampledProblem, what: str) -> TabularEnvironment:
    """The problem's environment, if it is tabular. Raises InputError that names what needs it."""
    environment = problem.environment
    if not isinstance(environment, TabularEnvironment):
        raise InputError(
            f"environment: {what} needs a TabularEnvironment, got {type(environment).__name__}; for other "
            f"simulators use NestedRollouts or OneStep"
        )
    return environment


def reward_table(problem: SampledProblem, x: Any, num_states: int) -> jax.Array:
    """r_x[S, A] of a tabular problem."""
    return tabulate(problem.reward(x), num_states).values


def temperature_of(problem: SampledProblem, x: Any) -> jax.Array:
    """The temperature at x, a constant for derivatives."""
    return jax.lax.stop_gradient(require_entropy(problem.regularizer(x)).temperature)


def discounts(problem: SampledProblem, horizon: int) -> jax.Array:
    """discount^h for h below the horizon, [H]."""
    return problem.discount ** jnp.arange(horizon, dtype=problem.discount.dtype)
