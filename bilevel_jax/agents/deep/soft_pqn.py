"""Soft PQN: one Q network, learned on-policy from many processes in parallel; its policy is the regularized one."""

import dataclasses
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from bilevel_jax.agents.deep.actors import Exploring
from bilevel_jax.agents.deep.learning import (
    Episodes,
    Optimizer,
    entropy,
    minibatch_steps,
    require_divisible,
    returns_with_traces,
    values_ahead,
)
from bilevel_jax.agents.processes import as_limit, as_unit, at_states, simulator, take
from bilevel_jax.agents.protocol import Agent
from bilevel_jax.core.batching import merge_axes
from bilevel_jax.core.schedules import Schedule
from bilevel_jax.core.sizes import size
from bilevel_jax.environments import Categorical, Policy, Processes, Trajectory, collect, start_processes
from bilevel_jax.mdp.regularizers import KLDivergence, Regularizer, ShannonEntropy
from bilevel_jax.networks import MLP, Network


class SoftPQNState(eqx.Module):
    """The state of the agent.

    `params` are those of the Q network, `processes` the states of the simulator, [B], from which the next `improve`
    goes on. `updates` counts the batches that were collected. `numbers` describe the last one.
    """

    params: Any
    optimizer_state: Any
    processes: Any
    episodes: Episodes
    updates: Int32[Array, ""]
    numbers: dict[str, Float[Array, ""]]


