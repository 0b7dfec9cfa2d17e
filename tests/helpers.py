"""Random problems, independent references in plain numpy, and finite differences."""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import bilevel_jax as bj

STATES, ACTIONS, SLOTS = 6, 3, 4
KINDS = ("shannon", "kl", "tsallis")
LAYOUTS = ("dense", "successor")


class Process(NamedTuple):
    """One random process, by successors [K, S, A] and, of the same numbers, dense P [S, A, S]."""

    successor: np.ndarray
    probability: np.ndarray
    dense: np.ndarray
    reward: np.ndarray
    initial: np.ndarray
    reference: np.ndarray


def random_process(seed: int, states: int = STATES, actions: int = ACTIONS, slots: int = SLOTS) -> Process:
    rng = np.random.default_rng(seed)
    successor = rng.integers(states, size=(slots, states, actions), dtype=np.int32)
    successor[1, 0] = successor[0, 0]  # at least these stand in two slots
    probability = normalize(rng.uniform(0.1, 1, successor.shape), 0)
    return Process(
        successor,
        probability,
        densify(successor, probability),
        rng.normal(size=(states, actions)),
        rng.dirichlet(np.ones(states)),
        rng.dirichlet(2 * np.ones(actions), states),
    )


def normalize(weights: np.ndarray, axis: int) -> np.ndarray:
    return weights / weights.sum(axis, keepdims=True)


def densify(successor: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """P[S, A, S] by brute force."""
    slots, states, actions = successor.shape
    dense = np.zeros((states, actions, states))
    for k, s, a in itertools.product(range(slots), range(states), range(actions)):
        dense[s, a, successor[k, s, a]] += probability[k, s, a]
    return dense


def transition(process: Process, layout: str) -> bj.Transition:
    if layout == "dense":
        return bj.DenseTransition(process.dense)
    return bj.SuccessorTransition(process.successor, process.probability)


def make_mdp(process: Process, discount=0.8, layout: str = "dense") -> bj.MDP:
    return bj.MDP(transition(process, layout), process.reward, discount, process.initial)


def make_regularizer(kind: str, temperature, reference) -> bj.Regularizer:
    match kind:
        case "shannon":
            return bj.ShannonEntropy(temperature)
        case "kl":
            return bj.KLDivergence(temperature, reference)
        case _:
            return bj.TsallisEntropy(temperature)


def conjugate_numpy(kind: str, q: np.ndarray, temperature: float, reference: np.ndarray):
    """(Omega*(q) [S], policy [S, A]) from the definition, or by trying every support (Tsallis).

    In plain numpy: scipy's logsumexp and softmax take ten times as long, and `solve_numpy` sweeps by the thousand.
    """
    if kind in ("shannon", "kl"):
        logits = q / temperature
        if kind == "kl":
            with np.errstate(divide="ignore"):
                logits = logits + np.log(reference)
        top = logits.max(-1, keepdims=True)
        weight = np.exp(logits - top)
        total = weight.sum(-1, keepdims=True)
        return temperature * (top + np.log(total))[..., 0], weight / total
    return _sparsemax(q, temperature)


def _sparsemax(q, temperature):
    top = q.max(-1, keepdims=True)
    q = q - top  # for the digits of q / temperature
    best, policy = np.full(q.shape[:-1], -np.inf), np.zeros_like(q)
    actions = q.shape[-1]
    for support in itertools.product([False, True], repeat=actions):
        if not any(support):
            continue
        on = np.array(support)
        threshold = (q[..., on].sum(-1, keepdims=True) / temperature - 1) / on.sum()
        p = np.where(on, q / temperature - threshold, 0)
        value = (p * q).sum(-1) - temperature / 2 * ((p**2).sum(-1) - 1)
        better = (p >= 0).all(-1) & (value > best)
        best, policy = np.where(better, value, best), np.where(better[..., None], p, policy)
    return best + top[..., 0], policy


def solve_numpy(kind, dense, reward, discount, temperature, reference, sweeps: int = 20_000):
    """(V, Q, pi) by value iteration: `sweeps` sweeps, or until they change nothing but rounding."""
    value = np.zeros(len(reward))
    for _ in range(sweeps):
        new = conjugate_numpy(kind, reward + discount * (dense @ value), temperature, reference)[0]
        change, value = np.abs(new - value).max(), new
        if change <= 4e-16 * np.abs(value).max():
            break
    q = reward + discount * (dense @ value)
    return value, q, conjugate_numpy(kind, q, temperature, reference)[1]


def but(few, cases):
    """Cases of a parametrization, of which all but a few run among the slow tests."""

    def slow(case):
        return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)

    return [case if case in few else slow(case) for case in cases]


