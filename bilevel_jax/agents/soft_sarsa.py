"""SARSA for an entropy-regularized process."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp

from bilevel_jax.agents.processes import choose_all, mixed, take
from bilevel_jax.agents.temporal_difference import TemporalDifference
from bilevel_jax.errors import InputError
from bilevel_jax.regularizers import KLDivergence, ShannonEntropy


class SoftSARSA(TemporalDifference):
    """The target is that of the action a' which the process takes next, under the policy b that it acts by.

      v(s') = Q(s', a') - temperature log b(a' | s')   (Shannon; for KL, log b / reference)

    b is the softmax policy mixed with `epsilon` uniform, and what is learned are b's values: the policy
    is off pi* by O(epsilon). With epsilon 0, Q - temperature log b = Omega*(Q) for every action, and each
    target is that of `SoftQLearning`.

    Args:
      expected: take the mean over a', sum_a b Q - Omega(b), for less noise and for any regularizer (static).

    The others, and errors, are those of `TemporalDifference`. Also InputError: a regularizer that is no
    entropy, with expected=False.
    """

    expected: bool = eqx.field(static=True)

    def __init__(self, *, expected: bool = False, epsilon: Any = 0.02, **options: Any):
        super().__init__(epsilon=epsilon, **options)
        self.expected = expected

    def require(self, regularizer):
        if not self.expected and not isinstance(regularizer, ShannonEntropy | KLDivergence):
            raise InputError(
                f"regularizer: SoftSARSA() needs the log-policy of ShannonEntropy or KLDivergence, got "
                f"{type(regularizer).__name__}; use SoftSARSA(expected=True) or SoftQLearning()"
            )

    def follows(self, regularizer, q, numbers):
        behaviour = mixed(regularizer, regularizer.policy(q), self.epsilon)
        if self.expected:
            return jnp.sum(behaviour * q, -1) - regularizer.penalty(behaviour)
        action = choose_all(numbers, behaviour)
        ratio = take(behaviour, action)
        if isinstance(regularizer, KLDivergence):
            reference = jnp.broadcast_to(regularizer.reference, q.shape).astype(q.dtype)
            ratio = ratio / take(reference, action)
        return take(q, action) - jnp.asarray(regularizer.temperature, q.dtype) * jnp.log(ratio)
