"""What a gradient costs beside its solve, against optimistix, and against differentiating the iterations.

    python -m benchmarks.gradients.differentiation          # all parts; an hour on two cores
    python -m benchmarks.gradients.differentiation --only ratio --most 1e4
    python -m benchmarks.gradients.differentiation --table  # tables and picture of what has been measured

The objective is initial . V*, Shannon entropy at temperature 0.1, discount 0.99, float64; problems are those of
`peer_problems.py`. Values have to be right to 1e-6 max |V*|.

- ratio: solve plus gradient over the solve alone, with the default adjoint and with one of 1e-6; `reward` is that in
  the reward, `all` in every float leaf. Successor lists, with predecessors, stencils.
- optimistix: the same gradient by `optimistix.fixed_point` on the same Bellman operator and transition, with
  FixedPointIteration and ImplicitAdjoint. It gets the loosest decade of its tolerance whose true error passes, and its
  fastest linear solver of those whose gradient passes.
- memory: peak of the gradient over the number of sweeps, implicit and by reverse mode through a scan of the sweeps: as
  compiled (temporary arrays) and, for some, as measured (resident set of a process of its own).

What is checked is by numpy and scipy: `value_error` is MacQueen's bound on |V - V*|_inf over max |V*|; `flow_error` how
far the gradient in the reward, an occupancy d[s, a], is from obeying its own flow equation:
|sum_a d - initial - discount P' d|_1 / ((1 - discount) |d|_1), which bounds the relative error under the policy that d
has; `gradient_error` is the distance |d - d*|_1 / |d*|_1 from a d* that was solved to working precision.
Median seconds of contenders that take turns.
"""

import argparse
import functools
import json
import subprocess
import sys
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import bilevel_jax as bj
from benchmarks.common import peer_problems
from benchmarks.common.figures import Figures, reset_peak, resident
from benchmarks.common.timing import IMAGES, alternate, seconds, summary
from bilevel_jax.linear import default_linear_solver, linear_solve
from bilevel_jax.mdp.transitions import PolicyOperator

DISCOUNT, TEMPERATURE, ACCURACY = 0.99, 0.1, 1e-6
SIZES = (10**2, 10**3, 10**4, 10**5, 10**6)
SWEEPS = (10, 30, 100, 300, 1000)
PICTURE = IMAGES / "gradient_memory.png"


def kernels(problem: peer_problems.Problem) -> dict[str, bj.Transition]:
    """The forms that the problem has; on large grids the stencil alone."""
    lists = bj.SuccessorTransition(jnp.asarray(problem.successor), jnp.asarray(problem.probability))
    forms: dict[str, bj.Transition] = {"lists": lists, "with predecessors": lists.with_predecessors()}
    if problem.grid is not None:
        offsets, probability = peer_problems.stencil(problem)
        forms["stencil"] = bj.StencilTransition(offsets, jnp.asarray(probability), problem.grid)
    return forms


def objective(mdp, regularizer, solver, adjoint):
    return mdp.initial @ bj.solve(mdp, regularizer, solver=solver, adjoint=adjoint).value


@jax.jit
def solve(mdp, regularizer, solver):
    return bj.solve(mdp, regularizer, solver=solver)


@jax.jit
def in_reward(mdp, regularizer, solver, adjoint):
    def of_reward(reward):
        return objective(eqx.tree_at(lambda m: m.reward, mdp, reward), regularizer, solver, adjoint)

    return jax.value_and_grad(of_reward)(mdp.reward)


@jax.jit
def in_all(mdp, regularizer, solver, adjoint):
    def of_both(both):
        mdp, regularizer = both
        return objective(mdp, regularizer, solver, adjoint)

    return eqx.filter_value_and_grad(of_both)((mdp, regularizer))


