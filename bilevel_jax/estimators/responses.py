"""How the policy answers to x: estimators of dQ* - dV* at visited pairs.

For an entropy, grad log pi*(a | s) = (dQ*[s, a] - dV*[s]) / temperature, and dQ*, dV* are discounted sums
of dr under pi* (Yang, Gao and Yuan 2025). Each estimator turns credits c, one a visited pair, into a
scalar whose gradient in x is an estimate of sum c (dQ* - dV*): one backward pass serves them all, and
no vector as wide as x is held for a state, except by `LearnedCritic`, whose purpose it is.

On a table, with W[s, a] the credits summed over the visits of a pair and w = W - pi sum_a W:
sum c (dQ* - dV*) = <w, dQ*>, since dV* = sum_a pi dQ*.
"""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.lax import stop_gradient

from bilevel_jax.bellman import action_values
from bilevel_jax.environments import TabularEnvironment, Trajectory, rollout_from, trajectory_keys
from bilevel_jax.errors import InputError
from bilevel_jax.estimators.counts import Counts
from bilevel_jax.estimators.problem import SampledProblem, discounts, require_tabular, reward_table
from bilevel_jax.evaluation import policy_value
from bilevel_jax.functions import ActionFunction, tabulate
from bilevel_jax.hypergradient import Problem
from bilevel_jax.hypergradient.problem import as_upper_variable
from bilevel_jax.mdp import over_batch
from bilevel_jax.validation import as_size, plain


class Response(eqx.Module):
    """The protocol. Only a response that learns has a state."""

    @property
    def learns_first(self) -> bool:
        """Whether it wants to learn from a batch before it is used on it; see `LearnedModel`."""
        return False

    def init(self, problem: SampledProblem, x: Any) -> Any:
        """The state before anything was learned; None for estimators that learn nothing."""
        del problem, x

    def update(self, state: Any, problem: SampledProblem, x: Any, policy: ActionFunction, groups: Trajectory) -> Any:
        """Learn from groups [N, I, H] drawn under `policy` at x.

        An estimator that is to be unbiased uses it for later batches only: the product of two estimates is
        unbiased if they are independent.
        """
        del problem, x, policy, groups
        return state

    @abc.abstractmethod
    def surrogate(
        self,
        key: jax.Array,
        state: Any,
        problem: SampledProblem,
        x: Any,
        policy: ActionFunction,
        trajectories: Trajectory,
        credit: jax.Array,
    ) -> jax.Array:
        """A scalar whose gradient in x estimates sum_bh credit[b, h] (dQ* - dV*)[s_bh, a_bh].

        Args:
          trajectories: [B, H], drawn under `policy`. Constants for derivatives.
          credit: [B, H], 0 on steps that are not valid.
        """

    def environment_steps(self, problem: SampledProblem, batch: int) -> int:
        """Steps of the simulator that `surrogate` takes for B = batch trajectories."""
        del problem, batch
        return 0


class Exact(Response):
    """dQ* - dV* of the model: the reference for all others, and for lower variance where the model is known.

    The problem must have the methods of `bilevel_jax.Problem` as well.
    """

    def surrogate(self, key, state, problem, x, policy, trajectories, credit):
        del key, state
        if not isinstance(problem, Problem):
            raise InputError(
                f"problem: Exact() needs the model, but {type(problem).__name__} has no mdp(x) and objective; use "
                f"NestedRollouts or OneStep"
            )
        environment = require_tabular(problem, "Exact()")
        mdp = problem.mdp(x)
        mdp = eqx.tree_at(lambda m: m.reward, stop_gradient(mdp), mdp.reward)
        pi = tabulate(policy, environment.num_states).values
        weights = centred_weights(environment, pi, trajectories, credit).reshape(mdp.reward.shape)
        value = policy_value(mdp, pi.reshape(mdp.reward.shape).astype(mdp.reward.dtype))
        q = over_batch(lambda m, _, v: action_values(m, v))(mdp, problem.regularizer(x), value)
        return jnp.sum(weights * q)


