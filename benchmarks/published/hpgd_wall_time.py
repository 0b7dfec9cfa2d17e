"""Four Rooms incentive design: wall time of HPGD's own code and of the exact hyper-gradient to the same value.

    python -m benchmarks.published.hpgd_wall_time --peer PATH_TO_THEIR_CHECKOUT --peer-python PYTHON_OF_hpgd_peer

Theirs is `hpgd_peer_run.py` with the published settings (SGD, clipping at norm 1, 5 environments of 2,000 steps,
10,000 iterations, float32), without the reports that its update step makes. Its learning rate is the best of the
published four after PILOT iterations each. Its weights are evaluated here every BLOCK iterations, outside its time.
Its time is that of its fastest pilot an iteration, times the iterations: half an hour of one core is rarely all quiet.

Ours is `implicit` with Adam, float64, from the same start and from nine others of the same distribution, timed until
its value is at least the target, everything in one compiled loop. Targets: shares of the best value that HPGD has on
its whole way, which is no less than its last one. Adam's rate is the best of RATES by the median time to that value,
on other starts.

The judge is our model, exact and in float64, for both. HPGD's simulator makes the chosen move with probability 0.67,
the matrix behind its best responses and its published values with 0.56 (docs/sampling.md): `simulator` is the
designer's value if agents that plan with the matrix walk in the simulator. Pieces of their run are kept in --store;
started again it goes on.
"""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"

import argparse
import json
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import bilevel_jax as bj
from benchmarks.common import timing
from benchmarks.common.figures import Figures
from bilevel_jax.bilevel import lower_level

PUBLISHED_RATES = (0.5, 0.1, 0.05, 0.01)
PILOT = 500
ITERATIONS = 10_000
PIECE = 2_500
BLOCK = 20
RATES = (0.05, 0.1, 0.3)
ADAM = {rate: optax.adam(rate) for rate in RATES}  # built once: a new one is a new structure
SEEDS = 10
LIMIT = 5_000  # steps of ours at most
SHARES = (0.5, 0.75, 0.9, 1.0)


