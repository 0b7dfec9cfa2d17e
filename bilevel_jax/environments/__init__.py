"""Simulators as pure functions, any `MDP` as one, policies, and batches of trajectories."""

from bilevel_jax.environments import classic
from bilevel_jax.environments.collect import collect
from bilevel_jax.environments.evaluation import Evaluation, Greedy, evaluate
from bilevel_jax.environments.gymnax import GymnaxEnvironment
from bilevel_jax.environments.host import HostEnvironment, HostSpaces
from bilevel_jax.environments.policies import (
    Categorical,
    Distribution,
    Policy,
    PolicyFunction,
    TabularPolicy,
    as_policy,
    policy_table,
)
from bilevel_jax.environments.protocol import Environment, TimeStep, Trajectory, require_every_action
from bilevel_jax.environments.rollout import random_segments, rollout, rollout_from, segments, trajectory_keys
from bilevel_jax.environments.spaces import Box, Discrete, as_space
from bilevel_jax.environments.tabular import TabularEnvironment, flatten_contexts
from bilevel_jax.environments.vector import Processes, start_processes, with_restarts
from bilevel_jax.environments.visits import Visits
from bilevel_jax.environments.wrappers import AutoReset, Continuing, Rewarded, TimeLimit

__all__ = [
    "AutoReset",
    "Box",
    "Categorical",
    "Continuing",
    "Discrete",
    "Distribution",
    "Environment",
    "Evaluation",
    "Greedy",
    "GymnaxEnvironment",
    "HostEnvironment",
    "HostSpaces",
    "Policy",
    "PolicyFunction",
    "Processes",
    "Rewarded",
    "TabularEnvironment",
    "TabularPolicy",
    "TimeLimit",
    "TimeStep",
    "Trajectory",
    "Visits",
    "as_policy",
    "as_space",
    "classic",
    "collect",
    "evaluate",
    "flatten_contexts",
    "policy_table",
    "random_segments",
    "require_every_action",
    "rollout",
    "rollout_from",
    "segments",
    "start_processes",
    "trajectory_keys",
    "with_restarts",
]
