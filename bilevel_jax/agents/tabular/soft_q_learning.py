"""Q-learning for a regularized process."""

from typing import Any

from jaxtyping import Array, Float

from bilevel_jax.agents.tabular.temporal_difference import TemporalDifference


class SoftQLearning(TemporalDifference):
    """Q(s, a) <- Q(s, a) + alpha (r_x(s, a) + discount (1 - terminated) Omega*(Q(s', :)) - Q(s, a)).

    Off-policy: it learns Q* of any regularizer however the processes explore. (Watkins and Dayan 1992,
    with the soft maximum of Haarnoja, Tang, Abbeel and Levine 2017.) Arguments and errors are those of
    `TemporalDifference`.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> x = problem.start(jax.random.key(0))
      >>> agent = bj.agents.SoftQLearning(processes=4, steps=50)
      >>> state = agent.init(jax.random.key(1), problem, x)
      >>> state = agent.improve(jax.random.key(2), state, problem, x)
      >>> bj.environments.policy_table(agent.policy(state, problem, x), 8).shape
      (8, 3)
    """

    def __init__(self, **options: Any):
        super().__init__(**options)

    def follows(self, regularizer, q, numbers) -> Float[Array, " B"]:
        del numbers
        return regularizer.conjugate(q)
