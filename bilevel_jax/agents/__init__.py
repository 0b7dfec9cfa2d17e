"""Lower-level agents: policies learned from a simulator, warm-started from one upper variable to the next."""

from bilevel_jax.agents.exact import ExactAgent
from bilevel_jax.agents.protocol import Agent, policy_gap

__all__ = ["Agent", "ExactAgent", "policy_gap"]
