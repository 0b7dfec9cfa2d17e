"""Runs of one algorithm that differ in learning rate and seed: one vmapped program, within budgets."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj


class Progress(NamedTuple):
    """A run under way: the algorithm's state, transitions so far and in the last iteration, whether all is finite."""

    state: Any
    transitions: jax.Array
    last: jax.Array
    finite: jax.Array


def curves(
    algorithm: Any, learning_rates: Sequence[float], seeds: Sequence[int], budgets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(transitions, exact objective) of each run at each budget, [budgets, runs].

    An iteration begins only if one like the last would end within the budget; a run whose objective or x is not
    finite ends. The start depends on the seed alone.

    Args:
      algorithm: with an optimizer of `optax.inject_hyperparams`, whose learning rate the runs' replace.
      learning_rates, seeds: one of each per run.
      budgets: increasing numbers of transitions.
    """
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    progress = _start(algorithm, keys, jnp.asarray(learning_rates, float))
    points = []
    for budget in budgets:
        progress = _advance(algorithm, keys, progress, jnp.asarray(float(budget)))
        points.append((np.asarray(progress.transitions), np.asarray(_objective(algorithm.problem, progress.state.x))))
    transitions, objective = zip(*points, strict=True)
    return np.stack(transitions), np.stack(objective)


@jax.jit
def _start(algorithm, keys, learning_rates):
    def one(key, learning_rate):
        state = algorithm.init(jax.random.fold_in(key, 0), algorithm.problem.start(key))
        hyperparams = state.optimizer_state.hyperparams
        rate = learning_rate.astype(hyperparams["learning_rate"].dtype)
        moved = state.optimizer_state._replace(hyperparams={**hyperparams, "learning_rate": rate})
        state = eqx.tree_at(lambda s: s.optimizer_state, state, moved)
        return Progress(
            state, jnp.asarray(0.0), jnp.asarray(float(algorithm.environment_steps), float), jnp.asarray(True)
        )

    return jax.vmap(one)(keys, learning_rates)


@jax.jit
def _advance(algorithm, keys, progress, budget):
    def one(key, progress):
        def step(progress):
            state, info = algorithm.step(jax.random.fold_in(key, 1 + progress.state.iteration), progress.state)
            spent = info.transitions.astype(progress.transitions.dtype)
            finite = jnp.isfinite(info.objective) & jnp.isfinite(optax.tree.norm(state.x))
            return Progress(state, progress.transitions + spent, spent, finite)

        def goes_on(progress):
            return progress.finite & (progress.transitions + progress.last <= budget)

        return jax.lax.while_loop(goes_on, step, progress)

    return jax.vmap(one)(keys, progress)


@jax.jit
def _objective(problem, xs):
    def one(x):
        made = bj.hypergradient(problem, x, with_error=False)
        # A curve has no place for result codes.
        return jnp.where(jnp.all(made.solution.result == bj.Result.CONVERGED), made.value, jnp.nan)

    return jax.lax.map(one, xs)
