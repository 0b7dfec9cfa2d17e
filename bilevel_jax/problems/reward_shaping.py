"""Reward shaping for a short-sighted agent: bonuses that lead it past a small reward to a large one.

This is the bilevel form of reward shaping (Hu et al., NeurIPS 2020, "Learning to utilize shaping rewards"). The upper
level chooses a bonus, the agent optimizes its shaped reward, and the upper level counts only the true reward.
"""

import dataclasses
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from bilevel_jax.bilevel import Problem, SampledProblem
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.functions import Table
from bilevel_jax.core.options import require_choices
from bilevel_jax.core.validation import as_float, plain, require_at_least, require_finite, require_fraction
from bilevel_jax.environments import TabularEnvironment, Trajectory
from bilevel_jax.mdp.process import MDP
from bilevel_jax.mdp.regularizers import ShannonEntropy
from bilevel_jax.mdp.transitions import SuccessorTransition, Transition
from bilevel_jax.problems.grid import dynamics, map_rows, parse_map
from bilevel_jax.problems.options import MOST_STEPS, refuse_unused, require_room_to_solve, require_whole
from bilevel_jax.problems.panels import Curves, grid_panel
from bilevel_jax.problems.registry import register
from bilevel_jax.solvers.policy_value import policy_value

MOST = 10_000  # states
ROWS = (
    "xxxxxxxxx",
    "xd  x   x",
    "x   x   x",
    "xs      x",
    "x   x   x",
    "x   x  gx",
    "xxxxxxxxx",
)
Layout = tuple[Transition, Bool[np.ndarray, " S"], Bool[np.ndarray, " S"], Bool[np.ndarray, " S"]]


@dataclasses.dataclass(frozen=True)
class RewardShapingOptions:
    """Reward shaping: bonuses that lead a short-sighted agent past a small reward near by to a large one far off.

    layout: "chain", states in a row with moves left and right; or "grid", a map with four moves.
    states: of the chain. It starts in its second state; the small exit is its first, the goal its last.
    rows: of the grid's map: x is a wall, s the start, g the goal (at least one), d a small exit; all else is free.
    discount, temperature: of the agent.
    true_discount: of the upper level.
    distractor: reward of the small exit; that of the goal is 1.
    bonus: "state" or "pair", what has a bonus of its own.
    scale: bonuses are between -scale and scale.
    price: weight of the sum of the squared bonuses / 2 in the objective.
    slip: probability that another move than the chosen one is made.
    horizon: steps of a sampled trajectory.
    """

    layout: Literal["chain", "grid"] = "chain"
    states: int = 10
    rows: tuple[str, ...] = ROWS
    discount: float = 0.7
    temperature: float = 0.05
    true_discount: float = 0.97
    distractor: float = 0.2
    bonus: Literal["state", "pair"] = "state"
    scale: float = 0.5
    price: float = 0.02
    slip: float = 0.1
    horizon: int = 500


