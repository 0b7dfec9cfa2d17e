"""Soft policy iteration on the transitions that were counted."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from bilevel_jax.agents.processes import (
    as_limit,
    as_unit,
    at_states,
    mixed,
    simulator,
    table_environment,
)
from bilevel_jax.agents.protocol import Agent
from bilevel_jax.agents.tabular.values import TableValues, coverage, values_at
from bilevel_jax.core.sizes import size
from bilevel_jax.environments import Processes, TabularPolicy, collect, start_processes


class PolicyIterationState(eqx.Module):
    """The state of the agent.

    `ahead` is the expected value of what follows a pair, so that Q = r_x + ahead. `visits` counts the visits of
    each of the S A pairs, and `went` how many of them led to each of its successors. `processes` are
    states of the simulator, [B]. `change` is the largest change of Q in the last sweep, infinite before the first.
    """

    ahead: Float[Array, "S A"]
    visits: Int32[Array, " pairs"]
    went: Int32[Array, "pairs K"]
    processes: Any
    change: Float[Array, ""]


class SampledPolicyIteration(Agent):
    """Evaluate the policy on all transitions counted so far, improve it, and collect more with it.

    The dynamics do not depend on x, so that transitions counted at an earlier x remain valid, and the reward is known
    at every x. The agent can therefore follow an x that moves, without forgetting. One evaluation of pi is `sweeps`
    sweeps of expected SARSA,

      Q(s, a) <- r_x(s, a) + discount * mean of (1 - terminated) (sum_a' pi Q - Omega(pi))(s')
                 over all visits of (s, a) so far,

    from the last Q; the improvement is pi = grad Omega*(Q). Pairs not visited yet are followed by the
    mean of Omega*(r_x) / (1 - discount). Tables only; any regularizer.

    Visits are counted per entry of the environment's lists of successors; its probabilities are not used.

    Args:
      processes: B, the number of processes that run in parallel (static).
      steps: the number of steps of each process per improvement (static).
      improvements: the number of improvements per `improve` (static).
      sweeps: the number of sweeps per evaluation (static): about 1 / (1 - discount) evaluate well; 1 is value
      iteration. epsilon, restart_every: as in `TemporalDifference`.

    Raises:
      InputError: sizes below 1; epsilon outside [0, 1]; and in `init`, an environment that is not tabular.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> x = problem.start(jax.random.key(0))
      >>> agent = bj.agents.SampledPolicyIteration(processes=4, steps=50)
      >>> state = agent.init(jax.random.key(1), problem, x)
      >>> state = agent.improve(jax.random.key(2), state, problem, x)
      >>> bj.environments.policy_table(agent.policy(state, problem, x), 8).shape
      (8, 3)
    """

    epsilon: Float[Array, ""]
    restart_every: Int32[Array, ""] | None
    processes: int = eqx.field(static=True, converter=size("processes"))
    steps: int = eqx.field(static=True, converter=size("steps"))
    improvements: int = eqx.field(static=True, converter=size("improvements"))
    sweeps: int = eqx.field(static=True, converter=size("sweeps"))

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
        self.processes = processes
        self.steps = steps
        self.improvements = improvements
        self.sweeps = sweeps
        self.epsilon = as_unit("epsilon", epsilon, "0 acts by the policy alone, 1 uniformly")
        self.restart_every = as_limit("restart_every", restart_every)

    def init(self, key, problem, x):
        successor = table_environment(problem.environment, "SampledPolicyIteration").successor
        processes = start_processes(key, simulator(problem, self.restart_every), self.processes)
        none = jnp.zeros(successor.shape, jnp.int32)
        ahead = _table(problem, x).init().parameters
        return PolicyIterationState(
            ahead=ahead,
            visits=none[:, 0],
            went=none,
            processes=processes.states,
            change=jnp.full((), jnp.inf, ahead.dtype),
        )

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

    def report(self, state):
        """Return `sweep_change`, the largest change of Q in the last sweep of the last evaluation, and `coverage`, the
        fraction of pairs that were counted at least once.
        """
        return {"sweep_change": state.change, "coverage": coverage(state.visits, state.ahead.dtype)}

    def _collect(self, key, state, problem, x):
        """Count transitions under the current policy."""
        environment = table_environment(problem.environment, "SampledPolicyIteration")
        regularizer = at_states(problem.regularizer(x), _states(state.ahead))
        behaviour = mixed(regularizer, _table(problem, x).policy(state.ahead, regularizer).probabilities, self.epsilon)
        processes = Processes(simulator(problem, self.restart_every), state.processes)
        processes, seen = collect(key, processes, TabularPolicy(behaviour), self.steps)
        pair = environment.pair(seen.observation, seen.action)
        slot = jnp.argmax(environment.successor[pair] == seen.next_observation[..., None], -1)
        goes_on = (~seen.terminated).astype(jnp.int32)
        return PolicyIterationState(
            ahead=state.ahead,
            visits=state.visits.at[pair].add(1),
            went=state.went.at[pair, slot].add(goes_on),
            processes=processes.states,
            change=state.change,
        )

    def _evaluate(self, state, problem, x):
        """Q of the policy grad Omega*(Q)."""
        table, dtype = _table(problem, x), state.ahead.dtype
        successor = table_environment(problem.environment, "SampledPolicyIteration").successor
        regularizer = at_states(problem.regularizer(x), _states(state.ahead))
        policy = regularizer.policy(table.reward + state.ahead)
        penalty = regularizer.penalty(policy)
        seen = jnp.maximum(state.visits, 1).astype(dtype)[:, None]
        chance = jnp.asarray(problem.discount, dtype) * state.went.astype(dtype) / seen

        def sweep(carry, _):
            ahead, _ = carry
            value = jnp.sum(policy * (table.reward + ahead), -1) - penalty
            mean = jnp.sum(chance * value[successor], -1)
            return (jnp.where(state.visits > 0, mean, table.guess).reshape(policy.shape), ahead), None

        (ahead, before), _ = lax.scan(sweep, (state.ahead, state.ahead), None, length=self.sweeps)
        return eqx.tree_at(lambda s: (s.ahead, s.change), state, (ahead, jnp.max(jnp.abs(ahead - before))))


def _states(table: Float[Array, "S A"]) -> Int32[Array, " S"]:
    return jnp.arange(table.shape[0], dtype=jnp.int32)


def _table(problem, x) -> TableValues:
    values = values_at(problem, x, None, None)
    assert isinstance(values, TableValues)
    return values
