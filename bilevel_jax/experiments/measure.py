"""The results that runs have reached, evaluated apart from them: exactly where the problem has a model, else by
samples.
"""

from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from bilevel_jax.environments import Greedy, TabularEnvironment, policy_table
from bilevel_jax.environments.evaluation import WIDTH
from bilevel_jax.estimators import group_costs, sample_groups
from bilevel_jax.experiments.program import Inputs, Progress


class Final(NamedTuple):
    """Where runs ended, batch axis first: the objective, its gradient's norm, codes and bounds, of the last x.

    `policy` and `value` are those of the lower level there; None where they are not tabular. `agent` are then the
    leaves of the agent's policy, None else. `best_x` is the x with the
    least objective, `best_objective`, that the run saw, the last x included.
    """

    x: Any
    objective: np.ndarray
    gradient_norm: np.ndarray
    columns: dict[str, np.ndarray]
    result: np.ndarray
    policy: np.ndarray | None
    value: np.ndarray | None
    best_x: Any
    best_objective: np.ndarray
    agent: Any = None


def evaluated(inputs: Inputs, progress: Progress, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Return phi(x) and |grad phi(x)| of each run, on the model; or the mean loss of a batch, and NaN for the norm.

    Curves have no place for result codes: phi is NaN where the lower level did not converge, and the norm is NaN where
    the adjoint did not converge.
    """
    if isinstance(_algorithm(inputs).problem, bj.Problem):
        varying, shared = inputs.varying.problem, inputs.shared.problem
        value, norm = _exact(varying, shared, progress.state.x)
        return np.asarray(value), np.asarray(norm)
    value = np.asarray(_sampled(inputs.varying, inputs.shared, progress.state, samples).objective)
    return value, np.full_like(value, np.nan)


def final(inputs: Inputs, progress: Progress, samples: int) -> Final:
    """Where the runs of a chunk ended."""
    x, best_x = progress.state.x, progress.best_x
    algorithm = _algorithm(inputs)
    if not isinstance(algorithm.problem, bj.Problem):
        return _final_by_samples(inputs, progress, samples)
    varying, shared = inputs.varying.problem, inputs.shared.problem
    exact = jax.device_get(_solved(varying, shared, x))
    at_best = np.asarray(_solved(varying, shared, best_x).value)
    last = np.asarray(exact.value)
    better = np.isnan(at_best) | (last <= at_best)  # False where the last one diverged
    chosen = jax.tree.map(
        lambda new, old: np.where(better.reshape(-1, *[1] * (np.ndim(new) - 1)), new, old), *jax.device_get((x, best_x))
    )
    rows = tuple(range(1, exact.solution.result.ndim))
    stats = {
        "lower_level_result": np.max(exact.solution.result, rows),
        "lower_level_error_bound": np.max(exact.solution.stats.error_bound, rows),
        "adjoint_result": np.max(exact.stats.result, rows),
        "adjoint_error_bound": np.max(exact.stats.error_bound, rows),
    }
    if hasattr(algorithm, "upper"):  # without one, nothing says how x is projected
        upper = inputs.varying.upper, inputs.shared.upper
        stats["stationarity"] = np.asarray(_stationarity(*upper, x, exact.gradient))
    norm = np.asarray(jax.vmap(optax.tree.norm)(exact.gradient))
    codes = np.maximum(stats["lower_level_result"], stats["adjoint_result"])
    codes = np.where(np.isfinite(last), codes, np.maximum(codes, bj.Result.NOT_FINITE))
    solution = exact.solution
    return Final(
        x=jax.device_get(x),
        objective=last,
        gradient_norm=norm,
        columns=stats,
        result=codes,
        policy=solution.policy,
        value=solution.value,
        best_x=chosen,
        best_objective=np.where(better, last, at_best),
    )


def _final_by_samples(inputs: Inputs, progress: Progress, samples: int) -> Final:
    """Where runs ended, without a model. The objective and the returns have intervals of 95%."""
    made = jax.device_get(_sampled(inputs.varying, inputs.shared, progress.state, samples))
    greedy = jax.device_get(_sampled(inputs.varying, inputs.shared, progress.state, samples, greedy=True))
    columns = {}
    for name, mean, error in (
        ("objective", None, made.objective_error),
        ("return", made.mean_return, made.return_error),
        ("greedy_return", greedy.mean_return, greedy.return_error),
    ):
        if mean is not None:
            columns[name] = mean
        middle = made.objective if mean is None else mean
        columns |= {f"{name}_low": middle - WIDTH * error, f"{name}_high": middle + WIDTH * error}
    columns |= jax.device_get(_at_the_end(inputs.varying, inputs.shared, progress.state))
    policy = agent = None
    if isinstance(_algorithm(inputs).problem.environment, TabularEnvironment):
        policy = np.asarray(_policies(inputs.varying, inputs.shared, progress.state))
    else:
        agent = jax.device_get(_agents(inputs.varying, inputs.shared, progress.state))
    x, objective = jax.device_get(progress.state.x), made.objective
    return Final(
        x=x,
        objective=objective,
        gradient_norm=np.full_like(objective, np.nan),
        columns=columns,
        result=np.where(np.isfinite(objective), bj.Result.CONVERGED, bj.Result.NOT_FINITE),
        policy=policy,
        value=None,
        best_x=x,  # the objectives that an iteration reports are estimates: the least of them is none to choose by
        best_objective=objective,
        agent=agent,
    )


class Sampled(NamedTuple):
    """Means over trajectories and their standard errors: of the loss, and of the sum of the environment's rewards."""

    objective: Any
    objective_error: Any
    mean_return: Any
    return_error: Any


def _algorithm(inputs: Inputs) -> Any:
    """The algorithm of the first run."""
    first = jax.tree.map(lambda leaf: leaf[0], inputs.varying)
    return eqx.combine(first, inputs.shared)


# Of the problem alone, without the algorithm: all algorithms on a problem share what is compiled.
@jax.jit
def _exact(varying, shared, xs):
    def one(inputs):
        own, x = inputs
        made = bj.hypergradient(eqx.combine(own, shared), x, with_error=False)
        value = jnp.where(jnp.all(made.solution.result == bj.Result.CONVERGED), made.value, jnp.nan)
        adjoint = jnp.all(made.stats.result == bj.Result.CONVERGED)
        return value, jnp.where(adjoint, optax.tree.norm(made.gradient), jnp.nan)

    return jax.lax.map(one, (varying, xs))


@jax.jit
def _solved(varying, shared, xs):
    def one(inputs):
        own, x = inputs
        return bj.hypergradient(eqx.combine(own, shared), x, with_error=False)

    return jax.lax.map(one, (varying, xs))


@jax.jit
def _stationarity(varying, shared, xs, gradients):
    return jax.vmap(lambda own, x, g: eqx.combine(own, shared).stationarity(x, g))(varying, xs, gradients)


@partial(jax.jit, static_argnames=("samples", "greedy"))
def _sampled(varying, shared, states, samples, greedy=False):
    def one(inputs):
        own, state = inputs
        algorithm = eqx.combine(own, shared)
        problem = algorithm.problem
        for_groups, for_loss = jax.random.split(jax.random.key(0))
        policy = algorithm.policy(state)
        groups = sample_groups(for_groups, problem, Greedy(policy) if greedy else policy, samples)
        costs = group_costs(for_loss, problem, state.x, groups)
        losses = jnp.sum(costs.factors[None] * costs.each, 1)
        returns = jnp.sum(jnp.where(groups.valid, groups.reward, 0), -1).reshape(-1).astype(losses.dtype)
        # A policy of NaN still takes actions, and what they earn is finite.
        broken = jnp.any(jnp.isnan(groups.probability))
        losses, returns = (jnp.where(broken, jnp.nan, one) for one in (losses, returns))
        return Sampled(jnp.mean(losses), _error(losses), jnp.mean(returns), _error(returns))

    return jax.lax.map(one, (varying, states))


def _error(numbers: jax.Array) -> jax.Array:
    """The standard error of a mean; infinite with one number."""
    if numbers.size == 1:
        return jnp.asarray(jnp.inf, numbers.dtype)
    return jnp.std(numbers, ddof=1) / numbers.size**0.5


@jax.jit
def _at_the_end(varying, shared, states):
    def one(inputs):
        own, state = inputs
        algorithm = eqx.combine(own, shared)
        return algorithm.at_the_end(state) if hasattr(algorithm, "at_the_end") else {}

    return jax.lax.map(one, (varying, states))


@jax.jit
def _agents(varying, shared, states):
    return jax.lax.map(lambda inputs: eqx.combine(inputs[0], shared).policy(inputs[1]), (varying, states))


@jax.jit
def _policies(varying, shared, states):
    def one(inputs):
        own, state = inputs
        algorithm = eqx.combine(own, shared)
        return policy_table(algorithm.policy(state), algorithm.problem.environment.num_states)

    return jax.lax.map(one, (varying, states))
