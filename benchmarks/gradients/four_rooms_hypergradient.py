"""One exact Four Rooms hyper-gradient: cold, warm-started in an upper-level loop, and a batch of 32.

python -m benchmarks.gradients.four_rooms_hypergradient

Two contexts, float64, V to 0.99e-6 (the bound proved). `cold` starts from V = 0; `warm` is the mean iteration of
a loop (exact M-SoBiRL, Adam 0.05) inside one program; `batch` is a vmapped call over 32 upper
variables against 32 single calls.
"""

import functools

import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from benchmarks.common import timing

LOOP = 200
BATCH = 32


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    figures: dict = {}
    for transition in ("dense", "successor"):
        for temperature in (0.001, 0.005):
            problem = bj.problems.make("four_rooms", temperature=temperature, transition=transition)
            figures[f"{transition}, temperature {temperature}"] = measure(problem)
    timing.write("four_rooms_hypergradient", {"goal_ms": {"cold": 5.0, "warm": 2.5}, "figures": figures})


def measure(problem, repeats: int = 15, steps: int = LOOP, count: int = BATCH) -> dict:
    """Milliseconds of a cold hyper-gradient, of one in a loop of `steps`, of `count` in a batch and one at a time."""
    # |TV - V| <= 1e-8 at discount 0.99 is a bound of 0.99e-6 on the error.
    solver = bj.PolicyIteration(tolerance=0.99 / 0.01 * 1e-8)
    method = bj.Implicit(solver=solver)
    x = problem.start(jax.random.key(0))

    def exact(problem, x):
        return bj.hypergradient(problem, x, method=method, with_error=False)

    single, batched = jax.jit(exact), jax.jit(jax.vmap(exact, (None, 0)))
    xs = x + 0.1 * jax.random.normal(jax.random.key(1), (count, *x.shape))
    separate = list(xs)

    algorithm = bj.algorithms.m_sobirl(problem, optax.adam(0.05), solver=solver, adjoint=bj.Direct())
    state = algorithm.init(jax.random.key(0), x)

    @functools.partial(jax.jit, static_argnums=2)
    def loop(algorithm, state, steps):
        def step(state, _):
            state, info = algorithm.step(None, state)
            return state, (info.reports["lower level"].stats.iterations, info.reports["lower level"].stats.residual)

        return jax.lax.scan(step, state, None, steps)

    taken = timing.alternate(
        {
            "cold": lambda: single(problem, x),
            "loop": lambda: loop(algorithm, state, steps),
            "batch": lambda: batched(problem, xs),
            "singles": lambda: [single(problem, one) for one in separate],
        },
        repeats,
    )
    _, (sweeps, residuals) = loop(algorithm, state, steps)
    one = single(problem, x)
    medians = {name: timing.summary(times)["median"] * 1e3 for name, times in taken.items()}
    return {
        "cold_ms": medians["cold"],
        "warm_ms": medians["loop"] / steps,
        f"batch_of_{count}_ms": medians["batch"],
        f"{count}_singles_ms": medians["singles"],
        "batch_over_singles": medians["batch"] / medians["singles"],
        "cold_sweeps": int(jnp.max(one.solution.stats.iterations)),
        "warm_sweeps_mean": float(jnp.mean(jnp.max(sweeps, -1))),
        "worst_residual": float(jnp.max(residuals)),
    }


if __name__ == "__main__":
    main()
