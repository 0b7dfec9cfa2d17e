"""Four Rooms incentive design (Thoma, Pasztor, Krause, Ramponi and Hu, NeurIPS 2024, arXiv 2406.01575).

A designer places penalties so that an agent on its way to a goal passes a cell that the designer
likes. Two contexts (goals), known to the agent, with probability 1/2 each.
"""

import dataclasses
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int32, PRNGKeyArray

from bilevel_jax.bilevel import Problem, SampledProblem
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.functions import Table
from bilevel_jax.core.options import require_choices
from bilevel_jax.core.validation import as_float, plain, require_at_least, require_finite
from bilevel_jax.environments import TabularEnvironment
from bilevel_jax.mdp.process import MDP
from bilevel_jax.mdp.regularizers import ShannonEntropy
from bilevel_jax.mdp.transitions import Transition
from bilevel_jax.networks import MLP, Network
from bilevel_jax.problems.grid import MOVES, Grid, dynamics, map_rows, parse_map
from bilevel_jax.problems.options import (
    MOST_STEPS,
    MOST_WIDTH,
    as_fraction,
    as_sequence,
    refuse_unused,
    require_room_to_solve,
    require_size,
)
from bilevel_jax.problems.panels import grid_panel
from bilevel_jax.problems.registry import register
from bilevel_jax.solvers.policy_value import policy_value

ROWS = (
    "xxxxxxxxxxxxx",
    "x     x  g  x",
    "x     x     x",
    "x     d     x",
    "xs    x     x",
    "x     x     x",
    "xxdxxxx     x",
    "x     xxxdxxx",
    "x   t x     x",
    "x     x     x",
    "x     d     x",
    "x     x    gx",
    "xxxxxxxxxxxxx",
)


@dataclasses.dataclass(frozen=True)
class FourRoomsOptions:
    """Four Rooms incentive design: penalties that lead an agent past a marked cell (Thoma et al. 2024).

    temperature: of the agent's entropy, in units of the goal's reward (published: 0.001, 0.003, 0.005).
    beta: price of the penalties to the designer (published: 1, 3, 5).
    discount: of the agent and of the designer.
    max_penalty: total penalty that the designer can distribute, in units of the goal's reward.
    slip: probability that another move than the chosen one is made (0.33 * 4 / 3).
    rows: of the map: x is a wall, s the start, g a goal (a context each), t the cell that the designer likes, d a
      door; all else is free.
    penalties: "cells", each can have one; or "doors", only they can.
    variable: "weights", one per cell with a penalty and a spare one; or "network", which has them as a function of the
      cell's coordinates.
    width: of the network's hidden layers.
    closed: probability that a door is closed when the agent moves to it, which then stays where it was.
    goals: (row, column) of the goal in each context, instead of the letters.
    origin: (row, column) where the agent starts, instead of the letter.
    target: (row, column) of the cell that the designer likes, instead of the letter.
    transition: "dense", "successor" or "stencil", how the dynamics are stored.
    horizon: steps of a sampled trajectory (published: 200).
    """

    temperature: float = 0.003
    beta: float = 1.0
    discount: float = 0.99
    max_penalty: float = 0.2
    slip: float = 0.44
    rows: tuple[str, ...] = ROWS
    penalties: Literal["cells", "doors"] = "cells"
    variable: Literal["weights", "network"] = "weights"
    width: int = 32
    closed: float = 0.0
    goals: tuple[tuple[int, int], ...] | None = None
    origin: tuple[int, int] | None = None
    target: tuple[int, int] | None = None
    transition: Literal["dense", "successor", "stencil"] = "dense"
    horizon: int = 200


