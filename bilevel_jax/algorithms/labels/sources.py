"""Where labels come from: a data set, a synthetic teacher at the start, or fresh pairs while the agent learns."""

import abc
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray

from bilevel_jax.agents import Agent, SoftPQN, train
from bilevel_jax.agents.deep.actors import Exploring
from bilevel_jax.agents.processes import as_unit, simulator
from bilevel_jax.core.batching import merge_axes
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.sizes import size
from bilevel_jax.core.validation import as_size
from bilevel_jax.environments import Policy, Trajectory, collect, start_processes
from bilevel_jax.preferences import (
    PreferenceFile,
    Preferences,
    ScriptedTeacher,
    Segments,
    compacted,
    cut_segments,
    decision_scores,
    draw,
    labelled,
    split,
    subset,
    wait_for_labels,
)
from bilevel_jax.preferences.problem import PreferenceProblem

Judging = Literal["decisions", "outcomes"]
LEAST_PAIRS = 4


class Labels(eqx.Module):
    """The protocol of a source of labels: `SyntheticLabels`, `FreshLabels`, `FileLabels`, or `GivenLabels`.

    Its state is carried from iteration to iteration.
    """

    @abc.abstractmethod
    def init(self, key: PRNGKeyArray, problem: PreferenceProblem, policy: Policy | None, x: Any) -> Any:
        """Return the state at the start. `policy` is the agent's then; labels that are not fresh need none."""

    def due(self, state: Any, iteration: Int32[Array, ""]) -> Bool[Array, ""]:
        """Return whether labels are asked for in this iteration. By default they never are."""
        del state, iteration
        return jnp.asarray(False)

    def update(
        self, key: PRNGKeyArray, state: Any, due: Bool[Array, ""], iteration: Int32[Array, ""], seen: "AgentSegments"
    ) -> Any:
        """Return the state after an iteration. Where labels are `due`, they are of what was `seen`; elsewhere that is
        nothing, and the state stays.
        """
        del key, due, iteration, seen
        return state

    @abc.abstractmethod
    def train(self, state: Any) -> Preferences:
        """Return the pairs to fit."""

    def draw(self, key: PRNGKeyArray, state: Any, count: int) -> Preferences:
        """Return a minibatch of the pairs to fit, as `preferences.draw` does."""
        return draw(key, self.train(state), count)

    def judged(self, state: Any) -> Int32[Array, ""]:
        """Return how many pairs to fit have a label."""
        return jnp.sum(self.train(state).weight > 0, dtype=jnp.int32)

    @abc.abstractmethod
    def held_out(self, state: Any) -> Preferences | None:
        """Return pairs that nothing is fitted to, if there are any."""

    @property
    def fresh_segments(self) -> int:
        """The number of segments that `update` takes from the agent's own trajectories; 0 if it takes none."""
        return 0

    @property
    def period(self) -> int:
        """The number of iterations from one time that labels are due to the next."""
        return 1


class AgentSegments(eqx.Module):
    """What the agent did in an iteration: `segments` of its trajectories, and the problem with its x."""

    problem: PreferenceProblem
    x: Any
    segments: Segments


class FixedPairs(eqx.Module):
    """The state of labels that never change: pairs to fit, and pairs that are held out."""

    train: Preferences
    held_out: Preferences | None


class GivenLabels(Labels):
    """Labels that are there already, e.g. those that people gave.

    Args:
      pairs: to fit.
      others: pairs that are held out, if any, by which runs report how well they predict.

    Example:
      >>> segments = bj.preferences.Segments(jnp.zeros((2, 5)), jnp.zeros((2, 5)), valid=jnp.ones((2, 5), bool))
      >>> labels = bj.algorithms.GivenLabels(bj.preferences.Preferences(segments, [[0, 1]], [1.0]))
      >>> labels.pairs.count
      1
    """

    pairs: Preferences
    others: Preferences | None = None

    def init(self, key, problem, policy, x):
        del key, problem, policy, x
        return FixedPairs(self.pairs, self.others)

    def train(self, state):
        return state.train

    def held_out(self, state):
        return state.held_out


