"""Grids and bands: successors at fixed offsets from the state, without a list of indices."""

import functools
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Real

from bilevel_jax.core.arrays import Count, PerState
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.indexing import gather
from bilevel_jax.core.memory import require_room
from bilevel_jax.core.reductions import map_slots, sum_last, sum_slots
from bilevel_jax.core.validation import as_float, is_known, require_distribution, require_index
from bilevel_jax.mdp.transitions.protocol import StateOperator, Transition
from bilevel_jax.mdp.transitions.successor import SuccessorTransition

# More offsets than this and lists of successors are the better form; products then go through them by a loop.
MOST_OFFSETS = 32


class StencilOperator(StateOperator):
    """M[s, s + offset_k] = weight[k, s] for the flat `offsets` of K diagonals; `incoming` is M' in the same form."""

    offsets: tuple[int, ...] = eqx.field(static=True)
    weight: Float[Array, "K S"]
    incoming: Float[Array, "K S"]

    def apply(self, values):
        return _shifted_sum(self.offsets, self.weight, values)

    def apply_transpose(self, masses):
        return _shifted_sum(tuple(-o for o in self.offsets), self.incoming, masses)

    def matrix(self):
        size = self.weight.shape[-1]
        rows = jnp.arange(size)
        # An entry beyond either end has weight 0, wherever it is written.
        columns = (rows[None] + np.asarray(self.offsets, np.int32)[:, None].astype(rows.dtype)) % size
        return jnp.zeros((size, size), self.weight.dtype).at[rows, columns].add(self.weight)

    def diagonal(self):
        return _at_zero(self.offsets, self.weight)


