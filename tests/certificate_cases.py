"""Hard MDPs for the search for wrong certificates: short descriptions, and the plain arrays they stand for.

A `Structure` is what is compiled (sizes, dtype, representation, solver, regularizer, arguments that are given), and a
`Case` adds numbers. Both come from a `Choose`: random numbers (`Random`) or hypothesis (`test_certificates.Drawn`).
`build` is a function of the case alone, so that its printed form repeats it.
"""

import dataclasses
import itertools
from typing import Any, NamedTuple, Protocol

import numpy as np

SMALL = ((1, 1), (1, 3), (2, 2), (3, 2), (6, 3), (16, 4))
SIZES = (*SMALL, *SMALL, (40, 2), (100, 3))  # Auto takes another solver from 65 states on
KINDS = ("unregularized", "shannon", "kl", "tsallis")
REPRESENTATIONS = ("dense", "successor", "stencil")
SOLVERS = (
    "auto",
    "value iteration",
    "last backup",  # value iteration that returns its last T V
    "policy iteration",
    "modified policy iteration",
    "newton krylov",
    "anderson",
    "adaptive",
)
# What solvers without linear solves get to in their `max_iterations`: discounts up to 1 minus so many decades.
SWEEPING = {"value iteration": 3.0, "last backup": 3.0, "anderson": 3.0, "modified policy iteration": 5.0}
SLOTS = 5
BATCH = 4
# The farthest that discounts and scales go.
NEAR_ONE = {"float32": 6.0, "float64": 12.0}
SMALLEST, LARGEST = -30, 12

LINES = ("ring", "slipping ring", "corridor", "maze ends", "blocks", "absorbing all", "sticky", "layers")
GRAPHS = (*LINES, "garnet", "ends", "classes", "one way", "clusters", "periodic", "funnel")
REWARDS = (
    "plain",
    "costs",
    "mixed",
    "parts",
    "penalties",
    "huge elsewhere",
    "zero",
    "one entry",
    "constant",
    "level",
    "tiny",
)
STARTS = ("zeros", "near", "solution", "wild")
ENDS = ("none", "some", "most", "random")


class Choose(Protocol):
    def pick(self, options): ...

    def number(self, low: float, high: float) -> float: ...

    def whole(self, low: int, high: int) -> int: ...


class Random(NamedTuple):
    generator: np.random.Generator

    def pick(self, options):
        return options[int(self.generator.integers(len(options)))]

    def number(self, low, high):
        return round(float(self.generator.uniform(low, high)), 3)

    def whole(self, low, high):
        return int(self.generator.integers(low, high + 1))


@dataclasses.dataclass(frozen=True)
class Structure:
    states: int
    actions: int
    dtype: str
    representation: str
    solver: str
    kind: str
    masked: bool = False
    ending: bool = False  # a discount for each pair
    warm: bool = False
    tolerance: bool = False
    batch: int = 0
    shared: bool = False  # one transition for the batch

    @property
    def shapes(self):
        return LINES if self.representation == "stencil" else GRAPHS


@dataclasses.dataclass(frozen=True)
class Case:
    """`discount` is 1 - 10^-discount; `scale`, `other` and `temperature` are exponents of ten, too."""

    structure: Structure
    shape: str
    reward: str
    seed: int
    discount: float = 1.0
    scale: int = 0
    other: int = 0
    temperature: float = 0.0
    relative: bool = True  # the temperature is in units of the scale
    ends: str = "none"
    start: str = "zeros"
    digits: float = 3.0  # tolerance: so many digits of what is implied
    float32_rows: bool = False  # rows of float64 that sum to 1 in float32 only


def structure(choose: Choose) -> Structure:
    states, actions = choose.pick(SIZES)
    solver = choose.pick(SOLVERS + ("auto",) * 4)
    batch = choose.pick((0, 0, 0, BATCH))
    representation = choose.pick(REPRESENTATIONS)
    return Structure(
        states,
        actions,
        choose.pick(("float32", "float64")),
        representation,
        solver,
        choose.pick(KINDS),
        choose.pick((False, False, True)),
        choose.pick((False, False, True)),
        choose.pick((False, True)),
        choose.pick((False, False, False, True)),
        batch,
        bool(batch) and choose.pick((False, True)),
    )