class OneStep(Response):
    """dQ* - dV* ~ dr(s, a) - E_pi dr(s, .): the authors' code (`SoBiPreferenceModel.rewards`, reduce_var).

    Exact for discount 0; otherwise biased, see docs/sampling.md for how much.
    """

    def surrogate(self, key, state, problem, x, policy, trajectories, credit):
        del key, state
        reward = problem.reward(x)

        def advantage(observation: Any, action: jax.Array) -> jax.Array:
            rewards = reward(observation)
            return rewards[action] - jnp.sum(stop_gradient(policy(observation)) * rewards)

        flat = jax.tree.map(_flatten, (trajectories.observation, trajectories.action))
        return jnp.sum(_flatten(credit) * jax.vmap(advantage)(*flat))


class NestedRollouts(Response):
    """Two rollouts from each visited pair: one that takes its action gives dQ*, one that draws anew dV*.

    Both are drawn with the same random numbers, so that what they share cancels; they are independent
    of the trajectories that earned the credit, so that the product of both is unbiased up to the
    truncation: at most 2 discount^length / (1 - discount) max |dr| a unit of credit.

    Args:
      length: steps of each rollout (static).
      copies: pairs of rollouts from each visited pair (static).
      coupled: False draws the two with independent numbers.
      visits: rollouts from this many steps of each trajectory only, drawn with replacement in proportion
        to |credit| and weighted to stay unbiased (static); None takes all steps.

    Raises:
      InputError: sizes below 1.
    """

    length: int = eqx.field(static=True, converter=plain)
    copies: int = eqx.field(default=1, static=True, converter=plain)
    coupled: bool = eqx.field(default=True, static=True)
    visits: int | None = eqx.field(default=None, static=True, converter=plain)

    def __check_init__(self):
        _require_sizes(length=self.length, copies=self.copies, visits=1 if self.visits is None else self.visits)

    def surrogate(self, key, state, problem, x, policy, trajectories, credit):
        del state
        keys = jax.random.split(key, 3)
        origin = (trajectories.state, trajectories.action)
        if self.visits is not None:
            chosen, credit = _draw_visits(keys[0], credit, self.visits)
            origin = jax.tree.map(lambda leaf: jax.vmap(lambda row, at: row[at])(leaf, chosen), origin)
        states, actions, credit = jax.tree.map(
            lambda leaf: jnp.repeat(_flatten(leaf), self.copies, 0), (*origin, credit)
        )
        from_pairs = trajectory_keys(keys[1], credit.shape[0])
        from_states = from_pairs if self.coupled else trajectory_keys(keys[2], credit.shape[0])
        run = {"environment": problem.environment, "policy": policy, "states": states, "horizon": self.length}
        with_action, _ = rollout_from(from_pairs, actions=actions, **run)
        drawn, _ = rollout_from(from_states, **run)
        difference = _returns(problem, x, with_action) - _returns(problem, x, drawn)
        return jnp.sum(credit * difference) / self.copies

    def environment_steps(self, problem, batch):
        visits = problem.horizon if self.visits is None else self.visits
        return 2 * batch * visits * self.copies * self.length


