"""Incentive design on Garnet random MDPs (Archibald, McKinnon and Thomas 1995; Bhatnagar et al. 2009)."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from bilevel_jax.bilevel import Problem, SampledProblem
from bilevel_jax.core.functions import Table
from bilevel_jax.core.validation import as_float, plain, require_finite
from bilevel_jax.environments import TabularEnvironment
from bilevel_jax.mdp.process import MDP
from bilevel_jax.mdp.regularizers import ShannonEntropy
from bilevel_jax.mdp.transitions import SuccessorTransition
from bilevel_jax.problems.options import require_room_to_solve, require_seed, require_size
from bilevel_jax.problems.panels import pair_panel
from bilevel_jax.problems.random_process import random_successors
from bilevel_jax.problems.registry import register
from bilevel_jax.solvers.policy_value import policy_value


@dataclasses.dataclass(frozen=True)
class GarnetOptions:
    """Garnet random MDP whose designer pays bonuses to lower a cost of its own.

    states, actions: size of the MDP.
    branching: successors of each pair.
    discount: of the agent and of the designer.
    temperature: of the agent's entropy, in units of the reward.
    price: of the squared bonus to the designer.
    horizon: steps of a sampled trajectory.
    seed: of the random MDP (not of the starting point).
    """

    states: int = 8
    actions: int = 3
    branching: int = 3
    discount: float = 0.9
    temperature: float = 0.5
    price: float = 0.1
    horizon: int = 150
    seed: int = 0


class Garnet(Problem, SampledProblem):
    """The problem. The upper variable is a bonus x[S, A] on top of the agent's reward, N(0, 1) of its own.

    The designer minimises the discounted sum of cost[s, a] + price / 2 x[s, a]^2, cost ~ N(0, 1).
    Sampled, a trajectory is cut after `horizon` steps.
    """

    transition: SuccessorTransition
    base: Float[Array, "S A"]
    cost: Float[Array, "S A"]
    discount: Float[Array, ""]
    temperature: Float[Array, ""]
    price: Float[Array, ""]
    environment: TabularEnvironment
    horizon: int = eqx.field(static=True, converter=plain("horizon"))

    def __init__(self, options: GarnetOptions):
        for name in ("states", "actions", "horizon"):
            require_size(options, name)
        require_size(options, "branching", most=options.states, why="the number of states")
        require_seed(options)
        pairs = (options.states, options.actions)
        require_room_to_solve("states, actions", *pairs)
        keys = jax.random.split(jax.random.key(options.seed), 4)
        self.transition = SuccessorTransition(*random_successors(keys[:2], pairs, options.states, options.branching))
        self.base = jax.random.normal(keys[2], pairs)
        self.cost = jax.random.normal(keys[3], pairs)
        self.discount = as_float("discount", options.discount, float)
        self.temperature = ShannonEntropy(options.temperature).temperature
        self.price = as_float("price", options.price, float)
        require_finite("price", self.price)
        self.horizon = int(options.horizon)
        self.environment = TabularEnvironment(self.mdp(jnp.zeros(pairs)))  # checks the discount where it is known

    @property
    def trajectories(self) -> int:
        """The number of trajectories per loss: 1."""
        return 1

    @property
    def loss_discount(self) -> Float[Array, ""]:
        """The designer discounts as the agent does."""
        return self.discount

    def start(self, key: PRNGKeyArray) -> Float[Array, "S A"]:
        """x ~ N(0, 0.1^2)."""
        return 0.1 * jax.random.normal(key, self.base.shape)

    def mdp(self, x):
        return MDP(self.transition, self.base + x, self.discount)

    def reward(self, x):
        return Table(self.base + x)

    def regularizer(self, x):
        del x
        return ShannonEntropy(self.temperature)

    def objective(self, x, solution) -> Float[Array, ""]:
        mdp = MDP(self.transition, self._costs(x), self.discount)
        return policy_value(mdp, solution.policy) @ mdp.initial

    def loss(self, key, x, trajectories) -> Float[Array, " H"]:
        del key
        return self._costs(x)[trajectories.observation[0], trajectories.action[0]]

    def panels(self, x, solution):
        return (
            pair_panel("the designer's cost", self.cost, "cost"),
            pair_panel("bonus", x, "bonus"),
            pair_panel("the agent's policy", solution.policy, "probability"),
        )

    def _costs(self, x: Float[Array, "S A"]) -> Float[Array, "S A"]:
        return self.cost + self.price / 2 * x**2


register("garnet", GarnetOptions, Garnet)
