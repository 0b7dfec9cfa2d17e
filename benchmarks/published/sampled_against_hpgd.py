"""Sampling on Four Rooms: our rollouts and HPGD iterations against those of HPGD's authors, one machine.

python -m benchmarks.published.sampled_against_hpgd --peer PATH_TO_THEIR_CHECKOUT --peer-python PYTHON_OF_hpgd_peer

Their side is `hpgd_peer.py`, run in between: half of our repetitions come before it, half after. Both run
in float32 at temperature 0.003, and with OPENBLAS_NUM_THREADS=1, which this script sets before JAX is
imported: on few cores OpenBLAS's threads get in the way of XLA's.

Rollouts, 10^6 steps a second: `whole` returns all of a trajectory, `used` what HPGD reads of it
(observation, action, valid; theirs: done, t, state, action). Ours ends at the goal, the rest of its steps
are computed, but not valid (`valid`: share that is); theirs starts anew. `restarting used` has dynamics
that go from the goal to the start, so that each step is one of a process, as theirs.

Iterations: beta 3, gradient clipped at norm 1, SGD 0.1. Theirs has 5 environments of 2,000 steps, ours 50
trajectories of 200, a fifth of their steps valid; 250 of them have about as many valid ones as theirs.
Both use best responses found on the model: theirs 100 x 5 sweeps from zeros, ours warm-started policy
iteration to working precision. Single calls of theirs are without reports, their scan has them.

Profile, nanoseconds a step: `start` makes keys and first states, `bits` is the hashing alone in a loop,
`loop` has the look-ups too and stores nothing, `used` and `whole` are all of it.
"""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"

import argparse
import functools
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from benchmarks.common import timing
from bilevel_jax.bilevel import lower_level
from bilevel_jax.core.functions import Table
from bilevel_jax.environments import rollout, rollout_from, trajectory_keys
from bilevel_jax.environments.sampling import two_numbers

SHAPES = ((5, 2000), (1024, 200), (16384, 50), (16384, 100), (131072, 50))  # batch, horizon; the peer has three
BATCHES = (50, 250)  # of an iteration
SCANNED = 20
REPEATS = 11  # of every call, twice
LARGE = 2**26  # numbers in the array that measures memory
RATES = ("whole", "used", "restarting used")
PARTS = ("start", "bits", "loop", "used", "whole")
Calls = dict[str, Callable[[], Any]]


def rollout_calls(problem: Any, policy: Table, batch: int, horizon: int) -> Calls:
    """What is timed at one shape. Arrays are arguments: constants could be folded."""
    environment = problem.environment
    first = jnp.arange(environment.num_states) // len(problem.initial) * len(problem.initial)
    origin = jnp.repeat(first + jnp.argmax(problem.initial), environment.num_actions)[:, None].astype(jnp.int32)
    successor = jnp.where(environment.ends[:, None], origin, environment.successor)
    endless = eqx.tree_at(lambda e: (e.successor, e.ends), environment, (successor, environment.ends & False))

    def whole(key, model):
        return rollout(key, model[0], model[1], batch=batch, horizon=horizon)

    def used(key, model):
        seen = whole(key, model)
        return seen.observation, seen.action, seen.valid

    def start(key, model):
        keys = trajectory_keys(key, batch)
        return keys, jax.vmap(lambda key: model[0].reset(jax.random.fold_in(key, 0)))(keys)

    def bits(keys):
        def step(total, h):
            return total + sum(two_numbers(keys, h + 1)), None

        return jax.lax.scan(step, jnp.zeros(batch), jnp.arange(horizon, dtype=jnp.uint32))[0]

    def loop(keys, states, model):
        return rollout_from(keys, model[0], model[1], states, horizon=horizon)[1]

    key, model, restarting = jax.random.key(1), (environment, policy), (endless, policy)
    keys, states = jax.jit(start)(key, model)
    arguments = {"start": (start, key, model), "bits": (bits, keys), "loop": (loop, keys, states, model)}
    arguments |= {"whole": (whole, key, model), "used": (used, key, model), "restarting used": (used, key, restarting)}
    return {name: functools.partial(jax.jit(call), *given) for name, (call, *given) in arguments.items()}


