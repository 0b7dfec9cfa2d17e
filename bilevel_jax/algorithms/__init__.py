"""Algorithms for the upper level. Each is a pair: init(key, x) -> state, step(key, state) -> (state, info)."""

from bilevel_jax.algorithms.amd import amd
from bilevel_jax.algorithms.attenuating_actor_critic import Attenuation, attenuating_actor_critic
from bilevel_jax.algorithms.basin_hopping import basin_hopping
from bilevel_jax.algorithms.bc_hg import bc_hg
from bilevel_jax.algorithms.hpgd import hpgd
from bilevel_jax.algorithms.implicit import implicit
from bilevel_jax.algorithms.m_sobirl import m_sobirl
from bilevel_jax.algorithms.naive import naive
from bilevel_jax.algorithms.pbrl import pbrl
from bilevel_jax.algorithms.protocol import Algorithm
from bilevel_jax.algorithms.sobirl import Reuse, sobirl
from bilevel_jax.algorithms.stoc_sobirl import StocSchedule, stoc_schedule, stoc_sobirl
from bilevel_jax.algorithms.upper import Cooling, UpperLevel
from bilevel_jax.algorithms.zero_order import zero_order

__all__ = [
    "Algorithm",
    "Attenuation",
    "Cooling",
    "Reuse",
    "StocSchedule",
    "UpperLevel",
    "amd",
    "attenuating_actor_critic",
    "basin_hopping",
    "bc_hg",
    "hpgd",
    "implicit",
    "m_sobirl",
    "naive",
    "pbrl",
    "sobirl",
    "stoc_schedule",
    "stoc_sobirl",
    "zero_order",
]
