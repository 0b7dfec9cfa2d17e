"""The Markov decision process as a pytree, and batches of them."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Real

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.validation import (
    as_array,
    as_float,
    is_known,
    require_distribution,
    require_finite,
    require_fraction,
    require_policy,
)
from bilevel_jax.mdp.transitions import DenseTransition, Transition


class MDP(eqx.Module):
    """A finite, discounted Markov decision process with S states and A actions.

    Args:
      transition: P[S, A, S] with rows that sum to 1, or a `Transition`.
      reward: r[S, A]. If your rewards are r[s, a, s'], give their expectation, `(P * r).sum(-1)`.
      discount: in [0, 1); a number, or one per state-action pair, [S, A]. It multiplies what follows the
        action, so that 0 means that the process ends there.
      initial: distribution over the first state, rho[S]; None means uniform.
      available: which actions each state has, bool [S, A], at least one; None means all of them. Rewards
        and transitions of the others must be valid numbers (0 and a self-loop will do) and are not used:
        their Q is -inf, their probability 0. Whether it is None is a part of the structure.

    Every array takes any number of leading batch axes, as given by the reward; a number or array
    without them is shared (the transition stays shared in memory, the others are broadcast).
    Shapes are checked always, values wherever they are known, i.e. outside jit and vmap. A reward of
    [..., S, S, S] (as many actions as states) beside one transition [S, S, S] could be a batch of S
    problems or r[s, a, s']. It is accepted as a batch if another argument has the batch axes, too, e.g.
    `discount=jnp.full(S, 0.9)`. A discount of the shape of the batch axes is one per batch element.

    All leaves get the wider floating-point type of reward and transition, float32 or, with
    jax_enable_x64, float64. Here and wherever numbers come in, float16 and bfloat16 are widened to
    float32, booleans count as 0 and 1, and whole numbers become floating-point ones whatever their size;
    indices and counts must fit int32. Numbers that the type cannot hold, masked and complex ones, and
    narrower or other types are refused.

    Raises:
      InputError: names the argument, what is wrong with it, and the remedy.

    Example:
      >>> transition = jnp.array([[[0.9, 0.1], [0.1, 0.9]], [[0.8, 0.2], [0.3, 0.7]]])  # P[s, a, s']
      >>> mdp = bj.MDP(transition, reward=jnp.eye(2), discount=0.9)
      >>> mdp.num_states, mdp.num_actions
      (2, 2)
      >>> bj.MDP(transition, reward=jnp.ones((5, 2, 2)), discount=0.9).batch_shape  # five rewards, one transition
      (5,)
    """

    transition: Transition
    reward: Float[Array, "*batch S A"]
    discount: Float[Array, "*batch"] | Float[Array, "*batch S A"]
    initial: Float[Array, "*batch S"]
    available: Bool[Array, "*#batch S A"] | None

    def __init__(
        self,
        transition: Transition | Real[ArrayLike, "*#batch S A S"] | Any,
        reward: Real[ArrayLike, "*batch S A"] | Any,
        discount: Real[ArrayLike, "*#batch"] | Real[ArrayLike, "*#batch S A"] | Any,
        initial: Real[ArrayLike, "*#batch S"] | Any | None = None,
        available: Bool[ArrayLike, "*#batch S A"] | Any | None = None,
    ):
        kernel = transition if isinstance(transition, Transition) else DenseTransition(transition)
        reward = as_float("reward", reward)
        if reward.ndim < 2:
            raise InputError(f"reward: expected shape [S, A] (batch axes first), got {list(reward.shape)}")
        with jax.numpy_dtype_promotion("standard"):  # widening is what is promised, also where jax is strict
            dtype = jax.dtypes.canonicalize_dtype(jnp.promote_types(kernel.dtype, reward.dtype))
        states, actions = reward.shape[-2:]
        batch = reward.shape[:-2]
        if states == 0 or actions == 0:
            raise InputError(
                f"reward: shape {list(reward.shape)} has no {'state' if states == 0 else 'action'}; an MDP needs "
                f"at least one of each"
            )
        if kernel.shape[-2:] != (states, actions):
            raise InputError(
                f"reward: shape {list(reward.shape)} disagrees with a transition of {kernel.shape[-2]} states and "
                f"{kernel.shape[-1]} actions; give reward as [S, A] = {list(kernel.shape[-2:])}"
                f"{_of_next_state(reward.shape, kernel.shape)}"
            )
        if kernel.shape[:-2] not in ((), batch):
            raise InputError(
                f"transition: batch axes {list(kernel.shape[:-2])} disagree with the reward's {list(batch)}; give "
                f"the same ones, or none to share one transition{_of_next_state(reward.shape, kernel.shape)}"
            )
        self.transition = kernel.astype(dtype)
        self.reward = reward.astype(dtype)
        discount = as_float("discount", discount, dtype)
        uniform = jnp.full((states,), 1 / states, dtype)
        start = uniform if initial is None else as_float("initial", initial, dtype)
        mask = None if available is None else _as_mask(available, batch, (states, actions))
        shared = (
            kernel.shape == (states, actions)
            and discount.shape in ((), (states, actions))
            and start.ndim == 1
            and (mask is None or mask.ndim == 2)
        )
        if shared and reward.shape[-3:] == (states, actions, states):
            raise InputError(
                f"reward: shape {list(reward.shape)} beside one transition of {states} states and {actions} actions "
                f"may be a batch of {states} problems or r[s, a, s']; a batch is told by a discount of shape "
                f"{list(batch)}, e.g. numpy.full({batch}, 0.9){_of_next_state(reward.shape, kernel.shape)}"
            )
        self.discount = broadcast_numbers("discount", discount, batch, (states, actions))
        if start.shape[-1:] != (states,) or start.shape[:-1] not in ((), batch):
            raise InputError(f"initial: expected shape [S] = [{states}], got {list(start.shape)}")
        self.initial = jnp.broadcast_to(start, (*batch, states))
        self.available = mask
        self.validate()

    @property
    def num_states(self) -> int:
        """S."""
        return self.reward.shape[-2]

    @property
    def num_actions(self) -> int:
        """A."""
        return self.reward.shape[-1]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The axes in front of [S, A]."""
        return self.reward.shape[:-2]

    @property
    def modulus(self) -> Float[Array, "*batch"]:
        """The contraction modulus of the Bellman operator: the largest discount, one number per batch element."""
        axes = tuple(range(len(self.batch_shape), self.discount.ndim))
        used = self.discount
        if axes and self.available is not None:
            used = jnp.where(self.available, used, 0)
        return jnp.max(used, axes)

    def replace(self, **leaves: Any) -> "MDP":
        """A new, checked MDP with some arguments exchanged, e.g. `mdp.replace(reward=r)`."""
        names = ("transition", "reward", "discount", "initial", "available")
        current = {name: getattr(self, name) for name in names}
        return MDP(**(current | leaves))

    def validate(self) -> None:
        """Check every value that is known; the constructor has done so. Raises InputError."""
        self.transition.validate()
        require_finite(
            "reward",
            self.reward,
            "replace NaN and infinities; actions that a state does not have go into available=, with reward 0",
        )
        require_fraction("discount", self.discount, "for long horizons use e.g. 0.999")
        require_distribution("initial", self.initial, -1, "divide it by its sum")
        if self.available is not None:
            _require_an_action(self.available)

    def event_ndim(self) -> "MDP":
        """The same tree with each array replaced by its number of axes in a single MDP."""
        return eqx.tree_at(
            lambda m: (m.transition, m.reward, m.discount, m.initial, m.available),
            self,
            (
                self.transition.event_ndim(),
                2,
                self.discount.ndim - len(self.batch_shape),
                1,
                None if self.available is None else 2,
            ),
            is_leaf=lambda leaf: leaf is None,
        )

    def require_available(self, policy: Float[Array, "*batch S A"]) -> None:
        """Raise InputError where a policy[S, A] that is known is none, or takes an action that is not available."""
        require_policy("policy", policy)
        if self.available is None or not is_known(policy, self.available):
            return
        wrong = (np.asarray(policy) != 0) & ~np.asarray(self.available)
        if wrong.any():
            index = [int(i) for i in np.argwhere(wrong)[0]]
            raise InputError(
                f"policy{index} is {np.asarray(policy)[wrong][0]:g}, but that action is not available in that "
                f"state; give it probability 0"
            )


def _as_mask(available: Any, batch: tuple[int, ...], event: tuple[int, ...]) -> Bool[Array, "*batch S A"]:
    mask = as_array("available", available)
    if mask.dtype != bool:
        raise InputError(f"available: expected booleans, got {mask.dtype}; say what is meant, e.g. available > 0")
    if mask.shape not in (event, batch + event):
        raise InputError(
            f"available: expected shape [S, A] = {list(event)} (batch axes {list(batch)} first, or none), got "
            f"{list(mask.shape)}"
        )
    return mask


def _of_next_state(reward: tuple[int, ...], kernel: tuple[int, ...]) -> str:
    """What to do with rewards that have the shape of r[s, a, s']."""
    same = reward[-3:] == (*kernel[-2:], kernel[-2])
    return "; of rewards r[s, a, s'] give the expectation, (P * r).sum(-1)" if same else ""


def _require_an_action(available: Bool[Array, "*batch S A"]) -> None:
    if is_known(available):
        some = np.asarray(available).any(-1)
        if not some.all():
            state = [int(i) for i in np.argwhere(~some)[0]]
            raise InputError(
                f"available: state {state} has no action ({(~some).sum()} of {some.size} states have none); make "
                f"one available, e.g. a self-loop with reward 0"
            )


def broadcast_numbers(
    name: str, array: Float[Array, "..."], batch: tuple[int, ...], event: tuple[int, ...]
) -> Float[Array, "..."]:
    """A number or one for each pair, with or without batch axes, to batch axes and nothing or [S, A]."""
    for target in (batch, batch + event):
        if array.shape == target:
            return array
    for own, target in (((), batch), (event, batch + event)):
        if array.shape == own:
            return jnp.broadcast_to(array, target)
    raise InputError(
        f"{name}: expected a number, or shape [S, A] = {list(event)} (batch axes {list(batch)} first), got "
        f"{list(array.shape)}"
    )