class Checks:
    """Errors of values and gradients of one problem."""

    def __init__(self, problem: peer_problems.Problem, mdp: bj.MDP):
        self.problem, self.matrix = problem, problem.matrix(actions_first=True)
        self.initial = np.asarray(mdp.initial)
        regularizer = bj.ShannonEntropy(TEMPERATURE)
        value = np.asarray(bj.solve(mdp, regularizer).value)
        backup, _ = peer_problems.sweep(self.matrix, problem, value)
        self.right, self.known = peer_problems.bounds(problem, value, backup)
        self.scale = float(np.abs(self.right).max())
        self.gradient = np.asarray(in_reward(mdp, regularizer, bj.Auto(), bj.BiCGStab(1e-11))[1])

    def value(self, value: Any) -> float:
        """Proven: the distance from a V, plus how far that V may be from V*."""
        return float(np.abs(np.asarray(value) - self.right).max() + self.known) / self.scale

    def flow(self, gradient: Any) -> float:
        masses = np.asarray(gradient)
        arrives = self.matrix.T @ masses.T.reshape(-1)
        left = masses.sum(-1) - self.initial - DISCOUNT * arrives
        return float(np.abs(left).sum() / ((1 - DISCOUNT) * np.abs(masses).sum()))

    def of(self, gradient: Any) -> float:
        return float(np.abs(np.asarray(gradient) - self.gradient).sum() / np.abs(self.gradient).sum())


def ratio(name: str, states: int, form: str, repeats: int) -> dict[str, Any]:
    """Seconds of a solve, and of a solve with its gradient."""
    problem = peer_problems.make(name, states, DISCOUNT, TEMPERATURE)
    mdp = bj.MDP(kernels(problem)[form], jnp.asarray(problem.reward), DISCOUNT)
    regularizer = bj.ShannonEntropy(TEMPERATURE)
    checks = Checks(problem, mdp)
    solver = bj.Auto(ACCURACY * checks.scale)
    adjoints = {"default": None, "1e-6": bj.AdaptiveKrylov(ACCURACY)}
    calls: dict[str, Any] = {"solve": functools.partial(solve, mdp, regularizer, solver)}
    for label, adjoint in adjoints.items():
        calls[f"reward, {label}"] = functools.partial(in_reward, mdp, regularizer, solver, adjoint)
        calls[f"all, {label}"] = functools.partial(in_all, mdp, regularizer, solver, adjoint)
    solution = calls["solve"]()
    gradients = {label: calls[f"reward, {label}"]()[1] for label in adjoints}
    policy = solution.policy
    operator = PolicyOperator(mdp.transition, DISCOUNT * policy)
    used = {}
    for label, adjoint in adjoints.items():
        linear = default_linear_solver(problem.states) if adjoint is None else adjoint
        run = jax.jit(lambda linear, operator, rhs: _linear(linear, operator, rhs)[1].products)
        used[label] = int(run(linear, operator, mdp.initial))
    taken = {key: summary(times) for key, times in alternate(calls, repeats).items()}
    base = taken["solve"]["median"]
    return {
        "states": problem.states,
        "seconds": taken,
        "ratio": {key: times["median"] / base for key, times in taken.items() if key != "solve"},
        "sweeps": int(solution.stats.iterations),
        "products": int(solution.stats.products),
        "adjoint_products": used,
        "value_error": checks.value(solution.value),
        "flow_error": {label: checks.flow(gradient) for label, gradient in gradients.items()},
        "gradient_error": {label: checks.of(gradient) for label, gradient in gradients.items()},
    }


def _linear(linear, operator, rhs):
    return linear_solve(linear, operator, jnp.asarray(DISCOUNT), rhs, transpose=True)