class StencilTransition(Transition):
    """Successors at fixed offsets on a grid: slot k of state s leads to the cell of s plus `offsets[k]`.

    Args:
      offsets: K steps, each with one whole number for each axis of the grid; static.
      probability: [K, S, A], S being the number of cells. A step that would leave the grid has
        probability 0. The offset of zeros means to stay: a wall is expressed by its probability.
      grid: the lengths of the grid's axes, of cells in row-major order; static. One axis makes a
        banded kernel.

    A product reads each probability once and no index: several times faster than lists of successors
    where memory is the limit, and its transpose is as fast. Folded under a policy it is K numbers per state.
    Where the probabilities are traced, steps that leave the grid go unchecked; they must be 0, and
    derivatives in them mean nothing.

    Raises:
      InputError: shapes or offsets that do not fit the grid, negative probabilities, sums over the slots
        that are not 1, or a step off the grid with a probability above 0.

    Example:
      >>> probability = jnp.array([[0.5, 0.5, 1.0], [0.5, 0.5, 0.0]])[..., None]  # stay, go right: [K, S, A]
      >>> bj.StencilTransition([(0,), (1,)], probability, (3,)).expect(jnp.array([0.0, 1.0, 2.0])).tolist()
      [[0.5], [1.5], [2.0]]
    """

    folding_shrinks: ClassVar[bool] = True
    offsets: tuple[tuple[int, ...], ...] = eqx.field(static=True)
    probability: Float[Array, "*batch K S A"]
    grid: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, offsets: Any, probability: Real[ArrayLike, "*batch K S A"] | Any, grid: Any):
        self.grid = _whole_numbers("grid", grid)
        self.offsets = tuple(_whole_numbers("offsets", offset) for offset in offsets)
        self.probability = as_float("transition.probability", probability)
        if not self.grid or min(self.grid) < 1:
            raise InputError(f"grid: expected the lengths of its axes, each at least 1, got {self.grid}")
        if any(len(offset) != len(self.grid) for offset in self.offsets) or not self.offsets:
            raise InputError(
                f"offsets: expected steps with {len(self.grid)} numbers each, as the grid {self.grid} has axes, got "
                f"{self.offsets}"
            )
        shape = self.probability.shape
        expected = (len(self.offsets), math.prod(self.grid))
        if len(shape) < 3 or shape[-3:-1] != expected:
            raise InputError(
                f"transition.probability: expected shape [K, S, A] with K, S = {list(expected)}, for {expected[0]} "
                f"offsets on the grid {self.grid} (batch axes first), got {list(shape)}"
            )
        self.validate()

    @property
    def shape(self):
        return self.probability.shape[:-3] + self.probability.shape[-2:]

    @property
    def dtype(self):
        return self.probability.dtype

    @property
    def terms(self):
        return len(self.offsets)

    def astype(self, dtype):
        return eqx.tree_at(lambda t: t.probability, self, self.probability.astype(dtype))

    def event_ndim(self):
        return eqx.tree_at(lambda t: t.probability, self, 3)

    def validate(self):
        name = "transition.probability"
        remedy, order = "divide by the sum over the slots: p / p.sum(-3)", "[slot, state, action]"
        require_distribution(name, self.probability, -3, remedy, order)
        if not is_known(self.probability):
            return
        inside, known = self._inside(), np.asarray(self.probability)
        for k, offset in enumerate(self.offsets):
            outside = np.flatnonzero(~inside[k])
            leaves = known[..., k, outside, :] > 0
            if leaves.any():
                state = outside.tolist()[np.argwhere(leaves).tolist()[0][-2]]
                raise InputError(
                    f"{name}: slot {k}, offset {offset}, has a positive probability at state {state}, cell "
                    f"{tuple(int(i) for i in np.unravel_index(state, self.grid))}, from where it leaves the grid "
                    f"{self.grid}; give it to the offset of zeros, to stay, or to another cell"
                )

    def expect(self, values):
        flat = self._flat_offsets()
        if len(flat) > MOST_OFFSETS:
            shifted = _shifts_of(values, flat)
            return sum_slots(lambda p, o: p * shifted(o)[:, None], self.probability, _array(flat))
        return _total(p * v[:, None] for p, v in zip(self.probability, _shifts(values, flat), strict=True))

    def push(self, masses):
        flat = self._flat_offsets()
        if len(flat) > MOST_OFFSETS:
            return sum_slots(lambda p, o: jnp.roll(sum_last(p * masses), o), self.probability, _array(flat))
        return _total(jnp.roll(sum_last(p * masses), o) for p, o in zip(self.probability, flat, strict=True))

    def under(self, weights):
        return self._operator(map_slots(lambda p: sum_last(p * weights), self.probability))

    def diagonal(self):
        return _at_zero(self._flat_offsets(), self.probability)

    def select(self, action, weight):
        states, actions = self.probability.shape[1:]
        pair = jnp.arange(states, dtype=jnp.int32) * actions + action.astype(jnp.int32)
        return self._operator(map_slots(lambda p: gather(p.reshape(-1), pair) * weight, self.probability))

    def to_successors(self) -> SuccessorTransition:
        """Return the same kernel as lists of successors.

        A successor that is off the grid is replaced by the state itself.
        """
        states = np.arange(math.prod(self.grid), dtype=np.int32)
        flat = np.asarray(self._flat_offsets(), np.int32)[:, None]
        successor = np.where(self._inside(), states + flat, states)
        return SuccessorTransition(
            jnp.broadcast_to(jnp.asarray(successor)[..., None], self.probability.shape), self.probability
        )

    @classmethod
    def from_successors(cls, transition: SuccessorTransition, grid: Any) -> "StencilTransition":
        """Return lists of successors on a grid of S cells as a stencil whose offsets are those that occur in the lists.

        A slot whose probability is known to be 0 counts as unused. The function is differentiable in the probabilities.

        Raises:
          InputError: the grid does not have S cells, the successors are traced, or there are more than 32 offsets.
        """
        if not is_known(transition.successor):
            raise InputError(
                "transition.successor: offsets are static; call from_successors outside jit and vmap, or from_lists "
                "with numpy's array"
            )
        return cls._from_lists(np.asarray(transition.successor), transition.probability, grid)

    @classmethod
    def from_lists(
        cls,
        successor: Int[ArrayLike, "*batch K S A"] | Any,
        probability: Real[ArrayLike, "*batch K S A"] | Any,
        grid: Any,
    ) -> "StencilTransition":
        """The two lists that a `SuccessorTransition` is made of, successor[K, S, A] and probability[K, S, A], as bands.

        Only the successors have to be known. Under jit those of a `SuccessorTransition` are not, whatever they were
        made of; numpy's arrays are.

        Raises:
          InputError: as `SuccessorTransition` and `from_successors`.

        Example:
          >>> stay_or_go_on = np.array([[0, 1, 2], [1, 2, 2]])[..., None]
          >>> jax.jit(lambda p: bj.StencilTransition.from_lists(
          ...     stay_or_go_on, jnp.full((2, 3, 1), jnp.stack([1 - p, p])[:, None, None]), (3,)
          ... ))(0.25).offsets
          ((0,), (1,))
        """
        if isinstance(successor, Tracer):
            raise InputError("transition.successor: offsets are static; give numpy's array, which is never traced")
        lists = SuccessorTransition(successor, probability)  # checks them
        require_index("transition.successor", np.asarray(successor), lists.shape[-2])
        return cls._from_lists(np.asarray(successor), lists.probability, grid)

    @classmethod
    def _from_lists(
        cls, successor: Int[np.ndarray, "*batch K S A"], probability: Float[Array, "*batch K S A"], grid: Any
    ) -> "StencilTransition":
        grid = _whole_numbers("grid", grid)
        states = successor.shape[-2]
        if math.prod(grid) != states:
            raise InputError(f"grid: {grid} has {math.prod(grid)} cells, the transition has {states} states")
        cells = np.stack(np.unravel_index(np.arange(states), grid), -1)
        steps = cells[successor] - cells[:, None]
        span = 2 * np.asarray(grid) - 1
        code = np.ravel_multi_index(tuple(np.moveaxis(steps + np.asarray(grid) - 1, -1, 0)), tuple(span))
        used = np.asarray(probability) > 0 if is_known(probability) else np.ones(code.shape, bool)
        codes = np.unique(np.asarray(code)[used])
        if codes.size > MOST_OFFSETS:
            raise InputError(
                f"transition: its successors stand at {codes.size} offsets on the grid {grid}, a stencil has at most "
                f"{MOST_OFFSETS}; keep the SuccessorTransition"
            )
        require_room(
            "transition",
            codes.size * math.prod(probability.shape[:-3] + probability.shape[-2:]) * probability.dtype.itemsize,
            f"probabilities at each of {codes.size} offsets",
            "keep the SuccessorTransition",
            given=successor.nbytes + probability.nbytes,
        )
        offsets = np.stack(np.unravel_index(codes, tuple(span)), -1) - (np.asarray(grid) - 1)
        slots = [jnp.sum(jnp.where(code == one, probability, 0), -3) for one in codes]
        return cls(offsets.tolist(), jnp.stack(slots, -3), grid)

    def _flat_offsets(self) -> tuple[int, ...]:
        strides = [math.prod(self.grid[axis + 1 :]) for axis in range(len(self.grid))]
        return tuple(sum(o * stride for o, stride in zip(offset, strides, strict=True)) for offset in self.offsets)

    def _inside(self) -> Bool[np.ndarray, "K S"]:
        """Whether each step stays on the grid, bool[K, S]."""
        cells = np.unravel_index(np.arange(math.prod(self.grid)), self.grid)
        inside = [
            np.all(
                [
                    (cell + o >= 0) & (cell + o < length)
                    for cell, o, length in zip(cells, offset, self.grid, strict=True)
                ],
                0,
            )
            for offset in self.offsets
        ]
        return np.stack(inside)

    def _operator(self, weights: Float[Array, "K S"]) -> StencilOperator:
        flat = self._flat_offsets()
        if len(flat) > MOST_OFFSETS:
            return StencilOperator(flat, weights, map_slots(jnp.roll, weights, _array(flat)))
        incoming = [jnp.roll(weight, o) for weight, o in zip(weights, flat, strict=True)]
        return StencilOperator(flat, weights, jnp.stack(incoming))


