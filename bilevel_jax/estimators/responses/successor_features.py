"""dQ* by a network that learns it from earlier batches, for a few numbers of x: those of a reward's last layer."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from bilevel_jax.bilevel.problem import as_upper_variable
from bilevel_jax.bilevel.sampled_problem import SampledProblem
from bilevel_jax.core.batching import merge_axes
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.functions import as_pytree
from bilevel_jax.core.validation import as_float, require_probability
from bilevel_jax.environments import Policy, Trajectory, as_policy
from bilevel_jax.environments.policies import finite
from bilevel_jax.estimators.critics import Critic, CriticState
from bilevel_jax.estimators.responses.protocol import Response
from bilevel_jax.networks import MLP, Network


class SuccessorFeatures(Response):
    """psi(s, a) = dQ*/dw for the numbers w of x that `where` picks; x has no other answer (Barreto et al. 2017).

    A reward that is linear in w, such as r = phi(s, a) . w with w the last layer of a network, has dr/dw = phi, and psi
    is the discounted sum of phi under the policy: a vector-valued critic. It does not depend on w but through the
    policy, so that what was learned stays good while w moves. It is the network's form of `LearnedCritic`, and like
    that it is biased until it has caught up.

    Each batch moves psi towards returns along the trajectories, by steps of Adam:

      G_t = phi_t + discount (E_pi psi(s_t+1, .) + trace (G_t+1 - psi(s_t+1, a_t+1)))

    Nothing follows a step that terminated. A batch is learned from after it was used. All pairs of the F numbers of w
    and the A actions are outputs of the network: keep F small. Rewards of the next state have phi, too.

    Args:
      network: of psi, A F outputs; None is `MLP(output_scale=0)`.
      where: x -> w, an array of x or a tuple of some, e.g. `last_layer`; None is all of x. A function (static), or a
        pytree.
      trace: in [0, 1]; a leaf.
      learning_rate: of Adam, in units of the first batch's returns; a leaf.
      steps: steps of Adam for each batch (static).
      minibatches: the parts of a batch that the steps take in turn (static).
      seed: of the parameters; a leaf.

    Raises:
      InputError: sizes below 1, a trace outside [0, 1].

    Example:
      >>> problem = bj.problems.make("garnet", states=4, actions=2, horizon=20)
      >>> response = bj.estimators.SuccessorFeatures(bj.networks.OneHot(4))  # x[S, A] itself is linear in the reward
      >>> algorithm = bj.algorithms.sobirl(problem, optax.adam(0.1), response=response)
    """

    critic: Critic
    where: Callable | None
    trace: Float[Array, ""]
    seed: Any

    def __init__(
        self,
        network: Network | None = None,
        where: Callable[[Any], Any] | None = None,
        *,
        trace: Any = 0.9,
        learning_rate: Any = 3e-3,
        steps: int = 32,
        minibatches: int = 4,
        seed: Any = 0,
    ):
        network = MLP(output_scale=0.0) if network is None else network
        self.critic = Critic(network, learning_rate, steps, minibatches)
        self.where = None if where is None else as_pytree("where", where)
        self.trace = as_float("trace", trace, float)
        require_probability("trace", self.trace, "1 looks to the end of the batch, 0 one step ahead")
        self.seed = seed

    def init(self, problem, x):
        environment = problem.environment
        features = self._numbers(as_upper_variable(x)).size
        key = jax.random.key(self.seed)
        return self.critic.init(key, environment.observation_space, environment.num_actions, features)

    def update(self, state, problem, x, policy, groups):
        seen = merge_axes(groups)
        phi = self._features(problem, as_upper_variable(x), seen).astype(state.scale.dtype)
        targets = self._targets(state, problem, as_policy(policy), seen, phi)
        return self.critic.fitted(state, *merge_axes((seen.observation, seen.action, targets, seen.valid)))

    def surrogate(self, key, state, problem, x, policy, trajectories, credit) -> Float[Array, ""]:
        del key, problem
        policy = as_policy(policy)

        def at(total, now):
            observation, action, own = now
            values, expected = self._values(state, policy, observation)
            return total + own.astype(values.dtype) @ (_taken(values, action) - expected), None

        by_time = jax.tree.map(_by_time, (trajectories.observation, trajectories.action, credit))
        total, _ = jax.lax.scan(at, jnp.zeros_like(state.shift), by_time)
        numbers = self._numbers(x)
        return stop_gradient(total).astype(numbers.dtype) @ numbers

    def _numbers(self, x: Any) -> Float[Array, " F"]:
        return ravel_pytree(x if self.where is None else self.where(x))[0]

    def _features(self, problem: SampledProblem, x: Any, seen: Trajectory) -> Float[Array, "B H F"]:
        """dr/dw of each step."""
        numbers, unravel = ravel_pytree(x if self.where is None else self.where(x))

        def reward(numbers, *step):
            moved = unravel(numbers)
            changed = moved if self.where is None else eqx.tree_at(self.where, x, moved)
            return problem.reward(changed).of_step(*step)

        each = jax.grad(reward)
        for _ in range(2):
            each = jax.vmap(each, (None, 0, 0, 0))
        return each(numbers, seen.observation, seen.action, seen.next_observation)

    def _targets(
        self, state: CriticState, problem: SampledProblem, policy: Policy, seen: Trajectory, phi: Float[Array, "B H F"]
    ) -> Float[Array, "B H F"]:
        discount = jnp.asarray(problem.discount, phi.dtype)
        last = jnp.arange(phi.shape[1]) == phi.shape[1] - 1
        goes_on = ~(seen.terminated | seen.truncated | last[None])
        trace = jnp.where(goes_on, self.trace.astype(phi.dtype), 0)

        def back(later, now):  # `later` is G - psi of the step ahead
            own, observation, action, following, terminated, along = now
            _, expected = self._values(state, policy, following)
            beyond = jnp.where(terminated[:, None], 0, expected + along[:, None] * later)
            target = own + discount * beyond
            values, _ = self._values(state, policy, observation)
            return target - _taken(values, action), target

        parts = (phi, seen.observation, seen.action, seen.next_observation, seen.terminated, trace)
        by_time = jax.tree.map(_by_time, parts)
        targets = jax.lax.scan(back, jnp.zeros_like(phi[:, 0]), by_time, reverse=True)[1]
        return jnp.swapaxes(targets, 0, 1)

    def _values(
        self, state: CriticState, policy: Policy, observations: Any
    ) -> tuple[Float[Array, "B A F"], Float[Array, "B F"]]:
        """psi of all actions, and its mean over those of the policy."""

        def each(observation):
            values = self.critic.values(state, observation)
            chances = finite(policy.distribution(observation)).probabilities.astype(values.dtype)
            return values, chances @ values

        return jax.vmap(each)(observations)


def last_layer(x: Any) -> tuple[Any, Any]:
    """The weights and biases of the last layer of the parameters of an `MLP`, for `SuccessorFeatures`.

    Raises:
      InputError: they are not those of an `MLP`.

    Example:
      >>> x = bj.networks.MLP(width=8).init(jax.random.key(0), jnp.zeros(3), 2)
      >>> [leaf.shape for leaf in bj.estimators.last_layer(x)]
      [(2, 8), (2,)]
    """
    layers = getattr(getattr(x, "arrays", None), "layers", None)
    if not layers or not isinstance(layers[-1], eqx.nn.Linear):
        raise InputError(
            f"x: expected the parameters of an MLP, got {type(x).__name__}; give SuccessorFeatures a function "
            f"where(x) that picks the last layer"
        )
    return layers[-1].weight, layers[-1].bias


def _taken(values: Float[Array, "B A F"], actions: Any) -> Float[Array, "B F"]:
    return jax.vmap(lambda rows, action: rows[action])(values, actions)


def _by_time(leaf: Any) -> Any:
    return jnp.swapaxes(leaf, 0, 1)
