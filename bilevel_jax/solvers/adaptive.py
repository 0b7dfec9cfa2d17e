"""Policy iteration that measures which way of evaluating a policy pays on the problem at hand."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bilevel_jax.adjoint import BiCGStab, Preconditioner, linear_solve, residual_of
from bilevel_jax.solvers.evaluation import fold_where_it_pays, improve, policy_operator, span, sweep_policy
from bilevel_jax.solvers.loop import Stepper
from bilevel_jax.validation import require_instance, require_setting

# A Krylov product does more beside the product itself than a sweep of evaluation does.
KRYLOV_COST = 1.5
# What a Krylov solve is expected to gain a product, in nats of the residual, before it was tried.
PRIOR_RATE = 0.15
# A solve that gained less counts as this: one bad policy must not rule Krylov solves out for good.
LEAST_RATE = PRIOR_RATE / 10
# A Krylov solver that was not used looks better by this factor each step, so that it is tried again.
OPTIMISM = 1.1
# A Krylov solve makes at most so many times `sweeps` products.
BUDGET = 3
# Sweeps before the choice; the rate is that of the last half of them.
TRIAL = 8
# Newton's steps need not narrow the bracket each time; after so many that did not, only sweeps follow.
PATIENCE = 40


class Record(NamedTuple):
    """What Krylov solves gained a product, in nats of the residual, and whether the bracket still narrows.

    `best` half width so far and `stale` steps since.
    """

    krylov_rate: jax.Array
    best: jax.Array
    stale: jax.Array


class AdaptivePolicyIteration(Stepper):
    """Modified policy iteration that turns to a Krylov solver where its sweeps are slow.

    Each step improves the policy and evaluates it by some sweeps (`ModifiedPolicyIteration`). Where these
    narrow the span more slowly, product by product, than the last Krylov solve did, and `sweeps` of them
    would not reach `forcing`, a Krylov solve ends the evaluation (`NewtonKrylov`). Sweeps win on chains
    that mix fast, at any discount, and where a policy is still far from optimal; Krylov solvers on slow
    chains at discounts near 1.

    Args:
      tolerance: bound on |value - V*|_inf; None asks for working precision.
      max_steps: sweeps at most.
      sweeps, forcing: of the evaluation by sweeps, see `ModifiedPolicyIteration`.
      krylov_forcing: relative residual of a Krylov solve, by BiCGStab.
      preconditioner: of BiCGStab.

    Raises:
      InputError: a setting out of range or of another type.
    """

    tolerance: Any = None
    max_steps: Any = 100_000
    sweeps: Any = 50
    forcing: Any = 0.2
    krylov_forcing: Any = 0.03
    preconditioner: Preconditioner | None = None

    def __check_init__(self):
        require_setting("sweeps", self.sweeps, 0, "20 to 50 is usual", whole=True)
        require_setting("forcing", self.forcing, 0, "0.1 to 0.5 is usual")
        require_setting("krylov_forcing", self.krylov_forcing, 0, "0.01 to 0.1 is usual")
        require_instance("preconditioner", self.preconditioner, Preconditioner | None)

    def keep(self, mdp, regularizer, q):
        del mdp
        return improve(regularizer, q)

    def start(self, mdp, value):
        del mdp
        return Record(
            jnp.asarray(PRIOR_RATE, value.dtype), jnp.asarray(jnp.inf, value.dtype), jnp.asarray(0, jnp.int32)
        )

    def step(self, mdp, swept, state):
        operator = fold_where_it_pays(mdp, policy_operator(mdp, swept.kept))
        gap = swept.gap
        dtype = gap.dtype
        enough = swept.needed / swept.half_width / 2
        stop = jnp.maximum(jnp.asarray(self.forcing, dtype), enough) * span(gap)
        most = jnp.asarray(self.sweeps, jnp.int32)

        half, term, first = sweep_policy(operator, gap, gap, stop, jnp.minimum(most, TRIAL // 2))
        middle = span(term)
        trial, term, second = sweep_policy(operator, half, term, stop, jnp.minimum(most - first, TRIAL - TRIAL // 2))
        sweep_rate = jnp.log(middle / span(term)) / jnp.maximum(second, 1).astype(dtype)
        made = first + second

        def sweep(_):
            total, _, products = sweep_policy(operator, trial, term, stop, most - made)
            return total, products, jnp.minimum(OPTIMISM * state.krylov_rate, PRIOR_RATE)

        def solve(_):
            fraction = jnp.maximum(jnp.asarray(self.krylov_forcing, dtype), enough)
            # What is lost by trying is bounded: policies that change do not deserve more.
            krylov = BiCGStab(fraction, max_steps=BUDGET * most, preconditioner=self.preconditioner)
            rest = operator.apply(term)
            total, stats = linear_solve(krylov, operator, mdp.modulus, rest, share=False)
            # In the span, as of sweeps: what a solve takes off a constant error, the bracket does for nothing.
            products = stats.steps.astype(jnp.int32) + 2
            rate = jnp.log(span(rest) / span(residual_of(operator, total, rest))) / products.astype(dtype)
            return trial + total, products, jnp.where(rate > LEAST_RATE, rate, LEAST_RATE)

        stale = jnp.where(swept.half_width < state.best, 0, state.stale + 1)
        # A solve goes deeper than sweeps would, which is lost on a policy that will change: only where sweeps would not
        # get as far as they should.
        short = (most - made).astype(dtype) * sweep_rate < jnp.log(span(term) / stop)
        worth_it = short & (state.krylov_rate / KRYLOV_COST > sweep_rate) & (stale < PATIENCE)
        total, products, krylov_rate = lax.cond((second >= TRIAL - TRIAL // 2) & worth_it, solve, sweep, None)
        state = Record(krylov_rate, jnp.minimum(state.best, swept.half_width), stale)
        return swept.value + total, state, made + products
