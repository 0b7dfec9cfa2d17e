"""Time and memory of a solve and of its gradient from 10^4 to 10^7 states, each size in a process of its own.

    python -m benchmarks.solvers.scale          # all cells; half an hour on two cores, 16 GiB
    python -m benchmarks.solvers.scale --most 1e5 --dtypes float32
    python -m benchmarks.solvers.scale --device gpu --name scale_gpu
    python -m benchmarks.solvers.scale --table  # table and picture of what has been measured

A = 4 actions. `random`: K = 4 random successors a pair, as lists; `random, predecessors`: the same with lists of
predecessors; `grid`: an open square grid with slip 0.1 as a stencil, K = 5 (four moves and staying). Rewards N(0, 1),
one a pair (random) or a cell (grid), Shannon entropy at 0.1, discount 0.95. Float32 is solved to 5e-3, float64 to
2e-5, about 2e-4 and 1e-6 of max |V*|; the gradient is that of initial . V* in the reward, its adjoint to 1e-6
(float32: 1e-5).

A transition is an entry [k, s, a]. Memory is what is resident: `arguments` are the MDP's arrays, `solve` and
`gradient` what each adds at its most, `building` what the constructors and their checks add at their most, `process`
all there is. Products are counted with sweeps. `sweep_of_copy` is the rate at which a Bellman sweep reads and writes
what it must, each array once, over that of a plain copy of as much. The value is checked by numpy (MacQueen's bounds),
the gradient by its flow equation (see `differentiation.py`). Median seconds.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import bilevel_jax as bj
from benchmarks.common.figures import Figures, reset_peak, resident
from benchmarks.common.timing import IMAGES, alternate, seconds, summary
from bilevel_jax.mdp.bellman import backup

ACTIONS, SLOTS, DISCOUNT, TEMPERATURE = 4, 4, 0.95, 0.1
SIZES = (10**4, 10**5, 10**6, 10**7)
MOST = {"float32": 10**7, "float64": 10**6}
TOLERANCE = {"float32": (5e-3, 1e-5), "float64": (2e-5, 1e-6)}
FORMS = ("random", "random, predecessors", "grid")
LOOP = 5
MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))


class Memory:
    """Bytes on the device: now, and at the most since the last `reset`; `process` is the most of all."""

    def __init__(self):
        self.device = jax.devices()[0]
        self.process = 0

    def now(self) -> int:
        return resident()[0] if self.device.platform == "cpu" else self._stats()["bytes_in_use"]

    def most(self) -> int:
        """On an accelerator this is the most since the process began."""
        most = resident()[1] if self.device.platform == "cpu" else self._stats()["peak_bytes_in_use"]
        self.process = max(self.process, most)
        return most

    def reset(self) -> int:
        """What there is now."""
        self.most()
        if self.device.platform == "cpu":
            reset_peak()
        return self.now()

    def _stats(self) -> dict[str, int]:
        return self.device.memory_stats() or {}


def build(form: str, states: int, dtype: Any) -> bj.MDP:
    """Numbers are drawn slot by slot, so that nothing larger than the arrays themselves is made."""
    rng = np.random.default_rng(states)
    if form == "grid":
        kernel: bj.Transition = grid(round(states**0.5), dtype)
        cells = rng.standard_normal(kernel.shape[0], dtype)
        reward = np.repeat(cells[:, None], ACTIONS, 1)
    else:
        shape = (SLOTS, states, ACTIONS)
        successor, weight = np.empty(shape, np.int32), np.empty(shape, dtype)
        for k in range(SLOTS):
            successor[k] = rng.integers(states, size=shape[1:], dtype=np.int32)
            weight[k] = rng.random(shape[1:], dtype) + dtype(1e-2)
        weight /= weight.sum(0)
        lists = bj.SuccessorTransition(jnp.asarray(successor), jnp.asarray(weight))
        del successor, weight
        kernel = lists.with_predecessors() if form.endswith("predecessors") else lists
        reward = rng.standard_normal(shape[1:], dtype)
    return bj.MDP(kernel, jnp.asarray(reward), DISCOUNT)


def grid(side: int, dtype: Any) -> bj.StencilTransition:
    made = np.where(np.eye(ACTIONS, dtype=bool), 0.9, 0.1 / 3).astype(dtype)  # [chosen, made]
    probability = np.zeros((len(MOVES) + 1, side, side, ACTIONS), dtype)
    for k, (row, column) in enumerate(MOVES):
        probability[k] = made[:, k]
        edge = {(-1, 0): np.s_[0], (1, 0): np.s_[-1], (0, -1): np.s_[:, 0], (0, 1): np.s_[:, -1]}[row, column]
        probability[k][edge] = 0
        probability[-1][edge] += made[:, k]
    flat = probability.reshape(len(MOVES) + 1, side * side, ACTIONS)
    return bj.StencilTransition((*MOVES, (0, 0)), jnp.asarray(flat), (side, side))


def numpy_lists(mdp: bj.MDP):
    """(successor, probability) of each slot."""
    kernel: Any = mdp.transition
    if isinstance(kernel, bj.StencilTransition):
        size = kernel.shape[0]
        for k, (row, column) in enumerate(kernel.offsets):
            there = np.arange(size) + row * kernel.grid[1] + column
            # Beyond the edges the probability is 0.
            yield np.broadcast_to(np.clip(there, 0, size - 1)[:, None], kernel.shape), np.asarray(kernel.probability[k])
    else:
        for k in range(kernel.probability.shape[0]):
            yield np.asarray(kernel.successor[k]), np.asarray(kernel.probability[k])


def value_error(mdp: bj.MDP, value: np.ndarray) -> tuple[float, float]:
    """(proven bound on |V - V*|_inf, max |V|), by numpy in float64."""
    expected, mass = np.zeros(mdp.reward.shape), np.zeros(mdp.reward.shape)
    for successor, probability in numpy_lists(mdp):
        expected += probability * value[successor]
        mass += probability
    q = np.asarray(mdp.reward) + DISCOUNT * expected
    top = q.max(-1)
    new = top + TEMPERATURE * np.log(np.exp((q - top[:, None]) / TEMPERATURE).sum(-1))
    gap = new - value
    factors = [DISCOUNT * m / (1 - DISCOUNT * m) for m in (mass.min(), mass.max())]
    bounds = [f * g for f in factors for g in (gap.min(), gap.max())]
    return float(max(abs((gap + max(bounds)).max()), abs((gap + min(bounds)).min()))), float(np.abs(value).max())


def flow_error(mdp: bj.MDP, gradient: np.ndarray) -> float:
    """See `differentiation.py`."""
    arrives = np.zeros(gradient.shape[0])
    for successor, probability in numpy_lists(mdp):
        arrives += np.bincount(successor.reshape(-1), (probability * gradient).reshape(-1), gradient.shape[0])
    left = gradient.sum(-1) - np.asarray(mdp.initial, float) - DISCOUNT * arrives
    return float(np.abs(left).sum() / ((1 - DISCOUNT) * np.abs(gradient).sum()))


def gradient_in_reward(mdp, regularizer, solver, adjoint):
    def of_reward(reward):
        one = eqx.tree_at(lambda m: m.reward, mdp, reward)
        return one.initial @ bj.solve(one, regularizer, solver=solver, adjoint=adjoint).value

    return jax.value_and_grad(of_reward)(mdp.reward)


# The number of rounds is an argument: a constant one is unrolled, and additions of several rounds become one.
@jax.jit
def sweeps(rounds, value, mdp, regularizer):
    return lax.fori_loop(0, rounds, lambda _, v: backup(mdp, regularizer, v), value)


@jax.jit
def copies(rounds, array):
    return lax.fori_loop(0, rounds, lambda _, a: a + 1, array)


def cell(form: str, states: int, dtype_name: str, repeats: int) -> dict[str, Any]:
    """One process's figures."""
    dtype = np.dtype(dtype_name).type
    memory = Memory()
    jax.block_until_ready(jnp.zeros(1) + 1)
    empty = memory.reset()
    mdp = jax.block_until_ready(build(form, states, dtype))
    entries = mdp.transition.terms * mdp.num_states * ACTIONS
    arguments = sum(leaf.nbytes for leaf in jax.tree.leaves(mdp))
    out: dict[str, Any] = {
        "states": mdp.num_states,
        "transitions": entries,
        "empty_bytes": empty,
        "arguments_bytes": arguments,
        "building_bytes": memory.most() - empty - arguments,
    }
    regularizer = bj.ShannonEntropy(dtype(TEMPERATURE))
    tolerance, adjoint = TOLERANCE[dtype_name]
    solver = bj.Auto(tolerance)
    programs = {
        "solve": (lambda m, r, s: bj.solve(m, r, solver=s), (mdp, regularizer, solver)),
        "gradient": (gradient_in_reward, (mdp, regularizer, solver, bj.BiCGStab(adjoint))),
    }
    results: dict[str, Any] = {}
    for name, (function, given) in programs.items():
        program = jax.jit(function).lower(*given).compile()
        before = memory.reset()
        results[name] = jax.block_until_ready(program(*given))
        out[f"{name}_bytes"] = memory.most() - before
        taken = summary(seconds(functools.partial(program, *given), repeats, 0))
        out[f"{name}_seconds"] = taken
        out[f"{name}_ns_per_transition"] = 1e9 * taken["median"] / entries
        del program
    solution = results["solve"]
    out |= {"sweeps": int(solution.stats.iterations), "products": int(solution.stats.products)}
    out |= {"result": int(solution.result), "process_bytes": memory.process}
    rounds = entries * (out["sweeps"] + out["products"])
    out["solve_ns_per_transition_and_product"] = 1e9 * out["solve_seconds"]["median"] / rounds
    out["peak_bytes_per_transition"] = (arguments + max(out["solve_bytes"], out["gradient_bytes"])) / entries

    value = solution.value
    bound, scale = value_error(mdp, np.asarray(value, float))
    out["value_error"] = bound / scale
    out["flow_error"] = flow_error(mdp, np.asarray(results["gradient"][1], float))
    del results, solution
    return out | bandwidth(mdp, regularizer, value, repeats)


