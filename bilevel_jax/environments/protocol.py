"""The protocol of a simulator, pure functions of a key and a state, and the record of a rollout."""

import abc
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Integer, Key, PRNGKeyArray

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.validation import is_known
from bilevel_jax.environments.policies import Policy, require_policy
from bilevel_jax.environments.spaces import Action, Box, Space


class TimeStep(NamedTuple):
    """The result of one step.

    `observation` is the one that the step led to, before any reset. `terminated` means that the process ended there,
    and `truncated` that it was cut, though it could have gone on. The step of one process has no batch axes, and
    that of many has [B].
    """

    observation: Any
    reward: Float[Array, "*batch"]
    terminated: Bool[Array, "*batch"]
    truncated: Bool[Array, "*batch"]


class Trajectory(NamedTuple):
    """Steps of B processes, each field [B, H, ...]; for one process [H, ...].

    `state` and `observation` are those before the step; the state is None where it was not recorded. `action` is int32,
    or of the shape and dtype of the `Box`. `probability` is that of the action under the policy that chose it, or its
    density where actions are continuous. `next_observation` is the one before any reset. `valid` is False on the steps
    after the end of a process that is not reset; the other fields mean nothing there. `distribution` is the policy's,
    from which the action was drawn; None where it was not recorded.
    """

    state: Any | None
    observation: Any
    action: Integer[Array, "*steps"] | Float[Array, "..."]
    probability: Float[Array, "*steps"]
    reward: Float[Array, "*steps"]
    next_observation: Any
    terminated: Bool[Array, "*steps"]
    truncated: Bool[Array, "*steps"]
    valid: Bool[Array, "*steps"]
    distribution: Any | None = None


class Environment(eqx.Module):
    """The protocol of a simulator. All methods are pure and act on one process; vmap them over many.

    A state is any pytree. `step` on a state whose process has ended may return anything: wrap the
    environment in `AutoReset` to go on, or let a rollout mark the steps as not valid.
    """

    @property
    @abc.abstractmethod
    def action_space(self) -> Space:
        """`Discrete(A)`, or a `Box` of continuous actions."""

    @property
    def observation_space(self) -> Any:
        """Shapes and dtypes of an observation: a pytree of `jax.ShapeDtypeStruct`."""
        return jax.eval_shape(lambda key: self.observe(self.reset(key)), jax.random.key(0))

    @property
    def num_actions(self) -> int:
        """A. Raises InputError where actions are no finite set."""
        space = self.action_space
        if isinstance(space, Box):
            raise InputError(
                f"environment: the actions of {type(self).__name__} are a Box of shape {list(space.shape)}, no finite "
                f"set; use an agent and estimators that need no table of actions"
            )
        return space.n

    @abc.abstractmethod
    def reset(self, key: PRNGKeyArray) -> Any:
        """Draw a state to start from."""

    @abc.abstractmethod
    def observe(self, state: Any) -> Any:
        """Return the observation of a state, on which a policy acts."""

    @abc.abstractmethod
    def step(self, key: PRNGKeyArray, state: Any, action: Action) -> tuple[Any, TimeStep]:
        """Act. `action` is an integer, [], or a point of the `Box`."""

    def run(
        self,
        keys: Key[Array, " B"],
        states: Any,
        policy: Policy,
        horizon: int,
        actions: Integer[Array, " B"] | Float[Array, "B ..."] | None,
    ) -> tuple[Trajectory, Any]:
        """Run `horizon` steps of many processes, one key and one state per process; see `environments.rollout_from`.

        The randomness of step h comes from `fold_in(key, h + 1)` alone. Results therefore do not depend on how a
        batch is cut. Subclasses may do the same faster.
        """

        def step(carry, h):
            states, alive = carry
            step_keys = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, h + 1)))(keys)
            observations = jax.vmap(self.observe)(states)
            distributions = jax.vmap(policy.distribution)(observations)
            chosen = jax.vmap(lambda one, key: one.sample(key))(distributions, step_keys[:, 0])
            require_policy(distributions, chosen, self.action_space)
            if actions is not None:
                chosen = jnp.where(h == 0, actions, chosen)
            following, made = jax.vmap(self.step)(step_keys[:, 1], states, chosen)
            record = Trajectory(
                state=states,
                observation=observations,
                action=chosen,
                probability=jax.vmap(lambda one, action: one.probability(action))(distributions, chosen),
                reward=made.reward,
                next_observation=made.observation,
                terminated=made.terminated,
                truncated=made.truncated,
                valid=alive,
            )
            # AutoReset states carry on; others stay where their process ended.
            ended = jnp.zeros_like(alive) if self.resets else made.terminated | made.truncated
            following = jax.tree.map(lambda new, old: _where(alive, new, old), following, states)
            return (following, alive & ~ended), record

        alive = jnp.ones(keys.shape, bool)
        (states, _), records = lax.scan(step, (states, alive), jnp.arange(horizon))
        return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), records), states

    @property
    def available(self) -> Bool[Array, "S A"] | None:
        """Which actions each state has, for environments with states; None: all of them."""
        return None

    @property
    def resets(self) -> bool:
        """Whether `step` starts a new process when one ends."""
        return False


def require_available(available: Bool[Array, "S A"] | None, policy: Float[Array, "S A"]) -> None:
    """Raise InputError where a policy[S, A] that is known has probability on an action that is not available."""
    if available is None or not is_known(policy, available):
        return
    wrong = (np.asarray(policy) != 0) & ~np.asarray(available)
    if wrong.any():
        index = [int(i) for i in np.argwhere(wrong)[0]]
        raise InputError(
            f"policy{index} is {np.asarray(policy)[wrong][0]:g}, but that action is not available in that state; give "
            f"it probability 0"
        )


def require_every_action(environment: Environment, what: str) -> None:
    """Raise InputError for an environment in which some states lack actions: agents that explore would take them.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> environment = bj.environments.TabularEnvironment(mdp)
      >>> bj.environments.require_every_action(environment, "my agent")
    """
    if environment.available is not None:
        raise InputError(
            f"environment: {what} takes every action in every state, and this environment has states with fewer "
            f"(`available`); let the others do what one of the available ones does, and give available=None"
        )


def _where(condition: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    if jnp.issubdtype(new.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(
            _where(condition, jax.random.key_data(new), jax.random.key_data(old)), impl=jax.random.key_impl(new)
        )
    return jnp.where(condition.reshape(condition.shape + (1,) * (new.ndim - condition.ndim)), new, old)
