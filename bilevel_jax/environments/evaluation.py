"""The true return of a policy: whole episodes, in the rewards that the environment emits, with an interval."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray

from bilevel_jax.core.validation import as_size, require_computable
from bilevel_jax.environments.policies import Categorical, Distribution, Policy, as_policy, require_policy
from bilevel_jax.environments.protocol import Environment
from bilevel_jax.environments.rollout import trajectory_keys
from bilevel_jax.environments.spaces import Discrete
from bilevel_jax.environments.wrappers import AutoReset

WIDTH = 1.96  # standard errors: 95%, for a mean of 30 episodes or more


class Evaluation(NamedTuple):
    """The result of `evaluate`.

    `mean` is that of the returns, `low` and `high` its interval of 95% (normal; with one episode it is infinite).
    `returns`, `lengths` and `finished` are those of each episode, [N]; an episode that is not finished was cut after
    the most steps that were allowed. The return of an episode is NaN where the policy was.
    """

    mean: Float[Array, ""]
    low: Float[Array, ""]
    high: Float[Array, ""]
    returns: Float[Array, " N"]
    lengths: Int32[Array, " N"]
    finished: Bool[Array, " N"]


class Greedy(Policy):
    """The policy that takes the most probable action (`Distribution.mode`) of another one.

    Example:
      >>> policy = bj.environments.Greedy(bj.environments.TabularPolicy([[0.4, 0.6]]))
      >>> policy.distribution(0).probabilities.tolist()
      [0.0, 1.0]
    """

    policy: Policy

    def distribution(self, observation):
        inner = self.policy.distribution(observation)
        if isinstance(inner, Categorical):
            best = jnp.argmax(inner.probabilities, -1)
            made = jax.nn.one_hot(best, inner.probabilities.shape[-1], dtype=inner.probabilities.dtype)
            broken = jnp.any(jnp.isnan(inner.probabilities), -1, keepdims=True)
            return Categorical(jnp.where(broken, jnp.nan, made))
        return Certain(inner.mode())


class Certain(Distribution):
    """One action, with probability 1."""

    action: Float[Array, "..."]

    def sample(self, key):
        del key
        return self.action

    def log_prob(self, action):
        same = jnp.all(jnp.asarray(action) == self.action)
        return jnp.where(same, 0.0, -jnp.inf)

    def entropy(self):
        return jnp.zeros(())

    def mode(self):
        return self.action


def evaluate(
    key: PRNGKeyArray,
    environment: Environment,
    policy: Any,
    *,
    episodes: int,
    steps: int,
    greedy: bool = False,
) -> Evaluation:
    """Run whole episodes and return what they earned, undiscounted, in the rewards that the environment emits.

    Args:
      key: the key of all episodes.
      environment: one that ends; `AutoReset` around it is left out.
      policy: a `Policy`, or an argument of `as_policy`.
      episodes: N, run in parallel (static).
      steps: the most steps of an episode (static). The loop ends when all episodes have.
      greedy: take the most probable action (static).

    Raises:
      InputError: sizes below 1; the policy has other actions than the environment.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> environment = bj.environments.TimeLimit(bj.environments.TabularEnvironment(mdp), 10)
      >>> made = bj.environments.evaluate(jax.random.key(0), environment, jnp.eye(2), episodes=4, steps=10)
      >>> made.returns.tolist(), made.lengths.tolist()
      ([10.0, 10.0, 10.0, 10.0], [10, 10, 10, 10])
    """
    require_computable("environment", environment, any_floats=True)
    episodes, steps = as_size("episodes", episodes), as_size("steps", steps)
    policy = Greedy(as_policy(policy)) if greedy else as_policy(policy)
    if isinstance(environment, AutoReset):
        environment = environment.environment
    keys = trajectory_keys(key, episodes)
    first = jax.vmap(lambda key: environment.reset(jax.random.fold_in(key, 0)))(keys)
    one = jax.tree.map(lambda leaf: leaf[0], first)
    made = jax.eval_shape(lambda: environment.step(keys[0], one, _some_action(environment)))[1]
    nothing = jnp.zeros(episodes, made.reward.dtype)

    def goes_on(carry):
        return jnp.any(carry[1]) & (carry[0] < steps)

    def step(carry):
        h, alive, states, returns, lengths, finished = carry
        own = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, h + 1)))(keys)
        distributions = jax.vmap(lambda state: policy.distribution(environment.observe(state)))(states)
        actions = jax.vmap(lambda one, key: one.sample(key))(distributions, own[:, 0])
        require_policy(distributions, actions, environment.action_space)
        states, made = jax.vmap(environment.step)(own[:, 1], states, actions)
        # A policy of NaN still takes actions, and what they earn is finite.
        broken = jnp.isnan(jax.vmap(lambda one, action: one.probability(action))(distributions, actions))
        returns = returns + jnp.where(alive, jnp.where(broken, jnp.nan, made.reward), 0)
        ended = alive & (made.terminated | made.truncated)
        return h + 1, alive & ~ended, states, returns, lengths + alive.astype(jnp.int32), finished | ended

    none = jnp.zeros(episodes, bool)
    carry = (jnp.zeros((), jnp.int32), ~none, first, nothing, jnp.zeros(episodes, jnp.int32), none)
    _, _, _, returns, lengths, finished = lax.while_loop(goes_on, step, carry)
    mean = jnp.mean(returns)
    error = jnp.std(returns, ddof=1) / episodes**0.5 if episodes > 1 else jnp.full_like(mean, jnp.inf)
    return Evaluation(mean, mean - WIDTH * error, mean + WIDTH * error, returns, lengths, finished)


def _some_action(environment: Environment) -> Any:
    space = environment.action_space
    return jnp.zeros(() if isinstance(space, Discrete) else space.shape, space.dtype)
