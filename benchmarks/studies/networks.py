"""Estimators of the hyper-gradient through a network, and what an eligibility trace costs in bias and noise."""

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import bilevel_jax as bj
from benchmarks.studies.records import draw, read_rows, write_rows
from benchmarks.studies.study import Study, main
from bilevel_jax.estimators import (
    CriticAdvantage,
    EligibilityTrace,
    Exact,
    ExactAdvantage,
    LearnedAdvantage,
    LearnedModel,
    LeaveOneOut,
    NestedRollouts,
    OneStep,
    SharedRollouts,
    estimate,
    group_costs,
    sample_groups,
)
from bilevel_jax.mdp.bellman import action_values


@dataclasses.dataclass(frozen=True)
class NetworksOptions:
    """Four Rooms with a network of coordinates against the exact gradient; bias and noise of traces on random MDPs.

    temperature, discount, rooms_horizon: of Four Rooms. With the published ones (0.005, 0.99) the noise of a hundred
      trajectories is many times the gradient.
    length: steps of rollouts there; what is cut weighs discount^length.
    rooms_batch, rooms_estimates: trajectories of an estimate, and the number of estimates.
    directions: random directions along which gradients are compared, beside the exact gradient's.
    mdps, first_seed: the number of Garnet MDPs, and the seed of the first.
    batch, estimates: trajectories of an estimate there, and the number of estimates.
    decays: of the traces.
    critics: trajectories from which critics learn.
    """

    temperature: float = 0.03
    discount: float = 0.95
    rooms_horizon: int = 250
    length: int = 150
    rooms_batch: int = 100
    rooms_estimates: int = 200
    directions: int = 4
    mdps: int = 32
    first_seed: int = 1000
    batch: int = 64
    estimates: int = 200
    decays: tuple[float, ...] = (0.0, 0.5, 0.8, 0.9, 1.0)
    critics: tuple[int, ...] = (32, 128, 512, 2048)


def run(options: NetworksOptions, directory: Path, report: Callable[[str], None]) -> None:
    """Write rooms.csv (one row per estimator) and traces.csv (one row per MDP, credit and decay)."""
    write_rows(directory / "rooms.csv", _rooms(options, report))
    rows = []
    for seed in range(options.first_seed, options.first_seed + options.mdps):
        rows += _traces(options, seed)
        report(f"garnet {seed}")
    write_rows(directory / "traces.csv", rows)


# Four Rooms.


def _rooms(options: NetworksOptions, report: Callable[[str], None]) -> list[dict[str, Any]]:
    problem = bj.problems.make(
        "four_rooms",
        variable="network",
        temperature=options.temperature,
        discount=options.discount,
        horizon=options.rooms_horizon,
    )
    x = _trained(problem)
    exact = bj.check(bj.hypergradient(problem, x))
    policy = bj.Table(exact.solution.policy.reshape(-1, exact.solution.policy.shape[-1]))
    truth = np.asarray(ravel_pytree(exact.gradient)[0])
    directions = np.random.default_rng(0).normal(size=(truth.size, options.directions))
    directions = np.concatenate([truth[:, None] / np.linalg.norm(truth), directions], 1)
    rows = []
    for number, (name, (unbiased, response, baseline)) in enumerate(_estimators(problem, x, options.length).items()):
        state = response.init(problem, x), baseline.init(problem)
        key = jax.random.fold_in(jax.random.key(3), number)
        for_learning, for_estimates = jax.random.split(key)
        state = _learned(for_learning, problem, x, policy, response, baseline, state, batch=2000)
        keys = jax.random.split(for_estimates, options.rooms_estimates)
        sampled = np.asarray(_estimates(problem, x, policy, response, baseline, state, keys, batch=options.rooms_batch))
        mean = sampled.mean(0)
        along = sampled @ directions
        error = along.std(0, ddof=1) / np.sqrt(len(sampled))
        off = along.mean(0) - truth @ directions
        with np.errstate(divide="ignore", invalid="ignore"):  # estimates that do not vary are right, or infinitely off
            z = np.where(off == 0, 0, off / error)
        rows.append(
            {
                "estimator": name,
                "unbiased": unbiased,
                "trajectories": options.rooms_batch * options.rooms_estimates,
                "cosine": _cosine(mean, truth),
                "length_ratio": float(np.linalg.norm(mean) / np.linalg.norm(truth)),
                "cosine_of_one_batch": float(np.mean([_cosine(one, truth) for one in sampled])),
                "z_along_gradient": float(z[0]),
                "z": " ".join(f"{value:.2f}" for value in z),
                "largest_z": float(np.abs(z).max()),
            }
        )
        report(f"{name}: cosine {rows[-1]['cosine']:.4f}, largest |z| {rows[-1]['largest_z']:.2f}")
    return rows