class FileLabels(GivenLabels):
    """Labels from a `PreferenceFile`, e.g. those that people gave with `bilevel-jax label`.

    The file is read when the object is made: labels that come later count for the next run.

    Args:
      path: of the file, relative to the working directory.
      held_out: the part of the pairs that is held out, above 0 and below 1. Which pairs is drawn by `split_seed`.
      wait_for: how many pairs must have labels before the run begins.
      wait_minutes: after so many minutes it begins with the labels that there are.

    Raises:
      InputError: there is no such file or it has wrong lines, or fewer than four pairs have labels.

    Example:
      >>> import tempfile
      >>> path = tempfile.mkdtemp() + "/labels.jsonl"
      >>> space = bj.environments.Discrete(3)
      >>> file = bj.preferences.PreferenceFile.create(
      ...     path, jnp.zeros(()), space, length=4, next_observation=False, reward=False
      ... )
      >>> steps = jnp.zeros((8, 4))
      >>> segments = bj.preferences.Segments(steps, steps.astype(jnp.int32), valid=jnp.ones((8, 4), bool))
      >>> ids = file.append_segments(segments)
      >>> pairs = file.append_pairs([ids[k : k + 2] for k in (0, 2, 4, 6)], source="uniform", iteration=0)
      >>> for pair in pairs:
      ...     file.append_label(pair, 1, by="Ada")
      >>> bj.algorithms.FileLabels(path, held_out=0.25).pairs.count
      3
    """

    def __init__(
        self,
        path: str = "labels.jsonl",
        held_out: float = 0.2,
        *,
        wait_for: int = 0,
        wait_minutes: float = 60.0,
        split_seed: int = 0,
    ):
        if wait_for:
            wait_for_labels(path, as_size("wait_for", wait_for), 60 * wait_minutes)
        data = PreferenceFile(path).read().preferences
        judged = np.flatnonzero(np.asarray(data.weight) > 0)
        if judged.size < LEAST_PAIRS:
            raise InputError(
                f"path: {judged.size} pairs of {path} have labels, too few to fit and to hold out; label more "
                f"(bilevel-jax label), or wait_for them"
            )
        self.pairs, self.others = split(jax.random.key(split_seed), compacted(subset(data, judged)), float(held_out))