class SharedRollouts(Response):
    """`copies` rollouts from every pair of a table, shared by all its visits.

    As independent of the trajectories as `NestedRollouts`, hence as unbiased, at a cost that does not
    depend on how many steps the trajectories have: S A copies length steps. All trajectories share the
    rollouts' noise: beyond some batch only more `copies` lower the variance.

    Args:
      length: steps of each rollout (static).
      copies: rollouts from each pair (static).

    Raises:
      InputError: sizes below 1; the environment is not tabular.
    """

    length: int = eqx.field(static=True, converter=plain)
    copies: int = eqx.field(default=1, static=True, converter=plain)

    def __check_init__(self):
        _require_sizes(length=self.length, copies=self.copies)

    def surrogate(self, key, state, problem, x, policy, trajectories, credit):
        del state
        environment = require_tabular(problem, "SharedRollouts")
        pi = tabulate(policy, environment.num_states).values
        weights = centred_weights(environment, pi, trajectories, credit)
        pairs = jnp.repeat(jnp.arange(weights.size, dtype=jnp.int32), self.copies)
        states, actions = jnp.divmod(pairs, environment.num_actions)
        sampled, _ = rollout_from(
            trajectory_keys(key, pairs.size), environment, policy, states, horizon=self.length, actions=actions
        )
        return jnp.sum(weights.reshape(-1)[pairs] * _returns(problem, x, sampled)) / self.copies

    def environment_steps(self, problem, batch):
        del batch
        environment = require_tabular(problem, "SharedRollouts")
        return environment.num_states * environment.num_actions * self.copies * self.length


class LearnedCritic(Response):
    """A table G[S, A, |x|] of dQ*, learned by expected SARSA on dr from the batches that went before.

      G[s, a] <- G[s, a] + alpha (dr[s, a] + discount sum_a' pi[s', a'] G[s', a'] - G[s, a])

    `sweeps` passes over a batch, each with the mean correction of the visits of a pair, and alpha =
    step_size, at least 1 / (batches that visited the pair). Carried from one upper iteration to the
    next; biased until it has caught up with x.

    Args:
      sweeps: passes over a batch (static).
      step_size: alpha's floor, in (0, 1]; a small one averages over many batches.

    Raises:
      InputError: sweeps below 1; the environment is not tabular.
    """

    sweeps: int = eqx.field(default=20, static=True, converter=plain)
    step_size: Any = 0.1

    def __check_init__(self):
        _require_sizes(sweeps=self.sweeps)

    def init(self, problem, x):
        environment = require_tabular(problem, "LearnedCritic")
        flat = ravel_pytree(as_upper_variable(x))[0]
        pairs = environment.num_states * environment.num_actions
        return jnp.zeros((pairs, flat.size), flat.dtype), jnp.zeros(pairs, flat.dtype)

    def update(self, state, problem, x, policy, groups):
        environment = require_tabular(problem, "LearnedCritic")
        critic, batches = state
        flat, unravel = ravel_pytree(as_upper_variable(x))
        jacobian = jax.jacobian(lambda f: reward_table(problem, unravel(f), environment.num_states).reshape(-1))(flat)
        pi = tabulate(policy, environment.num_states).values.astype(flat.dtype)
        seen = Counts.of(environment, groups, flat.dtype)
        batches = batches + (seen.visits > 0).astype(flat.dtype)
        least = jnp.asarray(self.step_size, flat.dtype)
        rate = jnp.where(seen.visits > 0, jnp.maximum(1 / jnp.maximum(batches, 1), least), 0)
        follows = problem.discount.astype(flat.dtype) * seen.transition()

        def sweep(critic, _):
            expected = jnp.einsum("sa,san->sn", pi, critic.reshape(*pi.shape, -1))
            return critic + rate[:, None] * (jacobian + follows @ expected - critic), None

        critic, _ = jax.lax.scan(sweep, critic, None, length=self.sweeps)
        return critic, batches

    def surrogate(self, key, state, problem, x, policy, trajectories, credit):
        del key
        environment = require_tabular(problem, "LearnedCritic")
        pi = tabulate(policy, environment.num_states).values
        weights = centred_weights(environment, pi, trajectories, credit).reshape(-1)
        gradient = stop_gradient(weights.astype(state[0].dtype) @ state[0])
        return gradient @ ravel_pytree(x)[0]


