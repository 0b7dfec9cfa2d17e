"""Soft policy iteration on counted samples."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from bilevel_jax.agents.processes import (
    Processes,
    as_limit,
    as_unit,
    at_states,
    choose_all,
    mixed,
    require_sizes,
    table_environment,
)
from bilevel_jax.agents.protocol import Agent
from bilevel_jax.agents.values import TableValues, values_at
from bilevel_jax.validation import plain


class PolicyIterationState(eqx.Module):
    """What the agent carries.

    `ahead` [S, A]: what is expected to follow a pair, Q = r_x + ahead. `visits` int32 [S A] of each pair
    and `went` int32 [S A, K], how often they went on to each of its successors. `processes`: states of
    the simulator, [B].
    """

    ahead: jax.Array
    visits: jax.Array
    went: jax.Array
    processes: Any


class SampledPolicyIteration(Agent):
    """Evaluate the policy on all transitions counted so far, improve it, and collect more with it.

    The dynamics do not depend on x: what was counted at earlier x stays true, and with the reward
    known at every x, the agent follows an x that moves without forgetting. One evaluation of pi is
    `sweeps` of expected SARSA,

      Q(s, a) <- r_x(s, a) + discount * mean of (1 - terminated) (sum_a' pi Q - Omega(pi))(s')
                 over all visits of (s, a) so far,

    from the last Q; the improvement is pi = grad Omega*(Q). Pairs not visited yet are followed by the
    mean of Omega*(r_x) / (1 - discount). Tables only; any regularizer.

    The environment's lists of successors are where visits are counted; its probabilities are not looked at.

    Args:
      processes: B, how many run in parallel (static).
      steps: of each process in one improvement (static).
      improvements: in one `improve` (static).
      sweeps: of an evaluation (static): about 1 / (1 - discount) evaluate well; 1 is value iteration.
      epsilon, restart_every: as in `TemporalDifference`.

    Raises:
      InputError: sizes below 1; epsilon outside [0, 1]; and in `init`, an environment that is not tabular.
    """

    epsilon: jax.Array
    restart_every: jax.Array | None
    processes: int = eqx.field(static=True, converter=plain)
    steps: int = eqx.field(static=True, converter=plain)
    improvements: int = eqx.field(static=True, converter=plain)
    sweeps: int = eqx.field(static=True, converter=plain)

    def __init__(
        self,
        *,
        processes: int = 64,
        steps: int = 16,
        improvements: int = 4,
        sweeps: int = 50,
        epsilon: Any = 0.2,
        restart_every: Any = None,
    ):
        require_sizes(processes=processes, steps=steps, improvements=improvements, sweeps=sweeps)
        self.processes = processes
        self.steps = steps
        self.improvements = improvements
        self.sweeps = sweeps
        self.epsilon = as_unit("epsilon", epsilon, "0 acts by the policy alone, 1 uniformly")
        self.restart_every = as_limit("restart_every", restart_every)

    def init(self, key, problem, x):
        successor = table_environment(problem.environment, "SampledPolicyIteration").successor
        states = Processes(problem, self.processes, self.restart_every).start(key)
        none = jnp.zeros(successor.shape, jnp.int32)
        return PolicyIterationState(_table(problem, x).init().parameters, none[:, 0], none, states)

    def improve(self, key, state, problem, x):
        def improvement(state, k):
            state = self._collect(jax.random.fold_in(key, k), state, problem, x)
            return self._evaluate(state, problem, x), None

        return lax.scan(improvement, state, jnp.arange(self.improvements))[0]

    def policy(self, state, problem, x):
        return _table(problem, x).policy(state.ahead, problem.regularizer(x))

    def environment_steps(self, problem):
        del problem
        return self.improvements * self.processes * self.steps

    def _collect(self, key, state, problem, x):
        """Count transitions under the current policy."""
        successor = table_environment(problem.environment, "SampledPolicyIteration").successor
        processes = Processes(problem, self.processes, self.restart_every)
        keys = processes.keys(key)
        regularizer = at_states(problem.regularizer(x), _states(state.ahead))
        behaviour = mixed(regularizer, _table(problem, x).policy(state.ahead, regularizer).values, self.epsilon)

        def step(carry, h):
            visits, went, states = carry
            observation = processes.observe(states)
            action = choose_all(processes.numbers(keys, h), behaviour[observation])
            states, made = processes.advance(keys, h, states, action)
            pair = observation * behaviour.shape[1] + action
            slot = jnp.argmax(successor[pair] == made.observation[:, None], -1)
            goes_on = (~made.terminated).astype(jnp.int32)
            return (visits.at[pair].add(1), went.at[pair, slot].add(goes_on), states), None

        start = (state.visits, state.went, state.processes)
        (visits, went, states), _ = lax.scan(step, start, jnp.arange(self.steps, dtype=jnp.uint32))
        return PolicyIterationState(state.ahead, visits, went, states)

    def _evaluate(self, state, problem, x):
        """Q of the policy grad Omega*(Q)."""
        table, dtype = _table(problem, x), state.ahead.dtype
        successor = table_environment(problem.environment, "SampledPolicyIteration").successor
        regularizer = at_states(problem.regularizer(x), _states(state.ahead))
        policy = regularizer.policy(table.reward + state.ahead)
        penalty = regularizer.penalty(policy)
        seen = jnp.maximum(state.visits, 1).astype(dtype)[:, None]
        chance = jnp.asarray(problem.discount, dtype) * state.went.astype(dtype) / seen

        def sweep(ahead, _):
            value = jnp.sum(policy * (table.reward + ahead), -1) - penalty
            mean = jnp.sum(chance * value[successor], -1)
            return jnp.where(state.visits > 0, mean, table.guess).reshape(policy.shape), None

        ahead, _ = lax.scan(sweep, state.ahead, None, length=self.sweeps)
        return eqx.tree_at(lambda s: s.ahead, state, ahead)


def _states(table: jax.Array) -> jax.Array:
    return jnp.arange(table.shape[0], dtype=jnp.int32)


def _table(problem, x) -> TableValues:
    values = values_at(problem, x, None, None)
    assert isinstance(values, TableValues)
    return values
