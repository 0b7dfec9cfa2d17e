"""Where a factorization stops paying: the adjoint system solved directly and by Krylov solvers.

python -m benchmarks.solvers.linear_solvers

Random MDPs (A = 4; dense, and K = 4 random successors), which mix fast, and open square grids with
slip, which mix slowly. Discount 0.99, float64. One solve of (I - discount P_pi)' w = g each, iterations to a
relative residual of 1e-10. `apart` is the largest distance from the direct solution. `default_linear_solver`
follows these figures.
"""

import jax
import jax.numpy as jnp

import bilevel_jax as bj
from benchmarks.common import timing
from bilevel_jax.linear import DIRECT_LIMIT, linear_solve
from bilevel_jax.mdp.bellman import discounted_operator
from bilevel_jax.problems.grid import dynamics, parse_map

ACTIONS = 4
SUCCESSORS = 4
DISCOUNT = 0.99
TOLERANCE = 1e-10


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    rows = []
    for states in (64, 128, 256, 512, 1024, 2048):
        for kind in ("dense", "successor", "grid"):
            rows.append({"states": states, "transition": kind, **measure(states, kind)})
            print(rows[-1], flush=True)
    timing.write("linear_solvers", {"discount": DISCOUNT, "direct_limit": DIRECT_LIMIT, "milliseconds": rows})


def measure(states: int, kind: str) -> dict:
    keys = jax.random.split(jax.random.key(states), 4)
    if kind == "grid":
        side = round(states**0.5)
        states = side * side
        transition = dynamics(parse_map("\n".join(["." * side] * side)), 0.1, "successor")
    elif kind == "dense":
        probability = jax.random.uniform(keys[0], (states, ACTIONS, states))
        transition = bj.DenseTransition(probability / jnp.sum(probability, -1, keepdims=True))
    else:
        probability = jax.random.uniform(keys[0], (SUCCESSORS, states, ACTIONS))
        successor = jax.random.randint(keys[1], probability.shape, 0, states)
        transition = bj.SuccessorTransition(successor, probability / jnp.sum(probability, 0))
    mdp = bj.MDP(transition, jax.random.normal(keys[2], (states, ACTIONS)), DISCOUNT)
    policy = jax.nn.softmax(mdp.reward)
    cotangent = jax.random.normal(keys[3], (states,))

    def solve(solver, mdp, policy, cotangent):
        operator = discounted_operator(mdp, policy)
        return linear_solve(solver, operator, mdp.modulus, cotangent, transpose=True, share=False)

    solvers = {
        "direct": bj.Direct(),
        "gmres": bj.GMRES(TOLERANCE),
        "bicgstab": bj.BiCGStab(TOLERANCE),
        "adaptive_krylov": bj.AdaptiveKrylov(TOLERANCE),
    }
    run = jax.jit(solve)
    calls = {name: lambda s=solver: run(s, mdp, policy, cotangent) for name, solver in solvers.items()}
    taken = timing.alternate(calls, repeats=9)
    found = {name: call() for name, call in calls.items()}
    apart = max(float(jnp.max(jnp.abs(found["direct"][0] - x))) for x, _ in found.values())
    steps = {f"{name}_steps": int(stats.products) for name, (_, stats) in found.items() if name != "direct"}
    figures = {name: round(timing.summary(times)["median"] * 1e3, 3) for name, times in taken.items()}
    return {**figures, "apart": apart, **steps}


if __name__ == "__main__":
    main()