# A step on the grid is a shift of the flat array: what would come from beyond an edge, from the next row
# or the padding, has probability 0. Slices of one padded copy run at the memory's speed.


# More than some offsets are gone through by a loop, whose program does not grow with their number.


def _shifts(values: PerState, offsets: tuple[int, ...]) -> list[PerState]:
    """values[s + offset] for each flat offset, [S] each."""
    size = values.shape[-1]
    padded, before = _padded(values, offsets)
    return [padded[before + o : before + o + size] for o in offsets]


def _shifts_of(values: PerState, offsets: tuple[int, ...]) -> Callable[[Count], PerState]:
    """The function of one of the offsets, a traced number, that returns values[s + offset], [S]."""
    size = values.shape[-1]
    padded, before = _padded(values, offsets)
    return lambda offset: lax.dynamic_slice_in_dim(padded, before + offset, size)


def _padded(values: PerState, offsets: tuple[int, ...]) -> tuple[Float[Array, " padded"], int]:
    before, after = max(0, -min(offsets)), max(0, max(offsets))
    return jnp.pad(jnp.asarray(values), (before, after)), before


def _array(offsets: tuple[int, ...]) -> Int[Array, " K"]:
    return jnp.asarray(offsets, jnp.int32)


def _shifted_sum(offsets: tuple[int, ...], weight: Float[Array, "K S"], values: PerState) -> PerState:
    if len(offsets) > MOST_OFFSETS:
        shifted = _shifts_of(values, offsets)
        return sum_slots(lambda w, o: w * shifted(o), weight, _array(offsets))
    return _total(w * v for w, v in zip(weight, _shifts(values, offsets), strict=True))


def _total(terms: Iterable[Float[Array, "*shape"]]) -> Float[Array, "*shape"]:
    return functools.reduce(operator.add, terms)


def _at_zero(offsets: tuple[int, ...], weight: Float[Array, "K ..."]) -> Float[Array, "..."]:
    return sum((weight[k] for k, o in enumerate(offsets) if o == 0), jnp.zeros_like(weight[0]))


def _whole_numbers(name: str, values: Any) -> tuple[int, ...]:
    try:
        return tuple(operator.index(value) for value in values)
    except TypeError:
        raise InputError(
            f"{name}: expected whole numbers, known when the transition is built, got {values!r}"
        ) from None
