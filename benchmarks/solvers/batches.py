"""Batches of MDPs: one call against as many problems one at a time, by us and by other packages.

    python -m benchmarks.solvers.batches          # both parts; half an hour on two cores
    python -m benchmarks.solvers.batches --only own --problems 64
    python -m benchmarks.solvers.batches --table  # only print what benchmarks/results/batches.json has

- own: 1,024 problems of S = 100, A = 5, each with transitions of its own (dense, or K = 5 successors a pair).
- shared: 256 rewards over one dense transition of S = 2,000, A = 8. `of_bare` is the rate of arithmetic of the whole
  solve, over that of the bare matrix product [S A, S] @ [S, B] (the faster of its two layouts) in the same run.

Discount 0.95, rewards N(0, 1), exponential weights. All have to be right to 1e-6 of the least max |V*|: ours are given
that tolerance, a peer the loosest decade of its own at which its true errors pass. Float32 cannot prove so little;
there the true error that was reached stands beside the time. V* is by numpy, proven by MacQueen's bounds.
Contenders take turns; medians. A contender that needs more than `SLOW` seconds a run is run once, and one marked with a
`sample` solves that many of the problems, its time scaled up.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import bilevel_jax as bj
from benchmarks.common.figures import Figures
from benchmarks.common.peer_problems import Problem, bounds
from benchmarks.common.peers import PEERS, JaxDP, Peer, quiet
from benchmarks.common.timing import summary

DISCOUNT, ACCURACY, TEMPERATURE = 0.95, 1e-6, 0.1
SLOW = 15.0
DECADES = range(3, -7, -1)


class Batch(NamedTuple):
    """B problems: `weight` [B or 1, K, S, A], `successor` the same or None (dense: K = S), `reward` [B, S, A]."""

    weight: np.ndarray
    successor: np.ndarray | None
    reward: np.ndarray
    temperature: float

    def expect(self, values: np.ndarray) -> np.ndarray:
        """[B, S] -> [B, S, A]."""
        shape = self.reward.shape
        if self.successor is not None:
            taken = np.take_along_axis(values[:, None], self.successor.reshape(shape[0], 1, -1), -1)
            return (self.weight * taken.reshape(self.weight.shape)).sum(1)
        states = shape[1]
        if self.weight.shape[0] == 1:
            flat = self.weight[0].transpose(1, 2, 0).reshape(-1, states)
            return (flat @ values.T).T.reshape(shape)
        return np.einsum("bksa,bk->bsa", self.weight, values, optimize=True)

    def conjugate(self, q: np.ndarray) -> np.ndarray:
        top = q.max(-1)
        if self.temperature == 0:
            return top
        return top + self.temperature * np.log(np.exp((q - top[..., None]) / self.temperature).sum(-1))

    def reference(self) -> np.ndarray:
        """V* [B, S] to 1e-10, relative."""
        mass = DISCOUNT * self.expect(np.ones(self.reward.shape[:2]))
        most, least = mass.max() / (1 - mass.max()), mass.min() / (1 - mass.min())
        value = np.zeros(self.reward.shape[:2])
        while True:
            backup = self.conjugate(self.reward + DISCOUNT * self.expect(value))
            low, high = (backup - value).min(-1), (backup - value).max(-1)
            upper, lower = high * np.where(high > 0, most, least), low * np.where(low > 0, least, most)
            best = backup + ((lower + upper) / 2)[:, None]
            if ((upper - lower) / 2).max() <= 1e-10 * np.abs(best).max():
                return best
            value = backup

    def problem(self, index: int) -> Problem:
        """One of them as the peers take them; dense ones with all states as successors."""
        weight = self.weight[index % self.weight.shape[0]]
        if self.successor is None:
            successor = np.broadcast_to(np.arange(weight.shape[0], dtype=np.int32)[:, None, None], weight.shape)
        else:
            successor = self.successor[index]
        return Problem(successor, weight, self.reward[index], DISCOUNT, self.temperature, None)

    def mdp(self, dtype: Any) -> bj.MDP:
        weight = self.weight.astype(dtype)
        if self.successor is not None:
            kernel: bj.Transition = bj.SuccessorTransition(jnp.asarray(self.successor), jnp.asarray(weight))
        else:
            rows = np.ascontiguousarray(np.moveaxis(weight, 1, -1))
            kernel = bj.DenseTransition(jnp.asarray(rows[0] if rows.shape[0] == 1 else rows))
        return bj.MDP(kernel, jnp.asarray(self.reward.astype(dtype)), DISCOUNT)


def make(form: str, problems: int, states: int, actions: int, slots: int, temperature: float) -> Batch:
    rng = np.random.default_rng([problems, states, actions, slots])
    shared = form == "shared"
    shape = (1 if shared else problems, slots, states, actions)
    weight = rng.exponential(size=shape) + 1e-3
    # Numbers that float32 holds exactly, so that both precisions solve the same problem.
    weight = (weight / weight.sum(1, keepdims=True)).astype(np.float32).astype(float)
    reward = rng.standard_normal((problems, states, actions)).astype(np.float32).astype(float)
    if form != "successors":
        return Batch(weight, None, reward, temperature)
    ranks = rng.random((problems, states, states * actions)).astype(np.float32)
    successor = np.argpartition(ranks, slots, 1)[:, :slots].astype(np.int32).reshape(shape)
    return Batch(weight, successor, reward, temperature)


class QuantEconDense(Peer):
    """quantecon's DiscreteDP with Q[S, A, S]."""

    package = "quantecon"

    def __init__(self, problem: Problem, method: str, **options: Any):
        from quantecon.markov import DiscreteDP

        self.method, self.options = method, options
        self.has_tolerance = method != "policy_iteration"
        rows = np.ascontiguousarray(problem.probability.transpose(1, 2, 0))
        self.program = DiscreteDP(problem.reward, rows, problem.discount)

    def solve(self, tolerance: float) -> Any:
        return self.program.solve(self.method, max_iter=10**9, epsilon=tolerance, **self.options)

    def value(self, result: Any) -> np.ndarray:
        return np.asarray(result.v)


