"""Incentives for a population: one bonus for followers of several types, whom only congestion brings together.

As in Thoma et al. (NeurIPS 2024, "Contextual Bilevel Reinforcement Learning for Incentive Alignment"), each context is
one follower. The objective is no mean over the followers: the cost of one type depends on where the others are, as in
congestion games (Rosenthal 1973). The followers themselves do not react to each other.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from bilevel_jax.bilevel import Problem
from bilevel_jax.mdp.process import MDP
from bilevel_jax.mdp.regularizers import ShannonEntropy
from bilevel_jax.mdp.transitions import SuccessorTransition
from bilevel_jax.problems.options import (
    as_fraction,
    as_number,
    require_room_for,
    require_room_to_solve,
    require_seed,
    require_size,
)
from bilevel_jax.problems.panels import Panel, pair_panel
from bilevel_jax.problems.random_process import random_successors
from bilevel_jax.problems.registry import register
from bilevel_jax.solvers.occupancy import occupancy


@dataclasses.dataclass(frozen=True)
class MultiFollowerOptions:
    """Several followers, one bonus: a designer relieves the congestion that a population makes together.

    followers: types of them, each with a reward of its own.
    states, actions: size of the MDP.
    branching: successors of each pair.
    discount, temperature: of the first follower.
    spread: discounts and temperatures fall evenly from the first follower's to (1 - spread) times that at the last.
    variety: from 0, all followers have one reward, to 1, their rewards are independent.
    features: of the bonus, random; 0 is a bonus for each pair instead.
    congestion: weight of the squared load of each pair.
    price: of the squared bonus, for each time that it is paid.
    designer_discount: of what the designer counts.
    seed: of the random process, rewards, shares and features (not of the starting point).
    """

    followers: int = 3
    states: int = 6
    actions: int = 3
    branching: int = 3
    discount: float = 0.9
    temperature: float = 0.5
    spread: float = 0.4
    variety: float = 0.5
    features: int = 0
    congestion: float = 10.0
    price: float = 0.1
    designer_discount: float = 0.9
    seed: int = 0


class MultiFollower(Problem):
    """The problem. The upper variable is a bonus x[S, A], or x[F], on top of the reward of each of N followers.

    load[s, a] is the share of the population's steps, discounted by the designer, that are made in s and take a:
    the mean of all followers' normalized occupancies, weighted by their shares of the population. The designer
    minimises sum_sa congestion / 2 load[s, a]^2 + price / 2 load[s, a] bonus[s, a]^2.

    Rewards are N(0, 1), and those of different followers have the correlation 1 - variety. Shares are random, features
    are N(0, 1 / F).

    This is no `bilevel_jax.SampledProblem`. Such a problem has one discount and one temperature, and its objective is
    the mean of a loss over trajectories. Here the mean itself is squared.

    Raises:
      InputError: sizes, a seed or numbers out of range.
    """

    transition: SuccessorTransition
    base: Float[Array, "N S A"]
    weight: Float[Array, " N"]  # shares of the population
    features: Float[Array, "S A F"] | None
    discount: Float[Array, " N"]
    temperature: Float[Array, " N"]
    congestion: Float[Array, ""]
    price: Float[Array, ""]
    designer_discount: Float[Array, ""]

    def __init__(self, options: MultiFollowerOptions):
        for name in ("followers", "states", "actions"):
            require_size(options, name)
        require_size(options, "branching", most=options.states, why="the number of states")
        require_size(options, "features", least=0)
        require_seed(options)
        fall = 1 - as_fraction(options, "spread", "0 makes all alike") * jnp.linspace(0, 1, options.followers)
        self.discount = fall * as_fraction(options, "discount", "for patient followers use e.g. 0.99")
        self.temperature = fall * ShannonEntropy(options.temperature).temperature
        self.designer_discount = as_fraction(options, "designer_discount", "for a patient designer use e.g. 0.99")
        self.congestion = as_number(options, "congestion", 0, "0 is none")
        self.price = as_number(options, "price", 0, "0 makes bonuses free")
        variety = as_number(options, "variety", 0, "0 is one reward for all, 1 independent ones", most=1)

        pairs = (options.states, options.actions)
        require_room_to_solve("followers", options.followers, *pairs)
        require_room_for("features", *pairs, max(1, options.features), copies=4)
        keys = jax.random.split(jax.random.key(options.seed), 6)
        self.transition = SuccessorTransition(*random_successors(keys[:2], pairs, options.states, options.branching))
        common, own = jax.random.normal(keys[2], pairs), jax.random.normal(keys[3], (options.followers, *pairs))
        self.base = jnp.sqrt(1 - variety) * common[None] + jnp.sqrt(variety) * own
        mass = 1 + jax.random.exponential(keys[4], (options.followers,))
        self.weight = mass / jnp.sum(mass)
        size = (*pairs, options.features)
        self.features = jax.random.normal(keys[5], size) / options.features**0.5 if options.features else None

    def start(self, key: PRNGKeyArray) -> Float[Array, "S A"] | Float[Array, " F"]:
        """x ~ N(0, 0.1^2)."""
        shape = self.base.shape[1:] if self.features is None else self.features.shape[-1:]
        return 0.1 * jax.random.normal(key, shape)

    def bonus(self, x: Float[Array, "S A"] | Float[Array, " F"]) -> Float[Array, "S A"]:
        """Return the bonus that every follower is paid."""
        return x if self.features is None else self.features @ x

    def mdp(self, x):
        return MDP(self.transition, self.base + self.bonus(x)[None], self.discount)

    def regularizer(self, x):
        del x
        return ShannonEntropy(self.temperature)

    def objective(self, x, solution) -> Float[Array, ""]:
        load = self.load(solution.policy)
        return jnp.sum(self.congestion / 2 * load**2 + self.price / 2 * load * self.bonus(x) ** 2)

    def load(self, policy: Float[Array, "N S A"]) -> Float[Array, "S A"]:
        """The population's share of steps in each pair under policies; sums to 1."""
        # One discount for each follower says that the first axis is a batch, however many there are.
        discount = jnp.broadcast_to(self.designer_discount, self.weight.shape)
        process = MDP(self.transition, self.base, discount)
        return jnp.tensordot(self.weight, occupancy(process, policy, normalized=True), 1)

    def panels(self, x, solution) -> tuple[Panel, ...]:
        """The bonus, the population's load, and each follower's policy."""
        policies = (
            pair_panel(f"follower {i}, {share:.0%} of all", policy, "probability")
            for i, (share, policy) in enumerate(zip(np.asarray(self.weight), solution.policy, strict=True))
        )
        load = pair_panel("load", self.load(solution.policy), "share of steps")
        return pair_panel("bonus", self.bonus(x), "bonus"), load, *policies


register("multi_follower", MultiFollowerOptions, MultiFollower)
