"""Newton-Krylov: soft policy iteration that evaluates each policy only as exactly as the step needs."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp

from bilevel_jax.core.validation import require_instance, require_setting
from bilevel_jax.linear import GMRES, BiCGStab, linear_solve
from bilevel_jax.solvers.evaluation import improve, policy_operator
from bilevel_jax.solvers.loop import Stepper

# After so many steps that did not narrow the bracket of V*, value iteration takes over until one does.
PATIENCE = 15


class NewtonKrylov(Stepper):
    """V <- V + x with (I - discount P_pi) x = T V - V solved to a residual of `forcing` times |T V - V|_2.

    An inexact Newton method (Dembo, Eisenstat and Steihaug 1982; for MDPs Gargiani et al. 2024, "Inexact
    policy iteration methods for large-scale Markov decision processes"). Its steps need not narrow the
    bracket of V* each time; after 15 that did not, sweeps of value iteration follow until one does.

    Args:
      tolerance: bound on |value - V*|_inf; None asks for working precision.
      max_iterations: sweeps at most, each but the first with one linear solve.
      krylov: GMRES or BiCGStab; its own tolerance is replaced by the forcing term. None is
        `BiCGStab(fall_back=True)`: up to 5,000 states an LU factorization where products gain too little.
      forcing: relative residual of a linear solve.

    Raises:
      InputError: tolerance below 0, max_iterations below 1, forcing below 0, or no GMRES or BiCGStab.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> solution = bj.solve(mdp, bj.ShannonEntropy(0.1), solver=bj.NewtonKrylov())
      >>> bj.check(solution).value.shape
      (2,)
    """

    tolerance: Any = None
    max_iterations: Any = 1000
    krylov: GMRES | BiCGStab | None = None
    forcing: Any = 0.03

    def __check_init__(self):
        require_instance("krylov", self.krylov, GMRES | BiCGStab | None)
        require_setting("forcing", self.forcing, 0, "0.01 to 0.1 is usual")

    def keep(self, mdp, regularizer, q):
        del mdp
        return improve(regularizer, q)

    def start(self, mdp, value):
        del mdp
        return jnp.asarray(jnp.inf, value.dtype), jnp.asarray(0, jnp.int32)

    def step(self, mdp, swept, state):
        best, stale = state
        stale = jnp.where(swept.half_width < best, 0, stale + 1)
        fraction = jnp.maximum(jnp.asarray(self.forcing, swept.value.dtype), swept.needed / swept.half_width / 2)
        # Inexact steps may go round in circles: sweeps of value iteration, which cannot, get them out.
        patient = stale < PATIENCE
        krylov = BiCGStab(fall_back=True) if self.krylov is None else self.krylov
        krylov = eqx.tree_at(lambda k: k.tolerance, krylov, fraction, is_leaf=lambda leaf: leaf is None)
        operator = policy_operator(mdp, swept.of_q)
        rhs = jnp.where(patient, swept.gap, 0)
        correction, stats = linear_solve(krylov, operator, mdp.modulus, rhs, share=False)
        value = jnp.where(patient, swept.value + correction, swept.backup)
        return value, (jnp.minimum(best, swept.half_width), stale), stats.products
