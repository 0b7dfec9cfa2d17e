"""The methods of the published Four Rooms table as the published runs apply them, a whole run one program.

As there: w ~ N(0, 0.01^2), one context drawn an iteration, gradients clipped at norm 1, SGD, and values at the
target temperature, exact, averaged over the last tenth of the iterations. `four_rooms_published.py` runs them.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import lax

import bilevel_jax as bj
from bilevel_jax.algorithms import UpperLevel
from bilevel_jax.bilevel import lower_level
from bilevel_jax.environments.sampling import thresholds

POINTS = 50  # values kept of a run
LAST = POINTS // 10  # of them are averaged
# The rate is a leaf of the optimizer's state: another one is no other program.
UPPER = UpperLevel(optax.chain(optax.clip_by_global_norm(1.0), optax.inject_hyperparams(optax.sgd)(0.5)))
SOLVER = bj.PolicyIteration(1e-10)
SWEEPS = 20  # of AMD in an iteration; published: 100
BATCH = 250  # trajectories of HPGD in an iteration, of some 10,000 valid steps in all; published: 5 times 2,000 steps
RADIUS = 0.1  # zero-order: u = RADIUS / iteration; published: the best of 0.01, 0.1, 0.5, 1
Step = Callable[[Any, Any, jax.Array, jax.Array], Any]  # (algorithm, state, context, key) -> next state


class ZeroOrderState(eqx.Module):
    x: jax.Array
    value: jax.Array  # of the agent in each context, from which the next solves start
    optimizer_state: Any
    iteration: jax.Array


class ExactZeroOrder(eqx.Module):
    """(phi(x + u z) - phi(x)) / u z with exact values, z normal, u = radius / iteration."""

    problem: Any
    radius: jax.Array

    def init(self, key: jax.Array, x: jax.Array) -> ZeroOrderState:
        del key
        value = jnp.zeros_like(self.problem.mdp(x).reward[..., 0])
        return ZeroOrderState(x, value, UPPER.optimizer.init(x), jnp.asarray(0, jnp.int32))

    def step(self, key: jax.Array, state: ZeroOrderState) -> tuple[ZeroOrderState, jax.Array]:
        z = jax.random.normal(key, state.x.shape, state.x.dtype)
        u = self.radius / (state.iteration + 1)
        here, value = self._phi(state.x, state.value)
        moved, _ = self._phi(state.x + u * z, value)
        x, optimizer_state, _ = UPPER.update((moved - here) / u * z, state.optimizer_state, state.x, here)
        return ZeroOrderState(x, value, optimizer_state, state.iteration + 1), here

    def _phi(self, x: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
        solution = bj.solve(*lower_level(self.problem, x), solver=SOLVER, initial_value=value)
        return self.problem.objective(x, solution), solution.value


def exact(problem: Any) -> Any:
    return bj.algorithms.implicit(problem, UPPER, method=bj.Implicit(SOLVER, bj.Direct()))


def amd(problem: Any) -> Any:
    return bj.algorithms.amd(problem, UPPER, sweeps=SWEEPS)


def zero_order(problem: Any) -> Any:
    return ExactZeroOrder(problem, jnp.asarray(RADIUS))


def hpgd(problem: Any) -> Any:
    return bj.algorithms.hpgd(problem, UPPER, agent=bj.agents.ExactAgent(SOLVER), batch=BATCH)


def step_model(algorithm: Any, state: Any, context: jax.Array, key: jax.Array) -> Any:
    """A step on the problem that has the drawn context alone; what is carried of the other one waits."""
    carried = [name for name in ("value", "adjoint", "slopes") if hasattr(state, name)]

    def get(state):
        return [getattr(state, name) for name in carried]

    whole = get(state)
    axes = [array.ndim - 2 for array in whole]  # contexts stand before states
    one = [lax.dynamic_index_in_dim(array, context, axis) for array, axis in zip(whole, axes, strict=True)]
    goal = lax.dynamic_index_in_dim(algorithm.problem.at_goal, context)
    algorithm = eqx.tree_at(lambda a: a.problem.at_goal, algorithm, goal)
    state, _ = algorithm.step(key, eqx.tree_at(get, state, one))
    merged = [
        lax.dynamic_update_index_in_dim(array, new, context, axis)
        for array, new, axis in zip(whole, get(state), axes, strict=True)
    ]
    return eqx.tree_at(get, state, merged)


def step_sampled(algorithm: Any, state: Any, context: jax.Array, key: jax.Array) -> Any:
    """A step whose trajectories all start in the drawn context."""
    problem = algorithm.problem
    start = jnp.zeros((len(problem.at_goal), len(problem.initial))).at[context].set(problem.initial)
    algorithm = eqx.tree_at(lambda a: a.problem.environment.initial, algorithm, thresholds(start.reshape(-1)))
    return algorithm.step(key, state)[0]


METHODS: dict[str, tuple[Callable[[Any], Any], Step]] = {
    "exact": (exact, step_model),
    "amd": (amd, step_model),
    "zero_order": (zero_order, step_model),
    "hpgd": (hpgd, step_sampled),
}


@eqx.filter_jit
def trace(method: str, problem: Any, rate: jax.Array, key: jax.Array, block: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Exact values of the problem after each of POINTS blocks of iterations, and x at the end."""
    make, step = METHODS[method]
    algorithm = make(problem)
    for_start, for_contexts, for_steps = jax.random.split(key, 3)
    state = algorithm.init(for_steps, problem.start(for_start))
    state = eqx.tree_at(lambda s: s.optimizer_state[1].hyperparams["learning_rate"], state, rate)

    def advance(i, state):
        context = jax.random.randint(jax.random.fold_in(for_contexts, i), (), 0, len(problem.at_goal))
        return step(algorithm, state, context, jax.random.fold_in(for_steps, i))

    def point(state, number):
        state = lax.fori_loop(number * block, (number + 1) * block, advance, state)
        solution = bj.solve(*lower_level(problem, state.x), solver=SOLVER)
        return state, -problem.objective(state.x, solution)

    state, values = lax.scan(point, state, jnp.arange(POINTS))
    return values, state.x