def against_optimistix(name: str, states: int, form: str, repeats: int) -> dict[str, Any]:
    """Both gradients in one run."""
    import lineax
    import optimistix

    problem = peer_problems.make(name, states, DISCOUNT, TEMPERATURE)
    mdp = bj.MDP(kernels(problem)[form], jnp.asarray(problem.reward), DISCOUNT)
    regularizer = bj.ShannonEntropy(TEMPERATURE)
    checks = Checks(problem, mdp)
    target = ACCURACY * checks.scale

    def sweep(value, both):
        mdp, regularizer = both
        return regularizer.conjugate(mdp.reward + mdp.discount * mdp.transition.expect(value))

    def fixed_point(reward, mdp, regularizer, tolerance, linear):
        both = (eqx.tree_at(lambda m: m.reward, mdp, reward), regularizer)
        found = optimistix.fixed_point(
            sweep,
            optimistix.FixedPointIteration(rtol=0.0, atol=tolerance),
            jnp.zeros_like(reward[:, 0]),
            args=both,
            max_steps=1_000_000,
            throw=False,
            adjoint=optimistix.ImplicitAdjoint(linear_solver=linear),
        )
        return mdp.initial @ found.value, (found.value, found.stats["num_steps"])

    differentiate = eqx.filter_jit(jax.value_and_grad(fixed_point, has_aux=True))

    def peer(tolerance, linear):
        return differentiate(mdp.reward, mdp, regularizer, jnp.asarray(tolerance), linear)

    forward = eqx.filter_jit(fixed_point)
    # Each sweep brings V nearer by the discount: a step of (1 - discount) target is the safe stop.
    tried: dict[str, Any] = {}
    tolerance = None
    for decade in range(2, -5, -1):
        _, (value, steps) = forward(mdp.reward, mdp, regularizer, jnp.asarray(target * 10.0**decade), lineax.LU())
        if checks.value(value) <= ACCURACY:
            tolerance = target * 10.0**decade
            tried["stop"] = {"decade": decade, "value_error": checks.value(value), "sweeps": int(steps)}
            break
    solvers: dict[str, Any] = {}
    for digits in (6, 8):
        # Its criterion is in the sup norm of the steps; the right-hand side has entries 1 / S.
        rtol, atol = 10.0**-digits, 10.0**-digits / problem.states
        solvers[f"lineax GMRES 1e-{digits}"] = lineax.GMRES(rtol, atol, restart=50, stagnation_iters=50)
        solvers[f"lineax BiCGStab 1e-{digits}"] = lineax.BiCGStab(rtol, atol)
    if problem.states <= 1100:
        solvers["lineax LU"] = lineax.LU()
    calls: dict[str, Any] = {}
    for label, linear in solvers.items():
        try:
            _, gradient = jax.block_until_ready(peer(tolerance, linear))
        except RuntimeError as error:  # how equinox and jax report that a solve failed
            tried[label] = {"failed": str(error).strip().splitlines()[0][:200]}
            continue
        tried[label] = {"flow_error": checks.flow(gradient), "gradient_error": checks.of(gradient)}
        if tried[label]["flow_error"] <= 2 * ACCURACY:
            calls[label] = functools.partial(peer, tolerance, linear)
    solver = bj.Auto(target)
    for label, adjoint in {"ours, default": None, "ours, 1e-6": bj.AdaptiveKrylov(ACCURACY)}.items():
        calls[label] = functools.partial(in_reward, mdp, regularizer, solver, adjoint)
        gradient = calls[label]()[1]
        tried[label] = {"flow_error": checks.flow(gradient), "gradient_error": checks.of(gradient)}
    slow = max(min(seconds(call, 1, 0)) for call in calls.values())
    taken = {key: summary(times) for key, times in alternate(calls, 1 if slow > 10 else repeats).items()}
    peers = [times["median"] for key, times in taken.items() if key.startswith("lineax")]
    return {
        "states": problem.states,
        "seconds": taken,
        "tried": tried,
        "times_faster": min(peers) / taken["ours, 1e-6"]["median"] if peers else None,
    }


def memory(states: int, sweeps: int, kind: str, measured: bool) -> dict[str, Any]:
    """Bytes of the gradient after `sweeps` sweeps of value iteration; `kind` implicit or unrolled."""
    problem = peer_problems.make("garnet", states, DISCOUNT, TEMPERATURE)
    mdp = bj.MDP(kernels(problem)["lists"], jnp.asarray(problem.reward), DISCOUNT)
    regularizer = bj.ShannonEntropy(TEMPERATURE)

    def unrolled(reward, mdp, regularizer):
        mdp = eqx.tree_at(lambda m: m.reward, mdp, reward)

        def sweep(value, _):
            return regularizer.conjugate(mdp.reward + mdp.discount * mdp.transition.expect(value)), None

        return mdp.initial @ lax.scan(sweep, jnp.zeros_like(reward[:, 0]), None, length=sweeps)[0]

    if kind == "unrolled":
        program: Any = jax.jit(jax.grad(unrolled))
        arguments: tuple[Any, ...] = (mdp.reward, mdp, regularizer)
    else:
        # Exactly as many sweeps: no tolerance can be met, and rounding is far away.
        solver = bj.ValueIteration(1e-30, sweeps, centred=False)
        program, arguments = in_reward, (mdp, regularizer, solver, bj.BiCGStab(1e-6))
    program = program.lower(*arguments).compile()
    analysis: Any = program.memory_analysis()
    out: dict[str, Any] = {"temporary_bytes": int(analysis.temp_size_in_bytes)}
    if measured:
        reset_peak()
        before, _ = resident()
        jax.block_until_ready(program(*arguments))
        _, peak = resident()
        out |= {"peak_bytes": peak, "peak_above_arguments_bytes": peak - before}
    return out


