"""An actor and a critic: the actor's policy follows the values that the critic learns for it."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from bilevel_jax.agents.processes import (
    as_limit,
    as_unit,
    at_states,
    mixed,
    simulator,
    take,
)
from bilevel_jax.agents.protocol import Agent
from bilevel_jax.agents.tabular.values import Learned, TableValues, coverage, values_at
from bilevel_jax.bilevel import SampledProblem
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.schedules import Polynomial, as_schedule
from bilevel_jax.core.sizes import size
from bilevel_jax.environments import Processes, TabularPolicy, collect, start_processes


class ActorCriticState(eqx.Module):
    """The state of the agent.

    `actor` y is the parameter of the policy grad Omega*(y), which is softmax(y / temperature) for the Shannon
    entropy. `critic` has learned the value of what follows each pair under this policy. `processes` are states of the
    simulator, [B]. `improvements` counts the calls of `improve`. `error` is the root mean square of the
    temporal-difference errors of the last call, infinite before the first.
    """

    actor: Float[Array, "S A"]
    critic: Learned
    processes: Any
    improvements: Int32[Array, ""]
    error: Float[Array, ""]


class ActorCritic(Agent):
    """Regularized actor-critic on a table, one small step of either at a time (two time scales).

      critic, at every step of every process:
        Q(s, a) <- Q(s, a) + beta (r_x(s, a) + discount (1 - terminated) v(s') - Q(s, a)),
        v = sum_a pi Q - Omega(pi), expected under the actor's policy, whatever the process does next;
      actor, once per `improve`: y <- (1 - alpha) y + alpha Q,   pi = grad Omega*(y),

    The actor's step is mirror descent on the regularized value; for the Shannon entropy it is the natural policy
    gradient with step size alpha / temperature. The critic has to learn faster than the actor moves. At alpha = 1 the
    agent is `SoftSARSA(expected=True)`. Any regularizer will do.

    Args:
      processes: B, the number of processes that run in parallel (static).
      steps: the number of steps of each process per `improve` (static).
      actor_step_size: alpha, up to 1: a number, or a function of the number of improvements made.
      critic_step_size: beta: a number, a function of the number of steps made, or `ByVisits(function)`. This and the
        other arguments are as in `TemporalDifference`.

    Raises:
      InputError: sizes below 1; a step size not above 0; epsilon outside [0, 1]; and in `init`, an
        environment that is not tabular.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> x = problem.start(jax.random.key(0))
      >>> agent = bj.agents.ActorCritic(processes=4, steps=50)
      >>> state = agent.init(jax.random.key(1), problem, x)
      >>> state = agent.improve(jax.random.key(2), state, problem, x)
      >>> bj.environments.policy_table(agent.policy(state, problem, x), 8).shape
      (8, 3)
    """

    actor_step_size: Callable
    critic_step_size: Callable
    epsilon: Float[Array, ""]
    restart_every: Int32[Array, ""] | None
    processes: int = eqx.field(static=True, converter=size("processes"))
    steps: int = eqx.field(static=True, converter=size("steps"))

    def __init__(
        self,
        *,
        processes: int = 64,
        steps: int = 16,
        actor_step_size: Any = None,
        critic_step_size: Any = None,
        epsilon: Any = 0.2,
        restart_every: Any = None,
    ):
        self.processes = processes
        self.steps = steps
        slow, fast = Polynomial(0.5, 100.0, 0.6), Polynomial(0.5, 1000.0, 0.5)
        self.actor_step_size = slow if actor_step_size is None else as_schedule("actor_step_size", actor_step_size)
        self.critic_step_size = fast if critic_step_size is None else as_schedule("critic_step_size", critic_step_size)
        self.epsilon = as_unit("epsilon", epsilon, "0 acts by the policy alone, 1 uniformly")
        self.restart_every = as_limit("restart_every", restart_every)

    def init(self, key, problem, x):
        critic = _table(problem, x).init()
        processes = start_processes(key, simulator(problem, self.restart_every), self.processes)
        return ActorCriticState(
            actor=jnp.zeros_like(critic.parameters),
            critic=critic,
            processes=processes.states,
            improvements=jnp.zeros((), jnp.int32),
            error=jnp.full((), jnp.inf, critic.parameters.dtype),
        )

    def improve(self, key, state, problem, x):
        return self.improve_against(key, state, problem, x, jnp.zeros_like(state.actor))

    def improve_against(
        self, key: PRNGKeyArray, state: ActorCriticState, problem: SampledProblem, x: Any, costs: Float[Array, "S A"]
    ) -> ActorCriticState:
        """Like `improve`, but the actor follows Q - costs. The critic still learns the policy's own Q."""
        table = _table(problem, x)
        everywhere = jnp.arange(state.actor.shape[0], dtype=jnp.int32)
        regularizer = at_states(problem.regularizer(x), everywhere)
        policy = regularizer.policy(state.actor)
        penalty, behaviour = regularizer.penalty(policy), mixed(regularizer, policy, self.epsilon)
        processes = Processes(simulator(problem, self.restart_every), state.processes)
        processes, seen = collect(key, processes, TabularPolicy(behaviour), self.steps)
        discount = jnp.asarray(problem.discount, state.actor.dtype)

        def step(critic, now):
            observation, action, following, terminated = now
            q = table.read(critic.parameters, following)
            follows = jnp.sum(policy[following] * q, -1) - penalty[following]
            errors = jnp.where(terminated, 0, discount * follows) - take(critic.parameters[observation], action)
            return table.correct(critic, observation, action, errors, self.critic_step_size), jnp.mean(errors**2)

        by_time = (leaf.T for leaf in (seen.observation, seen.action, seen.next_observation, seen.terminated))
        critic, squares = lax.scan(step, state.critic, tuple(by_time))
        alpha = jnp.asarray(self.actor_step_size(state.improvements), state.actor.dtype)
        actor = (1 - alpha) * state.actor + alpha * (table.reward + critic.parameters - costs)
        return ActorCriticState(
            actor=actor,
            critic=critic,
            processes=processes.states,
            improvements=state.improvements + 1,
            error=jnp.sqrt(jnp.mean(squares)),
        )

    def policy(self, state, problem, x):
        everywhere = jnp.arange(state.actor.shape[0], dtype=jnp.int32)
        return TabularPolicy(at_states(problem.regularizer(x), everywhere).policy(state.actor))

    def environment_steps(self, problem):
        del problem
        return self.processes * self.steps

    def report(self, state):
        """Return `temporal_difference_error`, the root mean square of the critic's errors over the last `improve`;
        `coverage`, the fraction of pairs that were corrected at least once; and `actor_step_size`, alpha of the next
        `improve`.
        """
        dtype = state.actor.dtype
        return {
            "temporal_difference_error": state.error,
            "coverage": coverage(state.critic.visits, dtype),
            "actor_step_size": jnp.asarray(self.actor_step_size(state.improvements), dtype),
        }


def _table(problem: SampledProblem, x: Any) -> TableValues:
    values = values_at(problem, x, None, None)
    if not isinstance(values, TableValues):
        raise InputError(f"environment: ActorCritic needs a table, got {type(problem.environment).__name__}")
    return values
