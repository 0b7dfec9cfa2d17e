"""What the upper level pays, step by step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bilevel_jax.errors import InputError
from bilevel_jax.estimators.problem import SampledProblem


class Costs(NamedTuple):
    """`each` [N, H], what N groups pay at each step; the whole is sum_h discount^h each[h].

    A loss that is paid as a whole is paid at the last step, with discount 1.
    """

    each: jax.Array
    discount: jax.Array

    @property
    def factors(self) -> jax.Array:
        """discount^h, [H]."""
        return self.discount ** jnp.arange(self.each.shape[1], dtype=self.discount.dtype)

    def returns(self) -> jax.Array:
        """What is still to pay from each step on, as seen from there, [N, H]."""
        return returns(self.each, self.discount)


def step_costs(problem: SampledProblem, losses: jax.Array) -> Costs:
    """Costs from the losses of N groups, [N] or [N, H]. Raises InputError for another shape."""
    if losses.ndim == 1:
        last = jnp.arange(problem.horizon) == problem.horizon - 1
        return Costs(jnp.where(last[None], losses[:, None], 0), jnp.ones((), losses.dtype))
    if losses.shape[1:] != (problem.horizon,):
        raise InputError(
            f"loss: expected a scalar or [H] = [{problem.horizon}] for each group, got shape {list(losses.shape[1:])}"
        )
    return Costs(losses, jnp.asarray(problem.loss_discount, losses.dtype))


def returns(amounts: jax.Array, discount: jax.Array) -> jax.Array:
    """sum_k discount^k amounts[:, h + k] at each step h, [B, H]."""

    def back(ahead: jax.Array, amount: jax.Array) -> tuple[jax.Array, jax.Array]:
        ahead = amount + discount * ahead
        return ahead, ahead

    _, backwards = jax.lax.scan(back, jnp.zeros_like(amounts[:, 0]), amounts.T, reverse=True)
    return backwards.T
