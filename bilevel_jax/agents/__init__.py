"""Lower-level agents: policies learned from a simulator, warm-started from one upper variable to the next."""

from bilevel_jax.agents.actor_critic import ActorCritic
from bilevel_jax.agents.exact import ExactAgent
from bilevel_jax.agents.protocol import Agent, policy_gap
from bilevel_jax.agents.sampled_policy_iteration import SampledPolicyIteration
from bilevel_jax.agents.schedules import ByVisits, Polynomial
from bilevel_jax.agents.soft_q_learning import SoftQLearning
from bilevel_jax.agents.soft_sarsa import SoftSARSA

__all__ = [
    "ActorCritic",
    "Agent",
    "ByVisits",
    "ExactAgent",
    "Polynomial",
    "SampledPolicyIteration",
    "SoftQLearning",
    "SoftSARSA",
    "policy_gap",
]
