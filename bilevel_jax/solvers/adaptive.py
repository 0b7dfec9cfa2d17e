"""Policy iteration that measures which way of evaluating a policy pays on the problem at hand."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from bilevel_jax.adjoint import GMRES, LinearSolver, linear_solve
from bilevel_jax.solvers.evaluation import fold_where_it_pays, improve, policy_operator, span, sweep_policy
from bilevel_jax.solvers.loop import Solver
from bilevel_jax.validation import require_instance, require_setting

# A Krylov product does more beside the product itself than a sweep of evaluation does.
KRYLOV_COST = 1.5
# What a Krylov solve is expected to gain a product, in nats of the bracket's width, before it was tried: where
# sweeps gain more it is never tried.
PRIOR_RATE = 0.1
# What was not used looks better by this factor each step, so that it is tried again.
OPTIMISM = 1.1


class Progress(NamedTuple):
    """What the last step was and what each way gained, in nats of the bracket's width a product."""

    half_width: jax.Array
    retreat: jax.Array
    by_krylov: jax.Array
    cost: jax.Array
    sweep_rate: jax.Array
    krylov_rate: jax.Array


class AdaptivePolicyIteration(Solver):
    """Modified policy iteration that turns to a Krylov solver where its sweeps are slow.

    Each step improves the policy and evaluates it either by sweeps (`ModifiedPolicyIteration`) or by a
    Krylov solve (`NewtonKrylov`), whichever narrowed the bracket of V* more for its cost so far. Sweeps win on
    chains that mix fast, at any discount; Krylov solvers on slow ones, at discounts near 1. A Krylov step
    that leaves the bracket wider is taken back.

    Args:
      tolerance: bound on |value - V*|_inf; None asks for working precision.
      max_steps: sweeps at most.
      sweeps, forcing: of the evaluation by sweeps, see `ModifiedPolicyIteration`.
      krylov: GMRES or BiCGStab; its tolerance is replaced by `krylov_forcing`.

    Raises:
      InputError: a setting out of range or of another type.
    """

    tolerance: Any = None
    max_steps: Any = 100_000
    sweeps: Any = 50
    forcing: Any = 0.3
    krylov: LinearSolver | None = None
    krylov_forcing: Any = 0.03

    def __check_init__(self):
        require_setting("sweeps", self.sweeps, 0, "20 to 50 is usual", whole=True)
        require_setting("forcing", self.forcing, 0, "0.1 to 0.5 is usual")
        require_setting("krylov_forcing", self.krylov_forcing, 0, "0.01 to 0.1 is usual")
        require_instance("krylov", self.krylov, LinearSolver | None)

    def keep(self, mdp, regularizer, q):
        del mdp
        return improve(regularizer, q)

    def start(self, mdp, value):
        del mdp
        number = jnp.zeros((), value.dtype)
        return Progress(number + jnp.inf, value, jnp.asarray(False), number, number + jnp.inf, number + PRIOR_RATE)

    def step(self, mdp, swept, state):
        gained = jnp.log(state.half_width / swept.half_width)
        failed = state.by_krylov & ~(gained > 0)
        measured = state.cost > 0
        rate = jnp.maximum(gained, 0) / jnp.where(measured, state.cost, 1)
        sweep_rate = jnp.where(state.by_krylov, state.sweep_rate * OPTIMISM, rate)
        krylov_rate = jnp.where(state.by_krylov, rate, state.krylov_rate * OPTIMISM)
        sweep_rate = jnp.where(measured, sweep_rate, state.sweep_rate)
        krylov_rate = jnp.where(measured, jnp.minimum(krylov_rate, PRIOR_RATE), state.krylov_rate)
        by_krylov = krylov_rate > sweep_rate

        operator = fold_where_it_pays(mdp, policy_operator(mdp, swept.kept))
        gap = swept.gap
        enough = swept.needed / swept.half_width / 2

        def sweep(_):
            fraction = jnp.maximum(jnp.asarray(self.forcing, gap.dtype), enough)
            most = jnp.asarray(self.sweeps, jnp.int32)
            total, _, products = sweep_policy(operator, gap, fraction * span(gap), most)
            return swept.value + total, products

        def solve(_):
            fraction = jnp.maximum(jnp.asarray(self.krylov_forcing, gap.dtype), enough)
            krylov: Any = GMRES() if self.krylov is None else self.krylov
            krylov = eqx.tree_at(lambda k: k.tolerance, krylov, fraction, is_leaf=lambda leaf: leaf is None)
            total, stats = linear_solve(krylov, operator, mdp.modulus, gap, share=False)
            return swept.value + total, stats.steps.astype(jnp.int32)

        def retreat(_):
            return state.retreat, jnp.asarray(0, jnp.int32)

        which = jnp.where(failed, 2, by_krylov.astype(jnp.int32))
        value, products = lax.switch(which, (sweep, solve, retreat), None)
        cost = mdp.num_actions + products * jnp.where(by_krylov, KRYLOV_COST, 1)
        new = Progress(
            jnp.where(failed, state.half_width, swept.half_width),
            jnp.where(failed, state.retreat, swept.backup),
            by_krylov & ~failed,
            jnp.where(failed, 0, cost).astype(gap.dtype),
            sweep_rate,
            jnp.where(failed, krylov_rate / 4, krylov_rate),
        )
        return value, new, products