def case(choose: Choose, of: Structure) -> Case:
    """A case of a structure. Solvers that only sweep get the last decades of the discount rarely: they cannot."""
    most = NEAR_ONE[of.dtype]
    if choose.whole(0, 49):
        most = min(most, SWEEPING.get(of.solver, most))
    spread = choose.number(0.0, most), choose.number(0.0, most)
    discount = choose.pick((0.0, choose.number(0.0, 2.0), *spread, spread[0] if choose.whole(0, 3) else most))
    scale = choose.pick((0, 0, 0, choose.whole(SMALLEST, LARGEST)))
    return Case(
        of,
        choose.pick(of.shapes),
        choose.pick(REWARDS if choose.whole(0, 2) == 0 else tuple(r for r in REWARDS if r != "tiny")),
        choose.whole(0, 2**31 - 1),
        discount,
        scale,
        choose.whole(SMALLEST, LARGEST),
        0.0 if of.kind == "unregularized" else choose.number(-6, 6),
        choose.pick((True, True, False)),
        choose.pick(ENDS) if of.ending else "none",
        choose.pick(STARTS) if of.warm else "zeros",
        choose.number(1, 12) if of.tolerance else 3.0,
        of.dtype == "float64" and discount < 3 and not of.shared and choose.pick((False, False, False, True)),
    )


class Double:
    """The arithmetic of what only asks whether a probability is 0 or 1."""

    @staticmethod
    def widen(array):
        return np.asarray(array, np.float64)


class Numbers(NamedTuple):
    """A case as arrays of its dtype. `probability` is [S, A, S] if dense, else [K, S, A]; `discount` a number and
    `factor` [S, A] or None what it is multiplied by for each pair; `cotangent` [S] of the objective."""

    transition: dict[str, Any]
    reward: np.ndarray
    discount: Any
    factor: np.ndarray | None
    available: np.ndarray | None
    temperature: Any
    reference: np.ndarray
    cotangent: np.ndarray

    @property
    def discounts(self):
        """What each pair has, [S, A], rounded as the dtype does."""
        shape = np.ones_like(self.reward)
        return self.discount * (shape if self.factor is None else self.factor)

    def entries(self, arithmetic):
        """P[S, A, S], summed in the arithmetic."""
        states, actions = self.reward.shape
        given = arithmetic.widen(self.transition["probability"])
        if "successor" not in self.transition:
            return given
        dense = arithmetic.widen(np.zeros((states, actions, states)))
        for k, s, a in itertools.product(range(len(given)), range(states), range(actions)):
            dense[s, a, self.transition["successor"][k, s, a]] += given[k, s, a]
        return dense

    def parts(self):
        """The part of each state, int[S]: states that no available pair connects are apart."""
        dense = self.entries(Double) > 0
        used = self.discounts > 0
        used = used if self.available is None else used & self.available
        joined = (dense & used[:, :, None]).any(1)
        joined = joined | joined.T | np.eye(len(joined), dtype=bool)
        for _ in range(len(joined).bit_length()):
            joined = joined @ joined
        return np.argmax(joined, 1)


