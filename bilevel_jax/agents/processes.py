"""What agents that learn from a simulator share: parallel processes that go on, and how actions are chosen."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from bilevel_jax.environments import (
    AutoReset,
    Environment,
    TabularEnvironment,
    TimeLimit,
    TimeStep,
    require_every_action,
    trajectory_keys,
)
from bilevel_jax.environments.sampling import choose, two_numbers
from bilevel_jax.errors import InputError
from bilevel_jax.estimators import SampledProblem
from bilevel_jax.indexing import gather
from bilevel_jax.regularizers import KLDivergence, Regularizer
from bilevel_jax.validation import (
    as_float,
    as_integer,
    as_size,
    require_at_least,
    require_computable,
    require_probability,
)


class Processes(eqx.Module):
    """B processes of a problem's simulator that start anew where they end, and every `limit` steps.

    The restarts keep them where trajectories of the problem go. A simulator that resets itself is
    taken as it is.
    """

    environment: Environment
    limit: jax.Array
    count: int = eqx.field(static=True)

    def __init__(self, problem: SampledProblem, count: int, limit: Any):
        require_computable("problem", problem, any_floats=True)
        inner = problem.environment
        require_every_action(inner, "an agent")
        self.limit = jnp.asarray(problem.horizon if limit is None else limit, jnp.int32)
        self.environment = inner if inner.resets else AutoReset(TimeLimit(inner, self.limit))
        self.count = count

    def start(self, key: jax.Array) -> Any:
        """States [B]. They are restarted at different times, so that a batch sees all of a trajectory."""
        states = jax.vmap(self.environment.reset)(jax.random.split(key, self.count))
        if not isinstance(self.environment, AutoReset) or not isinstance(self.environment.environment, TimeLimit):
            return states
        return states[0], jnp.arange(self.count, dtype=jnp.int32) * self.limit // self.count

    def observe(self, states: Any) -> Any:
        """Observations, [B]."""
        return jax.vmap(self.environment.observe)(states)

    def keys(self, key: jax.Array) -> jax.Array:
        """One key a process, [B], of which all that it draws in one `improve` is made."""
        return trajectory_keys(key, self.count)

    def numbers(self, keys: jax.Array, step: jax.Array) -> jax.Array:
        """The number in [0, 1) that each process chooses its action by in a step, [B]."""
        return two_numbers(keys, 2 * step)[0]

    def advance(self, keys: jax.Array, step: jax.Array, states: Any, actions: jax.Array) -> tuple[Any, TimeStep]:
        """One step of all processes."""
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 2 * step + 1)
        return jax.vmap(self.environment.step)(step_keys, states, actions)


def number_of_states(environment: Environment) -> int | None:
    """S, if observations are the states of a table."""
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
    """The regularizer of the observed states, rows of Q[B, A] or one Q[A]: what it has for each state is looked up.

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


def mixed(regularizer: Regularizer, policy: jax.Array, epsilon: jax.Array) -> jax.Array:
    """The policy [..., A], by chance epsilon replaced by the uniform one over the actions that are allowed."""
    allowed = jnp.ones_like(policy)
    if isinstance(regularizer, KLDivergence):
        allowed = jnp.broadcast_to(regularizer.reference > 0, policy.shape).astype(policy.dtype)
    epsilon = jnp.asarray(epsilon, policy.dtype)
    return (1 - epsilon) * policy + epsilon * allowed / jnp.sum(allowed, -1, keepdims=True)


def choose_all(numbers: jax.Array, probabilities: jax.Array) -> jax.Array:
    """The actions that numbers [B] pick from probabilities [B, A], int32."""
    return jax.vmap(choose)(numbers, probabilities)


def take(values: jax.Array, actions: jax.Array) -> jax.Array:
    """values[b, actions[b]], [B]."""
    return jnp.take_along_axis(values, actions[:, None], 1)[:, 0]


def require_sizes(**sizes: Any) -> None:
    """Raise InputError unless all are integers of at least 1."""
    for name, size in sizes.items():
        as_size(name, size)


def as_unit(name: str, value: Any, remedy: str) -> jax.Array:
    """A number in [0, 1]. Raises InputError."""
    number = as_float(name, value, float)
    require_probability(name, number, remedy)
    return number


def as_limit(name: str, value: Any) -> jax.Array | None:
    """A number of steps, or None. Raises InputError."""
    if value is None:
        return None
    steps = as_integer(name, value, "None is the problem's horizon", expected="a whole number of steps")
    require_at_least(name, steps, 1, "None is the problem's horizon")
    return steps
