"""Algorithms for the upper level. Each is a pair: init(key, x) -> state, step(key, state) -> (state, info)."""

from bilevel_jax.algorithms import cost
from bilevel_jax.algorithms.base import Algorithm, Estimate, Info, Report, State
from bilevel_jax.algorithms.basin_hopping import basin_hopping
from bilevel_jax.algorithms.labels.contrastive import contrastive
from bilevel_jax.algorithms.labels.drlhf import drlhf
from bilevel_jax.algorithms.labels.fresh import FreshLabels
from bilevel_jax.algorithms.labels.pbrl_labels import pbrl_labels
from bilevel_jax.algorithms.labels.sobirl_labels import sobirl_labels
from bilevel_jax.algorithms.labels.sources import FileLabels, GivenLabels, Labels, SyntheticLabels
from bilevel_jax.algorithms.labels.virtual_step import virtual_step
from bilevel_jax.algorithms.model.amd import amd
from bilevel_jax.algorithms.model.implicit import implicit
from bilevel_jax.algorithms.model.m_sobirl import m_sobirl
from bilevel_jax.algorithms.model.pbrl import pbrl
from bilevel_jax.algorithms.registry import algorithm_names, make_algorithm, register_algorithm, requires
from bilevel_jax.algorithms.sampled.agent_alone import agent_alone
from bilevel_jax.algorithms.sampled.attenuating_actor_critic import attenuating_actor_critic
from bilevel_jax.algorithms.sampled.base import default_agent
from bilevel_jax.algorithms.sampled.bc_hg import bc_hg
from bilevel_jax.algorithms.sampled.hpgd import hpgd
from bilevel_jax.algorithms.sampled.naive import naive
from bilevel_jax.algorithms.sampled.sobirl import Reuse, sobirl
from bilevel_jax.algorithms.sampled.stoc_sobirl import StocSchedule, stoc_schedule, stoc_sobirl
from bilevel_jax.algorithms.sampled.two_policy_penalty import two_policy_penalty
from bilevel_jax.algorithms.sampled.zero_order import zero_order
from bilevel_jax.algorithms.upper import UpperLevel
from bilevel_jax.core.schedules import Attenuation, Cooling

__all__ = [
    "Algorithm",
    "Attenuation",
    "Cooling",
    "Estimate",
    "FileLabels",
    "FreshLabels",
    "GivenLabels",
    "Info",
    "Labels",
    "Report",
    "Reuse",
    "State",
    "StocSchedule",
    "SyntheticLabels",
    "UpperLevel",
    "agent_alone",
    "algorithm_names",
    "amd",
    "attenuating_actor_critic",
    "basin_hopping",
    "bc_hg",
    "contrastive",
    "cost",
    "default_agent",
    "drlhf",
    "hpgd",
    "implicit",
    "m_sobirl",
    "make_algorithm",
    "naive",
    "pbrl",
    "pbrl_labels",
    "register_algorithm",
    "requires",
    "sobirl",
    "sobirl_labels",
    "stoc_schedule",
    "stoc_sobirl",
    "two_policy_penalty",
    "virtual_step",
    "zero_order",
]