def build(case: Case, transition: dict[str, Any] | None = None) -> Numbers:
    """The numbers; with the `transition` of another case of the structure, if a batch shares it."""
    of, dtype = case.structure, np.dtype(case.structure.dtype)
    states, actions = of.states, of.actions
    rng = np.random.default_rng(case.seed)
    successor, probability = _moves(case.shape, rng, states, actions)
    probability = _normalized(probability, np.float32 if case.float32_rows else dtype).astype(dtype)
    if transition is None:
        transition = _represented(of, successor, probability)
    available = None
    if of.masked:
        available = rng.uniform(size=(states, actions)) < 0.6
        available[np.arange(states), rng.integers(actions, size=states)] = True
    discount = dtype.type(0 if case.discount == 0 else 1 - 10.0**-case.discount)
    nothing = np.zeros(0)
    blank = Numbers(transition, np.zeros((states, actions), dtype), discount, None, available, 0, nothing, nothing)
    factor = None
    if of.ending:
        factor = _factor(case.ends, rng, states, actions).astype(dtype)
    reward = _reward(case, rng, blank._replace(factor=factor))
    scale = 10.0**case.scale if case.relative else 1.0
    return Numbers(
        transition,
        np.clip(reward, -1e30, 1e30).astype(dtype),
        discount,
        factor,
        available,
        dtype.type(max(scale * 10.0**case.temperature, 1e-36)),
        _reference(rng, states, actions, available).astype(dtype),
        (np.eye(states)[rng.integers(states)] if rng.uniform() < 0.3 else rng.normal(size=states)).astype(dtype),
    )


