"""AMD: adaptive model design. The designer carries its prediction of the agent from iteration to iteration."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from bilevel_jax.algorithms.base import Estimate, Report
from bilevel_jax.algorithms.model.base import ModelAlgorithm
from bilevel_jax.algorithms.registry import register_algorithm
from bilevel_jax.algorithms.upper import UpperLevel, as_upper_level
from bilevel_jax.bilevel import Problem, lower_level, require_problem
from bilevel_jax.core.batching import over_batch
from bilevel_jax.core.validation import as_size
from bilevel_jax.mdp.bellman import backup
from bilevel_jax.solvers import ValueIteration, solution_at, solve


class Prediction(eqx.Module):
    """The predicted value of the agent, `value` V, and its derivative, `slopes` dV/dx, at the last x."""

    value: Float[Array, "*batch S"]
    slopes: Float[Array, "n *batch S"]


class AMD(ModelAlgorithm):
    """See `amd`. Its memory is a `Prediction`; nothing is predicted at the start: V = 0."""

    problem: Problem
    upper: UpperLevel = eqx.field(converter=as_upper_level)
    sweeps: int = eqx.field(static=True)

    def init_memory(self, key, x):
        del key
        mdp, _ = lower_level(self.problem, x)
        value = jnp.zeros_like(mdp.reward[..., 0])
        return Prediction(value, jnp.zeros((ravel_pytree(x)[0].size, *value.shape), value.dtype))

    def estimate(self, key, state):
        del key
        problem, before = self.problem, state.memory
        flat, unravel = ravel_pytree(state.x)
        directions = jnp.eye(flat.size, dtype=flat.dtype)

        def sweep(carry, _):
            _, value, slopes = carry
            swept, along = jax.linearize(
                lambda flat, value: over_batch(backup)(*lower_level(problem, unravel(flat)), value), flat, value
            )
            return (value, swept, jax.vmap(along)(directions, slopes)), None

        start = (before.value, before.value, before.slopes)
        (last, _, slopes), _ = lax.scan(sweep, start, length=self.sweeps)
        # The last sweep once more, for what a solver says of it.
        one = ValueIteration(max_iterations=1, centred=False)
        mdp, regularizer = lower_level(problem, state.x)
        solution = solve(mdp, regularizer, solver=one, initial_value=last)
        stats = eqx.tree_at(lambda s: s.iterations, solution.stats, solution.stats.iterations + self.sweeps - 1)

        def objective_of(x, value):
            return problem.objective(x, solution_at(*lower_level(problem, x), value, solution.result, stats))

        objective, (direct, of_value) = jax.value_and_grad(objective_of, (0, 1))(state.x, solution.value)
        answered = slopes.reshape(flat.size, -1) @ of_value.reshape(-1)
        return Estimate(
            objective=objective,
            gradient=jax.tree.map(jnp.add, direct, unravel(answered.astype(flat.dtype))),
            memory=Prediction(solution.value, slopes),
            # Each sweep is one of V and one of every entry of dV/dx.
            transitions=jnp.asarray(float(self.sweeps * (1 + flat.size) * mdp.reward.size)),
            reports={"lower level": Report(solution.result, stats)},
        )


def amd(problem: Problem, optimizer: optax.GradientTransformation | UpperLevel, *, sweeps: int = 100) -> AMD:
    """Adaptive model design (Chen, Yang, Li, Wang, Yang and Wang, ICML 2022) for any `Problem`.

    The model is known, and x may be in any part of it. An iteration sweeps the predicted V and its derivative
    together, from their values at the last x, and descends along the gradient of f that they predict:

      V <- T V,   dV <- dT(V) + discount P_pi dV   (T and its derivative in x at the current x, pi at the V swept),
      grad = df/dx + dV' df/dV.

    This is forward mode: one right-hand side per entry of x, and no transpose. An iteration costs sweeps (1 + n)
    products with the transitions. Where x has many entries, `m_sobirl`, its counterpart with one adjoint, is cheaper.

    The choices are those of the public implementation (Thoma et al. 2024, `train_amd.py`). It sweeps Q and dQ/dx, 100
    times per iteration. Its objective is itself a discounted sum of a reward under the policy, whose values and their
    derivative are two more tables that are swept. This implementation differs: it takes any f, which is exact at the
    current policy if it solves for values itself, and any smooth regularizer; it uses all contexts at once instead of
    drawing one per iteration; and V starts from 0 instead of being solved for.

    Args:
      problem: a `Problem`; its numbers are leaves and may be changed or vmapped.
      optimizer: an optax transformation, or an `UpperLevel`. Build it once: a new one is a new structure.
      sweeps: the number of sweeps per iteration (static).

    Returns:
      An `Algorithm`: `init(key, x)`, `step(key, state)`, both compiled.

    Raises:
      InputError: an argument of another type, sweeps below 1.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> algorithm = bj.algorithms.amd(problem, optax.adam(0.1), sweeps=20)
      >>> state = algorithm.init(jax.random.key(0), problem.start(jax.random.key(1)))
      >>> state, info = algorithm.step(jax.random.key(2), state)
      >>> state.x.shape, info.objective.shape
      ((8, 3), ())
    """
    require_problem(problem)
    return AMD(problem, optimizer, as_size("sweeps", sweeps, "100 is usual"))


register_algorithm("amd", amd)
