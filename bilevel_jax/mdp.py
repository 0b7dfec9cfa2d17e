"""The Markov decision process as a pytree, and batches of them."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from bilevel_jax.errors import InputError
from bilevel_jax.transitions import DenseTransition, Transition
from bilevel_jax.validation import as_float, require_distribution, require_finite, require_fraction


class MDP(eqx.Module):
    """A finite, discounted Markov decision process with S states and A actions.

    Args:
      transition: P[S, A, S] with rows that sum to 1, or a `Transition`.
      reward: r[S, A].
      discount: in [0, 1); a number, or one for each pair, [S, A]: 0 where the process ends (the
        discount is applied to what follows that action).
      initial: distribution over the first state, rho[S]; None means uniform.

    Every array takes any number of leading batch axes, as given by the reward; a number or array
    without them is shared (the transition stays shared in memory, the others are broadcast).
    Shapes are checked always, values wherever they are known, i.e. outside jit and vmap.
    Integer rewards become floats; all leaves get the widest float type among reward and transition.

    Raises:
      InputError: names the argument, what is wrong with it, and the remedy.
    """

    transition: Transition
    reward: jax.Array
    discount: jax.Array
    initial: jax.Array

    def __init__(self, transition: Any, reward: Any, discount: Any, initial: Any = None):
        kernel = transition if isinstance(transition, Transition) else DenseTransition(transition)
        reward = as_float("reward", reward)
        if reward.ndim < 2:
            raise InputError(f"reward: expected shape [S, A] (batch axes first), got {list(reward.shape)}")
        with jax.numpy_dtype_promotion("standard"):  # widening is what is promised, also where jax is strict
            dtype = jnp.promote_types(kernel.dtype, reward.dtype)
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
            )
        if kernel.shape[:-2] not in ((), batch):
            raise InputError(
                f"transition: batch axes {list(kernel.shape[:-2])} disagree with the reward's {list(batch)}; give "
                f"the same ones, or none to share one transition"
            )
        self.transition = kernel.astype(dtype)
        self.reward = reward.astype(dtype)
        self.discount = _broadcast("discount", as_float("discount", discount, dtype), batch, (states, actions))
        uniform = jnp.full((states,), 1 / states, dtype)
        start = uniform if initial is None else as_float("initial", initial, dtype)
        if start.shape[-1:] != (states,) or start.shape[:-1] not in ((), batch):
            raise InputError(f"initial: expected shape [S] = [{states}], got {list(start.shape)}")
        self.initial = jnp.broadcast_to(start, (*batch, states))
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
    def modulus(self) -> jax.Array:
        """The contraction modulus of the Bellman operator: the largest discount, one a batch element."""
        axes = tuple(range(len(self.batch_shape), self.discount.ndim))
        return jnp.max(self.discount, axes)

    def replace(self, **leaves: Any) -> "MDP":
        """A new, checked MDP with some arguments exchanged, e.g. `mdp.replace(reward=r)`."""
        current = {name: getattr(self, name) for name in ("transition", "reward", "discount", "initial")}
        return MDP(**(current | leaves))

    def validate(self) -> None:
        """Check every value that is known; the constructor has done so. Raises InputError."""
        self.transition.validate()
        require_finite("reward", self.reward)
        require_fraction("discount", self.discount, "for long horizons use e.g. 0.999")
        require_distribution("initial", self.initial, -1, "divide it by its sum")

    def event_ndim(self) -> "MDP":
        """The same tree with each array replaced by its number of axes in a single MDP."""
        return eqx.tree_at(
            lambda m: (m.transition, m.reward, m.discount, m.initial),
            self,
            (self.transition.event_ndim(), 2, self.discount.ndim - len(self.batch_shape), 1),
        )


def _broadcast(name: str, array: jax.Array, batch: tuple[int, ...], event: tuple[int, ...]) -> jax.Array:
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


def over_batch(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make `function(mdp, regularizer, *arrays, **shared)`, written for one MDP, take batch axes.

    Leaves of `mdp` and `regularizer` are mapped where they have the batch axes and shared where they
    have none; `arrays` have them all (None is passed on); keyword arguments are shared.
    """

    def mapped(mdp: MDP, regularizer: Any, *arrays: Any, **shared: Any):
        depth = len(mdp.batch_shape)
        if depth == 0:
            return function(mdp, regularizer, *arrays, **shared)

        def axis(leaf: jax.Array, event_ndim: int) -> int | None:
            return 0 if jnp.ndim(leaf) - event_ndim == depth else None

        axes = [jax.tree.map(axis, tree, tree.event_ndim()) for tree in (mdp, regularizer)]
        axes += [jax.tree.map(lambda _: 0, array) for array in arrays]
        return jax.vmap(lambda m, r, *a: mapped(m, r, *a, **shared), in_axes=tuple(axes))(mdp, regularizer, *arrays)

    return mapped
