"""Trajectories of earlier policies, used again with importance weights."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel_jax.environments import Trajectory
from bilevel_jax.functions import ActionFunction


class Weights(NamedTuple):
    """`weights` [N], clipped. `effective_sample_size` (sum w)^2 / sum w^2. `clipped`: share of the groups that were."""

    weights: jax.Array
    effective_sample_size: jax.Array
    clipped: jax.Array


def importance_weights(policy: ActionFunction, groups: Trajectory, clip: Any = jnp.inf) -> Weights:
    """Weights that make means over groups [N, I, H] of other policies means under `policy`.

    w = prod_ih pi(a_ih | s_ih) / mu(a_ih | s_ih) over the valid steps, mu the probability recorded when
    the action was drawn; at most `clip`, which bounds the variance and costs bias: E[(w - clip)+ |l|].
    """

    def log_ratio(observation: Any, action: jax.Array, probability: jax.Array) -> jax.Array:
        chance = policy(observation)[action]
        return jnp.log(chance) - jnp.log(probability.astype(chance.dtype))

    each = log_ratio
    for _ in range(3):
        each = jax.vmap(each)
    ratios = jnp.where(groups.valid, each(groups.observation, groups.action, groups.probability), 0)
    raw = jnp.exp(jnp.sum(ratios, (1, 2)))
    limit = jnp.asarray(clip, raw.dtype)
    weights = jnp.minimum(raw, limit)
    square = jnp.sum(weights**2)
    size = jnp.where(square > 0, jnp.sum(weights) ** 2 / jnp.where(square > 0, square, 1), 0)
    return Weights(weights, size, jnp.mean(raw > limit))
