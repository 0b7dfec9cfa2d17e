"""The default against LU where Krylov methods have it easy and where they gain nothing: solve and gradient.

python -m benchmarks.solvers.krylov_and_direct [seconds after which no further case begins, by default 300]

Rings (one action goes on, the other may stay), seasonal chains (12 x 60, 365 x 10: month or day x stock), corridors,
random MDPs (Garnet, 4 actions, 5 successors) and open grids with a goal, at discounts 0.99, 0.999 and 0.99999; Shannon
entropy at temperature 0.1, float64. `solve`: seconds from V = 0 by the default, and by Newton's method with LU
(`PolicyIteration(linear_solver=Direct())`). `gradient`: seconds of the transposed system of V[0] at the solution by the
default adjoint, and by LU. `code` is the default's `Result` and `value_error` its largest distance from a V that
scipy's sparse LU found by Newton's method, relative to the largest |V|, as `value_bound`, what the solver proves of
it; `gradient_error` is that of the visits in the 1-norm, relative. Writes results/krylov_and_direct.json and .md. Cases
left out when the time is up are named.
"""

import functools
import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse
from scipy.sparse.linalg import splu

import bilevel_jax as bj
from benchmarks.common import timing
from bilevel_jax.linear import default_linear_solver, linear_solve
from bilevel_jax.mdp.bellman import discounted_operator
from bilevel_jax.problems.grid import dynamics, parse_map

DISCOUNTS = (0.99, 0.999, 0.99999)
TEMPERATURE = 0.1
SECONDS = 300
# A call that takes longer is timed once, others three times.
LONG = 1.0


def lists(to, probability):
    """Successors [K][S, A] or [K][S], probabilities broadcast to them."""
    successor = np.stack(to)
    return bj.SuccessorTransition(successor, np.broadcast_to(probability, successor.shape))


def ring(states):
    state = np.arange(states)
    on = np.stack([(state + 1) % states] * 2, -1)
    stay = np.stack([state] * 2, -1)
    return lists([on, stay], np.array([[1.0, 0.8], [0.0, 0.2]])[:, None]), random_reward(states, 2)


def seasons(seasons, stocks):
    season, stock = np.divmod(np.arange(seasons * stocks), stocks)
    to = [(season + 1) % seasons * stocks + np.clip(stock + step, 0, stocks - 1) for step in (1, 0, -1)]
    to = [np.stack([one] * 2, -1) for one in to]
    return lists(to, np.array([[0.5, 0.2], [0.3, 0.3], [0.2, 0.5]])[:, None]), random_reward(len(stock), 2)


def corridor(states):
    state = np.arange(states)
    ways = np.stack([np.minimum(state + 1, states - 1), np.maximum(state - 1, 0)], -1)
    return lists([ways, ways[:, ::-1]], np.array([0.8, 0.2])[:, None, None]), random_reward(states, 2)


def garnet(states, actions=4, successors=5):
    rng = np.random.default_rng(states)
    to = rng.integers(states, size=(successors, states, actions), dtype=np.int32)
    probability = np.moveaxis(rng.dirichlet(np.ones(successors), (states, actions)), -1, 0)
    return bj.SuccessorTransition(to, probability), random_reward(states, actions)


def grid(side):
    transition = dynamics(parse_map("\n".join(["." * side] * side)), 0.1, "successor")
    reward = np.full((side * side, 4), -0.01)
    reward[-1] = 1
    return transition, reward


def random_reward(states, actions):
    return np.random.default_rng(states).normal(size=(states, actions))


CASES = {
    "ring 600": functools.partial(ring, 600),
    "season 12 x 60": functools.partial(seasons, 12, 60),
    "corridor 500": functools.partial(corridor, 500),
    "garnet 500": functools.partial(garnet, 500),
    "grid 24 x 24": functools.partial(grid, 24),
    "ring 1000": functools.partial(ring, 1000),
    "corridor 2000": functools.partial(corridor, 2000),
    "ring 2000": functools.partial(ring, 2000),
    "season 365 x 10": functools.partial(seasons, 365, 10),
    "garnet 5000": functools.partial(garnet, 5000),
    "grid 70 x 70": functools.partial(grid, 70),
    "ring 5000": functools.partial(ring, 5000),
}
# Newton's method by LU takes up to 17 s at 2,000 states; `value_error` is by sparse LU all the same.
MOST_BY_LU = 1100


@jax.jit
def solve(mdp, solver):
    return bj.solve(mdp, bj.ShannonEntropy(TEMPERATURE), solver=solver)