class MDPSolverDense(Peer):
    """mdpsolver with full matrices."""

    package = "mdpsolver"

    def __init__(self, problem: Problem, algorithm: str, **options: Any):
        self.options = {"algorithm": algorithm, "update": "standard", **options}
        self.discount, self.rewards = problem.discount, problem.reward.tolist()
        self.matrix = problem.probability.transpose(1, 2, 0)
        self.model: Any = None

    def prepare(self) -> None:
        import mdpsolver

        self.model = mdpsolver.model()
        self.model.mdp(discount=self.discount, rewards=self.rewards, tranMatWithZeros=self.matrix.tolist())

    def solve(self, tolerance: float) -> Any:
        self.model.solve(tolerance=tolerance, makeFinalCheck=False, **self.options)

    def value(self, result: Any) -> np.ndarray:
        return np.asarray(self.model.getValueVector())


class NumpyDense(Peer):
    """Value iteration as one would write it with numpy, by full matrices; it stops on the span."""

    package = "numpy"

    def __init__(self, problem: Problem):
        self.problem = problem
        self.rows = np.ascontiguousarray(problem.probability.transpose(1, 2, 0)).reshape(-1, problem.states)

    def solve(self, tolerance: float) -> Any:
        value = np.zeros(self.problem.states)
        while True:
            q = self.problem.reward + self.problem.discount * (self.rows @ value).reshape(self.problem.reward.shape)
            top, temperature = q.max(-1), self.problem.temperature
            soft = temperature * np.log(np.exp((q - top[:, None]) / temperature).sum(-1)) if temperature else 0.0
            best, bound = bounds(self.problem, value, top + soft)
            if bound <= tolerance:
                return best
            value = top + soft


DENSE_PEERS: dict[str, Callable[[Problem], Peer]] = {
    "quantecon mpi 5": lambda p: QuantEconDense(p, "modified_policy_iteration", k=5),
    "quantecon mpi 20": lambda p: QuantEconDense(p, "modified_policy_iteration", k=20),
    "quantecon pi": lambda p: QuantEconDense(p, "policy_iteration"),
    "mdpsolver mpi 10": lambda p: MDPSolverDense(p, "mpi", parIterLim=10, parallel=True),
    "mdpsolver mpi 10 serial": lambda p: MDPSolverDense(p, "mpi", parIterLim=10, parallel=False),
    "mdpsolver pi serial": lambda p: MDPSolverDense(p, "pi", parallel=False),
}
SPARSE_PEERS = ("quantecon mpi 5", "quantecon mpi 20", "quantecon pi", "mdpsolver mpi 10 serial", "mdpsolver pi serial")


def peers(batch: Batch) -> dict[str, Callable[[Problem], Peer]]:
    """Those that solve such problems; of Shannon's kind only what one would write with numpy, and jaxdp."""
    if batch.successor is None:
        return {"numpy vi span": NumpyDense} | ({} if batch.temperature else DENSE_PEERS)
    names = () if batch.temperature else SPARSE_PEERS
    return {name: PEERS[name] for name in ("scipy vi span", *names)}