class FourRooms(Problem, SampledProblem):
    """The problem. The upper variable is w[n + 1], the n cells with a penalty in row-major order, then a spare one.

    With a network it is a dictionary, {"network": parameters, "spare": []}: the network gives w of a cell from its
    place, a row and a column from -1 to 1.

    penalty[c] = -max_penalty * softmax(w)[c]: the agent pays it for acting in cell c, except at its
    goal. Acting at the goal pays 1 and ends the episode (discount 0 there). The designer maximises the
    discounted sum of 1 in the target cell and -beta * sum_c |penalty[c]| at the goal. Sampled, a
    trajectory is cut after `horizon` steps.

    The authors' code has two more options that the paper's results do not use: penalties in the corridors only, and
    doors there, each of which is closed with its own probability, drawn at every step. Here they are the options
    `penalties` and `closed`, with one probability for all doors, which are the cells marked d.

    Raises:
      InputError: a map without start, goal, target or, where they are asked for, doors; or a number out of range.
    """

    transition: Transition
    temperature: Float[Array, ""]
    beta: Float[Array, ""]
    discount: Float[Array, ""]
    max_penalty: Float[Array, ""]
    at_goal: Bool[Array, "C S"]
    at_target: Bool[Array, " S"]
    place: Int32[Array, " n"]  # the states with a penalty
    coordinates: Float[Array, "n 2"]  # of these, from -1 to 1
    network: Network | None
    initial: Float[Array, " S"]
    environment: TabularEnvironment
    horizon: int = eqx.field(static=True, converter=plain("horizon"))
    rows: tuple[str, ...] = eqx.field(static=True)

    def __init__(self, options: FourRoomsOptions):
        require_choices(options)
        self.rows = map_rows(options.rows)
        grid = self.grid
        doors = grid.marked("d")
        closed = as_fraction(options, "closed", "0 leaves the doors open")
        always_open = not isinstance(options.closed, jax.Array) and options.closed == 0
        entry = None if always_open else jnp.where(doors, 1 - closed, 1)
        self.transition = dynamics(grid, options.slip, options.transition, entry)
        self.temperature = ShannonEntropy(options.temperature).temperature
        self.beta = as_float("beta", options.beta, float)
        self.discount = as_float("discount", options.discount, float)
        self.max_penalty = as_float("max_penalty", options.max_penalty, float)
        require_finite("beta", self.beta)
        require_finite("max_penalty", self.max_penalty)
        require_at_least("max_penalty", self.max_penalty, 0, "0 leaves the designer nothing to distribute")
        self.at_goal = jnp.asarray(_goals(grid, options))
        self.at_target = jnp.asarray(_one(grid, "target", options.target, "t"))
        self.initial = jnp.asarray(_one(grid, "origin", options.origin, "s"), float)
        if options.penalties == "doors":
            grid.marked("d", "door")
        self.place = jnp.asarray(np.flatnonzero(doors | (options.penalties == "cells")), jnp.int32)
        self.coordinates = _coordinates(grid)[self.place]
        self.network = _network(options)
        require_size(options, "horizon", most=MOST_STEPS)
        self.horizon = int(options.horizon)
        mdp = self._process(jnp.ones((*self.at_goal.shape, 1)))  # checks the discount where it is known
        by_successor = dynamics(grid, options.slip, "successor", entry)
        self.environment = TabularEnvironment(mdp.replace(transition=by_successor))

    @property
    def trajectories(self) -> int:
        """The number of trajectories per loss: 1."""
        return 1

    @property
    def loss_discount(self) -> Float[Array, ""]:
        """The designer discounts as the agent does."""
        return self.discount

    @property
    def grid(self) -> Grid:
        """The map; `incentive(x)` is a function of its cells."""
        return parse_map(self.rows)

    def start(self, key: PRNGKeyArray) -> Any:
        """w ~ N(0, 0.01^2), or a network drawn at random whose outputs are small, and 0."""
        if self.network is None:
            return 0.01 * jax.random.normal(key, (self.place.size + 1,))
        return {"network": self.network.init(key, self.coordinates[0], 1), "spare": jnp.zeros(())}

    def incentive(self, x: Any) -> Float[Array, " S"]:
        """The penalty of each cell, at most 0."""
        penalty = -self.max_penalty * jax.nn.softmax(self._weights(x))[:-1]
        if self.place.size == self.at_target.size:  # every cell
            return penalty
        return jnp.zeros(self.at_target.shape, penalty.dtype).at[self.place].set(penalty)

    def mdp(self, x):
        ends = self.at_goal[..., None]
        reward = jnp.where(ends, 1, self.incentive(x)[:, None])
        return self._process(reward)

    def regularizer(self, x):
        del x
        return ShannonEntropy(self.temperature)

    def objective(self, x, solution) -> Float[Array, ""]:
        value = policy_value(self._process(self._designer_reward(x)[..., None]), solution.policy)
        return -jnp.mean(value @ self.initial)

    def reward(self, x):
        return Table(self.mdp(x).reward.reshape(-1, self.transition.shape[-1]))

    def loss(self, key, x, trajectories) -> Float[Array, " H"]:
        del key
        reward = self._designer_reward(x).reshape(-1)[trajectories.observation[0]]
        return -jnp.where(trajectories.valid[0], reward, 0)

    def panels(self, x, solution):
        contexts = len(self.at_goal)
        goals = [tuple(self.grid.cells[np.flatnonzero(at)[0]].tolist()) for at in np.asarray(self.at_goal)]
        marks = {"T": self.at_target, "S": self.initial == 1}
        return tuple(
            grid_panel(
                f"goal at row {goals[context][0]}, column {goals[context][1]}" if contexts > 1 else "",
                self.grid,
                self.incentive(x),
                solution.policy[context],
                label="incentive",
                marks={"G": self.at_goal[context], **marks},
            )
            for context in range(contexts)
        )

    def _weights(self, x: Any) -> Float[ArrayLike, " n_and_spare"]:
        """w."""
        if self.network is None:
            return x
        of_cells = jax.vmap(self.network.apply, (None, 0))(x["network"], self.coordinates)
        return jnp.append(of_cells[:, 0], x["spare"])

    def _designer_reward(self, x: Any) -> Float[Array, "C S"]:
        """What the designer gets in each context and state."""
        price = self.beta * jnp.sum(jnp.abs(self.incentive(x)))
        return jnp.where(self.at_goal, -price, 0) + self.at_target.astype(price.dtype)[None]

    def _process(self, reward: Float[Array, " C S #A"]) -> MDP:
        """The agent's dynamics in each context with a reward [C, S, A] or [C, S, 1]."""
        shape = (*self.at_goal.shape, self.transition.shape[-1])
        discount = jnp.where(self.at_goal, 0, self.discount)[..., None]
        return MDP(self.transition, jnp.broadcast_to(reward, shape), jnp.broadcast_to(discount, shape), self.initial)


