"""Lower-level agents: policies learned from a simulator, warm-started from one upper variable to the next."""

from bilevel_jax.agents.deep.soft_pqn import SoftPQN
from bilevel_jax.agents.exact import ExactAgent
from bilevel_jax.agents.protocol import Agent, policy_gap
from bilevel_jax.agents.tabular.actor_critic import ActorCritic
from bilevel_jax.agents.tabular.sampled_policy_iteration import SampledPolicyIteration
from bilevel_jax.agents.tabular.soft_q_learning import SoftQLearning
from bilevel_jax.agents.tabular.soft_sarsa import SoftSARSA
from bilevel_jax.agents.train import Training, train
from bilevel_jax.core.schedules import ByVisits, LinearDecay, Polynomial

__all__ = [
    "ActorCritic",
    "Agent",
    "ByVisits",
    "ExactAgent",
    "LinearDecay",
    "Polynomial",
    "SampledPolicyIteration",
    "SoftPQN",
    "SoftQLearning",
    "SoftSARSA",
    "Training",
    "policy_gap",
    "train",
]