@functools.partial(jax.jit, static_argnames="direct")
def visits(mdp, policy, direct):
    solver = bj.Direct() if direct else default_linear_solver(mdp.num_states)
    first = jnp.zeros(mdp.num_states).at[0].set(1)
    return linear_solve(solver, discounted_operator(mdp, policy), mdp.modulus, first, transpose=True, share=False)


def reference(mdp, value):
    """V and the visits of state 0's, by Newton's method with scipy's sparse LU from a V near V*."""
    successor, probability = (np.asarray(a) for a in (mdp.transition.successor, mdp.transition.probability))
    discount, states = float(mdp.discount), mdp.num_states
    rows = np.broadcast_to(np.arange(states)[:, None], successor.shape)
    value, policy = np.asarray(value), None
    for _ in range(30):
        q = np.asarray(mdp.reward) + discount * np.sum(probability * value[successor], 0)
        top = q.max(-1, keepdims=True)
        weight = np.exp((q - top) / TEMPERATURE)
        gap = TEMPERATURE * np.log(weight.sum(-1)) + top[:, 0] - value
        policy = weight / weight.sum(-1, keepdims=True)
        entries = (probability * policy).ravel()
        kernel = sparse.csc_matrix((entries, (rows.ravel(), successor.ravel())), (states, states))
        factors = splu(sparse.identity(states, format="csc") - discount * kernel)
        step = factors.solve(gap)
        value = value + step
        if np.abs(step).max() <= 1e-13 * np.abs(value).max() / (1 - discount) ** 0.5:
            break
    first = np.zeros(states)
    first[0] = 1
    return value, factors.solve(first, trans="T")


def median(call):
    """(median seconds, the result), compiled before."""
    jax.block_until_ready(call())
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    taken = [time.perf_counter() - start]
    if taken[0] < LONG:
        taken += timing.seconds(call, 2, 0)
    return float(np.median(taken)), result


def measure(mdp):
    row = {}
    row["solve"], found = median(lambda: solve(mdp, bj.Auto()))
    row["gradient"], (w, stats) = median(lambda: visits(mdp, found.policy, False))
    if mdp.num_states <= MOST_BY_LU:
        row["solve_lu"], _ = median(lambda: solve(mdp, bj.PolicyIteration(linear_solver=bj.Direct())))
    row["gradient_lu"], _ = median(lambda: visits(mdp, found.policy, True))
    value, right = reference(mdp, found.value)
    row |= {
        "code": bj.Result(int(found.result)).name,
        "value_error": float(np.abs(found.value - value).max() / np.abs(value).max()),
        "value_bound": float(found.stats.error_bound / np.abs(value).max()),
        "gradient_code": bj.Result(int(stats.result)).name,
        "gradient_error": float(np.abs(w - right).sum() / np.abs(right).sum()),
        "steps": int(found.stats.iterations),
        "products": int(found.stats.products),
        "gradient_products": int(stats.products),
    }
    return row


def table(rows) -> str:
    head = "| chain | S | discount | solve, s | by LU | code | error | gradient, s | by LU | code | error |"
    lines = [head, "|---|---|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        by_lu = f"{row['solve_lu']:.3g}" if "solve_lu" in row else "-"
        lines.append(
            f"| {row['chain']} | {row['states']} | {row['discount']} | {row['solve']:.3g} | {by_lu} | {row['code']} | "
            f"{row['value_error']:.0e} | {row['gradient']:.3g} | {row['gradient_lu']:.3g} | {row['gradient_code']} | "
            f"{row['gradient_error']:.0e} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    limit = time.monotonic() + (float(sys.argv[1]) if len(sys.argv) > 1 else SECONDS)
    rows, left_out = [], []
    for chain, make in CASES.items():
        for discount in DISCOUNTS:
            if time.monotonic() > limit:
                left_out.append(f"{chain}, {discount}")
                continue
            transition, reward = make()
            mdp = bj.MDP(transition, reward, discount)
            rows.append({"chain": chain, "states": mdp.num_states, "discount": discount, **measure(mdp)})
            print(rows[-1], flush=True)
    load = list(os.getloadavg())
    threads = os.environ.get("OPENBLAS_NUM_THREADS", "default")
    timing.write(
        "krylov_and_direct",
        {"openblas_threads": threads, "load_average_at_the_end": load, "left_out": left_out, "rows": rows},
    )
    (timing.RESULTS / "krylov_and_direct.md").write_text(table(rows))


if __name__ == "__main__":
    main()
