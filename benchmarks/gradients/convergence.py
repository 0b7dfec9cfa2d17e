"""How fast each method's hyper-gradient converges, and M-SoBiRL with it, against what theory says.

    python -m benchmarks.gradients.convergence  # minutes on two cores

- errors: |gradient - exact|_2 / |exact|_2 against work, in Bellman sweeps and products with P_pi or its transpose
  (a sweep and a product read the transition once each), on the paper's synthetic problem and on Four Rooms,
  discounts 0.5 to 0.99. `neumann`: V* given, k terms of the adjoint. `unrolled`: k sweeps from V = 0 and back. `aid`: k
  sweeps from V = 0, then k terms. `trajectories`: the mean of SoBiRL's estimator at length k, V* given. `krylov`: both
  levels by Krylov methods, to tolerances from 1e-1 to 1e-10. A line through the logarithms, from 5e-2 to 1e-11, is the
  measured rate an iteration. Theory: at most the discount. `spectrum` has the moduli of the two largest eigenvalues of
  discount P_pi: the largest is the rate of a df/dV with a component along it, the second that of objectives which
  constants leave alone, such as those of the policy only.
- quasi_newton: iterations of `implicit` to |grad phi| <= 1e-6 on the same problems, L-BFGS with optax's line search
  against gradient descent and Adam (for each problem the best of four step sizes).
- m_sobirl: min over k <= K of |grad phi(x_k)|^2 over 3,000 iterations, 20 random synthetic problems in one vmapped
  program. Theory: O(1 / K). Fitted: the exponent between 10 and the iteration at which rounding or 3,000 is
  reached, and the constant sup_K K min_k |grad phi|^2 / (phi(x_0) - min phi).

Float64. The exact gradients are of factorizations; convergence.json keeps all points.
"""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import bilevel_jax as bj
from benchmarks.common.figures import Figures
from benchmarks.common.timing import IMAGES

DISCOUNTS = (0.5, 0.8, 0.9, 0.95, 0.99)
POINTS = 8
ITERATIONS, PROBLEMS = 3000, 20
STEP_SIZE = 0.02


def problem_of(name: str, discount: float):
    """The problem and an x."""
    if name == "synthetic":
        problem = bj.problems.make("synthetic", discount=discount)
        return problem, problem.start(jax.random.key(0)) / 10
    problem = bj.problems.make("four_rooms", discount=discount, temperature=0.05)
    return problem, 0.5 * jax.random.normal(jax.random.key(0), problem.start(jax.random.key(0)).shape)


def exact(problem: Any, x: Any):
    return bj.check(
        bj.hypergradient(problem, x, method=bj.Implicit(bj.PolicyIteration(), bj.Direct()), with_error=False)
    )


def lengths(discount: float) -> list[int]:
    """From 1 to where the discount has 1e-11."""
    most = np.log(1e-11) / np.log(discount)
    return sorted({round(k) for k in np.geomspace(1, most, POINTS)})


def methods(discount: float, solution: Any) -> dict[str, list[tuple[Any, int | None, Any]]]:
    """name -> (method, products beside those that it reports, V to start from)."""
    steps = lengths(discount)
    sweeps = {k: bj.ValueIteration(tolerance=0.0, max_iterations=k, centred=False) for k in steps}
    solved = bj.ValueIteration(tolerance=1e6, max_iterations=1, centred=False)  # V* as given, looked at once
    return {
        "neumann": [(bj.Implicit(solved, bj.Neumann(terms=k)), k, solution.value) for k in steps],
        "trajectories": [(bj.ExpectedTrajectories(k + 1, solved), k, solution.value) for k in steps],
        "unrolled": [(bj.Unrolled(k), 2 * k, None) for k in steps],
        "aid": [(bj.Implicit(sweeps[k], bj.Neumann(terms=k)), 2 * k, None) for k in steps],
        "krylov": [
            (bj.Implicit(bj.NewtonKrylov(10.0**-digits), bj.BiCGStab(10.0**-digits)), None, None)
            for digits in range(1, 11)
        ],
    }