def memory_in_process(states: int, sweeps: int, kind: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.gradients.differentiation"]
    command += ["--memory-cell", json.dumps([states, sweeps, kind, True])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def plot(cells: dict[str, Any]) -> None:
    """The picture of memory against sweeps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.4), layout="constrained")
    for kind, colour in (("implicit", "C0"), ("unrolled", "C3")):
        rows = {int(key.split()[3]): row for key, row in cells.items() if key.startswith("memory ") and kind in key}
        if rows:
            lengths = sorted(rows)
            for field, style, label in (
                ("temporary_bytes", "-o", "compiled"),
                ("peak_above_arguments_bytes", "--x", "measured"),
            ):
                axes.loglog(
                    lengths, [rows[n][field] / 2**20 for n in lengths], style, color=colour, label=f"{kind}, {label}"
                )
    axes.set(xlabel="sweeps", ylabel="MiB", title="Memory of a gradient beside its arguments")
    axes.legend(fontsize=8)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=110)


def tables(cells: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| solve + gradient / solve | reward, default | reward, 1e-6 | all, default | all, 1e-6 | solve, ms |"]
    lines += ["|---|---|---|---|---|---|"]
    for key, row in cells.items():
        if key.startswith("ratio"):
            ratios = [row["ratio"][f"{leaf}, {label}"] for leaf in ("reward", "all") for label in ("default", "1e-6")]
            shown = " | ".join(f"{r:.2f}" for r in ratios)
            lines.append(f"| {key[6:]} | {shown} | {1e3 * row['seconds']['solve']['median']:.3g} |")
    lines += ["", "| against optimistix | ours, ms | its best, ms | times faster |", "|---|---|---|---|"]
    for key, row in cells.items():
        if key.startswith("optimistix"):
            peers = [(t["median"], n) for n, t in row["seconds"].items() if n.startswith("lineax")]
            best = min(peers, default=(float("nan"), "none"))
            own = row["seconds"]["ours, 1e-6"]["median"]
            times = f"{row['times_faster']:.1f}" if row["times_faster"] else "none was accurate"
            lines.append(f"| {key[11:]} | {1e3 * own:.3g} | {1e3 * best[0]:.3g} ({best[1]}) | {times} |")
    lines += ["", "| memory | MiB, compiled | MiB, measured |", "|---|---|---|"]
    for key, row in cells.items():
        if key.startswith("memory"):
            sizes = (row["temporary_bytes"] / 2**20, row["peak_above_arguments_bytes"] / 2**20)
            lines.append(f"| {key[7:]} | {sizes[0]:.1f} | {sizes[1]:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is not measured yet, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["ratio", "optimistix", "memory"])
    parser.add_argument("--most", type=float, default=1e6, help="states")
    parser.add_argument("--problems", nargs="+", default=["garnet", "cells"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--memory-states", type=int, default=10_000)
    parser.add_argument("--name", default="differentiation", help="of the file in benchmarks/results, or a path *.json")
    parser.add_argument("--again", action="store_true", help="measure the chosen cells though they are there")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--memory-cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    if options.memory_cell:
        print(json.dumps(memory(*json.loads(options.memory_cell))))
        return
    figures = Figures(options.name, options.again)
    for states in () if options.table else SIZES:
        for name in options.problems if states <= options.most else ():
            # On grids the stencil is the form to take; lists beside it up to 10^5 states.
            forms = ["lists", "with predecessors"] if name == "garnet" or states <= 10**5 else []
            forms += ["stencil"] * (name != "garnet")
            for form in forms if options.only in (None, "ratio") else ():
                call = functools.partial(ratio, name, states, form, options.repeats)
                figures.measure(f"ratio {name} {states} {form}", call)
            if options.only in (None, "optimistix") and states <= 10**5:
                call = functools.partial(against_optimistix, name, states, forms[-1], options.repeats)
                figures.measure(f"optimistix {name} {states} {forms[-1]}", call)
    if options.only in (None, "memory") and not options.table:
        for kind in ("implicit", "unrolled"):
            for sweeps in SWEEPS:
                call = functools.partial(memory_in_process, options.memory_states, sweeps, kind)
                figures.measure(f"memory garnet {options.memory_states} {sweeps} sweeps, {kind}", call)
    if any(key.startswith("memory") for key in figures.cells):
        plot(figures.cells)
    print(tables(figures.cells))


if __name__ == "__main__":
    main()
