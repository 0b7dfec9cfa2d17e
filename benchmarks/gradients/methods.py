"""What each way to the hyper-gradient costs: time and peak memory, 100 to 100,000 states, at the same accuracy.

    python -m benchmarks.gradients.methods  # half an hour on two cores
    python -m benchmarks.gradients.methods --most 1e4

Problems of `peer_problems.py` (Garnet by lists with predecessors, cells by stencil), Shannon entropy at temperature
0.1, discount 0.99, float64. The upper variable x[8] weighs reward features; f is what the agent's policy and value are
worth to another, plus |x|^2 / 2. Every method gets the loosest of its settings with which the gradient is right to
1e-6 (2-norm, relative, against BiCGStab to 1e-12); `default` is `Implicit(tolerance=...)`, which leaves the choice of
solvers to the library, and `warm` the same from the solution at x + 1e-3. `random signs` are never that accurate: 64
samples, with the error they have. `default, unasked` is `hypergradient(problem, x)`, which goes on to working
precision whatever the table asks for. A second table asks for 1e-10, where the default needs no asking, and a third for
an estimate of the gradient's error besides, which `hypergradient` makes unless told not to.
Median seconds; bytes are temporary arrays as compiled.
"""

import argparse
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from benchmarks.common import peer_problems
from benchmarks.common.figures import Figures
from benchmarks.common.timing import alternate, seconds, summary

DISCOUNT, TEMPERATURE, FEATURES = 0.99, 0.1, 8
SIZES = (10**2, 10**3, 10**4, 10**5)
LIMIT = 30.0  # seconds that one call may take
NEAR = 4  # times the fastest
DECADES = range(-5, -14, -1)
TERMS = (300, 900, 1500, 2100, 2700, 3300)
PRECISE = ("default, unasked", "direct", "adaptive Krylov", "BiCGStab", "GMRES", "Neumann")
MOST_DIRECT, MOST_UNROLLED = 2_000, 20_000


def problem_of(name: str, states: int) -> tuple[bj.BilevelProblem, jax.Array]:
    """The bilevel problem and an x."""
    made = peer_problems.make(name, states, DISCOUNT, TEMPERATURE)
    if made.grid is None:
        lists = bj.SuccessorTransition(jnp.asarray(made.successor), jnp.asarray(made.probability))
        kernel: bj.Transition = lists.with_predecessors()
    else:
        offsets, probability = peer_problems.stencil(made)
        kernel = bj.StencilTransition(offsets, jnp.asarray(probability), made.grid)
    rng = np.random.default_rng(0)
    parts = (
        kernel,
        jnp.asarray(made.reward),
        jnp.asarray(rng.normal(size=(FEATURES, made.states, made.actions))),
        jnp.asarray(rng.normal(size=(made.states, made.actions))),
    )
    problem = bj.BilevelProblem(
        jax.tree_util.Partial(lower, parts), bj.ShannonEntropy(TEMPERATURE), jax.tree_util.Partial(objective, parts)
    )
    return problem, jnp.asarray(0.1 * rng.normal(size=FEATURES))


def lower(parts, x):
    kernel, reward, features, _ = parts
    return bj.MDP(kernel, reward + jnp.tensordot(x, features, 1), DISCOUNT)


def objective(parts, x, solution):
    """Paid at each state under the agent's policy, and beside for x."""
    return -jnp.mean(jnp.sum(solution.policy * parts[3], -1)) + jnp.sum(x**2) / 2 - jnp.mean(solution.value) / 10


def settings(states: int) -> dict[str, list[Any]]:
    """name -> methods from loose to tight."""

    def tolerances(make):
        return [make(10.0**decade) for decade in DECADES]

    found = {
        "default": tolerances(lambda t: bj.Implicit(tolerance=t)),
        "default, unasked": [None],
        "direct": tolerances(lambda t: bj.Implicit(bj.PolicyIteration(t), bj.Direct())),
        "adaptive Krylov": tolerances(lambda t: bj.Implicit(bj.Auto(t), bj.AdaptiveKrylov(t))),
        "BiCGStab": tolerances(lambda t: bj.Implicit(bj.Auto(t), bj.BiCGStab(t))),
        "GMRES": tolerances(lambda t: bj.Implicit(bj.Auto(t), bj.GMRES(t))),
        "Neumann": [bj.Implicit(bj.Auto(1e-7 if k < 2500 else 1e-11), bj.Neumann(terms=k)) for k in TERMS],
        "value iteration, Neumann": [bj.Implicit(bj.ValueIteration(1e-7), bj.Neumann(terms=k)) for k in TERMS],
        "unrolled": [bj.Unrolled(k) for k in TERMS],
        "unrolled, last 1/2": [bj.Unrolled(2 * k, k) for k in TERMS],
        "unrolled, forward": [bj.Unrolled(k, mode="forward") for k in TERMS],
        "differences": [bj.FiniteDifferences(step) for step in (1e-3, 1e-4, 1e-5)],
        "random signs": [bj.SimultaneousPerturbation(jax.random.key(0), 64, 1e-4)],
    }
    if states > MOST_DIRECT:
        del found["direct"]
    if states > MOST_UNROLLED:
        del found["unrolled, last 1/2"], found["unrolled, forward"]
    return found


