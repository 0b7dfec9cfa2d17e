"""The solvers of other packages behind one small protocol, each at the settings that it offers.

A peer builds its own data structures in `__init__` and, where a solver remembers its last solution, anew in
`prepare`; both outside the clock. `solve(tolerance)` is what is timed; `value(result)` turns what it returns into
an array [S], outside the clock again. `warm_up` compiles what is compiled.

What `tolerance` means to each is its own affair: the benchmark tries decades and counts the loosest at which the
true error is small enough. So nobody pays for a stop that is more careful than asked.
"""

import abc
import contextlib
import itertools
import os
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from benchmarks.common.peer_problems import Problem, bounds, make, sweep

UNLIMITED = 10**9


class Peer(abc.ABC):
    """See the module."""

    package: ClassVar[str]
    has_tolerance: bool = True

    @abc.abstractmethod
    def __init__(self, problem: Problem): ...

    def prepare(self) -> None:
        """Before each solve."""
        return

    def warm_up(self) -> None:
        """Once, before the first."""
        return

    @abc.abstractmethod
    def solve(self, tolerance: float) -> Any: ...

    def value(self, result: Any) -> np.ndarray:
        return np.asarray(result)


class MDPSolver(Peer):
    """mdpsolver (C++). Standard updates stop on the span and return MacQueen's lower bound, in parallel by OpenMP.

    The others, Gauss-Seidel and successive over-relaxation, stop on the sup norm and run on one thread: their
    `parallel=True` compares a vector with itself and stops at once in value iteration, and is ignored otherwise.
    """

    package = "mdpsolver"

    def __init__(self, problem: Problem, algorithm: str, update: str = "standard", **options: Any):
        self.options = {"algorithm": algorithm, "update": update, "parallel": update == "standard", **options}
        self.discount = problem.discount
        matrix = problem.matrix(actions_first=False)
        self.rewards = problem.reward.tolist()
        starts = np.asarray(matrix.indptr)
        self.probabilities = _nested(matrix.data.tolist(), starts, problem.actions)
        self.columns = _nested(matrix.indices.tolist(), starts, problem.actions)
        self.model: Any = None

    def prepare(self) -> None:
        # A second solve of one model would start from the solution of the first.
        import mdpsolver

        self.model = mdpsolver.model()
        self.model.mdp(
            discount=self.discount, rewards=self.rewards, tranMatProbs=self.probabilities, tranMatColumns=self.columns
        )

    def solve(self, tolerance: float) -> Any:
        self.model.solve(tolerance=tolerance, makeFinalCheck=False, **self.options)

    def value(self, result: Any) -> np.ndarray:
        del result
        return np.asarray(self.model.getValueVector())


class QuantEcon(Peer):
    """quantecon's DiscreteDP (numba and scipy), state-action pairs, sparse."""

    package = "quantecon"

    def __init__(self, problem: Problem, method: str, **options: Any):
        self.method, self.options = method, options
        self.has_tolerance = method != "policy_iteration"
        self.program = self._program(problem)

    @staticmethod
    def _program(problem: Problem) -> Any:
        from quantecon.markov import DiscreteDP

        pairs = problem.states * problem.actions
        state, action = np.divmod(np.arange(pairs), problem.actions)
        matrix = problem.matrix(actions_first=False)
        return DiscreteDP(problem.reward.reshape(-1), matrix, problem.discount, state, action)

    def warm_up(self) -> None:
        self._program(make("garnet", 20, 0.9)).solve(self.method, **self._settings(1e-3))

    def _settings(self, tolerance: float) -> dict[str, Any]:
        return {"max_iter": UNLIMITED, "epsilon": tolerance, **self.options}

    def solve(self, tolerance: float) -> Any:
        return self.program.solve(self.method, **self._settings(tolerance))

    def value(self, result: Any) -> np.ndarray:
        return np.asarray(result.v)


