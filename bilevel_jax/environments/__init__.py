"""Simulators as pure functions, any `MDP` as one, and batches of trajectories from them."""

from bilevel_jax.environments.gymnax import GymnaxEnvironment
from bilevel_jax.environments.protocol import Environment, TimeStep, Trajectory, require_every_action
from bilevel_jax.environments.rollout import random_segments, rollout, rollout_from, segments, trajectory_keys
from bilevel_jax.environments.tabular import TabularEnvironment, flatten_contexts
from bilevel_jax.environments.wrappers import AutoReset, TimeLimit

__all__ = [
    "AutoReset",
    "Environment",
    "GymnaxEnvironment",
    "TabularEnvironment",
    "TimeLimit",
    "TimeStep",
    "Trajectory",
    "flatten_contexts",
    "random_segments",
    "require_every_action",
    "rollout",
    "rollout_from",
    "segments",
    "trajectory_keys",
]