@jax.jit(static_argnames="with_error")
def make(problem, x, method, starts, with_error=False):
    return bj.hypergradient(problem, x, method=method, with_error=with_error, **starts)


class Table(NamedTuple):
    """Rows of a table, all to one accuracy."""

    accuracy: float
    with_error: bool
    methods: Sequence[str]

    def title(self, problem: str) -> str:
        return f"{problem}, to {self.accuracy:g}" + (", and the error estimated" if self.with_error else "")

    def key(self, problem: str, states: int) -> str:
        return f"{self.title(problem)}, {states} states"


class Contender(NamedTuple):
    """A method at the first of its settings that is accurate, or at the last that was tried."""

    call: Callable[[], Any]
    once: float  # seconds of the first call
    figures: dict[str, Any]


def contender(problem: bj.BilevelProblem, x: jax.Array, right: jax.Array, method: str, table: Table) -> Contender:
    starts: dict[str, Any] = {}
    choices = settings(problem.mdp(x).num_states)
    if method == "warm":
        choices["warm"] = choices["default"]
        near = make(problem, x + 1e-3, None, {})
        starts = {"initial_value": near.solution.value, "initial_adjoint": near.adjoint}
    for choice in choices[method]:
        compiled = make.lower(problem, x, choice, starts, with_error=table.with_error).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        start = time.perf_counter()
        made = jax.block_until_ready(compiled(problem, x, choice, starts))
        once = time.perf_counter() - start
        error = float(jnp.linalg.norm(made.gradient - right) / jnp.linalg.norm(right))
        figures = {
            "error": error,
            "bytes": memory.temp_size_in_bytes,
            "once": once,
            "accurate": error <= table.accuracy,
        }
        last = Contender(lambda run=compiled, c=choice: run(problem, x, c, starts), once, figures)
        if figures["accurate"] or method == "random signs" or once > LIMIT:
            break
    return last


def column(name: str, states: int, table: Table) -> dict[str, dict[str, Any]]:
    """Figures of each method. What is near to the fastest is timed in turns: a drift of the machine meets all."""
    problem, x = problem_of(name, states)
    right = make(problem, x, bj.Implicit(adjoint=bj.BiCGStab(1e-12)), {}).gradient
    known = [method for method in table.methods if method in settings(states) or method == "warm"]
    found = {method: contender(problem, x, right, method, table) for method in known}
    timed = {m: c for m, c in found.items() if c.figures["accurate"] or m == "random signs"}
    near = NEAR * min(c.once for c in timed.values())
    taken = alternate({m: c.call for m, c in timed.items() if c.once <= near}, 15, 1)
    for method, of in timed.items():
        if method not in taken:
            taken[method] = seconds(of.call, int(np.clip(5 / of.once, 1, 15)), 0 if of.once > 5 else 1)
    return {m: c.figures | (summary(taken[m]) if m in taken else {}) for m, c in found.items()}


def markdown(figures: Figures, sizes: list[int], table: Table) -> str:
    """Markdown: milliseconds and MiB."""
    lines = []
    for problem in ("garnet", "cells"):
        lines += [
            f"## {table.title(problem)}",
            "",
            "| method | " + " | ".join(f"{s:,} states" for s in sizes) + " |",
        ]
        lines.append("|---" * (1 + len(sizes)) + "|")
        for method in table.methods:
            entries = []
            for states in sizes:
                found = figures.cells.get(table.key(problem, states), {}).get(method)
                if found is None:
                    entries.append("-")
                elif found["accurate"] or method == "random signs":
                    beside = "" if found["accurate"] else f", error {found['error']:.0e}"
                    entries.append(f"{found['median'] * 1e3:.3g} ms, {found['bytes'] / 2**20:.3g} MiB{beside}")
                else:
                    entries.append(f"not accurate ({found['error']:.0e})")
            lines.append(f"| {method} | " + " | ".join(entries) + " |")
        lines.append("")
    return "\n".join(lines)


NAMES = list(settings(100))
TABLES = (
    Table(1e-6, False, (*NAMES[:2], "warm", *NAMES[2:])),
    Table(1e-10, False, PRECISE),
    Table(1e-10, True, PRECISE),
)


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="measure what has been measured, too")
    parser.add_argument("--most", type=float, default=1e5, help="states at most")
    options = parser.parse_args()
    figures = Figures("methods", options.again)
    sizes = [states for states in SIZES if states <= options.most]
    for table in TABLES:
        for states in sizes:
            for name in ("garnet", "cells"):
                figures.measure(table.key(name, states), functools.partial(column, name, states, table))
                jax.clear_caches()  # a process may have no more than 65,530 memory mappings, programs have many
    text = "\n".join(markdown(figures, sizes, table) for table in TABLES)
    figures.path.with_suffix(".md").write_text(
        f"# Cost of each method\n\n{(__doc__ or '').split('Problems of')[0]}\n{text}"
    )
    print(text)


if __name__ == "__main__":
    main()
