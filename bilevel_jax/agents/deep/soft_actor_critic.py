"""Soft actor-critic for numbered actions: an actor and two critics, learned from a replay."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from bilevel_jax.agents.deep.actors import CategoricalActor, require_log_policy
from bilevel_jax.agents.deep.off_policy import OffPolicyActorCritic, both
from bilevel_jax.agents.processes import as_unit, at_states
from bilevel_jax.networks import Network


class SoftActorCritic(OffPolicyActorCritic):
    """Discrete soft actor-critic (Christodoulou 2019, "Soft actor-critic for discrete action settings").

    The policy is softmax(y) of the actor's outputs y, times the reference of a `KLDivergence`. Values under it are sums
    over the actions, of which none is sampled:

      v(s) = sum_a pi(a | s) min(Q_1, Q_2)(s, a) - Omega(pi(s)).

    Its temperature is that of the problem's regularizer, so that it tends to pi*, which is softmax(Q* / temperature)
    for the Shannon entropy. It takes `ShannonEntropy` and `KLDivergence`.

    Args:
      target_entropy_fraction: None, or the part of log A to which a temperature of the agent's own is tuned, 0.98 in
        the paper's code. The temperature begins at the problem's and is in the report. The policy is then not pi*, and
        hypergradients that suppose the problem's temperature do not hold.

    The other arguments are those of `OffPolicyActorCritic`, `network` and `critic` among them: the actor's network and
    the critics', one output per action each.

    Raises:
      InputError: as there, a fraction outside [0, 1]; in `init`, another regularizer, a reference together with a tuned
        temperature, or actions that are no finite set.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> x = problem.start(jax.random.key(0))
      >>> agent = bj.agents.SoftActorCritic(bj.networks.OneHot(8), capacity=2000, learning_starts=200)
      >>> state = agent.init(jax.random.key(1), problem, x)
      >>> state = agent.improve(jax.random.key(2), state, problem, x)
      >>> bj.environments.policy_table(agent.policy(state, problem, x), 8).shape
      (8, 3)
    """

    def __init__(
        self,
        network: Network | None = None,
        critic: Network | None = None,
        *,
        target_entropy_fraction: float | None = None,
        **options: Any,
    ):
        target = target_entropy_fraction
        if target is not None:
            target = as_unit("target_entropy_fraction", target, "0.98 is usual, None keeps the problem's temperature")
        super().__init__(network, critic, target_entropy=target, **options)

    def require(self, problem, x):
        tuned = self.target_entropy is not None
        who = "SoftActorCritic(target_entropy_fraction=...)" if tuned else "SoftActorCritic()"
        require_log_policy(problem.regularizer(x), who, kl=not tuned)

    def sizes(self, environment):
        return environment.num_actions, environment.observation_space, environment.num_actions

    def actor(self, params, problem, x):
        return CategoricalActor(self.network, params, problem.regularizer(x))

    def q_of(self, critics, observation, action):
        q = both(self.critic, critics, observation)
        return jnp.take_along_axis(q, jnp.broadcast_to(action[None, :, None], (2, action.shape[0], 1)), -1)[..., 0]

    def soft_value(self, key, actor, critics, regularizer, observation):
        del key
        q = jnp.min(both(self.critic, critics, observation), 0)
        chances: Any = jax.vmap(actor.distribution)(observation)
        policy = chances.probabilities
        return jnp.sum(policy * q, -1) - at_states(regularizer, observation).penalty(policy), chances.entropy()

    def wanted_entropy(self, environment):
        assert self.target_entropy is not None
        return self.target_entropy * math.log(environment.num_actions)