class MDPToolbox(Peer):
    """pymdptoolbox with scipy matrices.

    Its bound on the number of iterations is left out: it takes S dense rows of S numbers, and stops too early. It stops
    on the span but returns V as it is, whose error stays at 1e-3 and more on fast-mixing chains whatever the
    tolerance; so one more of its sweeps and the middle of MacQueen's bounds are added here, inside the clock. Its
    Gauss-Seidel form is left out: a loop in Python over states, which numpy 2 refuses.
    """

    package = "pymdptoolbox"

    def __init__(self, problem: Problem, algorithm: str, **options: Any):
        from mdptoolbox import mdp

        matrix = problem.matrix(actions_first=True)
        self.problem = problem
        matrices = [matrix[a * problem.states : (a + 1) * problem.states] for a in range(problem.actions)]
        base = getattr(mdp, algorithm)
        # The largest number of sweeps is a limit for the one kind, and of an evaluation for the other.
        options = {"max_iter": UNLIMITED, **options}
        unbounded = type(algorithm, (base,), {"_boundIter": lambda self, epsilon: None})
        self.data = (matrices, problem.reward, problem.discount)
        self.create: Callable[[float], Any] = lambda epsilon: unbounded(*self.data, epsilon=epsilon, **options)
        self.limit = options["max_iter"]
        self.solver = self.create(1.0)
        self.start = self.solver.V.copy()

    def solve(self, tolerance: float) -> Any:
        solver = self.solver
        solver.V, solver.iter, solver.max_iter, solver.epsilon = self.start.copy(), 0, self.limit, tolerance
        solver.thresh = tolerance * (1 - solver.discount) / solver.discount
        solver.run()
        value = np.asarray(solver.V)
        _, backup = solver._bellmanOperator(value)
        return bounds(self.problem, value, backup)[0]


class JaxDP(Peer):
    """jaxdp: dense P[A, S', S], single updates; the loop and its stop are the caller's, so they are the best we know.

    Value iterations stop on the span and return the middle of MacQueen's bounds; policy iteration stops when the values
    stand still.
    """

    package = "jaxdp"
    most_states = 2_000  # 128 MB an array

    def __init__(self, problem: Problem, algorithm: str, **options: Any):
        import chex
        import jax
        import jax.numpy as jnp
        import jaxdp
        from jax import lax
        from jaxdp import planning

        jax.config.update("jax_enable_x64", True)
        chex.disable_asserts()  # they check values, which costs time, and need a wrapper under jit
        self.has_tolerance = algorithm != "PolicyIteration"
        states, discount = problem.states, problem.discount
        dense = np.asarray(problem.matrix(actions_first=True).todense()).reshape(problem.actions, states, states)
        reward = np.broadcast_to(problem.reward.T[:, :, None], dense.shape)
        self.mdp = jaxdp.MDP(
            **{
                "transition": jnp.asarray(dense.transpose(0, 2, 1)),
                "reward": jnp.asarray(reward),
                "initial": jnp.full(states, 1 / states),
                "terminal": jnp.zeros(states),
            }
        )
        factor = discount / (1 - discount)
        soft = {"temperature": problem.temperature}
        greedy = jaxdp.SoftBellmanOptOp(**soft).v if problem.temperature else jaxdp.bellman_opt_op.v

        def iterate(mdp, tolerance):
            def unfinished(carry):
                return factor * (carry[2] - carry[1]) / 2 > tolerance

            def body(carry):
                new = greedy(mdp, carry[0], discount)
                gap = new - carry[0]
                return new, jnp.min(gap), jnp.max(gap)

            start = (jnp.zeros(states), -jnp.asarray(jnp.inf), jnp.asarray(jnp.inf))
            value, low, high = lax.while_loop(unfinished, body, start)
            return value + factor * (low + high) / 2

        def plan(mdp, tolerance):
            planner = getattr(planning, algorithm)(gamma=discount, **options)

            def unfinished(carry):
                return carry[1] > tolerance

            def body(carry):
                new = planner.update(mdp, carry[0])
                return new, jnp.max(jnp.abs(new.v_val - carry[0].v_val))

            if algorithm == "PolicyIteration":
                policy = jnp.zeros((problem.actions, states)).at[0].set(1)
                value = planning.policy_eval.v(mdp, policy, discount)
                start = planner.State(policy=policy, v_val=value)
                tolerance = 1e-13 * jnp.max(jnp.abs(mdp.reward)) * factor
            else:
                start, tolerance = planner.init(mdp), tolerance / factor
            return lax.while_loop(unfinished, body, (start, jnp.asarray(jnp.inf)))[0].v_val

        self.run = jax.jit(iterate if algorithm == "ValueIteration" else plan)

    def warm_up(self) -> None:
        self.run.lower(self.mdp, 1.0).compile()

    def solve(self, tolerance: float) -> Any:
        return self.run(self.mdp, tolerance).block_until_ready()