def _coordinates(grid: Grid) -> Float[Array, "S 2"]:
    """The row and the column of each cell, each from -1 to 1."""
    cells = np.asarray(grid.cells, float)
    middle = (cells.max(0) + cells.min(0)) / 2
    return jnp.asarray((cells - middle) / np.maximum(cells.max(0) - middle, 1), float)


def _network(options: FourRoomsOptions) -> Network | None:
    require_size(options, "width", most=MOST_WIDTH, why="networks that are wider than the map are of no use")
    if options.variable == "network":
        # Smooth in its inputs and parameters: normalized layers have a kink where all inputs are 0, as in the middle.
        return MLP(width=options.width, layer_norm=False, activation="silu")
    refuse_unused(options, ("width",), "has no effect unless variable is 'network'")
    return None


def _goals(grid: Grid, options: FourRoomsOptions) -> Bool[np.ndarray, "C S"]:
    """The goal of each context."""
    if options.goals is None:
        state = np.flatnonzero(grid.marked("g", "goal"))
        require_room_to_solve("rows", state.size, len(grid.cells), len(MOVES))
    else:
        goals = as_sequence("goals", options.goals, "(row, column)")
        if not goals:
            raise InputError("goals: give at least one (row, column)")
        require_room_to_solve("goals", len(goals), len(grid.cells), len(MOVES))
        state = np.array([grid.state("goals", goal) for goal in goals])
    return np.arange(len(grid.cells)) == state[:, None]


def _one(grid: Grid, name: str, cell: tuple[int, int] | None, letter: str) -> Bool[np.ndarray, " S"]:
    """A cell by its place or, without one, by its letter."""
    if cell is None:
        return grid.marked(letter, name, once=True)
    return np.arange(len(grid.cells)) == grid.state(name, cell)


register("four_rooms", FourRoomsOptions, FourRooms)