def errors(name: str, discount: float) -> dict[str, Any]:
    """Relative error and work of every method."""
    problem, x = problem_of(name, discount)
    right = exact(problem, x)
    gradient = np.asarray(ravel_pytree(right.gradient)[0])
    found: dict[str, Any] = {"spectrum": spectrum(problem, x, right.solution)}
    for method, settings in methods(discount, right.solution).items():
        points = []
        for setting, products, start in settings:
            made = bj.hypergradient(problem, x, method=setting, initial_value=start, with_error=False)
            off = np.linalg.norm(np.asarray(ravel_pytree(made.gradient)[0]) - gradient) / np.linalg.norm(gradient)
            if products is None:
                stats = made.solution.stats
                products = int(jnp.max(stats.iterations + stats.products) + jnp.max(made.stats.products))
            points.append((products, float(off)))
        found[method] = {"work": [p for p, _ in points], "error": [e for _, e in points]}
        found[method]["rate"] = rate(found[method], {"unrolled": 2, "aid": 2}.get(method, 1))
    return found


def spectrum(problem: Any, x: Any, solution: Any) -> list[float]:
    """Moduli of the two largest eigenvalues of discount P_pi, over all contexts."""
    mdp = problem.mdp(x)
    size = mdp.num_states
    rows = jnp.eye(size)
    kernel = jnp.stack([mdp.transition.expect(row) for row in rows], -1)  # [S, A, S]
    discount = np.asarray(mdp.discount)
    if discount.ndim == len(mdp.batch_shape):
        discount = discount[..., None, None]
    weights = (discount * np.asarray(solution.policy)).reshape(-1, size, mdp.num_actions)
    moduli = [np.sort(np.abs(np.linalg.eigvals(np.einsum("sa,saz->sz", w, kernel))))[::-1][:2] for w in weights]
    return [float(m) for m in np.max(moduli, 0)]


def rate(points: dict[str, list], products: int) -> float | None:
    """The factor of the error an iteration of so many products, from a line through its logarithm."""
    work, error = np.array(points["work"]) / products, np.array(points["error"])
    used = (error < 5e-2) & (error > 1e-11)
    if used.sum() < 2:
        return None
    return float(np.exp(np.polyfit(work[used], np.log(error[used]), 1)[0]))


def m_sobirl() -> dict[str, Any]:
    """The gradient norms of the paper's algorithm, and the fits."""
    shape = {"states": 10, "actions": 5, "dimension": 20}
    made = [bj.problems.make("synthetic", seed=seed, **shape) for seed in range(PROBLEMS)]
    problems = jax.tree.map(lambda *leaves: jnp.stack(leaves), *made)
    optimizer = optax.sgd(STEP_SIZE)

    def one(problem, key):
        algorithm = bj.algorithms.m_sobirl(problem, optimizer)

        def step(state, _):
            after, info = algorithm.step(key, state)
            # What the algorithm estimates is not what theory bounds: the true gradient at its x, beside.
            true = bj.hypergradient(problem, state.x, with_error=False)
            return after, (optax.tree.norm(true.gradient) ** 2, info.gradient_norm**2, true.value)

        return jax.lax.scan(step, algorithm.init(key, problem.start(key) / 10), length=ITERATIONS)[1]

    run = jax.jit(jax.vmap(one)).lower(problems, jax.random.split(jax.random.key(0), PROBLEMS)).compile()
    start = time.perf_counter()
    squared, estimated, value = map(
        np.asarray, jax.block_until_ready(run(problems, jax.random.split(jax.random.key(0), PROBLEMS)))
    )
    taken = time.perf_counter() - start
    least = np.minimum.accumulate(squared, 1)
    each = [fit(row, paid) for row, paid in zip(least, value, strict=True)]
    shown = sorted({int(k) for k in np.geomspace(1, ITERATIONS, 40)})
    return {
        "problems": PROBLEMS,
        "iterations": ITERATIONS,
        "step_size": STEP_SIZE,
        "seconds": taken,
        "exponents": [exponent for exponent, _ in each],
        "constants": [constant for _, constant in each],
        "iteration": shown,
        "least_squared_norm": [[float(row[k - 1]) for k in shown] for row in least],
        "estimate_over_true_at_the_end": [float(e) for e in np.median(estimated[:, -100:] / squared[:, -100:], 1)],
    }


