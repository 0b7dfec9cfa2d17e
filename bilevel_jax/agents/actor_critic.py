"""An actor and a critic: a policy of its own that follows the values learned for it."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from bilevel_jax.agents.processes import Processes, as_limit, as_unit, at_states, choose_all, mixed, require_sizes, take
from bilevel_jax.agents.protocol import Agent
from bilevel_jax.agents.schedules import Polynomial, as_schedule
from bilevel_jax.agents.values import Learned, TableValues, values_at
from bilevel_jax.errors import InputError
from bilevel_jax.estimators import SampledProblem
from bilevel_jax.functions import Table
from bilevel_jax.validation import plain


class ActorCriticState(eqx.Module):
    """What the agent carries.

    `actor` y[S, A], the policy being grad Omega*(y): softmax(y / temperature) for the Shannon entropy.
    `critic`: what follows each pair under it. `processes`: states of the simulator, [B]. `improvements` made.
    """

    actor: jax.Array
    critic: Learned
    processes: Any
    improvements: jax.Array


class ActorCritic(Agent):
    """Regularized actor-critic on a table, one small step of either at a time (two time scales).

      critic, at every step of every process:
        Q(s, a) <- Q(s, a) + beta (r_x(s, a) + discount (1 - terminated) v(s') - Q(s, a)),
        v = sum_a pi Q - Omega(pi), expected under the actor's policy, whatever the process does next;
      actor, once an `improve`: y <- (1 - alpha) y + alpha Q,   pi = grad Omega*(y),

    the latter mirror descent on the regularized value (for the Shannon entropy the natural policy gradient
    with step size alpha / temperature). The critic has to be the faster of the two: at alpha = 1 this is
    `SoftSARSA(expected=True)`. Any regularizer.

    Args:
      processes: B, how many run in parallel (static).
      steps: of each process in one `improve` (static).
      actor_step_size: alpha, up to 1: a number, or a function of the improvements made.
      critic_step_size: beta: a number, a function of the steps made, or `ByVisits(function)`; as in
        `TemporalDifference`, as are the others.

    Raises:
      InputError: sizes below 1; a step size not above 0; epsilon outside [0, 1]; and in `init`, an
        environment that is not tabular.
    """

    actor_step_size: Callable
    critic_step_size: Callable
    epsilon: jax.Array
    restart_every: jax.Array | None
    processes: int = eqx.field(static=True, converter=plain)
    steps: int = eqx.field(static=True, converter=plain)

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
        require_sizes(processes=processes, steps=steps)
        self.processes = processes
        self.steps = steps
        slow, fast = Polynomial(0.5, 100.0, 0.6), Polynomial(0.5, 1000.0, 0.5)
        self.actor_step_size = slow if actor_step_size is None else as_schedule("actor_step_size", actor_step_size)
        self.critic_step_size = fast if critic_step_size is None else as_schedule("critic_step_size", critic_step_size)
        self.epsilon = as_unit("epsilon", epsilon, "0 acts by the policy alone, 1 uniformly")
        self.restart_every = as_limit("restart_every", restart_every)

    def init(self, key, problem, x):
        critic = _table(problem, x).init()
        states = Processes(problem, self.processes, self.restart_every).start(key)
        return ActorCriticState(jnp.zeros_like(critic.parameters), critic, states, jnp.zeros((), jnp.int32))

    def improve(self, key, state, problem, x):
        return self.improve_against(key, state, problem, x, jnp.zeros_like(state.actor))

    def improve_against(
        self, key: jax.Array, state: ActorCriticState, problem: SampledProblem, x: Any, costs: jax.Array
    ) -> ActorCriticState:
        """`improve`, the actor following Q - costs[S, A]. The critic learns the policy's own Q all the same."""
        table = _table(problem, x)
        everywhere = jnp.arange(state.actor.shape[0], dtype=jnp.int32)
        regularizer = at_states(problem.regularizer(x), everywhere)
        policy = regularizer.policy(state.actor)
        penalty, behaviour = regularizer.penalty(policy), mixed(regularizer, policy, self.epsilon)
        processes = Processes(problem, self.processes, self.restart_every)
        keys, discount = processes.keys(key), jnp.asarray(problem.discount, state.actor.dtype)

        def step(carry, h):
            critic, states = carry
            observation = processes.observe(states)
            action = choose_all(processes.numbers(keys, h), behaviour[observation])
            states, made = processes.advance(keys, h, states, action)
            q = table.read(critic.parameters, made.observation)
            follows = jnp.sum(policy[made.observation] * q, -1) - penalty[made.observation]
            target = jnp.where(made.terminated, 0, discount * follows)
            errors = target - take(critic.parameters[observation], action)
            return (table.correct(critic, observation, action, errors, self.critic_step_size), states), None

        steps = jnp.arange(self.steps, dtype=jnp.uint32)
        (critic, states), _ = lax.scan(step, (state.critic, state.processes), steps)
        alpha = jnp.asarray(self.actor_step_size(state.improvements), state.actor.dtype)
        actor = (1 - alpha) * state.actor + alpha * (table.reward + critic.parameters - costs)
        return ActorCriticState(actor, critic, states, state.improvements + 1)

    def policy(self, state, problem, x):
        everywhere = jnp.arange(state.actor.shape[0], dtype=jnp.int32)
        return Table(at_states(problem.regularizer(x), everywhere).policy(state.actor))

    def environment_steps(self, problem):
        del problem
        return self.processes * self.steps


def _table(problem: SampledProblem, x: Any) -> TableValues:
    values = values_at(problem, x, None, None)
    if not isinstance(values, TableValues):
        raise InputError(f"environment: ActorCritic needs a table, got {type(problem.environment).__name__}")
    return values
