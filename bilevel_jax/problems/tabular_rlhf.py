"""Reinforcement learning from a teacher's preferences, on a random MDP small enough to be exact.

The bilevel form of Yang, Gao and Yuan (AISTATS 2025): the upper level fits a reward model to labels on
pairs of segments, and the segments come from the policy that is optimal for that reward model. The MDP
is a Garnet (Archibald, McKinnon and Thomas 1995).
"""

import dataclasses
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from bilevel_jax.bilevel import Problem, SampledProblem
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.functions import Table
from bilevel_jax.core.options import require_choices
from bilevel_jax.core.validation import as_float, plain, require_at_least, require_finite
from bilevel_jax.environments import TabularEnvironment, Trajectory
from bilevel_jax.mdp.process import MDP
from bilevel_jax.mdp.regularizers import KLDivergence, ShannonEntropy
from bilevel_jax.mdp.transitions import SuccessorTransition
from bilevel_jax.preferences import Teacher, log_likelihood, segment_return
from bilevel_jax.problems.options import (
    require_count,
    require_room_for,
    require_room_to_solve,
    require_seed,
    require_whole,
)
from bilevel_jax.problems.panels import pair_panel
from bilevel_jax.problems.random_process import MOST_MINIMA, smallest
from bilevel_jax.problems.registry import register
from bilevel_jax.solvers.policy_value import policy_value

MOST = 10_000  # states, actions or features
MOST_SEGMENTS = 16_384  # the exact objective compares each with each
TILE = 128  # segments compared at a time


@dataclasses.dataclass(frozen=True)
class TabularRLHFOptions:
    """RLHF on a random MDP: a reward model fitted to a teacher's labels on segments of its own optimal policy.

    states, actions: size of the MDP.
    branching: successors that each pair has.
    starts: a process starts in one of the first `starts` states, uniformly.
    length: steps of a segment, which is also the horizon.
    discount, temperature: of the lower level.
    regularizer: "entropy", or "kl" to a random reference policy.
    features: of the reward model, random; 0 is one weight for each pair instead.
    rationality: the teacher's inverse temperature.
    noise: probability that a label is a guess.
    tie_threshold: the teacher mostly declares a tie where returns are closer than this.
    labels: "expected", the loss averaged over the labels of a pair; or "sampled", one label per pair.
    ridge: weight of |x|^2 / 2 in the objective.
    seed: of the MDP, the hidden reward, the features and the reference (not of the starting point).
    """

    states: int = 8
    actions: int = 3
    branching: int = 2
    starts: int = 8
    length: int = 3
    discount: float = 0.9
    temperature: float = 0.5
    regularizer: Literal["entropy", "kl"] = "entropy"
    features: int = 0
    rationality: float = 2.0
    noise: float = 0.05
    tie_threshold: float = 0.0
    labels: Literal["expected", "sampled"] = "expected"
    ridge: float = 1e-3
    seed: int = 0