class Scipy(Peer):
    """Value iteration as one would write it with scipy: a CSR product and a maximum (or numpy's logsumexp) a sweep.

    `span`: stop on the span and return the middle of MacQueen's bounds, or else on the sup norm.
    """

    package = "scipy"

    def __init__(self, problem: Problem, span: bool):
        self.problem, self.span = problem, span
        self.matrix = problem.matrix(actions_first=True)

    def solve(self, tolerance: float) -> Any:
        value = np.zeros(self.problem.states)
        factor = self.problem.discount / (1 - self.problem.discount)
        while True:
            backup, _ = sweep(self.matrix, self.problem, value)
            if self.span:
                best, bound = bounds(self.problem, value, backup)
            else:
                best, bound = backup, factor * np.abs(backup - value).max()
            if bound <= tolerance:
                return best
            value = backup


def _nested(flat: list, pointer: np.ndarray, actions: int) -> list:
    rows = [flat[low:high] for low, high in itertools.pairwise(pointer.tolist())]
    return [rows[first : first + actions] for first in range(0, len(rows), actions)]


@contextlib.contextmanager
def quiet():
    """Without what a package prints by itself."""
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
        yield


PEERS: dict[str, Callable[[Problem], Peer]] = {
    "mdpsolver vi": lambda p: MDPSolver(p, "vi"),
    "mdpsolver vi serial": lambda p: MDPSolver(p, "vi", parallel=False),
    "mdpsolver vi gs": lambda p: MDPSolver(p, "vi", "gs"),
    "mdpsolver vi sor 1.2": lambda p: MDPSolver(p, "vi", "sor", SORrelaxation=1.2),
    "mdpsolver mpi 10": lambda p: MDPSolver(p, "mpi", parIterLim=10),
    "mdpsolver mpi 10 serial": lambda p: MDPSolver(p, "mpi", parIterLim=10, parallel=False),
    "mdpsolver mpi 100": lambda p: MDPSolver(p, "mpi", parIterLim=100),
    "mdpsolver mpi 100 serial": lambda p: MDPSolver(p, "mpi", parIterLim=100, parallel=False),
    "mdpsolver mpi 100 gs": lambda p: MDPSolver(p, "mpi", "gs", parIterLim=100),
    "mdpsolver mpi 100 sor 1.2": lambda p: MDPSolver(p, "mpi", "sor", parIterLim=100, SORrelaxation=1.2),
    "mdpsolver pi": lambda p: MDPSolver(p, "pi"),
    "mdpsolver pi serial": lambda p: MDPSolver(p, "pi", parallel=False),
    "mdpsolver pi gs": lambda p: MDPSolver(p, "pi", "gs"),
    "quantecon vi": lambda p: QuantEcon(p, "value_iteration"),
    "quantecon mpi 5": lambda p: QuantEcon(p, "modified_policy_iteration", k=5),
    "quantecon mpi 20": lambda p: QuantEcon(p, "modified_policy_iteration", k=20),
    "quantecon mpi 100": lambda p: QuantEcon(p, "modified_policy_iteration", k=100),
    "quantecon pi": lambda p: QuantEcon(p, "policy_iteration"),
    "pymdptoolbox vi": lambda p: MDPToolbox(p, "ValueIteration"),
    "pymdptoolbox mpi 10": lambda p: MDPToolbox(p, "PolicyIterationModified", max_iter=10),
    "pymdptoolbox mpi 100": lambda p: MDPToolbox(p, "PolicyIterationModified", max_iter=100),
    "jaxdp vi": lambda p: JaxDP(p, "ValueIteration"),
    "jaxdp anderson vi": lambda p: JaxDP(p, "AndersonValueIteration"),
    "jaxdp pi": lambda p: JaxDP(p, "PolicyIteration"),
    "scipy vi sup": lambda p: Scipy(p, span=False),
    "scipy vi span": lambda p: Scipy(p, span=True),
}
# The ones with a Shannon version.
SOFT = ("jaxdp vi", "scipy vi sup", "scipy vi span")
