"""The upper level's advantage from a network that learns it from earlier batches."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from bilevel_jax.bilevel.sampled_problem import SampledProblem
from bilevel_jax.core.batching import merge_axes
from bilevel_jax.core.validation import as_float, require_fraction, require_probability
from bilevel_jax.environments import as_policy
from bilevel_jax.environments.policies import finite
from bilevel_jax.estimators.baselines.protocol import Baseline, require_one_trajectory
from bilevel_jax.estimators.critics import Critic, CriticState
from bilevel_jax.networks import MLP, Network


class CriticAdvantage(Baseline):
    """U(s, a) - E_pi U(s, .) of a network U instead of the costs of the trajectory: a function of the state and the
    action, as `EligibilityTrace` needs it.

    U is the sum of the costs from a step on. After each batch it is moved towards the returns along the trajectories
    (SARSA(lambda), forward view), with c the cost of a step, by steps of Adam:

      G_t = c_t + discount ((1 - trace) U(s_t+1, a_t+1) + trace G_t+1)

    A batch is learned from only after it was used, so that the credit is independent of its states: a network that has
    seen them fits their noise, and is then no function of the state and the action. The first credit
    is thus 0 where the network begins with zeros, as the default does.

    It is for losses that are sums of costs of single trajectories, where a cost depends on the past only through the
    state and the action. Losses of pairs and of whole trajectories have no such U: use `NestedRollouts`.

    Args:
      network: of U, one output per action; None is `MLP(output_scale=0)`. A table is `OneHot(states)`.
      trace: in [0, 1]: 1 takes the costs that were paid, 0 one of them and U of the next pair; a leaf.
      learning_rate: of Adam, in units of the first batch's returns; a leaf.
      steps: steps of Adam for each batch (static).
      minibatches: the parts of a batch that the steps take in turn (static).
      bootstrap: whether costs go on behind the last step of a trajectory that has not ended (static). False is for
        losses that end with the horizon, such as those that are not discounted.
      seed: of the parameters; a leaf.

    Raises:
      InputError: sizes below 1, a trace outside [0, 1]; the loss depends on more than one trajectory, or is not
        discounted, with bootstrap=True.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> baseline = bj.estimators.CriticAdvantage(bj.networks.OneHot(8))
      >>> response = bj.estimators.EligibilityTrace(0.9)
      >>> algorithm = bj.algorithms.sobirl(problem, optax.adam(0.1), response=response, baseline=baseline)
    """

    critic: Critic
    trace: Float[Array, ""]
    seed: Any
    bootstrap: bool = eqx.field(static=True)

    of_pairs: ClassVar[bool] = True

    def __init__(
        self,
        network: Network | None = None,
        *,
        trace: Any = 0.9,
        learning_rate: Any = 3e-3,
        steps: int = 32,
        minibatches: int = 4,
        bootstrap: bool = True,
        seed: Any = 0,
    ):
        network = MLP(output_scale=0.0) if network is None else network
        self.critic = Critic(network, learning_rate, steps, minibatches)
        self.trace = as_float("trace", trace, float)
        require_probability("trace", self.trace, "1 takes the costs that were paid")
        self.bootstrap, self.seed = bootstrap, seed

    def init(self, problem):
        require_one_trajectory("CriticAdvantage", problem)
        if self.bootstrap:
            require_fraction("loss_discount", problem.loss_discount, "or use CriticAdvantage(bootstrap=False)")
        environment = problem.environment
        return self.critic.init(
            jax.random.key(self.seed), environment.observation_space, environment.num_actions, features=1
        )

    def update(self, state, problem, groups, costs):
        seen = merge_axes(groups)
        values = jax.vmap(jax.vmap(lambda o, a: self.critic.values(state, o)[a, 0]))(seen.observation, seen.action)
        each, discount = costs.each.astype(values.dtype), costs.discount.astype(values.dtype)
        trace = self.trace.astype(values.dtype)
        follows = jnp.pad(seen.valid[:, 1:], ((0, 0), (0, 1)))
        known = seen.valid
        if self.bootstrap:  # of a last step that goes on, nothing is known but what is believed
            known = known.at[:, -1].set(known[:, -1] & _ends(problem, seen.terminated[:, -1]))
        ahead = jnp.roll(values, -1, 1)

        def back(later: Float[Array, " B"], now: Any) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
            cost, value, value_ahead, on, own = now
            later = (1 - trace) * value_ahead + trace * later
            target = jnp.where(own, cost + jnp.where(on, discount * later, 0), value)
            return target, target

        by_time = tuple(leaf.T for leaf in (each, values, ahead, follows, known))
        targets = jax.lax.scan(back, jnp.zeros_like(values[:, 0]), by_time, reverse=True)[1].T
        flat = merge_axes((seen.observation, seen.action, targets[..., None], known))
        return self.critic.fitted(state, *flat)

    def credit(self, state: CriticState, problem, policy, groups, costs) -> Float[Array, "N I H"]:
        del problem
        policy = as_policy(policy)

        def advantage(observation, action):
            values = self.critic.values(state, observation)[:, 0]
            chances = finite(policy.distribution(observation)).probabilities.astype(values.dtype)
            return values[action] - jnp.sum(chances * values)

        each = advantage
        for _ in range(3):
            each = jax.vmap(each)
        return each(groups.observation, groups.action).astype(costs.each.dtype)


def _ends(problem: SampledProblem, terminated: Bool[Array, " B"]) -> Bool[Array, " B"]:
    """Whether costs end with a step: a simulator that resets itself pays on in the next process."""
    return jnp.zeros_like(terminated) if problem.environment.resets else terminated
