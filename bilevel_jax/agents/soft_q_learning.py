"""Q-learning for a regularized process."""

from typing import Any

from bilevel_jax.agents.temporal_difference import TemporalDifference


class SoftQLearning(TemporalDifference):
    """Q(s, a) <- Q(s, a) + alpha (r_x(s, a) + discount (1 - terminated) Omega*(Q(s', :)) - Q(s, a)).

    Off-policy: it learns Q* of any regularizer however the processes explore. (Watkins and Dayan 1992,
    with the soft maximum of Haarnoja, Tang, Abbeel and Levine 2017.) Arguments and errors are those of
    `TemporalDifference`.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)

    def follows(self, regularizer, q, numbers):
        del numbers
        return regularizer.conjugate(q)
