"""Environment design: obstacles and a floor, built at a price, that lead an agent where the designer wants it.

Zhang, Chen and Parkes (IJCAI 2009, "A general approach to environment design with one agent") design an agent's
environment with its best response in mind. Keren, Pineda, Gal, Karpas and Zilberstein (IJCAI 2017, "Equi-reward utility
maximizing design in stochastic environments") change its transition probabilities at a cost. The map and the numbers
are our own.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray

from bilevel_jax.bilevel import Problem
from bilevel_jax.mdp.process import MDP
from bilevel_jax.mdp.regularizers import ShannonEntropy
from bilevel_jax.problems.grid import Grid, map_rows, move_lists, parse_map
from bilevel_jax.problems.options import as_fraction, as_number, require_room_to_solve
from bilevel_jax.problems.panels import grid_panel
from bilevel_jax.problems.registry import register
from bilevel_jax.solvers.policy_value import policy_value

ROWS = (
    "xxxxxxxxxxx",
    "x   o     x",
    "xs  x  o gx",
    "xx xxxxx xx",
    "x    t    x",
    "x    o    x",
    "xxxxxxxxxxx",
)


@dataclasses.dataclass(frozen=True)
class EnvironmentDesignOptions:
    """Environment design: obstacles and a floor that lead an agent past, or around, a marked cell to its goal.

    rows: of the map: x is a wall, s the start, g the agent's goal (at least one), t a cell that the designer counts, o
      a cell where an obstacle can be built; all else is free.
    discount, temperature: of the agent, and the discount also of the designer.
    max_slip: probability that the agent makes another move than it chose, on the floor as it is.
    visits: what a visit of a cell t is worth to the designer; below 0 it keeps the agent away.
    arrival: what the agent's arrival at its goal is worth to the designer.
    obstacle_price: of an obstacle that is always there.
    floor_price: of a floor without any slip.
    """

    rows: tuple[str, ...] = ROWS
    discount: float = 0.95
    temperature: float = 0.01
    max_slip: float = 0.3
    visits: float = 1.0
    arrival: float = 0.5
    obstacle_price: float = 0.1
    floor_price: float = 0.05


class EnvironmentDesign(Problem):
    """The problem. The upper variable is x[D + 1]: D cells where obstacles can be built, row-major, and the floor.

    At every step, an obstacle stands in cell d with probability sigmoid(x[d]); an agent that moves there then stays
    where it was. The agent slips with probability max_slip * sigmoid(x[D]). Acting at a goal pays the agent 1 and
    ends the process (discount 0 there). The designer maximises, discounted, `visits` for each step in a cell t and
    `arrival` at the goal, minus obstacle_price * sum_d sigmoid(x[d]) and floor_price * (1 - sigmoid(x[D])).

    The gradient goes through the transition: this is no `bilevel_jax.SampledProblem`, whose dynamics do
    not depend on x. At a given x, `TabularEnvironment(problem.mdp(x))` is the agent's simulator.

    Raises:
      InputError: a map without start, goal or obstacle, or a number out of range.
    """

    moves: Int32[Array, "S A"]
    place: Int32[Array, " D"]
    at_goal: Bool[Array, " S"]
    at_target: Bool[Array, " S"]
    initial: Float[Array, " S"]
    discount: Float[Array, ""]
    temperature: Float[Array, ""]
    max_slip: Float[Array, ""]
    visits: Float[Array, ""]
    arrival: Float[Array, ""]
    obstacle_price: Float[Array, ""]
    floor_price: Float[Array, ""]
    rows: tuple[str, ...] = eqx.field(static=True)

    def __init__(self, options: EnvironmentDesignOptions):
        self.rows = map_rows(options.rows)
        grid = self.grid
        self.moves = jnp.asarray(grid.moves(), jnp.int32)
        require_room_to_solve("rows", *self.moves.shape)
        self.place = jnp.asarray(np.flatnonzero(grid.marked("o", "place for an obstacle")), jnp.int32)
        self.at_goal = jnp.asarray(grid.marked("g", "goal"))
        self.at_target = jnp.asarray(grid.marked("t"))
        self.initial = jnp.asarray(grid.marked("s", "start", once=True), float)
        self.discount = as_fraction(options, "discount", "for long horizons use e.g. 0.99")
        self.temperature = ShannonEntropy(options.temperature).temperature
        self.max_slip = as_fraction(options, "max_slip", "0 is none, 0.75 a random move")
        self.visits = as_number(options, "visits", -np.inf, "0 leaves the cell out of account")
        self.arrival = as_number(options, "arrival", -np.inf, "0 leaves the goal out of account")
        self.obstacle_price = as_number(options, "obstacle_price", 0, "0 makes obstacles free")
        self.floor_price = as_number(options, "floor_price", 0, "0 makes the floor free")

    @property
    def grid(self) -> Grid:
        """The map; states are its free cells."""
        return parse_map(self.rows)

    def start(self, key: PRNGKeyArray) -> Float[Array, " n"]:
        """Draw obstacles with probability about 3/4, and about half of the slip: x ~ N(1, 0.1^2) and N(0, 0.1^2).

        From few obstacles, descent may end with none: an agent that is sure of its way hardly answers to a slightly
        higher probability of an obstacle, while its price is paid at once.
        """
        noise = 0.1 * jax.random.normal(key, (self.place.size + 1,))
        return noise.at[:-1].add(1)

    def obstacles(self, x: Float[Array, " n"]) -> Float[Array, " S"]:
        """The probability of an obstacle in each cell; 0 where none can be built."""
        probability = jax.nn.sigmoid(x[:-1])
        return jnp.zeros(self.initial.shape, probability.dtype).at[self.place].set(probability)

    def slip(self, x: Float[Array, " n"]) -> Float[Array, ""]:
        """The probability of another move than the chosen one."""
        return self.max_slip * jax.nn.sigmoid(x[-1])

    def mdp(self, x):
        return self._process(x, self.at_goal.astype(self.initial.dtype))

    def regularizer(self, x):
        del x
        return ShannonEntropy(self.temperature)

    def objective(self, x, solution) -> Float[Array, ""]:
        share = jax.nn.sigmoid(x)
        price = self.obstacle_price * jnp.sum(share[:-1]) + self.floor_price * (1 - share[-1])
        worth = jnp.where(self.at_target, self.visits, 0) + jnp.where(self.at_goal, self.arrival, 0)
        return price - policy_value(self._process(x, worth), solution.policy) @ self.initial

    def panels(self, x, solution):
        marks = {"S": self.initial == 1, "G": self.at_goal, "T": self.at_target, "o": self.grid.marked("o")}
        title = f"slip {float(self.slip(x)):.2f}"
        built = self.obstacles(x)
        return (grid_panel(title, self.grid, built, solution.policy, label="probability of an obstacle", marks=marks),)

    def _process(self, x: Float[Array, " n"], reward: Float[Array, " S"]) -> MDP:
        """The dynamics at x with a reward for being in each state."""
        transition = move_lists(self.moves, self.slip(x), 1 - self.obstacles(x))
        shape = self.moves.shape
        discount = jnp.where(self.at_goal, 0, self.discount)[:, None]
        return MDP(
            transition, jnp.broadcast_to(reward[:, None], shape), jnp.broadcast_to(discount, shape), self.initial
        )


register("environment_design", EnvironmentDesignOptions, EnvironmentDesign)