def swept_bytes(mdp: bj.MDP) -> int:
    """What a sweep must read and write, each array once: probabilities, successors, rewards, V and T V."""
    kernel: Any = mdp.transition
    arrays = [kernel.probability, mdp.reward]
    arrays += [kernel.successor] if isinstance(kernel, bj.SuccessorTransition) else []
    return sum(array.nbytes for array in arrays) + 2 * mdp.num_states * mdp.reward.dtype.itemsize


def bandwidth(mdp: bj.MDP, regularizer: Any, value: Any, repeats: int, rounds: int = LOOP) -> dict[str, float]:
    """Rates of a Bellman sweep and of a copy of as many bytes, in turns: medians of `repeats` loops of `rounds`."""
    moved = swept_bytes(mdp)
    copied = jnp.zeros(moved // 2 // mdp.reward.dtype.itemsize, mdp.reward.dtype)
    calls = {"sweep": lambda: sweeps(rounds, value, mdp, regularizer), "copy": lambda: copies(rounds, copied)}
    each = {name: summary(taken)["median"] / rounds for name, taken in alternate(calls, repeats).items()}
    rates = {f"{name}_GB_per_s": moved / taken / 1e9 for name, taken in each.items()}
    return rates | {"sweep_of_copy": each["copy"] / each["sweep"]}


def in_process(device: str, *arguments: Any) -> dict[str, Any]:
    environment = os.environ | ({"JAX_PLATFORMS": "cpu"} if device == "cpu" else {})
    command = [sys.executable, "-m", "benchmarks.solvers.scale", "--cell", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        return {"failed": done.returncode, "error": done.stderr.strip().splitlines()[-1:]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def plot(cells: dict[str, Any], picture: Path) -> None:
    """Time and memory a transition against the number of states."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    kinds = sorted({key.rsplit(", ", 1)[0] for key in cells})
    for colour, kind in enumerate(kinds):
        rows = sorted(
            (row["states"], row) for key, row in cells.items() if key.rsplit(", ", 1)[0] == kind and "states" in row
        )
        states = [s for s, _ in rows]
        for field, style in (("solve_ns_per_transition", "-o"), ("gradient_ns_per_transition", "--x")):
            label = f"{kind}: {'solve' if field[0] == 's' else 'and gradient'}"
            left.loglog(states, [row[field] for _, row in rows], style, color=f"C{colour}", label=label)
        right.semilogx(
            states, [row["peak_bytes_per_transition"] for _, row in rows], "-o", color=f"C{colour}", label=kind
        )
    left.set(xlabel="states", ylabel="ns a transition", title="Time")
    right.set(xlabel="states", ylabel="bytes a transition", title="Peak memory of the gradient", ylim=(0, None))
    left.legend(fontsize=6)
    right.legend(fontsize=7)
    figure.savefig(picture, dpi=110)


def table(cells: dict[str, Any]) -> str:
    """Markdown."""
    names = ("cell", "solve, s", "and gradient, s", "ns a transition", "bytes a transition", "process, GiB")
    names += ("ns a transition and product of the solve", "building, GiB", "sweep of copy")
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for key, row in cells.items():
        if "failed" in row:
            lines.append(f"| {key} | failed: {row['failed']} {row['error']} |" + " |" * 7)
            continue
        both = f"{row['solve_ns_per_transition']:.1f}, {row['gradient_ns_per_transition']:.1f}"
        times = [row[f"{name}_seconds"]["median"] for name in ("solve", "gradient")]
        lines.append(
            f"| {key} | {times[0]:.3g} | {times[1]:.3g} | {both} | {row['peak_bytes_per_transition']:.1f} | "
            f"{row['process_bytes'] / 2**30:.2f} | "
            f"{row['solve_ns_per_transition_and_product']:.2f} | "
            f"{row['building_bytes'] / 2**30:.2f} | {row['sweep_of_copy']:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure what is not measured yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=float, default=1e7, help="states")
    parser.add_argument("--forms", nargs="+", default=FORMS, choices=FORMS)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float64"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--name", default="scale", help="of the file in benchmarks/results, or a path *.json")
    parser.add_argument("--again", action="store_true", help="measure the chosen cells though they are there")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    if options.cell:
        print(json.dumps(cell(*json.loads(options.cell))))
        return
    figures = Figures(options.name, options.again)
    for states in () if options.table else SIZES:
        for dtype in options.dtypes:
            for form in options.forms if states <= min(options.most, MOST[dtype]) else ():
                repeats = options.repeats if states < 10**7 else min(3, options.repeats)
                call = functools.partial(in_process, options.device, form, states, dtype, repeats)
                figures.measure(f"{form}, {dtype}, {states}", call)
    if figures.cells:
        plot(figures.cells, IMAGES / f"{Path(options.name).stem}.png")
    print(table(figures.cells))


if __name__ == "__main__":
    main()
