"""Algorithms for the upper level. Each is a pair: init(key, x) -> state, step(key, state) -> (state, info)."""

from bilevel_jax.algorithms.m_sobirl import m_sobirl
from bilevel_jax.algorithms.protocol import Algorithm

__all__ = ["Algorithm", "m_sobirl"]
