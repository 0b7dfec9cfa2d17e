"""Inverse reinforcement learning: a reward that explains demonstrations, by maximum causal entropy.

This is the model of Ziebart, Bagnell and Dey (ICML 2010, "Modeling interaction via the principle of maximum causal
entropy"), with a discount and an infinite horizon as in Bloem and Bambos (CDC 2014). The demonstrator follows the soft
optimal policy of an unknown reward. The upper level chooses the reward under which the demonstrations are most likely.
"""

import dataclasses
import functools
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from bilevel_jax.bilevel import Problem
from bilevel_jax.core.errors import ConvergenceError, InputError
from bilevel_jax.core.functions import Table
from bilevel_jax.core.options import require_choices
from bilevel_jax.core.results import check, where_converged
from bilevel_jax.core.validation import as_float, is_known, require_finite
from bilevel_jax.environments import TabularEnvironment, rollout
from bilevel_jax.mdp.process import MDP
from bilevel_jax.mdp.regularizers import Regularizer, ShannonEntropy
from bilevel_jax.mdp.transitions import SuccessorTransition
from bilevel_jax.problems.demonstrations import visits_of_file
from bilevel_jax.problems.grid import Grid, dynamics, map_rows, parse_map
from bilevel_jax.problems.options import (
    as_fraction,
    as_number,
    refuse_unused,
    require_room_for,
    require_room_to_solve,
    require_seed,
    require_size,
)
from bilevel_jax.problems.panels import grid_panel
from bilevel_jax.problems.registry import register
from bilevel_jax.solvers import solve
from bilevel_jax.solvers.occupancy import occupancy

ROWS = (
    "xxxxxxxxx",
    "xs..~...x",
    "x...~.~.x",
    "x.x.~.~.x",
    "x.....~gx",
    "xxxxxxxxx",
)


@dataclasses.dataclass(frozen=True)
class InverseRLOptions:
    """Inverse reinforcement learning: a reward under which demonstrations on a map are most likely.

    rows: of the map: x is a wall, s the start (without one it is anywhere); the other letters are kinds of ground.
    grounds: the letters of the kinds of ground, s being of the first.
    expert: the expert's reward of each kind of ground.
    features: of the reward model: "ground", a weight for each kind; "state", for each cell; or "pair".
    demonstrations: how many are drawn; with 0 their expectation is used instead.
    length: steps of a drawn demonstration.
    demonstrations_file: .npz or .csv with demonstrations of your own instead of the expert's, relative to the config
      (in Python, to the working directory); see `bilevel_jax.problems.demonstrations`.
    estimator: "likelihood", x makes the demonstrations most likely; or "visits", x has the features visited as often
      as in them, as MCE-IRL does.
    discount, temperature: of the expert and of the model.
    slip: probability that another move than the chosen one is made.
    ridge: weight of |x|^2 / 2 in the objective.
    seed: of the demonstrations (not of the starting point).
    """

    rows: tuple[str, ...] = ROWS
    grounds: str = ".~g"
    expert: tuple[float, ...] = (0.0, -2.0, 3.0)
    features: Literal["ground", "state", "pair"] = "ground"
    demonstrations: int = 0
    length: int = 50
    demonstrations_file: str = dataclasses.field(default="", metadata={"path": True})
    estimator: Literal["likelihood", "visits"] = "likelihood"
    discount: float = 0.9
    temperature: float = 1.0
    slip: float = 0.1
    ridge: float = 0.0
    seed: int = 0


