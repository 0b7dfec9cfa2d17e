"""The synthetic random MDP of Yang, Gao and Yuan (AISTATS 2025, section 6 and their public code)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from bilevel_jax.bilevel import Problem
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.validation import as_float
from bilevel_jax.mdp.process import MDP
from bilevel_jax.mdp.regularizers import ShannonEntropy
from bilevel_jax.problems.options import require_room_for, require_room_to_solve, require_seed, require_whole
from bilevel_jax.problems.panels import pair_panel
from bilevel_jax.problems.registry import register

MOST = 10_000  # the dense transition alone has states^2 * actions entries


@dataclasses.dataclass(frozen=True)
class SyntheticOptions:
    """Synthetic random MDP with a quadratic reward model (Yang, Gao and Yuan 2025).

    states, actions: size of the MDP.
    dimension: of the upper variable.
    discount, temperature: of the lower level.
    seed: of the random MDP and reward (not of the starting point).
    """

    states: int = 10
    actions: int = 5
    dimension: int = 100
    discount: float = 0.5
    temperature: float = 1.0
    seed: int = 0


class Synthetic(Problem):
    """The problem: r_x[s, a] = coefficient[s, a] * x' matrix x, f = |x|^2 / 2 + sum pi^2 / 2.

    The upper variable is x[n]. Every pair has a random number (1 to S - 1) of random successors.
    """

    transition: Float[Array, "S A S"]
    coefficient: Float[Array, "S A"]
    matrix: Float[Array, "n n"]
    discount: Float[Array, ""]
    temperature: Float[Array, ""]

    def start(self, key: PRNGKeyArray) -> Float[Array, " n"]:
        """x ~ N(0, 1)."""
        return jax.random.normal(key, self.matrix.shape[:1], self.matrix.dtype)

    def mdp(self, x):
        return MDP(self.transition, self.coefficient * (x @ self.matrix @ x), self.discount)

    def regularizer(self, x):
        del x
        return ShannonEntropy(self.temperature)

    def objective(self, x, solution) -> Float[Array, ""]:
        return (jnp.sum(x**2) + jnp.sum(solution.policy**2)) / 2

    def panels(self, x, solution):
        return (
            pair_panel("reward", self.mdp(x).reward, "reward"),
            pair_panel("the agent's policy", solution.policy, "probability"),
        )


def synthetic(options: SyntheticOptions) -> Synthetic:
    """Draw a problem. Raises InputError for sizes, a seed, a discount or a temperature out of range."""
    require_whole(options, "states", "actions", "dimension")
    for name, least in (("states", 2), ("actions", 1), ("dimension", 1)):
        size = getattr(options, name)
        if not least <= size <= MOST:
            limit = f"at least {least}" if size < least else f"at most {MOST}"
            raise InputError(f"{name} must be {limit}, got {size}")
    require_seed(options)
    # A sort of random numbers, each with its place; a matrix, and its transpose for a product.
    require_room_for("states, actions", options.states, options.actions, options.states, copies=8)
    require_room_for("dimension", options.dimension, options.dimension, copies=4)
    require_room_to_solve("states, actions", options.states, options.actions)
    key = jax.random.key(options.seed)
    transition, coefficient, matrix = _draw(key, options.states, options.actions, options.dimension)
    problem = Synthetic(
        transition=transition,
        coefficient=coefficient,
        matrix=matrix,
        discount=as_float("discount", options.discount, float),
        temperature=ShannonEntropy(options.temperature).temperature,
    )
    problem.mdp(jnp.zeros(options.dimension))  # checks the discount where it is known
    return problem


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _draw(
    key: PRNGKeyArray, states: int, actions: int, dimension: int
) -> tuple[Float[Array, "S A S"], Float[Array, "S A"], Float[Array, "n n"]]:
    """The transition, the coefficient and the matrix."""
    keys = jax.random.split(key, 5)
    shape = (states, actions)
    count = jax.random.randint(keys[0], (*shape, 1), 1, states)
    order = jnp.argsort(jax.random.uniform(keys[1], (*shape, states)), -1)
    weight = jnp.where(order < count, jax.random.uniform(keys[2], order.shape, minval=1e-3), 0)
    uniform = jax.random.uniform(keys[3], (2, *shape))
    matrix = jax.random.normal(keys[4], (dimension, dimension))
    return weight / jnp.sum(weight, -1, keepdims=True), uniform[0] * uniform[1], matrix


register("synthetic", SyntheticOptions, synthetic)
