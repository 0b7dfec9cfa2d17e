"""Policy iteration that measures which way of evaluating a policy is faster on the problem at hand."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from bilevel_jax.core.arrays import Count, Flag, Scalar
from bilevel_jax.core.validation import require_instance, require_setting
from bilevel_jax.linear import BiCGStab, Preconditioner, linear_solve, residual_of
from bilevel_jax.linear.factorization import is_affordable, operations_in_products, solve_if, time_in_products
from bilevel_jax.solvers.evaluation import fold_where_it_pays, improve, policy_operator, span, sweep_policy
from bilevel_jax.solvers.loop import Stepper

# A Krylov product does more beside the product itself than a sweep of evaluation does.
KRYLOV_COST = 1.5
# How much a Krylov solve is expected to gain per product, in nats of the residual, before the first one was made.
PRIOR_RATE = 0.15
# The least that a solve counts as having gained: one bad policy must not rule Krylov solves out for good.
LEAST_RATE = PRIOR_RATE / 10
# While Krylov solves are not used, their assumed gain grows by this factor per step, so that they are tried again.
OPTIMISM = 1.1
# A Krylov solve makes at most this number times `sweeps` products.
BUDGET = 3
# The number of sweeps before the choice; their rate is measured over the last half of them.
TRIAL = 8
# Newton's steps need not narrow the bracket each time. After this many steps that did not, only sweeps follow.
PATIENCE = 40
# A factorization is considered once the products so far have taken SHARE of the time that it takes. It is made if, at
# the rate of these products, the rest of the solve would take as long as FACTORIZATIONS of them: a solve by Newton's
# method needs several.
SHARE = 1 / 4
FACTORIZATIONS = 4
# After the first factorization, the next one is considered sooner, by the factor SOONER. Each further one is considered
# later than the last, by the factor LATER: where factorizations do not pay either, products get most of the time.
SOONER, LATER = 1 / 8, 1.25
# The cost of a step apart from its products, in products: that of the sweep which improves the policy.
SWEEP = 2


class Record(NamedTuple):
    """What was measured: how much a Krylov solve gained per product, in nats of the residual, and how the bracket
    narrowed.

    `best` is the smallest half width of the bracket so far, and `stale` the number of steps since.
    """

    krylov_rate: Scalar
    best: Scalar
    stale: Count


class Spending(NamedTuple):
    """What the products gained since the last factorization or, if there was none, since the start.

    `reference` is the half width of the bracket at that time, infinite until a sweep has computed it. `spent` is the
    number of products since then, and `attempts` the number of factorizations.
    """

    reference: Scalar
    spent: Scalar
    attempts: Scalar

    def is_due(self, best: Scalar, needed: Scalar, price: float) -> Flag:
        """Return whether a factorization is the faster way from a half width `best` to `needed`.

        It takes as long as `price` products.
        """
        wait = jnp.where(self.attempts > 0, SOONER * jnp.exp(self.attempts * math.log(LATER)), 1) * (SHARE * price)
        gained, left = jnp.log(self.reference / best), jnp.log(best / needed)
        return (self.spent >= wait) & (left * self.spent > FACTORIZATIONS * price * gained)

    def after(self, due: Flag, best: Scalar, products: Count) -> "Spending":
        reference = jnp.where(jnp.isinf(self.reference), best, self.reference)
        spent = self.spent + (products + SWEEP).astype(best.dtype)
        return Spending(
            jnp.where(due, jnp.inf, reference), jnp.where(due, 0, spent), self.attempts + due.astype(best.dtype)
        )


class AdaptivePolicyIteration(Stepper):
    """Modified policy iteration that turns to a Krylov solver where its sweeps are slow.

    Each step improves the policy and evaluates it by some sweeps (`ModifiedPolicyIteration`). Two conditions make a
    Krylov solve complete the evaluation (`NewtonKrylov`): the sweeps narrow the span less per product than the last
    Krylov solve did, and `sweeps` of them would not reach `forcing`. Sweeps are faster on chains that mix fast, at any
    discount, and where a policy is still far from optimal. Krylov solvers are faster on slow chains at discounts near
    1.

    Args:
      tolerance: bound on |value - V*|_inf; None asks for working precision.
      max_iterations: the largest number of sweeps.
      sweeps, forcing: settings of the evaluation by sweeps, see `ModifiedPolicyIteration`.
      krylov_forcing: relative residual of a Krylov solve, which is BiCGStab.
      preconditioner: the preconditioner of BiCGStab.

    Raises:
      InputError: a setting out of range or of another type.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> solution = bj.solve(mdp, bj.ShannonEntropy(0.1), solver=bj.AdaptivePolicyIteration())
      >>> bj.check(solution).value.shape
      (2,)
    """

    tolerance: Any = None
    max_iterations: Any = 100_000
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
        infinity, zero = jnp.asarray(jnp.inf, value.dtype), jnp.zeros((), value.dtype)
        record = Record(jnp.asarray(PRIOR_RATE, value.dtype), infinity, jnp.asarray(0, jnp.int32))
        return record, Spending(infinity, zero, zero) if is_affordable(mdp.num_states) else None

    def step(self, mdp, swept, state):
        record, spending = state
        most = jnp.asarray(self.sweeps, jnp.int32)
        if spending is None:
            total, record, products = self._iterate(mdp, swept, record, most)
            return swept.value + total, (record, None), products
        operator = policy_operator(mdp, swept.of_q)
        best = jnp.minimum(record.best, swept.half_width)
        due = spending.is_due(best, swept.needed, time_in_products(operator))
        exact = solve_if(due, operator, swept.gap, jnp.zeros_like(swept.gap))
        total, record, products = self._iterate(mdp, swept, record, jnp.where(due, 0, most))
        spending = spending.after(due, best, products)
        products = jnp.where(due, operations_in_products(operator), products).astype(jnp.int32)
        return swept.value + jnp.where(due, exact, total), (record, spending), products

    def _iterate(self, mdp, swept, state, most):
        """Return what at most `most` sweeps or a Krylov solve add to V, the record, and the number of products."""
        operator = fold_where_it_pays(mdp, policy_operator(mdp, swept.of_q))
        gap = swept.gap
        dtype = gap.dtype
        enough = swept.needed / swept.half_width / 2
        stop = jnp.maximum(jnp.asarray(self.forcing, dtype), enough) * span(gap)

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
            krylov = BiCGStab(fraction, max_iterations=BUDGET * most, preconditioner=self.preconditioner)
            rest = operator.apply(term)
            total, stats = linear_solve(krylov, operator, mdp.modulus, rest, share=False)
            # In the span, as of sweeps: what a solve takes off a constant error, the bracket does for nothing.
            products = stats.products.astype(jnp.int32) + 2
            rate = jnp.log(span(rest) / span(residual_of(operator, total, rest))) / products.astype(dtype)
            return trial + total, products, jnp.where(rate > LEAST_RATE, rate, LEAST_RATE)

        stale = jnp.where(swept.half_width < state.best, 0, state.stale + 1)
        # A solve goes deeper than sweeps would, which is lost on a policy that will change: only where sweeps would not
        # get as far as they should.
        short = (most - made).astype(dtype) * sweep_rate < jnp.log(span(term) / stop)
        worth_it = short & (state.krylov_rate / KRYLOV_COST > sweep_rate) & (stale < PATIENCE)
        total, products, krylov_rate = lax.cond((second >= TRIAL - TRIAL // 2) & worth_it, solve, sweep, None)
        state = Record(krylov_rate, jnp.minimum(state.best, swept.half_width), stale)
        return total, state, made + products