def central_difference(function: Callable, x, direction, step: float = 1e-3):
    """Directional derivative of a pytree-valued function at a pytree, fourth order in the step."""

    def at(t):
        moved = jax.tree.map(lambda leaf, along: jnp.asarray(np.asarray(leaf) + t * np.asarray(along)), x, direction)
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(function(moved))])

    return np.asarray((8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step))


def random_like(seed: int, tree):
    """A standard normal pytree of the same shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: np.asarray(rng.normal(size=np.shape(leaf))), tree)


def flat(tree) -> np.ndarray:
    return np.asarray(ravel_pytree(tree)[0])


# A bilevel problem in which x makes all of the lower level: a dict, without constraints.

_RNG = np.random.default_rng(0)
WEIGHTS = _RNG.normal(size=STATES), _RNG.normal(size=(STATES, ACTIONS)), _RNG.normal(size=(STATES, ACTIONS))
CONTEXTS = _RNG.normal(size=(2, STATES, ACTIONS))


def upper_start(seed: int = 1):
    rng = np.random.default_rng(seed)
    return {
        "reward": jnp.asarray(rng.normal(size=(STATES, ACTIONS))),
        "transition": jnp.asarray(rng.normal(size=(STATES, ACTIONS, STATES))),
        "discount": jnp.asarray(1.0),
        "temperature": jnp.asarray(-0.5),
        "reference": jnp.asarray(rng.normal(size=(STATES, ACTIONS))),
    }


def upper_mdp(x, contexts=None) -> bj.MDP:
    """Reward, softmax transitions and sigmoid discount of x; `contexts` [C, S, A] shift the reward of each."""
    reward = x["reward"] if contexts is None else jnp.broadcast_to(x["reward"], contexts.shape) + contexts
    return bj.MDP(jax.nn.softmax(x["transition"]), reward, jax.nn.sigmoid(x["discount"]))


def upper_regularizer(x, kind: str) -> bj.Regularizer:
    return make_regularizer(kind, jnp.exp(x["temperature"]), jax.nn.softmax(x["reference"]))


def upper_objective(x, solution):
    """Nonlinear in value, q, policy and x; over all contexts if there are some."""
    parts = solution.value, solution.q, solution.policy
    a, b, c = (jnp.broadcast_to(weight, part.shape) for weight, part in zip(WEIGHTS, parts, strict=True))
    lower = jnp.sum(a * solution.value**2) + jnp.sum(b * jnp.sin(solution.q)) + jnp.sum(c * solution.policy**2)
    return lower + 0.1 * jnp.sum(x["reward"] ** 2) * x["temperature"]


@functools.cache
def upper_problem(kind: str, contexts: bool = False) -> bj.BilevelProblem:
    mdp = functools.partial(upper_mdp, contexts=CONTEXTS if contexts else None)
    return bj.BilevelProblem(mdp, functools.partial(upper_regularizer, kind=kind), upper_objective)


# Problems that are simulators alone, and those that can be solved exactly.
SIMULATORS = ("incentives", "preference_learning", "task")
WITH_MODEL = tuple(name for name in bj.problems.names() if name not in SIMULATORS)