def _moves(shape: str, rng, states: int, actions: int):
    """successor[K, S, A], probability[K, S, A]; slots of probability 0 are padding."""
    every = np.broadcast_to(np.arange(states)[None, :, None], (SLOTS, states, actions))
    where, act = every[0], np.broadcast_to(np.arange(actions), (states, actions))
    successor, p = np.array(every), np.zeros((SLOTS, states, actions))
    slip = 10.0 ** -rng.uniform(0.3, 8)
    match shape:
        case "ring" | "slipping ring" | "sticky":
            stay = {"ring": 0, "slipping ring": slip, "sticky": 1 - slip}[shape]
            successor[0] = (where + np.where(act % 2 == 0, 1, -1)) % states
            p[0], p[1] = 1 - stay, stay
        case "corridor" | "maze ends" | "blocks":
            slip = 0 if rng.uniform() < 0.5 else slip
            size = max(2, states // int(rng.integers(2, 5))) if shape == "blocks" else states
            low, high = where // size * size, np.minimum(where // size * size + size - 1, states - 1)
            step = np.where(act % 3 == 0, 1, np.where(act % 3 == 1, -1, 0))
            successor[0], successor[1] = np.clip(where + step, low, high), np.clip(where - step, low, high)
            p[0], p[1] = 1 - slip, slip
            ends = where == high if shape == "corridor" else (where == low) | (where == high)
            p[:, ends] = 0
            p[2, ends] = 1
        case "absorbing all":
            p[0] = 1
        case "layers":
            successor[0] = np.minimum(where + 1, states - 1)
            p[0], p[1] = 0.9, 0.1
            p[:, states - 1] = [[1]] + [[0]] * (SLOTS - 1)
        case _:
            _graph(shape, rng, states, where, successor, p, slip)
    return successor, p


def _graph(shape, rng, states, where, successor, p, slip):
    parts = int(rng.integers(2, 5))
    part = np.arange(states) * parts // states
    p[:] = rng.dirichlet(np.full(SLOTS, 0.5), p.shape[1:]).transpose(2, 0, 1)
    successor[:] = rng.integers(states, size=successor.shape)
    match shape:
        case "ends":
            ends = rng.permutation(states)[: max(1, states // 5)]
            successor[:, ends] = ends[None, :, None]
        case "classes" | "clusters" | "one way":
            for own in range(parts):
                mine = np.flatnonzero(part == own)
                if not mine.size:
                    continue
                reach = np.flatnonzero((part == own) | (part == own + 1)) if shape == "one way" else mine
                successor[:, mine] = rng.choice(reach, size=successor[:, mine].shape)
            if shape == "clusters":
                successor[0] = rng.integers(states, size=where.shape)
                p[0] = 0
                p[:] = p * (1 - slip) / np.maximum(p.sum(0), 1e-300)
                p[0] = 1 - p.sum(0)
        case "periodic":
            half = max(1, states // 2)
            low = where < half
            successor[:] = np.where(low, half % states + successor % max(1, states - half), successor % half)
        case "funnel":
            successor[:, 1:] = 0


def _normalized(p, dtype):
    p = np.maximum(p / p.sum(0), 0)
    if dtype == np.float64:
        return p
    p = p.astype(np.float32)
    return p / p.sum(0)


def _represented(of: Structure, successor, probability) -> dict[str, Any]:
    states = of.states
    if of.representation == "successor":
        return {"successor": successor.astype(np.int32), "probability": probability}
    slots, rows, columns = np.indices(probability.shape)
    if of.representation == "dense":
        dense = np.zeros((*probability.shape[1:], states), probability.dtype)
        np.add.at(dense, (rows, columns, successor), probability)
        return {"probability": dense}
    offsets = stencil_offsets(states)
    masses = np.zeros((len(offsets), *probability.shape[1:]), probability.dtype)
    index = {offset: k for k, offset in enumerate(offsets)}
    step = successor - rows
    slot = np.vectorize(lambda o, used: index[o] if used else 0)(step, probability > 0)
    np.add.at(masses, (slot, rows, columns), probability)
    offset = np.array(offsets)[:, None, None]
    return {"probability": masses, "successor": (np.arange(states)[None, :, None] + offset) % states + 0 * slots[:1]}


def stencil_offsets(states: int) -> tuple[int, ...]:
    """Neighbours on a line, and from either end to the other one."""
    return tuple(dict.fromkeys((0, 1, -1, states - 1, 1 - states))) if states > 1 else (0,)


def _factor(ends: str, rng, states, actions):
    shape = (states, actions)
    if ends == "random":
        return rng.uniform(size=shape)
    share = {"none": 0, "some": 0.2, "most": 0.8}[ends]
    return (rng.uniform(size=shape) >= share).astype(float)


def _reward(case: Case, rng, numbers: Numbers):
    """r[S, A] in float64."""
    shape = numbers.reward.shape
    states, actions = shape
    scale, other = 10.0**case.scale, 10.0**case.other
    plain = rng.normal(size=shape) * scale
    stays = numbers.entries(Double)[np.arange(states), :, np.arange(states)].min(-1) == 1
    match case.reward:
        case "costs":
            return np.where(stays[:, None], 0, -scale) * np.ones(shape)
        case "mixed":
            return rng.normal(size=shape) * 10.0 ** rng.uniform(SMALLEST, LARGEST, shape)
        case "parts":
            each = 10.0 ** rng.uniform(SMALLEST, LARGEST, states)[numbers.parts()]
            return rng.normal(size=shape) * each[:, None]
        case "penalties":
            bad = rng.uniform(size=shape) < 0.4
            bad[np.arange(states), rng.integers(actions, size=states)] = False
            return np.where(bad, -scale * 10.0 ** rng.integers(3, 18), plain)
        case "huge elsewhere":
            large = np.where(rng.uniform(size=shape) < 0.3, other, scale) * rng.normal(size=shape)
            return large if numbers.available is None else np.where(numbers.available, plain, 1e12 * scale)
        case "zero":
            return np.zeros(shape)
        case "one entry":
            return np.where(np.arange(states * actions).reshape(shape) == rng.integers(states * actions), scale, 0)
        case "constant":
            return np.full(shape, scale)
        case "level":
            return 1e3 * scale + plain
        case "tiny":
            return rng.normal(size=shape) * float(np.finfo(numbers.reward.dtype).tiny) * 10.0 ** rng.uniform(-3, 3)
    return plain


def _reference(rng, states, actions, available):
    weights = rng.dirichlet(np.ones(actions), states)
    style = rng.integers(4)
    if style:  # otherwise as it is
        small = rng.uniform(size=weights.shape) < 0.4
        keep = np.ones_like(small) if available is None else available
        first = np.argmax(keep * (1 + rng.uniform(size=small.shape)), 1)
        small[np.arange(states), first] = False
        weights = np.where(small, 0 if style == 1 else weights * 10.0 ** -rng.uniform(3, 30), weights)
    return weights / weights.sum(-1, keepdims=True)