class LearnedModel(Response):
    """dQ* under the transition frequencies counted so far: the dynamics do not depend on x, so no batch grows old.

    Certainty equivalence: `Exact` with the empirical transition in the model's place. A pair that was
    never visited counts as the end of the process. Consistent, with a bias that falls as 1 / visits.

    Args:
      current: count a batch before it is used (static). It then shares noise with what it is multiplied
        by, a bias of the same order that helps while little is known (docs/sampling.md).

    Raises:
      InputError: the environment is not tabular.
    """

    current: bool = eqx.field(default=True, static=True)

    @property
    def learns_first(self):
        return self.current

    def init(self, problem, x):
        environment = require_tabular(problem, "LearnedModel")
        return Counts.none(environment, jnp.result_type(*jax.tree.leaves(as_upper_variable(x))))

    def update(self, state, problem, x, policy, groups):
        del x, policy
        new = Counts.of(require_tabular(problem, "LearnedModel"), groups, state.visits.dtype)
        return jax.tree.map(jnp.add, state, new)

    def surrogate(self, key, state, problem, x, policy, trajectories, credit):
        del key
        environment = require_tabular(problem, "LearnedModel")
        dtype = state.visits.dtype
        pi = tabulate(policy, environment.num_states).values.astype(dtype)
        weights = centred_weights(environment, pi, trajectories, credit).astype(dtype)
        reward = reward_table(problem, x, environment.num_states).astype(dtype)
        return jnp.sum(weights * state.action_values(pi, reward, problem.discount))


def pair_weights(environment: TabularEnvironment, trajectories: Trajectory, credit: jax.Array) -> jax.Array:
    """W[S, A]: the credits [B, H] summed over the visits of each pair."""
    pair = trajectories.observation * environment.num_actions + trajectories.action
    total = jnp.zeros(environment.num_states * environment.num_actions, credit.dtype)
    return total.at[pair].add(credit).reshape(environment.num_states, -1)


def centred_weights(
    environment: TabularEnvironment, pi: jax.Array, trajectories: Trajectory, credit: jax.Array
) -> jax.Array:
    """w = W - pi sum_a W, [S, A], so that sum credit (dQ - dV) = <w, dQ>."""
    weights = pair_weights(environment, trajectories, credit)
    return stop_gradient(weights - pi.astype(weights.dtype) * jnp.sum(weights, -1, keepdims=True))


def _returns(problem: SampledProblem, x: Any, sampled: Trajectory) -> jax.Array:
    """The discounted sum of r_x along trajectories [B, H], differentiable in x, [B]."""
    reward = problem.reward(x)
    taken = jax.vmap(jax.vmap(lambda observation, action: reward(observation)[action]))(
        sampled.observation, sampled.action
    )
    # A simulator that resets itself goes on after the end: not with what this process earned.
    ended = jnp.cumsum((sampled.terminated | sampled.truncated).astype(jnp.int32), 1)
    before = jnp.pad(ended, ((0, 0), (1, 0)))[:, :-1] > 0
    return jnp.sum(jnp.where(sampled.valid & ~before, taken * discounts(problem, taken.shape[1])[None], 0), 1)


def _draw_visits(key: jax.Array, credit: jax.Array, visits: int) -> tuple[jax.Array, jax.Array]:
    """Steps [B, visits] drawn in proportion to |credit| [B, H], and the credits that keep the sum unbiased."""
    size = jnp.abs(credit)
    total = jnp.sum(size, 1, keepdims=True)
    chance = jnp.where(total > 0, size / jnp.where(total > 0, total, 1), 1 / credit.shape[1])
    keys = trajectory_keys(key, credit.shape[0])
    chosen = jax.vmap(lambda k, c: jax.random.choice(k, c.size, (visits,), p=c))(keys, chance)
    taken = jnp.take_along_axis(credit, chosen, 1)
    return chosen, jnp.sign(taken) * total / visits


def _flatten(leaf: jax.Array) -> jax.Array:
    return leaf.reshape(-1, *leaf.shape[2:])


def _require_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        as_size(name, size)
