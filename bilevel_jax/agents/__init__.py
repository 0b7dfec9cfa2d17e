"""Lower-level agents: policies learned from a simulator, warm-started from one upper variable to the next."""

from bilevel_jax.agents.deep.gaussian import Gaussian, TanhGaussian
from bilevel_jax.agents.deep.gaussian_actor_critic import GaussianActorCritic
from bilevel_jax.agents.deep.host import collect_on_host, improve_on_host
from bilevel_jax.agents.deep.proximal import PPO
from bilevel_jax.agents.deep.soft_actor_critic import SoftActorCritic
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
    "PPO",
    "ActorCritic",
    "Agent",
    "ByVisits",
    "ExactAgent",
    "Gaussian",
    "GaussianActorCritic",
    "LinearDecay",
    "Polynomial",
    "SampledPolicyIteration",
    "SoftActorCritic",
    "SoftPQN",
    "SoftQLearning",
    "SoftSARSA",
    "TanhGaussian",
    "Training",
    "collect_on_host",
    "improve_on_host",
    "policy_gap",
    "train",
]
