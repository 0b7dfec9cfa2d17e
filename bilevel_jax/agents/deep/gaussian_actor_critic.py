"""Soft actor-critic for actions of a box: a Gaussian actor and two critics, learned from a replay."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from bilevel_jax.agents.deep.actors import GaussianActor, require_log_policy
from bilevel_jax.agents.deep.gaussian import require_box
from bilevel_jax.agents.deep.off_policy import OffPolicyActorCritic, both
from bilevel_jax.core.validation import as_float, plain, require_finite
from bilevel_jax.networks import Network


class GaussianActorCritic(OffPolicyActorCritic):
    """Soft actor-critic (Haarnoja et al. 2018, "Soft actor-critic algorithms and applications").

    The policy is a `TanhGaussian` on the box. With a drawn from it, a function of the parameters and of noise,

      v(s) = min(Q_1, Q_2)(s, a) - temperature log pi(a | s),

    whose mean the actor raises. Densities are those of the actions, in their own units. The temperature is that of the
    problem's regularizer, a `ShannonEntropy`: the policy tends to the density proportional to exp(Q / temperature), or
    to the nearest that it can express.

    Args:
      squash: whether the box has bounds (static). False is for a box without any: the policy is then a `Gaussian`, and
        the first actions are drawn from the standard normal distribution.
      target_entropy: None, or the entropy per entry of an action to which a temperature of the agent's own is tuned, in
        nats and for actions scaled to [-1, 1]; the paper's is -1. The temperature begins at the problem's and is in the
        report. The policy is then not that of the problem's temperature.

    The other arguments are those of `OffPolicyActorCritic`. `network` is the actor's, with two outputs per entry of an
    action; `critic` is that of the critics, called with {"observation": ..., "action": ...}, with one output.

    Raises:
      InputError: as there; in `init`, actions that are no box, bounds that do not fit `squash`, another regularizer.

    Example:
      >>> class Target(bj.environments.Environment):  # one step: come close to where the observation says
      ...     @property
      ...     def action_space(self):
      ...         return bj.environments.Box(-2.0, 2.0, (1,))
      ...     def reset(self, key):
      ...         return jax.random.uniform(key, (1,))
      ...     def observe(self, state):
      ...         return state
      ...     def step(self, key, state, action):
      ...         end = jnp.asarray(True)
      ...         return state, bj.environments.TimeStep(state, jnp.zeros(()), end, ~end)
      >>> problem = bj.SampledBilevelProblem(
      ...     environment=Target(),
      ...     reward=lambda x: lambda observation, action: -x * jnp.sum((action - observation) ** 2),
      ...     regularizer=bj.ShannonEntropy(0.1),
      ...     loss=lambda key, x, trajectories: jnp.sum(trajectories.action**2),
      ...     discount=0.9,
      ...     horizon=1,
      ... )
      >>> x = jnp.asarray(1.0)
      >>> agent = bj.agents.GaussianActorCritic(bj.networks.MLP(width=16), capacity=2000, learning_starts=200)
      >>> state = agent.init(jax.random.key(1), problem, x)
      >>> state = agent.improve(jax.random.key(2), state, problem, x)
      >>> agent.policy(state, problem, x).distribution(jnp.ones(1)).sample(jax.random.key(3)).shape
      (1,)
    """

    squash: bool = eqx.field(static=True, converter=plain("squash"))

    def __init__(
        self,
        network: Network | None = None,
        critic: Network | None = None,
        *,
        squash: bool = True,
        target_entropy: float | None = None,
        **options: Any,
    ):
        target = target_entropy
        if target is not None:
            target = as_float("target_entropy", target, float)
            require_finite("target_entropy", target, "-1 is usual, None keeps the problem's temperature")
        super().__init__(network, critic, target_entropy=target, **options)
        self.squash = squash

    def require(self, problem, x):
        require_box(problem.action_space, "GaussianActorCritic()", squash=self.squash)
        require_log_policy(problem.regularizer(x), "GaussianActorCritic()", kl=False)

    def sizes(self, environment):
        space = environment.action_space
        action = jax.ShapeDtypeStruct(space.shape, space.dtype)
        return 2 * math.prod(space.shape), _pair(environment.observation_space, action), 1

    def actor(self, params, problem, x):
        del x
        space: Any = problem.action_space
        return GaussianActor(self.network, params, space, self.squash)

    def q_of(self, critics, observation, action):
        return both(self.critic, critics, _pair(observation, action))[..., 0]

    def soft_value(self, key, actor, critics, regularizer, observation):
        def one(key: PRNGKeyArray, observation: Any) -> tuple[Any, Float[Array, ""]]:
            distribution: Any = actor.distribution(observation)
            return distribution.sample_with_log_prob(key)

        keys = jax.random.split(key, jax.tree.leaves(observation)[0].shape[0])
        action, logs = jax.vmap(one)(keys, observation)
        q = jnp.min(self.q_of(critics, observation, action), 0)
        return q - jnp.asarray(regularizer.temperature, q.dtype) * logs.astype(q.dtype), -logs

    def wanted_entropy(self, environment):
        assert self.target_entropy is not None
        space: Any = environment.action_space
        each = self.target_entropy * math.prod(space.shape)
        if not self.squash:
            return each
        return each + jnp.sum(jnp.log(space.high / 2 - space.low / 2)).astype(each.dtype)


def _pair(observation: Any, action: Any) -> dict[str, Any]:
    return {"observation": observation, "action": action}