class SyntheticLabels(Labels):
    """Labels of a synthetic teacher on a fixed set of pairs, made when a run starts.

    An agent is trained on the true reward. It acts, with every share of random actions from `least_random` to 1, and
    segments are cut out of what it did. The teacher judges *decisions* by the agent's advantages, temperature times
    log pi, or *outcomes* by the true rewards.

    Args:
      count: pairs to fit (static).
      held_out: pairs to hold out (static).
      judging: by what the teacher judges (static).
      rationality, discount, mistake, skip, equal: of the teacher, see `preferences.ScriptedTeacher`. The rationality is
        in units of 1 / score: of decisions, rationality times temperature is the factor of log pi. None is perfectly
        rational. A `skip` of None skips nothing.
      expert: the agent that learns the true reward; None is `SoftPQN()`.
      improvements: how often it is improved (static).
      least_random: the smallest share of random actions.
      shares, processes: the number of shares, and of processes for each (static).

    Raises:
      InputError: sizes below 1, a share outside [0, 1], numbers that the teacher refuses.

    Example:
      >>> labels = bj.algorithms.SyntheticLabels(200, judging="outcomes", rationality=3.0)
      >>> labels.count
      200
    """

    teacher: ScriptedTeacher
    expert: Agent
    least_random: Float[Array, ""]
    count: int = eqx.field(static=True)
    held: int = eqx.field(static=True)
    judging: Judging = eqx.field(static=True)
    improvements: int = eqx.field(static=True)
    shares: int = eqx.field(static=True)
    processes: int = eqx.field(static=True)

    def __init__(
        self,
        count: int = 200,
        held_out: int = 500,
        *,
        judging: Judging = "decisions",
        rationality: float | None = 10.0,
        discount: float = 1.0,
        mistake: float = 0.0,
        skip: float | None = None,
        equal: float = 0.0,
        expert: Agent | None = None,
        improvements: int = 800,
        least_random: float = 0.3,
        shares: int = 8,
        processes: int = 32,
    ):
        if judging not in ("decisions", "outcomes"):
            raise InputError(f"judging: expected decisions or outcomes, got {judging!r}")
        self.teacher = scripted(rationality, discount, mistake, skip, equal)
        self.expert = SoftPQN() if expert is None else expert
        self.least_random = as_unit("least_random", least_random, "0 also shows the expert as it is")
        self.judging = judging
        self.count, self.held = size("count")(count), size("held_out")(held_out)
        self.improvements = size("improvements")(improvements)
        self.shares, self.processes = size("shares")(shares), size("processes")(processes)

    def init(self, key, problem, policy, x):
        del policy
        keys = jax.random.split(key, 4)
        true = problem.with_true_reward()
        expert = train(keys[0], self.expert, true, x, self.improvements)
        judge = self.expert.policy(expert.state, true, x)
        shown = self._shown(keys[1], problem, judge)
        pairs = self.count + self.held
        segments, cut_found = segments_of(keys[2], problem, shown, 2 * pairs)
        scores = None
        if self.judging == "decisions":
            scores = decision_scores(judge, segments, problem.regularizer(x).temperature)
        number = jnp.arange(pairs, dtype=jnp.int32)
        data = Preferences(segments, jnp.stack([number, number + pairs], -1), sources=("synthetic",))
        data = labelled(keys[3], self.teacher, data, scores)
        # A place where nothing could be cut is no pair.
        found = cut_found[data.pairs[:, 0]] & cut_found[data.pairs[:, 1]]
        data = eqx.tree_at(lambda data: data.weight, data, jnp.where(found, data.weight, 0))
        return FixedPairs(_range(data, 0, self.count), _range(data, self.count, pairs))

    def train(self, state):
        return state.train

    def held_out(self, state):
        return state.held_out

    def _shown(self, key: PRNGKeyArray, problem: PreferenceProblem, judge: Any) -> Trajectory:
        """Trajectories of the expert that acts at random more and more, [shares processes, H]."""
        environment = simulator(problem, None)
        pairs = self.count + self.held
        steps = problem.length + -(-4 * pairs * problem.length // (self.shares * self.processes))
        starts = -(-problem.horizon // steps)  # the first steps are all near the start

        def one(key: PRNGKeyArray, share: Float[Array, ""]) -> Trajectory:
            for_start, for_rest = jax.random.split(key)
            processes = start_processes(for_start, environment, self.processes)

            def on(carry: Any, key: PRNGKeyArray) -> Any:
                return collect(key, carry, Exploring(judge, share), steps)[0], None

            keys = jax.random.split(for_rest, starts + 1)
            processes = jax.lax.scan(on, processes, keys[1:])[0]
            return collect(keys[0], processes, Exploring(judge, share), steps, with_states=True)[1]

        shares = jnp.linspace(self.least_random, 1, self.shares)
        shown = jax.vmap(one)(jax.random.split(key, self.shares), shares)
        return merge_axes(shown)


def scripted(rationality: float | None, discount: Any, mistake: Any, skip: float | None, equal: Any) -> ScriptedTeacher:
    """The teacher of these numbers; configs write no infinities, but None."""
    rational = jnp.inf if rationality is None else rationality
    return ScriptedTeacher(rational, discount, mistake, -jnp.inf if skip is None else skip, equal)


def segments_of(
    key: PRNGKeyArray, problem: PreferenceProblem, shown: Trajectory, count: int
) -> tuple[Segments, Bool[Array, " count"]]:
    """Segments cut out of trajectories of processes that start again, with the states of the problem's environment; and
    which of them were found.
    """
    cut = cut_segments(key, shown, problem.length, count)
    state = cut.trajectories.state
    if not problem.environment.resets:
        assert isinstance(state, tuple)
        state, _ = state  # processes that are started again count their steps beside the state
    return Segments.of(cut.trajectories._replace(state=state)), cut.found


def _range(data: Preferences, start: int, end: int) -> Preferences:
    """Pairs number `start` to `end` with their own segments; pair p is of segments p and p + P."""
    total = data.count
    places = jnp.concatenate([jnp.arange(start, end), total + jnp.arange(start, end)])
    segments = jax.tree.map(lambda leaf: leaf[places], data.segments)
    number = jnp.arange(end - start, dtype=jnp.int32)
    pairs = jnp.stack([number, number + (end - start)], -1)
    label, weight = data.label[start:end], data.weight[start:end]
    return Preferences(segments, pairs, label, weight, sources=data.sources)
