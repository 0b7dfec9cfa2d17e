"""Modified policy iteration: a sweep to improve, some products to evaluate."""

from typing import Any

import jax.numpy as jnp

from bilevel_jax.core.validation import require_setting
from bilevel_jax.solvers.evaluation import fold_where_it_pays, improve, policy_operator, span, sweep_policy
from bilevel_jax.solvers.loop import Stepper


class ModifiedPolicyIteration(Stepper):
    """V <- T_pi^k V, where pi is the policy at V: value iteration that improves its policy in only one of k sweeps.

    Puterman and Shin 1978, "Modified policy iteration algorithms for discounted Markov decision problems"; for
    regularized MDPs Geist, Scherrer and Pietquin 2019. k is chosen in each step: the policy is evaluated until the span
    of T_pi V - V is `forcing` times its span at the beginning of the step.

    Args:
      tolerance: bound on |value - V*|_inf; None asks for working precision.
      max_iterations: the largest number of sweeps.
      sweeps: the largest number of products between two improvements; 0 is value iteration.
      forcing: the factor by which the evaluation narrows the span before the policy is improved again.

    Raises:
      InputError: tolerance, sweeps or forcing below 0, or max_iterations below 1.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> solution = bj.solve(mdp, bj.ShannonEntropy(0.1), solver=bj.ModifiedPolicyIteration())
      >>> bj.check(solution).value.shape
      (2,)
    """

    tolerance: Any = None
    max_iterations: Any = 100_000
    sweeps: Any = 50
    forcing: Any = 0.1

    def __check_init__(self):
        require_setting("sweeps", self.sweeps, 0, "20 to 50 is usual", whole=True)
        require_setting("forcing", self.forcing, 0, "0.1 to 0.5 is usual")

    def keep(self, mdp, regularizer, q):
        del mdp
        return improve(regularizer, q)

    def step(self, mdp, swept, state):
        operator = fold_where_it_pays(mdp, policy_operator(mdp, swept.of_q))
        gap = swept.gap
        fraction = jnp.maximum(jnp.asarray(self.forcing, gap.dtype), swept.needed / swept.half_width / 2)
        most = jnp.asarray(self.sweeps, jnp.int32)
        total, _, products = sweep_policy(operator, gap, gap, fraction * span(gap), most)
        return swept.value + total, state, products