class InverseRL(Problem):
    """The problem. The upper variable is x[F], the reward is features @ x: of a kind of ground, a cell or a pair.

    `visits` is the expert's discounted occupancy, or the mean over demonstrations of
    sum_t discount^t 1{s_t = s, a_t = a}; the expert is itself the soft optimal policy of its reward. The upper level
    minimises, with the estimator "likelihood" and pi_x the soft optimal policy,
      -sum_sa visits[s, a] log pi_x(a|s) + ridge |x|^2 / 2,
    and with "visits"
      (initial' V_x - sum_sa visits[s, a] reward_x[s, a]) / temperature + ridge |x|^2 / 2,
    the dual of maximum causal entropy. The gradient of the latter without ridge is
    (features' (d_x - visits)) / temperature, where d_x is the model's occupancy: at its minimum, features are visited
    as often as in the demonstrations. It is convex. Demonstrations that end are too short by discount^length. For
    "visits", visits are therefore scaled to the sum of an occupancy, 1 / (1 - discount). Otherwise the sum over all
    features, which no reward changes, could not match.

    For the occupancy of any policy both estimators minimise the same function, because -sum visits log pi telescopes.
    For a sample of demonstrations they differ: "visits" treats the successors that happened to be drawn as if the
    expert had wanted them, while the likelihood depends only on the actions, given the states. Both are consistent.
    Features that the demonstrations never (or always) visit have no finite weight in either; give a ridge.

    Rewards that differ by a constant have the same policy, so that some direction of x is flat.

    The upper level's loss depends on demonstrations and policy, not on trajectories of the agent: this is no
    `bilevel_jax.SampledProblem`.

    Raises:
      InputError: letters without a kind, sizes, a seed, texts or numbers out of range, a file that cannot be read as
        demonstrations on this map, or options that have no effect beside it.
      ConvergenceError: the expert's policy could not be computed. Where options are traced, visits are NaN then.
    """

    transition: SuccessorTransition
    initial: Float[Array, " S"]
    features: Float[Array, "S A F"]
    visits: Float[Array, "S A"]
    discount: Float[Array, ""]
    temperature: Float[Array, ""]
    ridge: Float[Array, ""]
    rows: tuple[str, ...] = eqx.field(static=True)
    estimator: str = eqx.field(static=True)

    def __init__(self, options: InverseRLOptions):
        require_choices(options)
        self.rows = map_rows(options.rows)
        grid = self.grid
        ground = _ground(grid, options)
        starts = grid.marked("s", "start", once=True) if "s" in grid.letters else np.ones(len(ground))
        self.initial = jnp.asarray(starts / starts.sum(), float)
        transition = dynamics(grid, options.slip, "successor")
        assert isinstance(transition, SuccessorTransition)
        self.transition = transition
        states, actions = transition.shape
        require_room_to_solve("rows", states, actions)
        self.features = jnp.asarray(_features(ground, actions, options.features), float)
        self.estimator = options.estimator
        self.discount = as_fraction(options, "discount", "for long horizons use e.g. 0.99")
        self.temperature = ShannonEntropy(options.temperature).temperature
        self.ridge = as_number(options, "ridge", 0, "0 leaves the weights free")
        expert = as_float("expert", options.expert, float, (len(options.grounds),))
        require_finite("expert", expert)
        reward = jnp.broadcast_to((jnp.asarray(ground, float) @ expert)[:, None], (states, actions))
        visits = _visits(self._process(reward), self.regularizer(None), options)
        scale = 1 if self.estimator == "likelihood" else 1 / ((1 - self.discount) * jnp.sum(visits))
        self.visits = visits * scale

    @property
    def grid(self) -> Grid:
        """The map; states are its free cells."""
        return parse_map(self.rows)

    def start(self, key: PRNGKeyArray) -> Float[Array, " F"]:
        """x ~ N(0, 0.1^2)."""
        return 0.1 * jax.random.normal(key, self.features.shape[-1:], self.features.dtype)

    def mdp(self, x):
        return self._process(self.features @ x)

    def regularizer(self, x):
        del x
        return ShannonEntropy(self.temperature)

    def objective(self, x, solution) -> Float[Array, ""]:
        if self.estimator == "likelihood":
            gap = jnp.sum(self.visits * (solution.value[:, None] - solution.q))
        else:
            gap = self.initial @ solution.value - jnp.sum(self.visits * (self.features @ x))
        return gap / self.temperature + self.ridge * jnp.sum(x**2) / 2

    def panels(self, x, solution):
        visits, policy = np.asarray(self.visits), np.asarray(solution.policy)
        seen = visits.sum(-1, keepdims=True)
        expert = np.where(seen > 0, visits / np.where(seen > 0, seen, 1), np.nan)
        model = occupancy(self.mdp(x), solution.policy)
        start = {"S": np.asarray(self.initial) == 1}
        reward = np.sum(policy * np.asarray(self.mdp(x).reward), -1)
        return (
            grid_panel("the expert", self.grid, seen[:, 0], expert, label="discounted visits", marks=start),
            grid_panel("the model", self.grid, model.sum(-1), policy, label="discounted visits", marks=start),
            grid_panel("the reward found", self.grid, reward - reward.max(), label="reward below its largest"),
        )

    def _process(self, reward: Float[Array, "S A"]) -> MDP:
        return MDP(self.transition, reward, self.discount, self.initial)