def peer_contender(make_peer, batch: Batch, right: np.ndarray, target: float, sample: int):
    """(run, error, decade): `run` solves `sample` problems one at a time and returns the seconds of solves alone."""
    with quiet():
        made = [make_peer(batch.problem(i)) for i in range(sample)]
        made[0].warm_up()

    def run(tolerance: float) -> tuple[float, float]:
        worst = taken = 0.0
        with quiet():
            for i, peer in enumerate(made):
                peer.prepare()
                start = time.perf_counter()
                result = peer.solve(tolerance)
                taken += time.perf_counter() - start
                worst = max(worst, float(np.abs(peer.value(result) - right[i]).max()))
        return taken, worst

    run(target)  # what is compiled at the first call is compiled now
    error = np.inf
    for decade in DECADES if made[0].has_tolerance else (0,):
        _, error = run(target * 10.0**decade)
        if error <= target:
            return functools.partial(lambda tolerance: run(tolerance)[0], target * 10.0**decade), error, decade
    return None, error, None


def jaxdp_contender(batch: Batch, right: np.ndarray, target: float):
    """jaxdp's value iteration under vmap: the same loop as one at a time, all problems in one program."""
    made = [JaxDP(batch.problem(i), "ValueIteration") for i in range(len(batch.reward))]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(peer.mdp for peer in made))
    call = jax.jit(jax.vmap(made[0].run, in_axes=(0, None)))
    del made

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(call(stacked, target))
        return time.perf_counter() - start

    error = float(np.abs(np.asarray(call(stacked, target)) - right).max())
    return run, error, 0


def solvers(tolerance: float) -> dict[str, bj.Solver]:
    return {
        "auto": bj.Auto(tolerance),
        "vi": bj.ValueIteration(tolerance),
        "mpi": bj.ModifiedPolicyIteration(tolerance),
        "adaptive": bj.AdaptivePolicyIteration(tolerance),
        "anderson": bj.AndersonIteration(tolerance),
    }


@jax.jit
def mapped(mdp: bj.MDP, regularizer: bj.Regularizer, solver: bj.Solver) -> bj.Solution:
    """One problem after another, inside one program."""
    return lax.map(lambda one: bj.solve(one, regularizer, solver=solver), mdp)


class Ours(NamedTuple):
    """What one contender of ours takes: seconds a run, scaled up from `sample`, and the last solution."""

    run: Callable[[], Any]
    sample: int


def ours(batch: Batch, dtype: Any, solver: bj.Solver, sample: int, own: bool) -> dict[str, Ours]:
    mdp = batch.mdp(dtype)
    count = len(batch.reward)
    regularizer = bj.ShannonEntropy(dtype(batch.temperature)) if batch.temperature else bj.Unregularized()
    kernels = [jax.tree.map(lambda x, i=i: x[i], mdp.transition) if own else mdp.transition for i in range(sample)]
    ones = [bj.MDP(kernel, mdp.reward[i], mdp.discount[i]) for i, kernel in enumerate(kernels)]

    def loop():
        return [bj.solve(one, regularizer, solver=solver) for one in ones]

    out = {"batch": Ours(lambda: bj.solve(mdp, regularizer, solver=solver), count), "loop": Ours(loop, sample)}
    if own:
        out["map"] = Ours(lambda: mapped(mdp, regularizer, solver), count)
    return out


def clock(call: Callable[[], Any]) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - start

    return run