@jax.jit
def judge(problem: Any, simulator: Any, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Values of weights [N, n] in the model, and where the agents that plan with it walk in the simulator."""

    def one(x):
        solution = bj.solve(*lower_level(problem, x))
        return -problem.objective(x, solution), -simulator.objective(x, solution)

    return lax.map(one, weights)


@jax.jit
def climb(algorithm: Any, state: Any, target: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Steps until the value is at least the target: x there, its value, hyper-gradients taken."""

    def short(carry):
        _, _, value, steps = carry
        return (value < target) & (steps < LIMIT)

    def advance(carry):
        state, _, _, steps = carry
        after, info = algorithm.step(jax.random.key(0), state)
        return after, state.x, -info.objective, steps + 1

    start = (state, state.x, jnp.asarray(-jnp.inf), jnp.asarray(0))
    return lax.while_loop(short, advance, start)[1:]


def make_algorithm(problem: Any, rate: float) -> Any:
    method = bj.Implicit(bj.PolicyIteration(1e-8), bj.Direct())
    return bj.algorithms.implicit(problem, ADAM[rate], method=method)


def run_peer(options: argparse.Namespace, **asked: Any) -> dict[str, Any]:
    command = [options.peer_python, str(Path(__file__).with_name("hpgd_peer_run.py"))]
    whole = {
        "checkout": str(options.peer),
        "temperature": options.temperature,
        "beta": options.beta,
        "seed": 0,
        **asked,
    }
    load = os.getloadavg()[0]
    made = subprocess.run(command, check=True, input=json.dumps(whole), stdout=subprocess.PIPE, text=True)
    return {**json.loads(made.stdout), "load_average": [load, os.getloadavg()[0]]}


def peer_run(options: argparse.Namespace, store: Figures, problem: Any, simulator: Any) -> dict[str, Any]:
    """Their whole run: the rate, seconds and values of its curve, its start."""
    cell = f"temperature {options.temperature:g}, beta {options.beta:g}"
    pilots, taken = {}, {}
    for rate in PUBLISHED_RATES:
        pilot = store.measure(
            f"{cell}, pilot {rate:g}", lambda rate=rate: run_peer(options, rate=rate, iterations=PILOT, block=PILOT)
        )
        pilots[rate] = float(judge(problem, simulator, jnp.asarray(pilot["weights"], float))[0][0])
        taken[rate] = pilot["seconds"][0] / PILOT
    rate = max(pilots, key=lambda rate: pilots[rate])
    step = min(taken.values())
    weights, measured, loads, compiling = [], [], [], []
    going_on: dict[str, Any] = {}
    for piece in range(options.iterations // PIECE):
        made = store.measure(
            f"{cell}, rate {rate:g}, piece {piece}",
            lambda going_on=going_on: run_peer(options, rate=rate, iterations=PIECE, block=BLOCK, **going_on),
        )
        weights += made["weights"] if weights else [made["start"], *made["weights"]]
        measured.append(made["seconds"][-1])
        compiling.append(made["compile_seconds"])
        loads += made["load_average"]
        going_on = {"weights": made["weights"][-1], "key": made["key"]}
    values, walked = (np.asarray(v) for v in judge(problem, simulator, jnp.asarray(weights, float)))
    seconds = [step * BLOCK * block for block in range(len(values))]
    last = len(values) // 10
    return {
        "rate": rate,
        "pilot_values": {f"{rate:g}": value for rate, value in pilots.items()},
        "iterations": options.iterations,
        "seconds": seconds[-1],
        "seconds_an_iteration": step,
        "seconds_an_iteration_of_the_pilots": {f"{rate:g}": second for rate, second in taken.items()},
        "seconds_an_iteration_of_the_whole_run": sum(measured) / options.iterations,
        "compile_seconds": statistics.median(compiling),
        "load_average": loads,
        "value_at_the_end": float(values[-1]),
        "mean_value_of_the_last_tenth": float(values[-last:].mean()),
        "best_value": float(values.max()),
        "best_value_simulator": float(walked.max()),
        "value_at_the_end_simulator": float(walked[-1]),
        "curve": {"seconds": np.round(seconds[::5], 2).tolist(), "values": np.round(values[::5], 4).tolist()},
        "reached": {f"{s:g}": _first(seconds, values, s * values.max()) for s in SHARES},
        "reached_simulator": _first(seconds, walked, walked.max()),
        "start": weights[0],
    }


def _first(seconds: list[float], values: np.ndarray, target: float) -> dict[str, float]:
    """When a value is first at least the target: the end of that block."""
    index = int(np.argmax(values >= target))
    return {"target": float(target), "seconds": seconds[index], "iterations": index * BLOCK}


def our_runs(problem: Any, simulator: Any, peer: dict[str, Any]) -> dict[str, Any]:
    key = jax.random.key(1)
    target = jnp.asarray(peer["best_value"])
    others = [problem.start(jax.random.fold_in(key, 100 + seed)) for seed in range(3)]
    trials = {rate: [_timed(problem, rate, x, target)["seconds"] for x in others] for rate in RATES}
    rate = min(trials, key=lambda rate: statistics.median(trials[rate]))
    first = jnp.asarray(peer["start"], float)
    algorithm = make_algorithm(problem, rate)
    jax.clear_caches()
    start = time.perf_counter()
    state = algorithm.init(key, first)
    climb.lower(algorithm, state, target).compile()
    compiling = time.perf_counter() - start
    starts = [first, *(problem.start(jax.random.fold_in(key, s)) for s in range(1, SEEDS))]
    reached = {}
    for share in SHARES:
        runs = [_timed(problem, rate, x, share * target) for x in starts]
        seconds = [run["seconds"] for run in runs]
        ends, walked = judge(problem, simulator, jnp.stack([run["x"] for run in runs]))
        reached[f"{share:g}"] = {
            "target": share * peer["best_value"],
            "from_their_start_seconds": seconds[0],
            "seconds": timing.summary(seconds),
            "steps": [run["steps"] for run in runs],
            "reached": int(jnp.sum(ends >= share * target - 1e-9)),
            "least_value": float(ends.min()),
            "values_simulator": np.round(np.asarray(walked), 4).tolist(),
        }
    return {
        "rate": rate,
        "trials_median_seconds": {f"{rate:g}": statistics.median(taken) for rate, taken in trials.items()},
        "compile_seconds": compiling,
        "reached": reached,
    }


def _timed(problem: Any, rate: float, x: jax.Array, target: jax.Array) -> dict[str, Any]:
    algorithm = make_algorithm(problem, rate)
    state = algorithm.init(jax.random.key(0), x)
    taken = timing.seconds(lambda: climb(algorithm, state, target), 3, warm_up=1)
    x, _, steps = climb(algorithm, state, target)
    return {"seconds": statistics.median(taken), "x": x, "steps": int(steps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--temperature", type=float, default=0.005)
    parser.add_argument("--beta", type=float, default=1.0)
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    parser.add_argument("--store", type=Path, default=Path("runs/hpgd_wall_time.json"))
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    problem, simulator = (
        bj.problems.make("four_rooms", temperature=options.temperature, beta=options.beta, slip=slip)
        for slip in (0.44, 0.33)
    )
    peer = peer_run(options, Figures(options.store), problem, simulator)
    load = os.getloadavg()[0]
    ours = our_runs(problem, simulator, peer)
    faster = {
        share: {
            "from_their_start": at["seconds"] / ours["reached"][share]["from_their_start_seconds"],
            "median_of_starts": at["seconds"] / ours["reached"][share]["seconds"]["median"],
            "slowest_start": at["seconds"] / ours["reached"][share]["seconds"]["max"],
        }
        for share, at in peer["reached"].items()
    }
    del peer["start"]
    figures = {"times_faster": faster, "ours": {"load_average": load, **ours}, "peer": peer}
    cells = Figures("hpgd_wall_time", again=True)
    cells.measure(f"temperature {options.temperature:g}, beta {options.beta:g}", lambda: figures)


if __name__ == "__main__":
    main()
