"""What a simulator is: pure functions of a key and a state, and what rollouts of it record."""

import abc
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bilevel_jax.environments.sampling import choose, uniform
from bilevel_jax.errors import InputError
from bilevel_jax.functions import ActionFunction
from bilevel_jax.validation import is_known


class TimeStep(NamedTuple):
    """What one step gave.

    `observation` that the step led to, before any reset; `reward`; `terminated`: the process ended
    there; `truncated`: it was cut, though it could have gone on.
    """

    observation: Any
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array


class Trajectory(NamedTuple):
    """Steps of B processes, each field [B, H, ...]; one process has [H, ...].

    `state` of the simulator and its `observation` before the step; `action` int32; its `probability`
    under the policy that chose it; `reward`; `next_observation`, before any reset; `terminated`,
    `truncated`; `valid`: False on the steps after the end of a process that is not reset. What these
    hold means nothing.
    """

    state: Any
    observation: Any
    action: jax.Array
    probability: jax.Array
    reward: jax.Array
    next_observation: Any
    terminated: jax.Array
    truncated: jax.Array
    valid: jax.Array


class Environment(eqx.Module):
    """The protocol of a simulator. All methods are pure and act on one process; vmap them over many.

    A state is any pytree. `step` on a state whose process has ended may return anything: wrap the
    environment in `AutoReset` to go on, or let a rollout mark the steps as not valid.
    """

    @property
    @abc.abstractmethod
    def num_actions(self) -> int:
        """A."""

    @abc.abstractmethod
    def reset(self, key: jax.Array) -> Any:
        """Draw a state to start from."""

    @abc.abstractmethod
    def observe(self, state: Any) -> Any:
        """What a policy sees of a state."""

    @abc.abstractmethod
    def step(self, key: jax.Array, state: Any, action: jax.Array) -> tuple[Any, TimeStep]:
        """Act. `action` is an integer, []."""

    def run(
        self, keys: jax.Array, states: Any, policy: ActionFunction, horizon: int, actions: jax.Array | None
    ) -> tuple[Trajectory, Any]:
        """`horizon` steps of many processes: one key and one state each, see `environments.rollout_from`.

        The randomness of step h is made from `fold_in(key, h + 1)` alone, which is what makes results
        independent of how a batch is cut. Subclasses may do the same faster.
        """

        def step(carry, h):
            states, alive = carry
            step_keys = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, h + 1)))(keys)
            observations = jax.vmap(self.observe)(states)
            probabilities = jax.vmap(policy)(observations)
            require_policy_shape(probabilities.shape[1:], (self.num_actions,))
            chosen = jax.vmap(choose)(jax.vmap(uniform)(step_keys[:, 0]), probabilities)
            if actions is not None:
                chosen = jnp.where(h == 0, actions, chosen)
            following, made = jax.vmap(self.step)(step_keys[:, 1], states, chosen)
            probability = jnp.take_along_axis(probabilities, chosen[:, None], 1)[:, 0]
            record = Trajectory(
                states,
                observations,
                chosen,
                probability,
                made.reward,
                made.observation,
                made.terminated,
                made.truncated,
                alive,
            )
            # AutoReset states carry on; others stay where their process ended.
            ended = jnp.zeros_like(alive) if self.resets else made.terminated | made.truncated
            following = jax.tree.map(lambda new, old: _where(alive, new, old), following, states)
            return (following, alive & ~ended), record

        alive = jnp.ones(keys.shape, bool)
        (states, _), records = lax.scan(step, (states, alive), jnp.arange(horizon))
        return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), records), states

    @property
    def available(self) -> jax.Array | None:
        """Which actions each state has, bool[S, A], for environments with states; None: all of them."""
        return None

    @property
    def resets(self) -> bool:
        """Whether `step` starts a new process when one ends."""
        return False


def require_policy_shape(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raise InputError where a policy has other sizes than the environment: look-ups do not check them."""
    if shape != expected:
        raise InputError(f"policy: expected probabilities of shape {list(expected)}, got {list(shape)}")


def require_available(available: jax.Array | None, policy: jax.Array) -> None:
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
    """Raise InputError for an environment in which states lack actions: agents that explore would take them."""
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
