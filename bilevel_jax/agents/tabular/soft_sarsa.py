"""SARSA for an entropy-regularized process."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from bilevel_jax.agents.processes import choose_all, mixed, take
from bilevel_jax.agents.tabular.temporal_difference import TemporalDifference
from bilevel_jax.core.errors import InputError
from bilevel_jax.mdp.regularizers import KLDivergence, ShannonEntropy


class SoftSARSA(TemporalDifference):
    """SARSA, whose target is the value of the action a' that the process takes next, under its own policy b.

      v(s') = Q(s', a') - temperature log b(a' | s')   (Shannon; for KL, log b / reference)

    b is the softmax policy mixed with `epsilon` uniform. The agent learns the values of b, so that its policy differs
    from pi* by O(epsilon). With epsilon 0, Q - temperature log b = Omega*(Q) for every action, and each target is that
    of `SoftQLearning`.

    Args:
      expected: take the mean over a', sum_a b Q - Omega(b), for less noise and for any regularizer (static).

    The other arguments, and the errors, are those of `TemporalDifference`. InputError is also raised for a regularizer
    that is no entropy, with expected=False.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> x = problem.start(jax.random.key(0))
      >>> agent = bj.agents.SoftSARSA(processes=4, steps=50)
      >>> state = agent.init(jax.random.key(1), problem, x)
      >>> state = agent.improve(jax.random.key(2), state, problem, x)
      >>> bj.environments.policy_table(agent.policy(state, problem, x), 8).shape
      (8, 3)
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

    def follows(self, regularizer, q, numbers) -> Float[Array, " B"]:
        behaviour = mixed(regularizer, regularizer.policy(q), self.epsilon)
        if self.expected:
            return jnp.sum(behaviour * q, -1) - regularizer.penalty(behaviour)
        action = choose_all(numbers, behaviour)
        ratio = take(behaviour, action)
        if isinstance(regularizer, KLDivergence):
            reference = jnp.broadcast_to(regularizer.reference, q.shape).astype(q.dtype)
            ratio = ratio / take(reference, action)
        return take(q, action) - jnp.asarray(regularizer.temperature, q.dtype) * jnp.log(ratio)