def iteration_calls(problem: Any, x: jax.Array, batch: int) -> Calls:
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
    algorithm = bj.algorithms.hpgd(problem, optimizer, agent=bj.agents.ExactAgent(), batch=batch)
    carry = start = jax.random.key(3), algorithm.init(jax.random.key(2), x)

    def advance(algorithm, carry):
        key, now = jax.random.split(carry[0])
        state, info = algorithm.step(now, carry[1])
        return (key, state), info

    step = jax.jit(advance)
    scan = jax.jit(lambda algorithm, carry: jax.lax.scan(lambda c, _: advance(algorithm, c), carry, None, SCANNED)[1])

    def single():
        nonlocal carry
        carry, info = step(algorithm, carry)
        return carry[1], info

    return {"single": single, "scan": lambda: scan(algorithm, start)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--out", type=Path, default=timing.RESULTS / "sampled_against_hpgd.json")
    options = parser.parse_args()
    load = [os.getloadavg()[0]]

    problem = bj.problems.make("four_rooms", temperature=0.003, beta=3.0)
    x = problem.start(jax.random.key(0))
    best = bj.solve(*lower_level(problem, x))
    policy = Table(best.policy.reshape(-1, best.policy.shape[-1]))
    shapes = {f"{batch} environments, {horizon} steps": (batch, horizon) for batch, horizon in SHAPES}
    batches = {f"batch {batch}, horizon {problem.horizon}": batch for batch in BATCHES}
    large, total, fill = jnp.ones(LARGE), jax.jit(jnp.sum), jax.jit(lambda value: jnp.full(LARGE, value))
    groups: dict[str, Calls] = {name: rollout_calls(problem, policy, *shape) for name, shape in shapes.items()}
    groups |= {name: iteration_calls(problem, x, batch) for name, batch in batches.items()}
    groups["memory"] = {"read": lambda: total(large), "write": lambda: fill(1.0)}

    before = {name: timing.alternate(calls, REPEATS) for name, calls in groups.items()}
    command = [options.peer_python, str(Path(__file__).with_name("hpgd_peer.py")), "--checkout", str(options.peer)]
    peer = json.loads(subprocess.run(command, check=True, timeout=900, stdout=subprocess.PIPE).stdout)
    after = {name: timing.alternate(calls, REPEATS) for name, calls in groups.items()}
    taken = {name: {call: times + after[name][call] for call, times in before[name].items()} for name in groups}
    load.append(os.getloadavg()[0])

    scan = f"scan_of_{SCANNED}_seconds_an_iteration"
    rates, profile, faster, iterations = ({} for _ in range(4))
    for name in batches:
        scanned = [t / SCANNED for t in taken[name]["scan"]]
        own = {"single_call_seconds": timing.summary(taken[name]["single"]), scan: timing.summary(scanned)}
        pairs = ("single_call_without_reports_seconds", "single_call_seconds"), (scan, scan)
        faster[name] = {mine: peer["iteration"][their]["median"] / own[mine]["median"] for their, mine in pairs}
        outcomes = groups[name]["scan"]().outcomes()
        converged = all(bool(jnp.all(outcome.result == bj.Result.CONVERGED)) for outcome in outcomes)
        iterations[name] = {**own, "all_converged": converged}
    for name, (batch, horizon) in shapes.items():
        steps, calls = batch * horizon, groups[name]
        rates[name] = {n: timing.summary([steps / t / 1e6 for t in taken[name][n]]) for n in RATES}
        rates[name]["valid"] = float(jnp.mean(calls["whole"]().valid))
        spent = {part: timing.summary(taken[name][part])["median"] / steps * 1e9 for part in PARTS}
        sizes = {n: sum(leaf.nbytes for leaf in jax.tree.leaves(calls[n]())) / steps for n in RATES[:2]}
        profile[name] = {"nanoseconds_a_step": spent, "bytes_a_step": sizes}
    for name, rate in peer["rollouts"].items():
        faster[name] = {n: rates[name][n]["median"] * 1e6 / rate[n.split()[-1]]["steps_a_second"] for n in RATES}
    memory = {name: timing.summary([4 * LARGE / t / 1e9 for t in times]) for name, times in taken["memory"].items()}
    figures = {"machine": timing.machine(), "load_average": load, "times_faster": faster, "iteration": iterations}
    figures |= {"bellman_residual_in_float32": float(jnp.max(best.stats.residual)), "million_steps_a_second": rates}
    figures |= {"profile": {**profile, "memory_gigabytes_a_second": memory}, "peer": peer}
    text = json.dumps(figures, indent=2) + "\n"
    options.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
