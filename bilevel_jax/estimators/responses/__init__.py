"""The policy's response to x: estimators of dQ* - dV* at visited pairs.

For an entropy, grad log pi*(a | s) = (dQ*[s, a] - dV*[s]) / temperature, and dQ* and dV* are discounted sums of dr
under pi* (Yang, Gao and Yuan 2025). Each estimator takes credits c, one per visited pair, and returns a scalar whose
gradient in x is an estimate of sum c (dQ* - dV*). One backward pass is then enough for all pairs, and no estimator
holds a vector as wide as x for each state, except `LearnedCritic`, whose purpose that is.

On a table, let W[s, a] be the credits summed over the visits of a pair, and w = W - pi sum_a W. Then
sum c (dQ* - dV*) = <w, dQ*>, because dV* = sum_a pi dQ*.
"""

from bilevel_jax.estimators.responses.eligibility_trace import EligibilityTrace
from bilevel_jax.estimators.responses.exact import Exact
from bilevel_jax.estimators.responses.learned_critic import LearnedCritic
from bilevel_jax.estimators.responses.learned_model import LearnedModel
from bilevel_jax.estimators.responses.nested_rollouts import NestedRollouts
from bilevel_jax.estimators.responses.one_step import OneStep
from bilevel_jax.estimators.responses.protocol import Response
from bilevel_jax.estimators.responses.shared_rollouts import SharedRollouts
from bilevel_jax.estimators.responses.successor_features import SuccessorFeatures, last_layer

__all__ = [
    "EligibilityTrace",
    "Exact",
    "LearnedCritic",
    "LearnedModel",
    "NestedRollouts",
    "OneStep",
    "Response",
    "SharedRollouts",
    "SuccessorFeatures",
    "last_layer",
]
