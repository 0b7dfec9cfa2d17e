"""Stackelberg stochastic games: a leader commits to a stationary policy, a follower answers it.

Letchford, MacDermed, Conitzer, Parr and Isbell (AAAI 2012) and Vorobeychik and Singh (AAAI 2012) compute the leader's
policy for followers that answer with a best response. Here the follower's entropy makes its answer unique and smooth,
so that the leader can follow a gradient. As the temperature tends to 0, the answer tends to a best response.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from bilevel_jax.bilevel import Problem
from bilevel_jax.mdp.process import MDP
from bilevel_jax.mdp.regularizers import ShannonEntropy
from bilevel_jax.mdp.transitions import SuccessorTransition
from bilevel_jax.problems.options import as_fraction, as_number, require_room_to_solve, require_seed, require_size
from bilevel_jax.problems.panels import Panel, pair_panel
from bilevel_jax.problems.random_process import random_successors
from bilevel_jax.problems.registry import register
from bilevel_jax.solvers.policy_value import policy_value


@dataclasses.dataclass(frozen=True)
class StackelbergOptions:
    """Stackelberg stochastic game: a leader commits to a policy, which a follower's optimal policy answers.

    states: of the game.
    leader_actions, actions: of the leader and of the follower.
    branching: successors of each state under each pair of actions.
    discount, temperature: of the follower.
    leader_discount: of the leader.
    alignment: correlation of the two rewards, from -1 (zero-sum) to 1 (common interest).
    seed: of the random game (not of the starting point).
    """

    states: int = 6
    leader_actions: int = 3
    actions: int = 3
    branching: int = 3
    discount: float = 0.9
    temperature: float = 0.3
    leader_discount: float = 0.9
    alignment: float = 0.0
    seed: int = 0


class Stackelberg(Problem):
    """The problem. The upper variable is x[S, L], logits of the leader's L actions in each state.

    The follower sees the state, not the leader's draw: its process has the rewards and transitions that the
    leader's policy mixes. All rewards are N(0, 1). The leader maximises its own discounted return under both
    policies from a uniform start. Its best policy may be a mixture, which a softmax can be, or pure, which a softmax
    only tends to.

    x changes the dynamics, so that this is no `bilevel_jax.SampledProblem`; at a given x,
    `TabularEnvironment(problem.mdp(x))` is the follower's simulator.

    Raises:
      InputError: sizes, a seed or numbers out of range.
    """

    successor: Int32[Array, "K L S A"]
    probability: Float[Array, "K L S A"]
    follower_reward: Float[Array, "L S A"]
    leader_reward: Float[Array, "L S A"]
    discount: Float[Array, ""]
    temperature: Float[Array, ""]
    leader_discount: Float[Array, ""]

    def __init__(self, options: StackelbergOptions):
        for name in ("states", "leader_actions", "actions"):
            require_size(options, name)
        require_size(options, "branching", most=options.states, why="the number of states")
        require_seed(options)
        self.discount = as_fraction(options, "discount", "for a patient follower use e.g. 0.99")
        self.leader_discount = as_fraction(options, "leader_discount", "for a patient leader use e.g. 0.99")
        self.temperature = ShannonEntropy(options.temperature).temperature
        alignment = as_number(options, "alignment", -1, "-1 is zero-sum, 1 is common interest", most=1)
        shape = (options.leader_actions, options.states, options.actions)
        require_room_to_solve("states, actions", options.states, options.actions)
        keys = jax.random.split(jax.random.key(options.seed), 4)
        self.successor, self.probability = random_successors(keys[:2], shape, options.states, options.branching)
        self.follower_reward, own = (jax.random.normal(key, shape) for key in keys[2:])
        self.leader_reward = alignment * self.follower_reward + jnp.sqrt(1 - alignment**2) * own

    def start(self, key: PRNGKeyArray) -> Float[Array, "S L"]:
        """x ~ N(0, 0.1^2): nearly uniform."""
        leaders, states, _ = self.follower_reward.shape
        return 0.1 * jax.random.normal(key, (states, leaders))

    def mdp(self, x):
        return self._process(x, self.follower_reward, self.discount)

    def regularizer(self, x):
        del x
        return ShannonEntropy(self.temperature)

    def objective(self, x, solution) -> Float[Array, ""]:
        process = self._process(x, self.leader_reward, self.leader_discount)
        return -policy_value(process, solution.policy) @ process.initial

    def panels(self, x, solution) -> tuple[Panel, ...]:
        """Both policies."""
        leader = pair_panel("leader's policy", jax.nn.softmax(x), "probability")
        return leader, pair_panel("follower's policy", solution.policy, "probability")

    def _process(self, x: Float[Array, "S L"], reward: Float[Array, "L S A"], discount: Float[Array, ""]) -> MDP:
        """The game with a reward as the follower's process: the leader's actions are averaged over."""
        mixture = jax.nn.softmax(x).T[..., None]  # [L, S, 1]
        pairs = reward.shape[1:]
        transition = SuccessorTransition(
            self.successor.reshape(-1, *pairs), (mixture[None] * self.probability).reshape(-1, *pairs)
        )
        return MDP(transition, jnp.sum(mixture * reward, 0), discount)


register("stackelberg", StackelbergOptions, Stackelberg)