def _trained(problem: Any) -> Any:
    """An x on the way: 30 steps of Adam along the exact gradient."""
    algorithm = bj.algorithms.implicit(problem, optax.adam(0.01))
    state = algorithm.init(jax.random.key(0), problem.start(jax.random.key(1)))
    for i in range(30):
        state, info = algorithm.step(jax.random.key(i), state)
        bj.check(info)
    return state.x


def _estimators(problem: Any, x: Any, length: int) -> dict[str, tuple[bool, Any, Any]]:
    """By name: whether it is unbiased, the response and the credit."""
    actions = problem.environment.num_actions
    costs = -problem._designer_reward(x).reshape(-1, 1)  # of each context and state
    credit = ExactAdvantage(jnp.broadcast_to(costs, (costs.shape[0], actions)))
    learned = CriticAdvantage(
        bj.networks.OneHot(problem.environment.num_states), trace=1.0, steps=2000, learning_rate=1e-2
    )
    return {
        "exact response": (True, Exact(), LeaveOneOut()),
        "shared rollouts": (True, SharedRollouts(length), LeaveOneOut()),
        "nested rollouts, one visit": (True, NestedRollouts(length, visits=1), LeaveOneOut()),
        "trace 1, exact credit": (True, EligibilityTrace(1.0), credit),
        "trace 0.9, exact credit": (False, EligibilityTrace(0.9), credit),
        "trace 1, learned credit": (False, EligibilityTrace(1.0), learned),
        "learned model and advantage": (False, LearnedModel(), LearnedAdvantage()),
        "one step": (False, OneStep(), LeaveOneOut()),
    }


@functools.partial(jax.jit, static_argnames="batch")
def _learned(key, problem, x, policy, response, baseline, state, batch):
    """What the response and the credit have learned from a batch of their own."""
    for_groups, for_costs = jax.random.split(key)
    groups = sample_groups(for_groups, problem, policy, batch)
    costs = group_costs(for_costs, problem, x, groups)
    return (
        response.update(state[0], problem, x, policy, groups),
        baseline.update(state[1], problem, groups, costs),
    )


@functools.partial(jax.jit, static_argnames="batch")
def _estimates(problem, x, policy, response, baseline, state, keys, batch):
    def one(key):
        made = estimate(
            key,
            problem,
            x,
            policy,
            batch=batch,
            response=response,
            response_state=state[0],
            baseline=baseline,
            baseline_state=state[1],
        )
        return ravel_pytree(made.gradient)[0]

    return jax.lax.map(one, keys)


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    size = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / size if size else 0.0


# Traces on random MDPs.


