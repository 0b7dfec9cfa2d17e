"""Inverse reinforcement learning: a reward that explains demonstrations, by maximum causal entropy.

The model of Ziebart, Bagnell and Dey (ICML 2010, "Modeling interaction via the principle of maximum causal
entropy"), with a discount and an infinite horizon as in Bloem and Bambos (CDC 2014): the demonstrator's policy is
the soft optimal one of an unknown reward. Its likelihood as an upper level makes the problem bilevel.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bilevel_jax.bellman import action_values, backup
from bilevel_jax.environments import TabularEnvironment, rollout
from bilevel_jax.errors import InputError
from bilevel_jax.functions import Table
from bilevel_jax.mdp import MDP
from bilevel_jax.occupancy import occupancy
from bilevel_jax.problems.grid import Grid, dynamics, parse_map
from bilevel_jax.problems.options import as_fraction, as_number, require_seed, require_size
from bilevel_jax.problems.panels import grid_panel
from bilevel_jax.problems.registry import register
from bilevel_jax.regularizers import Regularizer, ShannonEntropy
from bilevel_jax.transitions import SuccessorTransition
from bilevel_jax.validation import as_float, require_finite

ROWS = (
    "xxxxxxxxx",
    "xs..~...x",
    "x...~.~.x",
    "x.x.~.~.x",
    "x.....~gx",
    "xxxxxxxxx",
)
MOST_SWEEPS = 100_000


@dataclasses.dataclass(frozen=True)
class InverseRLOptions:
    """Inverse reinforcement learning: a reward under which demonstrations on a map are most likely.

    rows: of the map: x is a wall, s the start (without one it is anywhere); the other letters are kinds of ground.
    grounds: the letters of the kinds of ground, s being of the first.
    expert: the expert's reward of each kind of ground.
    features: of the reward model: "ground", a weight for each kind; "state", for each cell; or "pair".
    demonstrations: how many are drawn; 0 has their expectation instead.
    length: steps of a drawn demonstration.
    discount, temperature: of the expert and of the model.
    slip: probability that another move than the chosen one is made.
    ridge: weight of |x|^2 / 2 in the objective.
    seed: of the demonstrations (not of the starting point).
    """

    rows: tuple[str, ...] = ROWS
    grounds: str = ".~g"
    expert: tuple[float, ...] = (0.0, -2.0, 3.0)
    features: str = "ground"
    demonstrations: int = 0
    length: int = 50
    discount: float = 0.9
    temperature: float = 1.0
    slip: float = 0.1
    ridge: float = 0.0
    seed: int = 0


class InverseRL(eqx.Module):
    """The problem. The upper variable is x[F], the reward is features @ x: of a kind of ground, a cell or a pair.

    The upper level minimises -sum_sa visits[s, a] log pi_x(a|s) + ridge |x|^2 / 2, pi_x the soft optimal
    policy. `visits` is the expert's discounted occupancy, or the mean over drawn demonstrations of
    sum_t discount^t 1{s_t = s, a_t = a}; the expert is itself the soft optimal policy of its reward.

    With the occupancy of any policy, the gradient without ridge is (features' (d_x - visits)) / temperature,
    d_x the model's occupancy: at the minimum features are visited as often as the expert visits them, which
    is the dual of maximum causal entropy. The objective is then convex. Rewards that differ by a constant
    have the same policy, so that some direction of x is flat.

    What the upper level pays depends on demonstrations and policy, not on trajectories of the agent: this
    is no `bilevel_jax.SampledProblem`.

    Raises:
      InputError: letters without a kind, sizes, a seed, texts or numbers out of range.
    """

    transition: SuccessorTransition
    initial: jax.Array  # [S]
    features: jax.Array  # [S, A, F]
    visits: jax.Array  # [S, A]
    discount: jax.Array
    temperature: jax.Array
    ridge: jax.Array
    rows: tuple[str, ...] = eqx.field(static=True)

    def __init__(self, options: InverseRLOptions):
        self.rows = options.rows
        grid = self.grid
        ground = _ground(grid, options)
        starts = grid.marked("s", "start", once=True) if "s" in grid.letters else np.ones(len(ground))
        self.initial = jnp.asarray(starts / starts.sum(), float)
        transition = dynamics(grid, options.slip, "successor")
        assert isinstance(transition, SuccessorTransition)
        self.transition = transition
        states, actions = transition.shape
        kinds = {
            "ground": np.repeat(ground[:, None], actions, 1),
            "state": np.repeat(np.eye(states)[:, None], actions, 1),
            "pair": np.eye(states * actions).reshape(states, actions, -1),
        }
        if options.features not in kinds:
            raise InputError(f"features: expected one of {', '.join(kinds)}, got {options.features!r}")
        self.features = jnp.asarray(kinds[options.features], float)
        self.discount = as_fraction(options, "discount", "for long horizons use e.g. 0.99")
        self.temperature = ShannonEntropy(options.temperature).temperature
        self.ridge = as_number(options, "ridge", 0, "0 leaves the weights free")
        expert = as_float("expert", options.expert, float, (len(options.grounds),))
        require_finite("expert", expert)
        reward = jnp.broadcast_to((jnp.asarray(ground, float) @ expert)[:, None], (states, actions))
        self.visits = _demonstrate(self._process(reward), self.regularizer(None), options)

    @property
    def grid(self) -> Grid:
        """The map; states are its free cells."""
        return parse_map(self.rows)

    def start(self, key: jax.Array) -> jax.Array:
        """x ~ N(0, 0.1^2), [F]."""
        return 0.1 * jax.random.normal(key, self.features.shape[-1:], self.features.dtype)

    def mdp(self, x):
        return self._process(self.features @ x)

    def regularizer(self, x):
        del x
        return ShannonEntropy(self.temperature)

    def objective(self, x, solution):
        log_policy = (solution.q - solution.value[:, None]) / self.temperature
        return -jnp.sum(self.visits * log_policy) + self.ridge * jnp.sum(x**2) / 2

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

    def _process(self, reward: jax.Array) -> MDP:
        return MDP(self.transition, reward, self.discount, self.initial)


def _ground(grid: Grid, options: InverseRLOptions) -> np.ndarray:
    """Which kind of ground each cell is, one-hot [S, kinds]."""
    if not options.grounds or len(set(options.grounds)) < len(options.grounds):
        raise InputError(f"grounds: expected different letters, at least one, got {options.grounds!r}")
    unknown = sorted({str(letter) for letter in grid.letters} - set(options.grounds) - {"s"})
    if unknown:
        raise InputError(f"grounds: {options.grounds!r} lacks {', '.join(map(repr, unknown))} of the map; add them")
    letters = np.where(grid.letters == "s", options.grounds[0], grid.letters)
    return (letters[:, None] == np.array(list(options.grounds))).astype(float)


def _demonstrate(mdp: MDP, regularizer: Regularizer, options: InverseRLOptions) -> jax.Array:
    """How often each pair is visited, discounted, where the policy is optimal; expected or in a sample."""
    require_size(options, "demonstrations", least=0, most=1_000_000)
    require_size(options, "length")
    require_seed(options)
    policy = regularizer.policy(action_values(mdp, _optimal_value(mdp, regularizer)))
    if not options.demonstrations:
        return occupancy(mdp, policy)
    # A simulator needs only to know that no pair ends the process.
    simulator = TabularEnvironment(mdp.replace(discount=jnp.full_like(mdp.discount, 0.5)))
    key = jax.random.key(options.seed)
    drawn = rollout(key, simulator, Table(policy), batch=options.demonstrations, horizon=options.length)
    weight = mdp.discount ** jnp.arange(options.length, dtype=mdp.discount.dtype) / options.demonstrations
    return jnp.zeros_like(policy).at[drawn.observation, drawn.action].add(weight)


def _optimal_value(mdp: MDP, regularizer: Regularizer) -> jax.Array:
    """V = T V to working precision, by sweeps: problems stand below the solvers."""
    eps = jnp.finfo(mdp.reward.dtype).eps

    def goes_on(carry):
        value, change, sweeps = carry
        return (change > 4 * eps * jnp.max(jnp.abs(value))) & (sweeps < MOST_SWEEPS)

    def sweep(carry):
        value, _, sweeps = carry
        following = backup(mdp, regularizer, value)
        return following, jnp.max(jnp.abs(following - value)), sweeps + 1

    first = backup(mdp, regularizer, jnp.zeros_like(mdp.initial))
    return lax.while_loop(goes_on, sweep, (first, jnp.full((), jnp.inf, first.dtype), 0))[0]


register("inverse_rl", InverseRLOptions, InverseRL)
