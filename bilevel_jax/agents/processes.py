"""The part that agents share: the simulator that they learn from, and how they choose actions."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Integer

from bilevel_jax.bilevel import SampledProblem
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.indexing import gather
from bilevel_jax.core.validation import (
    as_float,
    as_integer,
    require_at_least,
    require_computable,
    require_probability,
)
from bilevel_jax.environments import (
    AutoReset,
    Environment,
    TabularEnvironment,
    TimeLimit,
    require_every_action,
    with_restarts,
)
from bilevel_jax.environments.sampling import choose
from bilevel_jax.mdp.regularizers import KLDivergence, Regularizer


def simulator(problem: SampledProblem, restart_every: Any) -> Environment:
    """Return the problem's simulator, with processes that start again where they end and after `restart_every` steps.

    None is the problem's horizon: the restarts keep the processes in the states that the problem's trajectories visit.
    """
    require_computable("problem", problem, any_floats=True)
    require_every_action(problem.environment, "an agent")
    return with_restarts(problem.environment, problem.horizon if restart_every is None else restart_every)


def number_of_states(environment: Environment) -> int | None:
    """Return S if observations are the states of a table, else None."""
    inner = _unwrapped(environment)
    return inner.num_states if isinstance(inner, TabularEnvironment) else None


def table_environment(environment: Environment, what: str) -> TabularEnvironment:
    """The tabular environment inside wrappers. Raises InputError that names what needs it."""
    inner = _unwrapped(environment)
    if not isinstance(inner, TabularEnvironment):
        raise InputError(
            f"environment: {what} needs a TabularEnvironment, got {type(environment).__name__}; for other simulators "
            f"use SoftQLearning(features=...)"
        )
    return inner


def _unwrapped(environment: Environment) -> Environment:
    while isinstance(environment, AutoReset | TimeLimit):
        environment = environment.environment
    return environment


def at_states(regularizer: Regularizer, observation: Any) -> Regularizer:
    """Return the regularizer of the observed states, for rows Q[B, A] or one Q[A]: its numbers for each state are
    looked up.

    Raises:
      InputError: it has batch axes, or numbers for each state that observations do not index.
    """

    def rows(leaf: jax.Array, event_ndim: int) -> jax.Array:
        if event_ndim < 2:
            if jnp.ndim(leaf) > event_ndim:
                raise InputError(
                    f"regularizer: an agent learns one policy, but a number of the regularizer has shape "
                    f"{list(jnp.shape(leaf))}; give one for all contexts"
                )
            return leaf
        if not (isinstance(observation, jax.Array) and jnp.issubdtype(observation.dtype, jnp.integer)):
            raise InputError(
                "regularizer: it has a row for each state, but observations are not indices of states; give one "
                "row for all, [A]"
            )
        return gather(leaf.reshape(-1, leaf.shape[-1]), observation)

    return jax.tree.map(rows, regularizer, regularizer.event_ndim())


def mixed(
    regularizer: Regularizer, policy: Float[Array, "*batch A"], epsilon: Float[Array, ""]
) -> Float[Array, "*batch A"]:
    """Return the policy, replaced with probability epsilon by the uniform one over the actions that are
    allowed.
    """
    allowed = jnp.ones_like(policy)
    if isinstance(regularizer, KLDivergence):
        allowed = jnp.broadcast_to(regularizer.reference > 0, policy.shape).astype(policy.dtype)
    epsilon = jnp.asarray(epsilon, policy.dtype)
    return (1 - epsilon) * policy + epsilon * allowed / jnp.sum(allowed, -1, keepdims=True)


def choose_all(numbers: Float[Array, " B"], probabilities: Float[Array, "B A"]) -> Int32[Array, " B"]:
    """The actions that numbers pick from probabilities."""
    return jax.vmap(choose)(numbers, probabilities)


def take(values: Float[Array, "B A"], actions: Integer[Array, " B"]) -> Float[Array, " B"]:
    """values[b, actions[b]]."""
    return jnp.take_along_axis(values, actions[:, None], 1)[:, 0]


def as_unit(name: str, value: Any, remedy: str) -> Float[Array, ""]:
    """A number in [0, 1]. Raises InputError."""
    number = as_float(name, value, float)
    require_probability(name, number, remedy)
    return number


def as_limit(name: str, value: Any) -> Int32[Array, ""] | None:
    """A number of steps, or None. Raises InputError."""
    if value is None:
        return None
    steps = as_integer(name, value, "None is the problem's horizon", expected="a whole number of steps")
    require_at_least(name, steps, 1, "None is the problem's horizon")
    return steps
