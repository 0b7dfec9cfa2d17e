"""dQ* - dV* by rollouts from each visited pair."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from bilevel_jax.bilevel.sampled_problem import SampledProblem
from bilevel_jax.core.batching import merge_axes
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.sizes import size
from bilevel_jax.environments import Box, Environment, Policy, Trajectory, rollout_from, trajectory_keys
from bilevel_jax.environments.policies import as_policy, finite
from bilevel_jax.estimators.responses.protocol import Response
from bilevel_jax.estimators.responses.sums import sampled_returns


class NestedRollouts(Response):
    """Two rollouts from each visited pair: one takes its action and gives dQ*, the other draws one and gives dV*.

    Both are drawn with the same random numbers, so that their common part cancels. They are independent of the
    trajectories that earned the credit, so that the product of the two is unbiased, apart from the truncation. The
    error of the latter is at most 2 discount^length / (1 - discount) max |dr| per unit of credit.

    Args:
      length: steps of each rollout (static).
      copies: pairs of rollouts from each visited pair (static).
      coupled: False draws the two with independent numbers.
      every_action: rollouts from every action of a visited state, weighted by the policy's probabilities, in place of
        one that draws it (static): A rollouts per visit, and less noise. For finitely many actions.
      visits: the number of steps of each trajectory from which rollouts start. They are drawn with replacement in
        proportion to |credit| and weighted so that the estimate stays unbiased (static). None takes all steps.

    Raises:
      InputError: sizes below 1; in `surrogate`, trajectories without the simulator's states, or `every_action` where
        actions are no finite set.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> x = problem.start(jax.random.key(0))
      >>> policy = bj.solve(problem.mdp(x), problem.regularizer(x)).policy
      >>> response = bj.estimators.NestedRollouts(10)
      >>> made = bj.estimators.estimate(jax.random.key(1), problem, x, policy, batch=4, response=response)
      >>> made.gradient.shape
      (8, 3)
    """

    length: int = eqx.field(static=True, converter=size("length"))
    copies: int = eqx.field(default=1, static=True, converter=size("copies"))
    coupled: bool = eqx.field(default=True, static=True)
    visits: int | None = eqx.field(default=None, static=True, converter=size("visits", optional=True))
    every_action: bool = eqx.field(default=False, static=True)

    def surrogate(self, key, state, problem, x, policy, trajectories, credit) -> Float[Array, ""]:
        del state
        _require_states(trajectories)
        keys = jax.random.split(key, 3)
        origin = (trajectories.state, trajectories.action)
        if self.visits is not None:
            chosen, credit = _draw_visits(keys[0], credit, self.visits)
            origin = jax.tree.map(lambda leaf: jax.vmap(lambda row, at: row[at])(leaf, chosen), origin)
        each = merge_axes((*origin, credit))
        states, actions, credit = jax.tree.map(lambda leaf: jnp.repeat(leaf, self.copies, 0), each)
        if self.every_action:
            return self._of_every_action(keys[1], problem, x, policy, states, actions, credit)
        from_pairs = trajectory_keys(keys[1], credit.shape[0])
        from_states = from_pairs if self.coupled else trajectory_keys(keys[2], credit.shape[0])
        run = {"environment": problem.environment, "policy": policy, "states": states, "horizon": self.length}
        with_action, _ = rollout_from(from_pairs, actions=actions, **run)
        drawn, _ = rollout_from(from_states, **run)
        difference = sampled_returns(problem, x, with_action) - sampled_returns(problem, x, drawn)
        return jnp.sum(credit * difference) / self.copies

    def _of_every_action(
        self,
        key: PRNGKeyArray,
        problem: SampledProblem,
        x: Any,
        policy: Policy,
        states: Any,
        actions: Int[Array, " N"],
        credit: Float[Array, " N"],
    ) -> Float[Array, ""]:
        """The rollouts of a visit share their random numbers, if they are coupled."""
        environment, policy, count = problem.environment, as_policy(policy), credit.shape[0]
        number = _number_of_actions(environment)
        chances = jax.vmap(lambda state: finite(policy.distribution(environment.observe(state))).probabilities)(states)
        taken = jax.nn.one_hot(actions, number, dtype=chances.dtype)
        weights = credit[:, None] * (taken - chances).astype(credit.dtype)
        each = jnp.broadcast_to(jnp.arange(number, dtype=jnp.int32), (count, number)).reshape(-1)
        if self.coupled:
            keys = jnp.repeat(trajectory_keys(key, count), number, 0)
        else:
            keys = trajectory_keys(key, count * number)
        repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, number, 0), states)
        sampled, _ = rollout_from(keys, environment, policy, repeated, horizon=self.length, actions=each)
        return jnp.sum(weights.reshape(-1) * sampled_returns(problem, x, sampled)) / self.copies

    def environment_steps(self, problem, batch):
        visits = problem.horizon if self.visits is None else self.visits
        rollouts = _number_of_actions(problem.environment) if self.every_action else 2
        return rollouts * batch * visits * self.copies * self.length


def _number_of_actions(environment: Environment) -> int:
    space = environment.action_space
    if isinstance(space, Box):
        raise InputError(
            f"every_action: the actions of {type(environment).__name__} are a Box of shape {list(space.shape)}, no "
            f"finite set; leave every_action=False"
        )
    return space.n


def _draw_visits(
    key: PRNGKeyArray, credit: Float[Array, "B H"], visits: int
) -> tuple[Int[Array, "B visits"], Float[Array, "B visits"]]:
    """Steps drawn in proportion to |credit|, and the credits that keep the sum unbiased."""
    size = jnp.abs(credit)
    total = jnp.sum(size, 1, keepdims=True)
    chance = jnp.where(total > 0, size / jnp.where(total > 0, total, 1), 1 / credit.shape[1])
    keys = trajectory_keys(key, credit.shape[0])
    chosen = jax.vmap(lambda k, c: jax.random.choice(k, c.size, (visits,), p=c))(keys, chance)
    taken = jnp.take_along_axis(credit, chosen, 1)
    return chosen, jnp.sign(taken) * total / visits


def _require_states(trajectories: Trajectory) -> None:
    if trajectories.state is None:
        raise InputError(
            "trajectories: NestedRollouts starts from the simulator's states, which were not recorded; use "
            "collect(..., with_states=True)"
        )
