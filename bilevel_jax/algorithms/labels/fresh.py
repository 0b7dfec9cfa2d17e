"""Labels on what the agent does, asked for while it learns."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, PRNGKeyArray

from bilevel_jax.agents.processes import simulator
from bilevel_jax.algorithms.labels.sources import Labels, scripted, segments_of
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.sizes import size
from bilevel_jax.environments import collect, start_processes
from bilevel_jax.preferences import (
    PreferenceBuffer,
    Preferences,
    ScriptedTeacher,
    Segments,
    disagreement,
    gains,
    labelled,
    select,
)


class FreshPairs(eqx.Module):
    """The state of `FreshLabels`: the pairs so far, and the number of labels asked for."""

    buffer: PreferenceBuffer
    labels: Int32[Array, ""]


class FreshLabels(Labels):
    """Labels on pairs of segments of the agent's own, asked for while it learns (Christiano et al. 2017).

    At the start `first` pairs come from the agent before it has learned anything; then every `every` iterations
    `count` more. The last `capacity` pairs are fitted.

    Args:
      count, every: pairs that are asked about, and every how many iterations (static).
      first: pairs at the start (static).
      capacity: of the queue of pairs (static).
      candidates: how many pairs are drawn for each that is asked about (static). With more than one, those are asked
        about on which an ensemble disagrees most.
      budget: after so many labels nothing more is asked; None is without end.
      rationality, discount, mistake, skip, equal: of the teacher, who judges true rewards; see
        `preferences.ScriptedTeacher`.

    Raises:
      InputError: sizes below 1, more pairs at a time than the capacity.

    Example:
      >>> labels = bj.algorithms.FreshLabels(count=10, every=5, first=100)
      >>> labels.fresh_segments
      20
    """

    teacher: ScriptedTeacher
    budget: Int32[Array, ""] | None
    count: int = eqx.field(static=True)
    every: int = eqx.field(static=True)
    first: int = eqx.field(static=True)
    capacity: int = eqx.field(static=True)
    candidates: int = eqx.field(static=True)

    def __init__(
        self,
        count: int = 16,
        *,
        every: int = 10,
        first: int = 100,
        capacity: int = 3000,
        candidates: int = 1,
        budget: int | None = None,
        rationality: float | None = 1.0,
        discount: float = 1.0,
        mistake: float = 0.0,
        skip: float | None = None,
        equal: float = 0.0,
    ):
        self.teacher = scripted(rationality, discount, mistake, skip, equal)
        self.count, self.every, self.first = size("count")(count), size("every")(every), size("first")(first)
        self.capacity, self.candidates = size("capacity")(capacity), size("candidates")(candidates)
        self.budget = None if budget is None else jnp.asarray(size("budget")(budget), jnp.int32)
        if max(self.count, self.first) > self.capacity:
            raise InputError(
                f"capacity: {self.capacity} has no room for {max(self.count, self.first)} pairs at a time; enlarge it"
            )

    @property
    def fresh_segments(self):
        return 2 * self.count * self.candidates

    @property
    def period(self):
        return self.every

    def init(self, key, problem, policy, x):
        keys = jax.random.split(key, 4)
        steps = max(problem.horizon, 2 * problem.length)
        count = -(-2 * 2 * self.first * problem.length // steps)
        environment = simulator(problem, None)
        shown = collect(keys[0], start_processes(keys[1], environment, count), policy, steps, with_states=True)[1]
        segments = segments_of(keys[2], problem, shown, 2 * self.first)[0]
        data = self._asked(keys[3], segments, self._pairs(self.first), jnp.zeros((), jnp.int32))
        return FreshPairs(PreferenceBuffer(data, self.capacity).add(data), jnp.asarray(self.first, jnp.int32))

    def due(self, state, iteration):
        now = (iteration + 1) % self.every == 0
        return now if self.budget is None else now & (state.labels < self.budget)

    def update(self, key, state, due, iteration, seen):
        for_pairs, for_labels = jax.random.split(key)
        pairs = self._pairs(self.count * self.candidates)
        if self.candidates > 1:
            candidates = Preferences(seen.segments, pairs)
            scores = seen.problem.member_scores(seen.x, seen.segments)
            gain = jax.vmap(lambda one: gains(candidates, one))(scores)
            unsure = disagreement(seen.problem.rationality(seen.x).astype(gain.dtype) * gain)
            unsure = jnp.where(_whole(seen.segments, pairs), unsure, -jnp.inf)
            pairs = pairs[select(for_pairs, unsure, self.count)]
        buffer = state.buffer.add(self._asked(for_labels, seen.segments, pairs, iteration), due)
        return FreshPairs(buffer, state.labels + jnp.where(due, self.count, 0).astype(jnp.int32))

    def train(self, state):
        return state.buffer.preferences()

    # The buffer may be large: it is neither sorted nor copied for a minibatch.
    def draw(self, key, state, count):
        return state.buffer.draw(key, count)

    def judged(self, state):
        return state.buffer.judged

    def held_out(self, state):
        return None

    def _pairs(self, count: int) -> Int32[Array, "P 2"]:
        number = jnp.arange(count, dtype=jnp.int32)
        return jnp.stack([number, number + count], -1)

    def _asked(self, key: PRNGKeyArray, segments: Segments, pairs: Any, iteration: Any) -> Preferences:
        data = Preferences(segments, pairs, iteration=iteration, sources=("fresh",))
        data = labelled(key, self.teacher, data)
        return eqx.tree_at(lambda data: data.weight, data, jnp.where(_whole(segments, pairs), data.weight, 0))


def _whole(segments: Segments, pairs: Int32[Array, "P 2"]) -> Bool[Array, " P"]:
    """Whether both segments of a pair were found: where nothing could be cut, no step is valid."""
    found = jnp.any(segments.valid, 1)
    return found[pairs[:, 0]] & found[pairs[:, 1]]