def quasi_newton() -> dict[str, Any]:
    """Upper iterations until the gradient's norm is 1e-6, for each problem; None if 2,000 do not do."""
    optimizers = {"L-BFGS": [optax.lbfgs()]}
    optimizers["gradient descent"] = [optax.sgd(rate) for rate in (0.01, 0.03, 0.1, 0.3)]
    optimizers["Adam"] = [optax.adam(rate) for rate in (0.01, 0.03, 0.1, 0.3)]
    most, found = 2000, {}
    made = [bj.problems.make("synthetic", seed=seed, states=10, actions=5, dimension=20) for seed in range(PROBLEMS)]
    problems = jax.tree.map(lambda *leaves: jnp.stack(leaves), *made)
    keys = jax.random.split(jax.random.key(0), PROBLEMS)
    for name, choices in optimizers.items():

        def count(problem, key, optimizer):
            algorithm = bj.algorithms.implicit(problem, optimizer)

            def step(state, _):
                state, info = algorithm.step(key, state)
                return state, info.gradient_norm <= 1e-6

            reached = jax.lax.scan(step, algorithm.init(key, problem.start(key) / 10), length=most)[1]
            return jnp.where(jnp.any(reached), jnp.argmax(reached), most)

        counts = [
            np.asarray(jax.jit(jax.vmap(lambda p, k, o=optimizer: count(p, k, o)))(problems, keys))
            for optimizer in choices
        ]
        found[name] = [int(c) for c in np.min(counts, 0)]
    return found


def fit(least: np.ndarray, value: np.ndarray) -> tuple[float, float]:
    """(slope of log min |g|^2 against log K, sup_K K min |g|^2 / (phi_0 - min phi))."""
    k = np.arange(1, least.size + 1)
    used = (k >= 10) & (least > 1e-24)
    slope = np.polyfit(np.log(k[used]), np.log(least[used]), 1)[0]
    return float(slope), float((k * least).max() / (value[0] - value.min()))


def picture(figures: Figures) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(DISCOUNTS), figsize=(3 * len(DISCOUNTS), 6), sharey=True)
    for row, name in zip(axes, ("synthetic", "four_rooms"), strict=True):
        for axis, discount in zip(row, DISCOUNTS, strict=True):
            for method, points in figures.cells[f"errors {name} {discount}"].items():
                if method == "spectrum":
                    continue
                axis.semilogy(points["work"], np.maximum(points["error"], 1e-16), "o-", label=method, markersize=3)
            axis.set_title(f"{name}, discount {discount}", fontsize=9)
            axis.set_ylim(1e-14, 10)
            slowest = figures.cells[f"errors {name} {discount}"]["unrolled"]
            axis.set_xlim(
                0, next((w for w, e in zip(slowest["work"], slowest["error"], strict=True) if e < 1e-11), None)
            )
    for axis in axes[-1]:
        axis.set_xlabel("sweeps and products")
    for axis in axes[:, 0]:
        axis.set_ylabel("relative error of the gradient")
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(IMAGES / "convergence.png", dpi=110)
    plt.close(figure)

    made = figures.cells["m_sobirl"]
    figure, axis = plt.subplots(figsize=(5, 4))
    for row in made["least_squared_norm"]:
        axis.loglog(made["iteration"], np.maximum(row, 1e-30), color="tab:blue", alpha=0.5, linewidth=1)
    k = np.array(made["iteration"], float)
    bound = np.median([row[0] for row in made["least_squared_norm"]])
    axis.loglog(k, bound / k, "k--", label="1 / K")
    axis.set_xlabel("iterations K")
    axis.set_ylabel("least squared norm of the hyper-gradient")
    axis.legend()
    figure.tight_layout()
    figure.savefig(IMAGES / "m_sobirl_rate.png", dpi=110)
    plt.close(figure)


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="measure what has been measured, too")
    options = parser.parse_args()
    figures = Figures("convergence", options.again)
    for name in ("synthetic", "four_rooms"):
        for discount in DISCOUNTS:
            figures.measure(f"errors {name} {discount}", lambda name=name, discount=discount: errors(name, discount))
    figures.measure("m_sobirl", m_sobirl)
    figures.measure("quasi_newton", quasi_newton)
    picture(figures)


if __name__ == "__main__":
    main()
