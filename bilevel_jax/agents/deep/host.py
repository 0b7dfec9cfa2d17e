"""Agents in environments that are stepped outside of JAX: a plain loop around compiled functions."""

from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import numpy as np
from jax import dtypes
from jaxtyping import Array, Float, Integer, Key, PRNGKeyArray

from bilevel_jax.bilevel import SampledProblem
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.validation import as_size
from bilevel_jax.environments import Policy, Processes, Trajectory, as_policy, trajectory_keys
from bilevel_jax.environments.host import HostEnvironment, HostSpaces
from bilevel_jax.environments.policies import require_policy


@runtime_checkable
class HostAgent(Protocol):
    """What an agent needs to learn from a `HostEnvironment`, beside `init`.

    It learns by `updates` times `steps` steps of `processes` processes, which `acting` chooses and `learn` learns from.
    """

    processes: int
    steps: int
    updates: int

    def acting(self, state: Any, problem: Any, x: Any) -> Policy:
        """Return the policy that acts while the agent learns."""
        ...

    def learn(self, key: PRNGKeyArray, state: Any, problem: Any, x: Any, seen: Trajectory) -> Any:
        """Return the state after an update by given steps [B, H] under `acting`; steps that are not `valid` have no
        weight.
        """
        ...


def collect_on_host(key: PRNGKeyArray, environment: HostEnvironment, policy: Any, steps: int) -> Trajectory:
    """Run `steps` steps of all processes under one policy; return the trajectory [B, H = steps], in JAX's arrays.

    The processes go on from where the last call left them, as in `collect`, and draw their actions from the same random
    numbers. Observations keep their dtypes (frames of uint8 stay so), and all steps move to the device at once.

    Args:
      key: the key of this call's actions; give each call its own. The environment has its own seed.
      environment: the processes; it changes.
      policy: a `Policy`, or an argument of `as_policy`.
      steps: H.

    Raises:
      InputError: steps is not an integer of at least 1; the policy's actions are not those of the environment.

    Example:
      >>> class Clocks:  # with gymnasium's methods: two processes of three steps
      ...     num_envs, metadata = 2, {"autoreset_mode": "NextStep"}
      ...     single_action_space = single_observation_space = bj.environments.Discrete(4)
      ...     def reset(self, *, seed=None, options=None):
      ...         self.time = np.zeros(2, int)
      ...         return self.time, {}
      ...     def step(self, actions):
      ...         self.time = np.where(self.time == 3, 0, self.time + 1)
      ...         return self.time, np.ones(2), self.time == 3, np.zeros(2, bool), {}
      >>> environment = bj.environments.HostEnvironment(Clocks(), seed=0)
      >>> policy = jnp.full((4, 4), 0.25)  # [S, A]
      >>> trajectory = bj.agents.collect_on_host(jax.random.key(0), environment, policy, 5)
      >>> trajectory.observation[0].tolist(), trajectory.next_observation[0].tolist()
      ([0, 1, 2, 3, 0], [1, 2, 3, 0, 1])
    """
    steps, count = as_size("steps", steps), environment.num_envs
    policy, keys = as_policy(policy), trajectory_keys(key, count)
    record = _empty(environment, steps)
    for h in range(steps):
        seen = environment.observation
        made = _act(policy, environment.spaces, keys, np.uint32(h), seen)
        action, probability = (np.asarray(part) for part in made)  # JAX is done with `seen`, which a step may overwrite
        _write(record.observation, h, seen)
        step = environment.step(action)
        _write(record.next_observation, h, step.next_observation)
        record.action[:, h], record.probability[:, h] = action, probability
        record.reward[:, h], record.valid[:, h] = step.reward, step.valid
        record.terminated[:, h], record.truncated[:, h] = step.terminated, step.truncated
    return jax.device_put(record)


