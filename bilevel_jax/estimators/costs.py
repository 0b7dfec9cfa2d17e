"""The costs that the upper level pays at each step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bilevel_jax.bilevel.sampled_problem import SampledProblem
from bilevel_jax.core.errors import InputError


class Costs(NamedTuple):
    """`each`: the cost that each of N groups pays at each step. The whole loss is sum_h discount^h each[h].

    A loss that is paid as a whole is paid at the last step, with discount 1.
    """

    each: Float[Array, "N H"]
    discount: Float[Array, ""]

    @property
    def factors(self) -> Float[Array, " H"]:
        """discount^h."""
        return self.discount ** jnp.arange(self.each.shape[1], dtype=self.discount.dtype)

    def returns(self) -> Float[Array, "N H"]:
        """Return the sum of the costs from each step on, discounted to that step."""
        return returns(self.each, self.discount)


def step_costs(problem: SampledProblem, losses: Float[Array, " N"] | Float[Array, "N H"]) -> Costs:
    """Return the costs for the losses of N groups, [N] or [N, H]. Raises InputError for another shape."""
    if not jnp.issubdtype(losses.dtype, jnp.inexact):  # counts and truths: their discount is no whole number
        losses = losses.astype(float)
    if losses.ndim == 1:
        last = jnp.arange(problem.horizon) == problem.horizon - 1
        return Costs(jnp.where(last[None], losses[:, None], 0), jnp.ones((), losses.dtype))
    if losses.shape[1:] != (problem.horizon,):
        raise InputError(
            f"loss: expected a scalar or [H] = [{problem.horizon}] for each group, got shape {list(losses.shape[1:])}"
        )
    return Costs(losses, jnp.asarray(problem.loss_discount, losses.dtype))


def returns(amounts: Float[Array, "B H"], discount: Float[Array, ""]) -> Float[Array, "B H"]:
    """Return sum_k discount^k amounts[:, h + k] at each step h."""

    def back(ahead: Float[Array, " B"], amount: Float[Array, " B"]) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
        ahead = amount + discount * ahead
        return ahead, ahead

    _, backwards = jax.lax.scan(back, jnp.zeros_like(amounts[:, 0]), amounts.T, reverse=True)
    return backwards.T