class SoftPQN(Agent):
    """Soft parallelised Q-network (after Gallici et al. 2024, PQN; the regularized form is ours).

    Each update runs every process for `steps` steps under the policy pi = grad Omega*(Q), which is
    softmax(Q / temperature) for the Shannon entropy, and then goes `epochs` times through what they saw, to lessen the
    mean of (Q(s_t, a_t) - G_t)^2 / 2, where

      G_t = r_t + discount (1 - terminated_t) (V(s_t+1) + trace (G_t+1 - Q(s_t+1, a_t+1))),   V = Omega*(Q).

    There is no target network and no replay: layers that are normalized keep it stable. Any regularizer will do. For
    `ShannonEntropy` and `KLDivergence`, the only ones of sampled algorithms, d log pi = (dQ - dV) / temperature holds
    by construction, as the policy is the regularized one of Q.

    Args:
      network: of Q, one output per action; None is `MLP(output_scale=0.0)`, with normalized layers: the first policy is
        uniform whatever the temperature. One that begins with Q of some temperatures has a favourite action from the
        start, and may never see a reward that is far off.
      processes: B, the number of processes that run in parallel (static).
      steps: the number of steps of each process per update (static).
      updates: the number of updates per `improve` (static).
      epochs, minibatches: passes through a batch, and steps of the optimizer in each (static).
      trace: lambda of the targets, in [0, 1].
      epsilon: the probability of an action drawn uniformly, while it learns. Where the temperature is low compared with
        the values, it keeps actions from never being tried. Traces are then multiplied by min(1, pi / mu) (Retrace).
      learning_rate: a number, or a function of the number of updates made, e.g. `LinearDecay`.
      max_gradient_norm: the 2-norm to which gradients are clipped.
      optimizer: "radam" or "adam" (static).
      restart_every: the number of steps after which a process starts again; None is the problem's horizon.

    Raises:
      InputError: sizes below 1, a trace outside [0, 1], minibatches that do not divide a batch.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> x = problem.start(jax.random.key(0))
      >>> agent = bj.agents.SoftPQN(bj.networks.OneHot(8), processes=4, steps=8)
      >>> state = agent.init(jax.random.key(1), problem, x)
      >>> state = agent.improve(jax.random.key(2), state, problem, x)
      >>> bj.environments.policy_table(agent.policy(state, problem, x), 8).shape
      (8, 3)
    """

    network: Network
    trace: Float[Array, ""]
    epsilon: Float[Array, ""]
    optimizer: Optimizer
    restart_every: Int32[Array, ""] | None
    processes: int = eqx.field(static=True, converter=size("processes"))
    steps: int = eqx.field(static=True, converter=size("steps"))
    updates: int = eqx.field(static=True, converter=size("updates"))
    epochs: int = eqx.field(static=True, converter=size("epochs"))
    minibatches: int = eqx.field(static=True, converter=size("minibatches"))

    def __init__(
        self,
        network: Network | None = None,
        *,
        processes: int = 32,
        steps: int = 32,
        updates: int = 1,
        epochs: int = 2,
        minibatches: int = 8,
        trace: Any = 0.9,
        epsilon: Any = 0.0,
        learning_rate: float | Schedule = 5e-4,
        max_gradient_norm: Any = 10.0,
        optimizer: Literal["adam", "radam"] = "radam",
        restart_every: Any = None,
    ):
        self.network = MLP(output_scale=0.0) if network is None else network
        self.processes, self.steps, self.updates = processes, steps, updates
        self.epochs, self.minibatches = epochs, minibatches
        require_divisible(self.processes, self.steps, self.minibatches)
        self.trace = as_unit("trace", trace, "0 looks one step ahead, 1 to the end of the batch")
        self.epsilon = as_unit("epsilon", epsilon, "0 acts by the policy alone, 1 uniformly")
        self.optimizer = Optimizer(learning_rate, max_gradient_norm, optimizer)
        self.restart_every = as_limit("restart_every", restart_every)

    def init(self, key, problem, x):
        for_params, for_processes = jax.random.split(key)
        environment = simulator(problem, self.restart_every)
        params = self.network.init(for_params, environment.observation_space, environment.num_actions)
        processes = start_processes(for_processes, environment, self.processes)
        numbers: dict[str, Float[Array, ""]] = dict.fromkeys(
            ("loss", "q", "entropy", "gradient_norm"), jnp.asarray(jnp.nan, jnp.result_type(float))
        )
        return SoftPQNState(
            params=params,
            optimizer_state=self.optimizer.init(params),
            processes=processes.states,
            episodes=Episodes.start(self.processes),
            updates=jnp.zeros((), jnp.int32),
            numbers=numbers,
        )

    def improve(self, key, state, problem, x):
        keys = jax.random.split(key, self.updates)
        return lax.scan(lambda state, key: (self._update(key, state, problem, x), None), state, keys)[0]

    def _update(self, key: PRNGKeyArray, state: SoftPQNState, problem: Any, x: Any) -> SoftPQNState:
        for_steps, for_order = jax.random.split(key)
        processes = Processes(simulator(problem, self.restart_every), state.processes)
        policy = self.acting(state, problem, x)
        processes, seen = collect(for_steps, processes, policy, self.steps, with_distributions=True)
        learned = self.learn(for_order, state, problem, x, seen, all_valid=True)
        return dataclasses.replace(learned, processes=processes.states)

    def acting(self, state: SoftPQNState, problem: Any, x: Any) -> "Exploring":
        """Return the policy that acts while the agent learns."""
        return Exploring(self._policy(state.params, problem.regularizer(x)), self.epsilon)

    def learn(
        self, key: PRNGKeyArray, state: SoftPQNState, problem: Any, x: Any, seen: Trajectory, *, all_valid: bool = False
    ) -> SoftPQNState:
        """Return the state after an update by given steps [B, H] under `acting`; `processes` stay as they are.

        Steps that are not `valid` have no weight; `all_valid` says that there are none (static). If the steps have
        their distributions, Q is not computed again where acting has computed it.
        """
        regularizer = problem.regularizer(x)
        rewards = problem.earned(x, seen)
        q = merge_axes(values_ahead(lambda observations: self._values(state.params, observations), seen))
        rewards = rewards.astype(q.dtype)
        local = at_states(regularizer, merge_axes(seen.next_observation))
        following = local.conjugate(q).reshape(rewards.shape)
        policy, ahead = local.policy(q), merge_axes(jnp.roll(seen.action, -1, 1))
        taken, chance = take(q, ahead).reshape(rewards.shape), take(policy, ahead).reshape(rewards.shape)
        ratio = chance / jnp.roll(seen.probability, -1, 1).astype(q.dtype)
        trace = self.trace.astype(q.dtype) * jnp.minimum(1, ratio)
        discount = jnp.asarray(problem.discount, q.dtype)
        targets = returns_with_traces(rewards, seen, following, taken, discount, trace)
        data = {"observation": seen.observation, "action": seen.action, "target": targets}
        if not all_valid:
            share = jnp.maximum(jnp.sum(seen.valid), 1).astype(q.dtype) / seen.valid.size
            data["target"] = jnp.where(seen.valid, targets, 0)
            data["weight"] = seen.valid.astype(q.dtype) / share

        def loss(params, batch):
            q = take(self._values(params, batch["observation"]), batch["action"])
            square = (q - batch["target"]) ** 2
            if "weight" in batch:
                square, q = batch["weight"] * square, batch["weight"] * q
            return jnp.mean(square) / 2, jnp.mean(q)

        def step(carry, batch):
            params, optimizer_state = carry
            (value, mean), gradient = jax.value_and_grad(loss, has_aux=True)(params, batch)
            params, optimizer_state, norm = self.optimizer.update(gradient, optimizer_state, params, state.updates)
            return (params, optimizer_state), {"loss": value, "q": mean, "gradient_norm": norm}

        (params, optimizer_state), numbers = minibatch_steps(
            key,
            (state.params, state.optimizer_state),
            merge_axes(data),
            step,
            epochs=self.epochs,
            minibatches=self.minibatches,
        )
        numbers["entropy"] = entropy(policy)
        return SoftPQNState(
            params=params,
            optimizer_state=optimizer_state,
            processes=state.processes,
            episodes=state.episodes.after(seen),
            updates=state.updates + 1,
            numbers={name: numbers[name].astype(old.dtype) for name, old in state.numbers.items()},
        )

    def _values(self, params: Any, observations: Any) -> Float[Array, "N A"]:
        return jax.vmap(self.network.apply, (None, 0))(params, observations)

    def _policy(self, params: Any, regularizer: Regularizer) -> "ValuePolicy":
        return ValuePolicy(self.network, params, regularizer)

    def policy(self, state, problem, x):
        return self._policy(state.params, problem.regularizer(x))

    def environment_steps(self, problem):
        del problem
        return self.processes * self.steps * self.updates

    def report(self, state):
        """Return `loss`, `q` (the mean of Q at the pairs that were visited), `entropy` of the policy and
        `gradient_norm`, means over the last update; `episode_return` and `episode_length`, in the environment's own
        rewards.
        """
        return {**state.numbers, **state.episodes.report()}


class ValuePolicy(Policy):
    """grad Omega*(Q) of a Q network."""

    network: Network
    params: Any
    regularizer: Regularizer

    def q(self, observation: Any) -> Float[Array, " A"]:
        """Q at one observation, [A]."""
        return self.network.apply(self.params, observation)

    def distribution(self, observation):
        q, local = self.q(observation), at_states(self.regularizer, observation)
        return CategoricalOfValues(local.policy(q), _log_policy(local, q), values=q)


def _log_policy(regularizer: Regularizer, q: Float[Array, " A"]) -> Float[Array, " A"] | None:
    """log pi, which stays finite where pi is 0 to the last digit; None where the policy has no logarithm."""
    if not isinstance(regularizer, ShannonEntropy | KLDivergence):
        return None
    logits = q / regularizer.temperature.astype(q.dtype)
    if isinstance(regularizer, KLDivergence):
        logits = logits + jnp.log(regularizer.reference).astype(q.dtype)
    return jax.nn.log_softmax(logits)


class CategoricalOfValues(Categorical):
    """Probabilities that come from the action `values` [A], which it keeps."""

    values: Float[Array, "*batch A"] | None = None