def improve_on_host(
    key: PRNGKeyArray,
    agent: HostAgent,
    state: Any,
    environment: HostEnvironment,
    problem: SampledProblem,
    x: Any,
) -> Any:
    """Return the state after an `improve` whose steps a `HostEnvironment` makes.

    This is a plain function: it compiles its parts, and cannot be compiled itself. Where a simulator in JAX gives the
    same steps, the results are those of `agent.improve`. Time limits are the environment's own: `restart_every` and the
    problem's horizon restart nothing.

    Args:
      key: of this call. The environment has its own seed.
      agent: one with the methods `acting` and `learn`, see `HostAgent`.
      state: from `agent.init` with the same problem, or from the last call.
      environment: the processes; it changes.
      problem: its `environment` is `environment.spaces`.

    Raises:
      InputError: an agent without these methods, one of another number of processes, or a problem with other spaces.

    Example:
      >>> class Clocks:  # with gymnasium's methods: two processes of three steps
      ...     num_envs, metadata = 2, {"autoreset_mode": "NextStep"}
      ...     single_action_space = single_observation_space = bj.environments.Discrete(4)
      ...     def reset(self, *, seed=None, options=None):
      ...         self.time = np.zeros(2, int)
      ...         return self.time, {}
      ...     def step(self, actions):
      ...         self.time = np.where(self.time == 3, 0, self.time + 1)
      ...         return self.time, np.ones(2), self.time == 3, np.zeros(2, bool), {}
      >>> environment = bj.environments.HostEnvironment(Clocks(), seed=0)
      >>> problem = bj.SampledBilevelProblem(
      ...     environment=environment.spaces,
      ...     reward=lambda x: x,  # x[S, A] is the reward
      ...     regularizer=bj.ShannonEntropy(0.1),
      ...     loss=lambda key, x, trajectories: jnp.sum(x**2),
      ...     discount=0.9,
      ...     horizon=4,
      ... )
      >>> x = jnp.zeros((4, 4))
      >>> agent = bj.agents.SoftPQN(bj.networks.OneHot(4), processes=2, steps=8)
      >>> state = agent.init(jax.random.key(0), problem, x)
      >>> state = bj.agents.improve_on_host(jax.random.key(1), agent, state, environment, problem, x)
      >>> int(state.updates)
      1
    """
    for name in ("acting", "learn"):
        if not callable(getattr(agent, name, None)):
            raise InputError(f"agent: {type(agent).__name__} has no method {name}; take one that has, e.g. SoftPQN()")
    if agent.processes != environment.num_envs:
        raise InputError(
            f"agent: it learns from {agent.processes} processes, and the environment has {environment.num_envs}; set "
            f"processes={environment.num_envs}"
        )
    if not _same_spaces(problem.environment, environment.spaces):
        raise InputError("problem: its environment has other spaces; give environment.spaces as the problem's")
    for one in jax.random.split(key, agent.updates):
        for_steps, for_order = jax.random.split(one)
        policy = _acting(agent, state, problem, x)
        seen = collect_on_host(for_steps, environment, policy, agent.steps)
        state = _learn(agent, for_order, state, problem, x, seen)
    return state


@eqx.filter_jit
def _act(
    policy: Policy, spaces: HostSpaces, keys: Key[Array, " B"], step: Any, seen: Any
) -> tuple[Integer[Array, " B"] | Float[Array, "B ..."], Float[Array, " B"]]:
    """Actions [B, ...] and their probabilities [B], from the random numbers of `collect`."""
    distributions = jax.vmap(policy.distribution)(seen)
    actions = Processes(spaces, seen).act(keys, step, distributions)
    require_policy(distributions, actions, spaces.action_space)
    return actions, jax.vmap(lambda one, chosen: one.probability(chosen))(distributions, actions)


@eqx.filter_jit
def _acting(agent: Any, state: Any, problem: SampledProblem, x: Any) -> Policy:
    return agent.acting(state, problem, x)


@eqx.filter_jit
def _learn(agent: Any, key: PRNGKeyArray, state: Any, problem: SampledProblem, x: Any, seen: Trajectory) -> Any:
    return agent.learn(key, state, problem, x, seen)


def _empty(environment: HostEnvironment, steps: int) -> Any:
    """A trajectory of numpy arrays to write into, new ones for each: JAX may go on using the memory of those it got."""

    def empty(shape: tuple[int, ...], dtype: Any) -> Any:
        return np.empty((environment.num_envs, steps, *shape), dtype)

    def observations() -> Any:
        return jax.tree.map(lambda leaf: empty(leaf.shape, leaf.dtype), environment.observation_space)

    space, real = environment.action_space, dtypes.canonicalize_dtype(float)
    fields: dict[str, Any] = {
        "state": None,
        "observation": observations(),
        "action": empty(space.shape, space.dtype),
        "probability": empty((), real),
        "reward": empty((), real),
        "next_observation": observations(),
        "terminated": empty((), bool),
        "truncated": empty((), bool),
        "valid": empty((), bool),
    }
    return Trajectory(**fields)


def _write(record: Any, h: int, observation: Any) -> None:
    jax.tree.map(lambda rows, leaf: rows.__setitem__((slice(None), h), leaf), record, observation)


def _same_spaces(one: Any, other: HostSpaces) -> bool:
    actions = (one.action_space, other.action_space)
    sizes = [(type(space), space.shape, getattr(space, "n", None)) for space in actions]
    return sizes[0] == sizes[1] and one.observation_space == other.observation_space