def _ground(grid: Grid, options: InverseRLOptions) -> Float[np.ndarray, "S kinds"]:
    """Which kind of ground each cell is, one-hot."""
    if not options.grounds or len(set(options.grounds)) < len(options.grounds):
        raise InputError(f"grounds: expected different letters, at least one, got {options.grounds!r}")
    unknown = sorted(set(np.unique(grid.letters).tolist()) - set(options.grounds) - {"s"})
    if unknown:
        raise InputError(f"grounds: {options.grounds!r} lacks {', '.join(map(repr, unknown))} of the map; add them")
    letters = np.where(grid.letters == "s", options.grounds[0], grid.letters)
    return (letters[:, None] == np.array(list(options.grounds))).astype(float)


def _features(ground: Float[np.ndarray, "S kinds"], actions: int, kind: str) -> Float[np.ndarray, "S A F"]:
    """Features of a kind, from the one-hot grounds."""
    states = len(ground)
    sizes = {"ground": ground.shape[1], "state": states, "pair": states * actions}
    require_room_for("features", states, actions, sizes[kind], copies=4)  # as they are made, and transposed
    number = jnp.result_type(float)
    if kind == "pair":
        return np.eye(states * actions, dtype=number).reshape(states, actions, -1)
    return np.repeat((ground.astype(number) if kind == "ground" else np.eye(states, dtype=number))[:, None], actions, 1)


def _visits(mdp: MDP, regularizer: Regularizer, options: InverseRLOptions) -> Float[Array, "S A"]:
    """How often each pair is visited, discounted: by the optimal policy, by drawn demonstrations, or by a file's."""
    require_size(options, "demonstrations", least=0, most=1_000_000)
    require_size(options, "length")
    require_seed(options)
    if options.demonstrations_file:
        unused = ("expert", "demonstrations", "length", "seed")
        refuse_unused(
            options, unused, "has no effect beside demonstrations_file, whose demonstrations are used instead"
        )
        return visits_of_file(options.demonstrations_file, mdp)
    require_room_for("demonstrations", options.demonstrations, options.length, copies=8)
    policy = _expert_policy(mdp, regularizer)
    if not options.demonstrations:
        refuse_unused(options, ("length",), "has no effect unless demonstrations are drawn (their number is 0)")
        return _require_known_visits(occupancy(mdp, policy))
    # A simulator needs only to know that no pair ends the process.
    simulator = TabularEnvironment(mdp.replace(discount=jnp.full_like(mdp.discount, 0.5)))
    key = jax.random.key(options.seed)
    return _drawn_visits(key, simulator, policy, mdp.discount, options.demonstrations, options.length)


@functools.partial(jax.jit, static_argnums=(4, 5))  # for other numbers, nothing is compiled anew
def _drawn_visits(
    key: PRNGKeyArray,
    simulator: TabularEnvironment,
    policy: Float[Array, "S A"],
    discount: Float[Array, ""],
    demonstrations: int,
    length: int,
) -> Float[Array, "S A"]:
    """The mean over drawn demonstrations of how often each pair is visited, discounted; NaN as the policy."""
    drawn = rollout(key, simulator, Table(policy), batch=demonstrations, horizon=length)
    weight = discount ** jnp.arange(length, dtype=discount.dtype) / demonstrations
    visits = jnp.zeros_like(policy).at[drawn.observation, drawn.action].add(weight)
    return jnp.where(jnp.isfinite(policy), visits, jnp.nan)


def _expert_policy(mdp: MDP, regularizer: Regularizer) -> Float[Array, "S A"]:
    """The optimal policy. Raises ConvergenceError without one; where numbers are traced, it is NaN then."""
    solution = solve(mdp, regularizer)
    if is_known(solution.result):
        return check(solution).policy
    return where_converged(solution.result, solution.policy)


def _require_known_visits(visits: Float[Array, "S A"]) -> Float[Array, "S A"]:
    """Raise ConvergenceError where a linear solve did not converge, which `occupancy` says by NaN."""
    if is_known(visits) and not np.isfinite(np.asarray(visits)).all():
        raise ConvergenceError("expert: the linear solve for its visits did not converge; lower the discount")
    return visits


register("inverse_rl", InverseRLOptions, InverseRL)