class RewardShaping(Problem, SampledProblem):
    """The problem. The upper variable is x[S], or x[S A]; the bonus is scale * tanh(x).

    Acting in an exit (the goal or the distractor) pays its reward and ends the process (discount 0
    there); nothing else pays but the bonus, to the agent only. The upper level maximises the true reward
    from the start, discounted by `true_discount`, minus price |bonus|^2 / 2.

    A sampled trajectory is cut after `horizon` steps. The steps that are cut off are worth at most
    true_discount^horizon times the largest reward (2.4e-7 by default), and less where the agent has mostly left by
    then.

    Raises:
      InputError: sizes, texts or numbers out of range, a map without start or goal.
    """

    transition: Transition
    environment: TabularEnvironment  # emits the true reward
    initial: Float[Array, " S"]
    at_exit: Bool[Array, " S"]
    discount: Float[Array, ""]
    true_discount: Float[Array, ""]
    temperature: Float[Array, ""]
    scale: Float[Array, ""]
    price: Float[Array, ""]
    horizon: int = eqx.field(static=True, converter=plain("horizon"))
    by_pair: bool = eqx.field(static=True)
    rows: tuple[str, ...] | None = eqx.field(static=True)  # None: a chain

    def __init__(self, options: RewardShapingOptions):
        _check(options)
        layout = _chain(options) if options.layout == "chain" else _grid(options)
        self.transition, at_start, at_goal, at_distractor = layout
        require_room_to_solve("rows" if options.layout == "grid" else "states", *self.transition.shape)
        self.at_exit = jnp.asarray(at_goal | at_distractor)
        self.initial = jnp.asarray(at_start, float)
        distractor = as_float("distractor", options.distractor, float)
        require_finite("distractor", distractor)
        true = jnp.where(at_goal, 1, jnp.where(at_distractor, distractor, 0))
        for name in ("discount", "true_discount", "scale", "price"):
            setattr(self, name, as_float(name, getattr(options, name), float))
        require_fraction("discount", self.discount, "0.7 is short-sighted")
        require_fraction("true_discount", self.true_discount, "for long horizons use e.g. 0.99")
        for name in ("scale", "price"):
            require_finite(name, getattr(self, name))
            require_at_least(name, getattr(self, name), 0, "0 is none")
        self.temperature = ShannonEntropy(options.temperature).temperature
        self.horizon = int(options.horizon)
        self.by_pair = options.bonus == "pair"
        self.rows = map_rows(options.rows) if options.layout == "grid" else None
        # A simulator needs only to know which pairs end the process.
        self.environment = TabularEnvironment(self._process(true[:, None], jnp.asarray(0.5, float)))

    @property
    def trajectories(self) -> int:
        """The number of trajectories per loss: 1."""
        return 1

    @property
    def loss_discount(self) -> Float[Array, ""]:
        """The discount of the true reward."""
        return self.true_discount

    def start(self, key: PRNGKeyArray) -> Float[Array, " n"]:
        """x ~ N(0, 0.1^2), [S] or [S A]."""
        states, actions = self.transition.shape
        return 0.1 * jax.random.normal(key, (states * actions if self.by_pair else states,))

    def shaping(self, x: Float[Array, " n"]) -> Float[Array, " S #A"]:
        """The bonus, [S, A] or [S, 1]."""
        return self.scale * jnp.tanh(x).reshape(self.transition.shape[0], -1)

    def reward(self, x):
        return Table(self.environment.reward + self.shaping(x))

    def mdp(self, x):
        return self._process(self.reward(x).values, self.discount)

    def regularizer(self, x):
        del x
        return ShannonEntropy(self.temperature)

    def objective(self, x, solution) -> Float[Array, ""]:
        return self._cost(x) - self.true_return(solution.policy)

    def loss(self, key, x, trajectories: Trajectory) -> Float[Array, " H"]:
        del key
        steps = jnp.arange(self.horizon)
        # The price is due before the first action.
        return jnp.where(steps == 0, self._cost(x), 0) - jnp.where(trajectories.valid[0], trajectories.reward[0], 0)

    def panels(self, x, solution):
        bonus = np.asarray(self.shaping(x))  # [S, A] or [S, 1]
        policy = np.asarray(solution.policy)
        if self.rows is not None:
            grid = parse_map(self.rows)
            marks = {letter.upper(): grid.marked(letter) for letter in "sgd"}
            title = "the policy's mean bonus" if self.by_pair else "bonus"
            return (grid_panel(title, grid, np.sum(policy * bonus, -1), policy, label="bonus", marks=marks),)
        state = np.arange(len(policy))
        names = ("bonus, left", "bonus, right") if self.by_pair else ("bonus",)
        paid = {"true reward": np.asarray(self.environment.reward)[:, 0], **dict(zip(names, bonus.T, strict=True))}
        return (
            Curves(title="rewards", x=state, curves=paid, x_label="state", y_label="reward"),
            Curves(
                title="the agent's policy",
                x=state,
                curves={"right": policy[:, 1]},
                x_label="state",
                y_label="probability of a move to the right",
            ),
        )

    def true_return(self, policy: Float[Array, "S A"]) -> Float[Array, ""]:
        """Return the true reward of a policy from the start, discounted by `true_discount`."""
        return policy_value(self._process(self.environment.reward, self.true_discount), policy) @ self.initial

    def _cost(self, x: Float[Array, " n"]) -> Float[Array, ""]:
        return self.price * jnp.sum(self.shaping(x) ** 2) / 2

    def _process(self, reward: Float[Array, " S #A"], discount: Float[Array, ""]) -> MDP:
        """The dynamics with a reward [S, A] or [S, 1], and a discount where it does not end."""
        shape = self.transition.shape
        going = jnp.where(self.at_exit, 0, discount)[:, None]
        return MDP(self.transition, jnp.broadcast_to(reward, shape), jnp.broadcast_to(going, shape), self.initial)


def _chain(options: RewardShapingOptions) -> Layout:
    """Dynamics, and where start, goal and distractor are."""
    slip = as_float("slip", options.slip, float)
    require_fraction("slip", slip, "0 is none, 0.5 a random move")
    place = np.arange(options.states)
    moves = np.clip(np.stack([place - 1, place + 1], -1), 0, options.states - 1)  # [S, A]: left, right
    successor = jnp.asarray(np.stack([moves, moves[:, ::-1]]), jnp.int32)  # the chosen one first
    probability = jnp.broadcast_to(jnp.stack([1 - slip, slip])[:, None, None], successor.shape)
    return SuccessorTransition(successor, probability), place == 1, place == options.states - 1, place == 0


def _grid(options: RewardShapingOptions) -> Layout:
    """Dynamics, and where start, goals and distractors are."""
    grid = parse_map(options.rows)
    places = grid.marked("s", "start", once=True), grid.marked("g", "goal"), grid.marked("d")
    return dynamics(grid, options.slip, "successor"), *places


def _check(options: RewardShapingOptions) -> None:
    require_choices(options)
    require_whole(options, "states", "horizon")
    unused = "rows" if options.layout == "chain" else "states"
    refuse_unused(options, (unused,), f"has no effect in the layout {options.layout!r}")
    if not 3 <= options.states <= MOST:
        limit = "at least 3 (exit, start and goal)" if options.states < 3 else f"at most {MOST}"
        raise InputError(f"states must be {limit}, got {options.states}")
    if not 1 <= options.horizon <= MOST_STEPS:
        limit = "at least 1" if options.horizon < 1 else f"at most {MOST_STEPS}"
        raise InputError(f"horizon must be {limit}, got {options.horizon}; the default is 500")


register("reward_shaping", RewardShapingOptions, RewardShaping)
