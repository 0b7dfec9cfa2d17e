"""Importance weights, with which trajectories of earlier policies are used again."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Real

from bilevel_jax.environments import Trajectory, as_policy
from bilevel_jax.environments.spaces import Action


class Weights(NamedTuple):
    """`weights`, clipped; `effective_sample_size`, (sum w)^2 / sum w^2; `clipped_fraction`, the fraction of groups
    whose weight was clipped.
    """

    weights: Float[Array, " N"]
    effective_sample_size: Float[Array, ""]
    clipped_fraction: Float[Array, ""]


def importance_weights(policy: Any, groups: Trajectory, clip: Real[ArrayLike, ""] = jnp.inf) -> Weights:
    """Return the weights with which a mean over groups [N, I, H] of other policies is a mean under `policy`.

    w = prod_ih pi(a_ih | s_ih) / mu(a_ih | s_ih) over the valid steps, mu the probability recorded when
    the action was drawn (densities where actions are continuous); at most `clip`, which bounds the variance and costs
    bias: E[(w - clip)+ |l|].

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> x = problem.start(jax.random.key(0))
      >>> policy = bj.solve(problem.mdp(x), problem.regularizer(x)).policy
      >>> groups = bj.estimators.sample_groups(jax.random.key(1), problem, policy, batch=8)
      >>> bj.estimators.importance_weights(policy, groups).weights.round(3).tolist() == [1.0] * 8
      True
    """
    policy = as_policy(policy)

    def log_ratio(observation: Any, action: Action, probability: Float[Array, ""]) -> Float[Array, ""]:
        now = policy.distribution(observation).log_prob(action)
        return now - jnp.log(probability.astype(now.dtype))

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
