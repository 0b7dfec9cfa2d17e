"""AMD: adaptive model design, the designer's prediction of the agent carried from iteration to iteration."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.flatten_util import ravel_pytree

from bilevel_jax.algorithms.protocol import ModelInfo, jit_step
from bilevel_jax.algorithms.upper import UpperLevel, as_upper_level, at_iteration
from bilevel_jax.bellman import backup
from bilevel_jax.captures import jit
from bilevel_jax.hypergradient import Problem, lower_level, require_problem
from bilevel_jax.mdp import over_batch
from bilevel_jax.solvers import ValueIteration, read_out, solve
from bilevel_jax.validation import as_size


class AMDState(eqx.Module):
    """What one iteration hands to the next.

    `x`: upper variable, n numbers in all. `value` V[S] and `slopes` dV/dx [n, S], the predicted value of
    the agent and how it answers, at the last x. `iteration`: how many were made.
    """

    x: Any
    value: jax.Array
    slopes: jax.Array
    optimizer_state: Any
    iteration: jax.Array


class AMD(eqx.Module):
    """See `amd`."""

    problem: Problem
    upper: UpperLevel = eqx.field(converter=as_upper_level)
    sweeps: int = eqx.field(static=True)

    def init(self, key: jax.Array, x: Any) -> AMDState:
        """The state at x (projected), nothing predicted yet: V = 0. The key is not used.

        Raises:
          InputError: x is not floating point; outside jit, if the MDP or the regularizer at x is not valid.
        """
        del key
        x, *_ = self.upper.start(self.problem, x)
        return _init(self, x)

    def step(self, key: jax.Array, state: AMDState) -> tuple[AMDState, ModelInfo]:
        """One upper iteration: sweeps of V and dV/dx at x, the gradient that they give, and x."""
        del key
        return _step(self, state)


def amd(problem: Problem, optimizer: optax.GradientTransformation | UpperLevel, *, sweeps: int = 100) -> AMD:
    """Adaptive model design (Chen, Yang, Li, Wang, Yang and Wang, ICML 2022) for any `Problem`.

    The model is known, x may be in all of it. An iteration sweeps the predicted V and its derivative
    together, from where they stood at the last x, and descends along what they say of f:

      V <- T V,   dV <- dT(V) + discount P_pi dV   (T and its derivative in x at the current x, pi at the V swept),
      grad = df/dx + dV' df/dV.

    Forward mode: one right-hand side for each entry of x, and no transpose. An iteration costs sweeps
    (1 + n) products with the transitions; where x has many entries `m_sobirl`, its counterpart with one
    adjoint, is cheaper.

    The choices are those of the public implementation (Thoma et al. 2024, `train_amd.py`), which sweeps Q
    and dQ/dx, 100 times an iteration, for an objective that is itself the discounted sum of a reward under
    the policy, its values and their derivative being two more tables swept along. Different: any f, which
    is exact at the current policy if it solves for values itself; any smooth regularizer; all contexts at
    once instead of one drawn each iteration; V starts from 0 instead of solved.

    Args:
      problem: a `Problem`; its numbers are leaves and may be changed or vmapped.
      optimizer: an optax transformation, or an `UpperLevel`. Build it once: a new one is a new structure.
      sweeps: an iteration (static).

    Returns:
      An `Algorithm`: `init(key, x)`, `step(key, state)`, both compiled.

    Raises:
      InputError: an argument of another type, sweeps below 1.
    """
    require_problem(problem)
    return AMD(problem, optimizer, as_size("sweeps", sweeps, "100 is usual"))


@jit
def _init(algorithm, x):
    start = jnp.asarray(0, jnp.int32)
    mdp, _ = lower_level(algorithm.problem, x)
    x = jax.tree.map(lambda leaf: leaf.astype(leaf.dtype), x)  # as `step` returns it
    value = jnp.zeros_like(mdp.reward[..., 0])
    slopes = jnp.zeros((ravel_pytree(x)[0].size, *value.shape), value.dtype)
    return AMDState(x, value, slopes, algorithm.upper.init(x), start)


@jit_step
def _step(algorithm, state):
    problem = at_iteration(algorithm, state.iteration).problem
    flat, unravel = ravel_pytree(state.x)
    directions = jnp.eye(flat.size, dtype=flat.dtype)

    def sweep(carry, _):
        _, value, slopes = carry
        swept, along = jax.linearize(
            lambda flat, value: over_batch(backup)(*lower_level(problem, unravel(flat)), value), flat, value
        )
        return (value, swept, jax.vmap(along)(directions, slopes)), None

    (before, _, slopes), _ = lax.scan(sweep, (state.value, state.value, state.slopes), length=algorithm.sweeps)
    # The last sweep once more, for what a solver says of it.
    one = ValueIteration(max_steps=1, centred=False)
    solution = solve(*lower_level(problem, state.x), solver=one, initial_value=before)
    stats = eqx.tree_at(lambda s: s.steps, solution.stats, solution.stats.steps + algorithm.sweeps - 1)

    def paid(x, value):
        return problem.objective(x, read_out(*lower_level(problem, x), value, solution.result, stats))

    objective, (direct, of_value) = jax.value_and_grad(paid, (0, 1))(state.x, solution.value)
    answered = slopes.reshape(flat.size, -1) @ of_value.reshape(-1)
    gradient = jax.tree.map(jnp.add, direct, unravel(answered.astype(flat.dtype)))
    x, optimizer_state, stationarity = algorithm.upper.update(gradient, state.optimizer_state, state.x, objective)
    info = ModelInfo(
        objective, gradient, optax.tree.norm(gradient), stationarity, solution.result, stats, adjoint_stats=None
    )
    return AMDState(x, solution.value, slopes, optimizer_state, state.iteration + 1), info