def _traces(options: NetworksOptions, seed: int) -> list[dict[str, Any]]:
    problem = bj.problems.make(
        "garnet", states=20, actions=3, branching=2, discount=0.9, temperature=0.3, horizon=80, seed=seed
    )
    x = problem.start(jax.random.key(seed))
    exact = bj.check(bj.hypergradient(problem, x))
    policy = bj.Table(exact.solution.policy)
    costs = problem.cost + problem.price / 2 * x**2
    decays = jnp.asarray(options.decays)
    charged = bj.MDP(problem.transition, costs, problem.discount)
    values = action_values(charged, bj.policy_value(charged, exact.solution.policy))
    truth = np.asarray(_centred(values, exact.solution.policy))
    credits: list[tuple[str, Any, Any]] = [("exact", ExactAdvantage(costs), None)]
    table = bj.networks.OneHot(20, bj.networks.MLP(depth=0))
    for batch in options.critics:
        critic = CriticAdvantage(table, trace=1.0, steps=1500, minibatches=8, learning_rate=1e-2)
        key = jax.random.fold_in(jax.random.key(seed), batch)
        groups_state = _learned(key, problem, x, policy, OneStep(), critic, (None, critic.init(problem)), batch=batch)
        credits.append((str(batch), critic, groups_state[1]))
    rows = []
    for number, (name, baseline, state) in enumerate(credits):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(7 + number), seed), options.estimates)
        made = np.asarray(_by_decay(problem, x, policy, baseline, state, decays, keys, batch=options.batch))
        error = 0.0
        if state is not None:
            learned = jax.vmap(lambda s, c=baseline, state=state: c.critic.values(state, s)[:, 0])(jnp.arange(20))
            found = np.asarray(_centred(learned, exact.solution.policy))
            error = float(np.linalg.norm(found - truth) / np.linalg.norm(truth))
        gradient = np.asarray(ravel_pytree(exact.gradient)[0])
        for i, decay in enumerate(options.decays):
            sampled = made[:, i]
            variance = sampled.var(0, ddof=1).sum()
            off = np.sum((sampled.mean(0) - gradient) ** 2) - variance / len(sampled)  # without the noise of the mean
            size = np.linalg.norm(gradient)
            rows.append(
                {
                    "seed": seed,
                    "credit": name,
                    "credit_error": error,
                    "decay": decay,
                    "bias": float(np.sqrt(max(off, 0)) / size),
                    "deviation": float(np.sqrt(variance) / size),
                    "cosine": float(np.mean([_cosine(one, gradient) for one in sampled])),
                }
            )
    return rows


def _centred(values: Any, policy: Any) -> Any:
    return values - jnp.sum(policy * values, -1, keepdims=True)


@functools.partial(jax.jit, static_argnames="batch")
def _by_decay(problem, x, policy, baseline, state, decays, keys, batch):
    def one(key, decay):
        made = estimate(
            key,
            problem,
            x,
            policy,
            batch=batch,
            response=EligibilityTrace(decay),
            baseline=baseline,
            baseline_state=state,
        )
        return ravel_pytree(made.gradient)[0]

    return jax.lax.map(lambda key: jax.vmap(lambda decay: one(key, decay))(decays), keys)


def summary(rows: list[dict[str, str]]) -> dict[tuple[str, str], dict[str, tuple[float, float]]]:
    """By credit and decay: the mean over the MDPs of each column, with its standard error."""
    found = {}
    for key in dict.fromkeys((row["credit"], row["decay"]) for row in rows):
        own = [row for row in rows if (row["credit"], row["decay"]) == key]
        found[key] = {}
        for name in ("credit_error", "bias", "deviation", "cosine"):
            numbers = np.array([float(row[name]) for row in own])
            found[key][name] = float(numbers.mean()), float(numbers.std(ddof=1) / np.sqrt(numbers.size))
    return found


def plot(directory: Path) -> None:
    """networks.png: bias, deviation and cosine of traces against the trajectories that their critics learned from."""
    found = summary(read_rows(directory / "traces.csv"))
    sizes = [size for size in dict.fromkeys(size for size, _ in found) if size != "exact"]
    decays = list(dict.fromkeys(decay for _, decay in found))

    def panel(name: str, label: str) -> Callable[[Any], None]:
        def show(axes: Any) -> None:
            for i, decay in enumerate(decays):
                means, errors = zip(*(found[size, decay][name] for size in sizes), strict=True)
                axes.errorbar([float(size) for size in sizes], means, errors, marker=".", color=f"C{i}", label=decay)
                axes.axhline(found["exact", decay][name][0], color=f"C{i}", linestyle=":", linewidth=1)
            axes.set(xscale="log", xlabel="trajectories that the critic learned from", ylabel=label)
            box = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": len(decays), "frameon": False}
            axes.legend(**box, fontsize=8, title="decay (dotted: exact credit)", title_fontsize=8)

        return show

    draw(
        directory / "networks.png",
        panel("bias", "bias / |gradient|"),
        panel("deviation", "deviation of one batch / |gradient|"),
        panel("cosine", "cosine of one batch"),
    )


STUDY = Study("networks", {"networks": NetworksOptions()}, run, plot)

if __name__ == "__main__":
    sys.exit(main(STUDY))
