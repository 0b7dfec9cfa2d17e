"""sum c (dQ* - dV*) by an eligibility trace along the trajectories themselves: the adjoint, sampled.

Let pi be fixed, U the upper level's action value, and c_t = weight_t (U - E_pi U)(s_t, a_t) the credit of step t.
Wanted is sum_t E[c_t (dQ - dV)(s_t, a_t)], where

  dQ(s, a) = dr(s, a) + discount E[dV(s') | s, a],    dV(s) = E_pi dQ(s, .),
  dQ - dV = dr - E_pi dr + discount (E[dV(s') | s, a] - E_pi E[dV(s') | s, .]).

1. c_t is a function of (s_t, a_t), and E_pi[c_t | s_t] = 0. What depends on s_t alone thus falls out:
   E[c_t (dQ - dV)] = E[c_t (dr_t - E_pi dr(s_t, .))] + discount E[c_t E[dV(s_t+1) | s_t, a_t]].
2. Given (s_t, a_t), c_t is a constant. The state that the trajectory went to thus stands for the expectation:
   E[c_t E[dV(s_t+1) | s_t, a_t]] = E[c_t dV(s_t+1)] = E[c_t sum_k>0 discount^(k-1) E_pi dr(s_t+k, .)].
3. Swap the sums over t and k. With e_t = discount e_(t-1) + c_t, cut where a process ends,
   sum_t E[c_t (dQ - dV)] = E[ sum_t c_t (dr_t - E_pi dr(s_t, .)) + discount e_(t-1) E_pi dr(s_t, .) ].

The gradient of a scalar: c and e are constants, and one backward pass is enough. With discount decay in place of
discount, sums over k are cut off smoothly. decay = 0 leaves the first term, which is `OneStep`; decay = 1 is exact.

Step 2 fails for a Monte-Carlo return or a temporal-difference error: they contain what s_t+1 brought, so that
E[c_t dV(s_t+1)] has the covariance of both over s_t+1 in addition, which is not small, and which does not vanish with
more samples. In deterministic simulators there is none for the temporal-difference error. Step 1 fails for a credit
that is not centred: V(s_t) would be credited to all states that follow.

A reward of the step, r(s, a, s'): step 2 holds for c_t dr_t as well, and E_pi dr(s_t, .) may be replaced by the reward
of the step that was made, whose mean given s_t it is. What remains is E[ sum_t e_t dr_t ].

As E[e_t] = 0, anything that is independent of e_t may be subtracted from the rewards. `centred` subtracts the mean of
the other trajectories at the same step. Where a process has ended, its reward is 0 and its trace goes on for this
purpose: E[e_t] = 0 holds for traces that are not cut.
"""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float

from bilevel_jax.core.batching import merge_axes
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.functions import ActionFunction
from bilevel_jax.core.validation import as_float, require_probability
from bilevel_jax.environments import as_policy
from bilevel_jax.environments.policies import finite
from bilevel_jax.environments.spaces import Action
from bilevel_jax.estimators.responses.protocol import Response