class TabularRLHF(Problem, SampledProblem):
    """The problem. The upper variable is x[S A], one weight per pair, or x[F] with r_x = features @ x.

    Two segments of H steps are drawn under pi*(x), the teacher labels them by their undiscounted return
    under `hidden_reward`, and the upper level pays the negative Bradley-Terry log-likelihood of the label
    under r_x, and ridge |x|^2 / 2. With features the hidden reward is one of the model's, features @ w
    with w ~ N(0, 1).

    `objective` is exact: it enumerates all N = starts A (A K)^(H - 1) segments and sums over all pairs, at
    O(N^2) time and O(N) memory. Sizes with at most 16,384 segments are accepted, e.g. 8 starts, 3 actions
    and 2 successors for up to 4 steps (5,184; the default's 3 steps have 864), or 8 starts, 2 actions and
    2 successors for up to 6 steps (16,384).

    Raises:
      InputError: sizes, a seed, texts or numbers out of range, or too many segments.
    """

    transition: SuccessorTransition
    environment: TabularEnvironment  # emits the hidden reward
    initial: Float[Array, " S"]
    discount: Float[Array, ""]
    temperature: Float[Array, ""]
    reference: Float[Array, "S A"] | None
    features: Float[Array, "S A F"] | None
    teacher: Teacher
    ridge: Float[Array, ""]
    horizon: int = eqx.field(static=True, converter=plain("horizon"))
    starts: int = eqx.field(static=True)
    sampled: bool = eqx.field(static=True)

    def __init__(self, options: TabularRLHFOptions):
        _check_sizes(options)
        shape = (options.states, options.actions)
        keys = jax.random.split(jax.random.key(options.seed), 5)
        require_room_for("states, actions", options.states, *shape, copies=4 if options.branching <= MOST_MINIMA else 9)
        require_room_for("branching", options.branching, *shape, copies=10)
        require_room_to_solve("states, actions", *shape)
        require_room_for("features", *shape, max(1, options.features), copies=4)
        numbers = jax.random.uniform(keys[0], (options.states, *shape))
        mass = jax.random.exponential(keys[1], (options.branching, *shape))
        self.transition = SuccessorTransition(
            smallest(jnp.moveaxis(numbers, 0, -1), options.branching), mass / jnp.sum(mass, 0, keepdims=True)
        )
        size = (*shape, options.features)
        self.features = jax.random.normal(keys[2], size) / options.features**0.5 if options.features else None
        weights = jax.random.normal(keys[3], size[2:] if options.features else shape)
        hidden = weights if self.features is None else self.features @ weights
        self.initial = jnp.where(jnp.arange(options.states) < options.starts, 1 / options.starts, jnp.zeros(()))
        # A simulator needs only to know that no pair ends the process.
        self.environment = TabularEnvironment(MDP(self.transition, hidden, 0.5, self.initial))
        self.discount = as_float("discount", options.discount, float)
        self.temperature = ShannonEntropy(options.temperature).temperature
        logits = jax.random.normal(keys[4], shape)
        self.reference = jax.nn.softmax(logits) if options.regularizer == "kl" else None
        self.teacher = Teacher(options.rationality, options.noise, options.tie_threshold)
        self.ridge = as_float("ridge", options.ridge, float)
        require_finite("ridge", self.ridge)
        require_at_least("ridge", self.ridge, 0, "0 leaves the weights free")
        self.horizon = int(options.length)
        self.starts = int(options.starts)
        self.sampled = options.labels == "sampled"
        self.mdp(self.start(keys[0]))  # checks the discount where it is known

    @property
    def trajectories(self) -> int:
        """The number of trajectories per loss: the 2 segments of a pair."""
        return 2

    @property
    def loss_discount(self) -> Float[Array, ""]:
        """The discount of the loss: 1, because a pair is paid for as a whole."""
        return jnp.ones_like(self.discount)

    @property
    def hidden_reward(self) -> Float[Array, "S A"]:
        """The reward by which the teacher judges."""
        return self.environment.reward

    def start(self, key: PRNGKeyArray) -> Float[Array, " n"]:
        """x ~ N(0, 0.1^2), [S A] or [F]."""
        size = self.hidden_reward.size if self.features is None else self.features.shape[-1]
        return 0.1 * jax.random.normal(key, (size,))

    def reward(self, x):
        shape = self.hidden_reward.shape
        return Table(x.reshape(shape) if self.features is None else self.features @ x)

    def mdp(self, x):
        return self._process(self.reward(x).values)

    def regularizer(self, x):
        del x
        if self.reference is None:
            return ShannonEntropy(self.temperature)
        return KLDivergence(self.temperature, self.reference)

    def objective(self, x, solution) -> Float[Array, ""]:
        probability, learned, hidden = self.segments(solution.policy, self.reward(x).values)
        return self._pair_loss(probability, learned, hidden) + self._price(x)

    def loss(self, key, x, trajectories: Trajectory) -> Float[Array, ""]:
        taken = self.reward(x).values[trajectories.observation, trajectories.action]
        learned = segment_return(taken, trajectories.valid)
        hidden = segment_return(trajectories.reward, trajectories.valid)
        label = self.teacher.label(key, *hidden) if self.sampled else self.teacher.mean_label(*hidden)
        return self._price(x) - log_likelihood(learned[0], learned[1], label.astype(learned.dtype))

    def panels(self, x, solution):
        return (
            pair_panel("the teacher's reward", self.hidden_reward, "reward"),
            pair_panel("the learned reward", self.reward(x).values, "reward"),
            pair_panel("the agent's policy", solution.policy, "probability"),
        )

    def true_return(self, policy: Float[Array, "S A"]) -> Float[Array, ""]:
        """Return the discounted hidden reward of a policy from the start."""
        process = self._process(self.hidden_reward)
        return policy_value(process, policy) @ process.initial

    def segments(
        self, policy: Float[Array, "S A"], reward: Float[Array, "S A"]
    ) -> tuple[Float[Array, " N"], Float[Array, " N"], Float[Array, " N"]]:
        """Return every segment's probability under the policy, return under the reward, and hidden return.

        A segment that is reached by several paths through the tree of actions and successors is listed once per path.
        """
        successor = jnp.moveaxis(self.transition.successor, 0, -1)  # [S, A, K]
        chance = jnp.moveaxis(self.transition.probability, 0, -1)
        state = jnp.arange(self.starts, dtype=jnp.int32)
        probability = self.initial[: self.starts].astype(policy.dtype)
        learned, hidden = (jnp.zeros(self.starts, table.dtype) for table in (reward, self.hidden_reward))
        for step in range(self.horizon):
            if step > 0:  # every successor of every pair, after [n, A]
                probability = (probability[..., None] * chance[state].astype(policy.dtype)).reshape(-1)
                slots = chance.shape[-1]
                learned, hidden = (jnp.repeat(total.reshape(-1), slots) for total in (learned, hidden))
                state = successor[state].reshape(-1)
            probability = probability[:, None] * policy[state]
            learned = learned[:, None] + reward[state]
            hidden = hidden[:, None] + self.hidden_reward[state]
        return probability.reshape(-1), learned.reshape(-1), hidden.reshape(-1)

    def _pair_loss(
        self, probability: Float[Array, " N"], learned: Float[Array, " N"], hidden: Float[Array, " N"]
    ) -> Float[Array, ""]:
        """sum_ij p_i p_j loss_ij over pairs of segments. The loss is symmetric: i <= j suffices."""
        count = -(-probability.size // TILE)
        pad = count * TILE - probability.size
        rows = [jnp.pad(part, (0, pad)).reshape(count, TILE) for part in (probability, learned, hidden)]

        @jax.checkpoint  # a tile is made anew for its derivative; kept, all would take O(N^2) memory
        def add(total, tile):
            (p, r, g), (q, s, h) = ([row[index] for row in rows] for index in tile)
            label = self.teacher.mean_label(g[:, None], h).astype(r.dtype)
            paid = p @ -log_likelihood(r[:, None], s, label) @ q
            return total + jnp.where(tile[0] == tile[1], paid, 2 * paid), None

        tiles = tuple(jnp.asarray(index, jnp.int32) for index in np.triu_indices(count))
        return lax.scan(add, jnp.zeros((), learned.dtype), tiles)[0]

    def _price(self, x: Float[Array, " n"]) -> Float[Array, ""]:
        return self.ridge * jnp.sum(x**2) / 2

    def _process(self, reward: Float[Array, "S A"]) -> MDP:
        return MDP(self.transition, reward, self.discount, self.initial)


def _check_sizes(options: TabularRLHFOptions) -> None:
    require_whole(options, "states", "actions", "branching", "starts", "length", "features")
    most = {"branching": options.states, "starts": options.states}
    for name in ("states", "actions", "branching", "starts", "length", "features"):
        size, least = getattr(options, name), 0 if name == "features" else 1
        if not least <= size <= most.get(name, MOST):
            limit = f"at least {least}" if size < least else f"at most {most.get(name, MOST)}"
            raise InputError(f"{name} must be {limit}{' (the number of states)' * (name in most)}, got {size}")
    require_choices(options)
    require_seed(options)
    count = options.starts * options.actions * (options.actions * options.branching) ** (options.length - 1)
    require_count(
        "length",
        count,
        MOST_SEGMENTS,
        f"{options.length} steps make {{count}} segments (starts * actions * (actions * branching)^(length - 1))",
        "can be compared exactly; take fewer steps, starts, actions or successors",
    )


register("tabular_rlhf", TabularRLHFOptions, TabularRLHF)