def turns(runs: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, in turn; the first round is a warm-up and tells which are too slow for more."""
    first: dict[str, float] = {}
    for name, run in runs.items():
        run()
        first[name] = run()
    taken = {name: [seconds] for name, seconds in first.items()}
    for _ in range(repeats - 1):
        for name, run in runs.items():
            if first[name] <= SLOW:
                taken[name].append(run())
    return taken


def measure(
    form: str, dtype: Any, temperature: float, options: argparse.Namespace, names: list[str], with_peers: bool
) -> dict[str, Any]:
    """One cell: all contenders on one batch."""
    own = form != "shared"
    if own:
        problems, states, actions = options.problems, 100, 5
        slots = 5 if form == "successors" else states
        sample = peer_sample = problems
    else:
        problems, states, actions = options.rewards, options.states, 8
        slots, sample, peer_sample = states, min(16, options.rewards), 2
    batch = make(form, problems, states, actions, slots, temperature)
    right = batch.reference()
    scale = float(np.abs(right).max(-1).min())
    target = ACCURACY * scale
    runs: dict[str, Callable[[], float]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        solver = solvers(target)[name]
        for mode, (run, count) in ours(batch, dtype, solver, sample, own).items():
            key = f"ours {name} {mode}"
            solution: Any = run()
            if isinstance(solution, list):
                solution = jax.tree.map(lambda *leaves: jnp.stack(leaves), *solution)
            error = float(np.abs(np.asarray(solution.value, float) - right[:count]).max()) / scale
            steps = np.asarray(solution.stats.iterations)
            rows[key] = {
                "sample": count,
                "relative_error": error,
                "results": sorted({int(code) for code in np.asarray(solution.result)}),
                "steps": [int(steps.min()), int(steps.max())],
            }
            runs[key] = clock(run)
    if with_peers:
        for name, maker in peers(batch).items():
            run, error, decade = peer_contender(maker, batch, right, target, peer_sample)
            rows[name] = {"sample": peer_sample, "relative_error": error / scale, "decade": decade}
            if run is not None:
                runs[name] = run
        if own and batch.successor is None:
            run, error, _ = jaxdp_contender(batch, right, target)
            rows["jaxdp vi vmapped"] = {"sample": problems, "relative_error": error / scale}
            runs["jaxdp vi vmapped"] = run
    if not own:
        mdp = batch.mdp(dtype)
        kernel: Any = mdp.transition
        flat = kernel.probability.reshape(-1, states)
        v = jnp.asarray(right.astype(dtype))
        columns = jnp.asarray(np.ascontiguousarray(right.T.astype(dtype)))
        product = jax.jit(jnp.matmul)
        rowwise = jax.jit(lambda p, v: lax.dot_general(v, p, (((1,), (1,)), ((), ()))))
        runs["bare [S A, S] @ [S, B]"] = clock(lambda: product(flat, columns))
        runs["bare [B, S] @ [S A, S]'"] = clock(lambda: rowwise(flat, v))
    taken = turns(runs, options.repeats)
    work = 2 * problems * states * actions * states
    bare = max((work / summary(s)["median"] for name, s in taken.items() if name.startswith("bare")), default=None)
    for name, seconds in taken.items():
        row = rows.setdefault(name, {"sample": problems})
        row["seconds"] = {key: value * problems / row["sample"] for key, value in summary(seconds).items()}
        row["seconds"]["runs"] = len(seconds)
        row["problems_per_s"] = problems / row["seconds"]["median"]
        if bare is not None and name.startswith("bare"):
            row["GFLOP_per_s"] = work / row["seconds"]["median"] / 1e9
        elif bare is not None and "steps" in row:
            # The first sweep, from V = 0, needs no product, the action values at the end need one.
            rate = work * row["steps"][1] / row["seconds"]["median"]
            row["GFLOP_per_s"], row["of_bare"] = rate / 1e9, rate / bare
    return {"relative_target": ACCURACY, "problems": problems, "states": states, "actions": actions, "rows": rows}


def table(cells: dict[str, Any]) -> str:
    """Markdown: one row per contender."""
    lines = [
        "| batch | contender | problems a second | relative error | of the bare product |",
        "|---|---|---|---|---|",
    ]
    for key, cell in cells.items():
        fast_first = sorted(cell["rows"].items(), key=lambda item: -item[1].get("problems_per_s", 0))
        for name, row in fast_first:
            error = f"{row['relative_error']:.1e}" if "relative_error" in row else ""
            share = f"{row['of_bare']:.0%}" if "of_bare" in row else ""
            rate = f"{row['problems_per_s']:.4g}" if "problems_per_s" in row else "not accurate"
            lines.append(f"| {key} | {name} | {rate} | {error} | {share} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is not measured yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["own", "shared"])
    parser.add_argument("--problems", type=int, default=1024, help="of the first part")
    parser.add_argument("--rewards", type=int, default=256, help="of the second part")
    parser.add_argument("--states", type=int, default=2000, help="of the second part")
    parser.add_argument("--solvers", nargs="+", default=["auto", "vi", "mpi", "adaptive", "anderson"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--name", default="batches", help="of the file in benchmarks/results, or a path *.json")
    parser.add_argument("--again", action="store_true", help="measure the chosen cells though they are there")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    figures = Figures(options.name, options.again)
    cells = [
        (form, dtype, temperature)
        for part, form, dtypes in (
            ("own", "dense", (np.float64,)),
            ("own", "successors", (np.float64,)),
            ("shared", "shared", (np.float32, np.float64)),
        )
        if options.only in (None, part)
        for dtype in dtypes
        for temperature in (0.0, TEMPERATURE)
    ]
    for form, dtype, temperature in [] if options.table else cells:
        # The peers have float64 alone.
        with_peers = not options.no_peers and dtype is np.float64
        key = f"{form}, {dtype.__name__}, {'Shannon' if temperature else 'unregularized'}"
        figures.measure(key, functools.partial(measure, form, dtype, temperature, options, options.solvers, with_peers))
    print(table(figures.cells))


if __name__ == "__main__":
    main()