class EligibilityTrace(Response):
    """dQ* - dV* by the rewards that follow a step on its own trajectory, weighted by a trace of the credits before.

    It takes no further step of the simulator, holds nothing as wide as x for each step, and works for all observations
    and for rewards of the next state. The credit has to be a function of the state and the action: take
    `CriticAdvantage` as the baseline. The module's docstring has the derivation.

    With decay 1 it is unbiased if the credit is exact, apart from what lies beyond the horizon: an answer to the last
    credits is not seen. Let trajectories be longer than 1 / (1 - discount) by some factor. A smaller decay has more
    bias and less variance.

    Args:
      decay: in [0, 1]; a leaf. 0 is `OneStep`.
      centred: subtract the mean of the other trajectories from the rewards (static). It changes no mean, unless
        trajectories are used in several groups.

    Raises:
      InputError: decay is out of range (where it is known); in an estimate, a baseline whose credit is no function of
        the state and the action.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> x = problem.start(jax.random.key(0))
      >>> policy = bj.solve(problem.mdp(x), problem.regularizer(x)).policy
      >>> response, baseline = bj.estimators.EligibilityTrace(0.9), bj.estimators.ExactAdvantage(problem.cost)
      >>> made = bj.estimators.estimate(
      ...     jax.random.key(1), problem, x, policy, batch=4, response=response, baseline=baseline
      ... )
      >>> made.gradient.shape
      (8, 3)
    """

    decay: Float[Array, ""]
    centred: bool = eqx.field(static=True)

    credit_of_pairs: ClassVar[bool] = True

    def __init__(self, decay: Any = 0.9, *, centred: bool = True):
        self.decay = as_float("decay", decay, float)
        require_probability("decay", self.decay, "0 is OneStep, 1 has no bias of its own")
        self.centred = centred

    def surrogate(self, key, state, problem, x, policy, trajectories, credit) -> Float[Array, ""]:
        del key, state
        reward, valid = problem.reward(x), trajectories.valid
        factor = self.decay.astype(credit.dtype) * jnp.asarray(problem.discount, credit.dtype)
        goes_on = ~(trajectories.terminated | trajectories.truncated)
        before = traces_before(credit, factor, goes_on)
        uncut = traces_before(credit, factor, jnp.ones_like(goes_on)) if self.centred else jnp.zeros_like(credit)
        now = jnp.zeros_like(credit)
        if knows_all_actions(reward, trajectories.observation):
            expected, advantage = _pair_rewards(reward, as_policy(policy), trajectories)
            first = jnp.sum(credit.astype(advantage.dtype) * advantage)
        else:
            each = jax.vmap(jax.vmap(reward.of_step))
            expected = each(trajectories.observation, trajectories.action, trajectories.next_observation)
            first, now = jnp.zeros((), expected.dtype), credit
        others = _mean_of_others(uncut + now) if self.centred else jnp.zeros_like(credit)
        weights = stop_gradient(jnp.where(valid, before + now - others, 0))
        return first + jnp.sum(weights.astype(expected.dtype) * expected)


def traces_before(
    credit: Float[Array, "B H"], factor: Float[Array, ""], goes_on: Bool[Array, "B H"]
) -> Float[Array, "B H"]:
    """factor e_(t-1), [B, H], for e_t = factor e_(t-1) + credit_t; 0 after a step that does not go on."""

    def step(before: Float[Array, " B"], now: Any) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
        own, on = now
        return jnp.where(on, factor * (before + own), 0), before

    return jax.lax.scan(step, jnp.zeros_like(credit[:, 0]), (credit.T, goes_on.T))[1].T


def knows_all_actions(reward: ActionFunction, observations: Any) -> bool:
    """Whether a reward has numbers for all actions of an observation; `observations` has two axes in front."""
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[2:], leaf.dtype), observations)
    try:
        jax.eval_shape(reward.all, one)
    except InputError:
        return False
    return True


def _pair_rewards(
    reward: ActionFunction, policy: Any, trajectories: Any
) -> tuple[Float[Array, "B H"], Float[Array, "B H"]]:
    """E_pi r(s, .), and r(s, a) minus it."""

    def each(observation: Any, action: Action) -> tuple[Float[Array, ""], Float[Array, ""]]:
        rewards = reward.all(observation)
        chances = stop_gradient(finite(policy.distribution(observation)).probabilities)
        expected = jnp.sum(chances.astype(rewards.dtype) * rewards)
        return expected, rewards[action] - expected

    flat = merge_axes((trajectories.observation, trajectories.action))
    expected, advantage = jax.vmap(each)(*flat)
    shape = trajectories.action.shape[:2]
    return expected.reshape(shape), advantage.reshape(shape)


def _mean_of_others(weights: Float[Array, "B H"]) -> Float[Array, "B H"]:
    """Of the other trajectories, at the same step; 0 where there is none."""
    return (jnp.sum(weights, 0, keepdims=True) - weights) / max(1, weights.shape[0] - 1)
