"""The Markov decision process as a pytree, and batches of them."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax.errors import InputError
from bilevel_jax.transitions import DenseTransition, Transition
from bilevel_jax.validation import (
    as_array,
    as_float,
    is_known,
    require_distribution,
    require_finite,
    require_fraction,
    require_policy,
)


class MDP(eqx.Module):
    """A finite, discounted Markov decision process with S states and A actions.

    Args:
      transition: P[S, A, S] with rows that sum to 1, or a `Transition`.
      reward: r[S, A]. Of rewards r[s, a, s'] give the expectation, `(P * r).sum(-1)`.
      discount: in [0, 1); a number, or one for each pair, [S, A]: 0 where the process ends (the
        discount is applied to what follows that action).
      initial: distribution over the first state, rho[S]; None means uniform.
      available: which actions each state has, bool [S, A], at least one; None means all of them. Rewards
        and transitions of the others must be valid numbers (0 and a self-loop will do) and are not used:
        their Q is -inf, their probability 0. Whether it is None is a part of the structure.

    Every array takes any number of leading batch axes, as given by the reward; a number or array
    without them is shared (the transition stays shared in memory, the others are broadcast).
    Shapes are checked always, values wherever they are known, i.e. outside jit and vmap. A reward of
    [..., S, S, S] (as many actions as states) beside one transition [S, S, S] could be a batch of S
    problems or r[s, a, s']: a batch is then told by another argument with its axes, e.g.
    `discount=jnp.full(S, 0.9)`. A discount of the shape of the batch axes is one per batch element.

    All leaves get the wider floating-point type of reward and transition, float32 or, with
    jax_enable_x64, float64. Here and wherever numbers come in, float16 and bfloat16 are widened to
    float32, booleans count as 0 and 1, and whole numbers become floating-point ones whatever their size;
    indices and counts must fit int32. Numbers that the type cannot hold, masked and complex ones, and
    narrower or other types are refused.

    Raises:
      InputError: names the argument, what is wrong with it, and the remedy.
    """

    transition: Transition
    reward: jax.Array
    discount: jax.Array
    initial: jax.Array
    available: jax.Array | None

    def __init__(self, transition: Any, reward: Any, discount: Any, initial: Any = None, available: Any = None):
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
        self.discount = _broadcast("discount", discount, batch, (states, actions))
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
    def modulus(self) -> jax.Array:
        """The contraction modulus of the Bellman operator: the largest discount, one a batch element."""
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

    @classmethod
    def from_gymnasium(cls, env: Any, discount: Any = 0.99, *, initial: Any = None) -> "MDP":
        """The MDP of a tabular gymnasium environment (FrozenLake, Taxi, CliffWalking), by successors.

        A pair that terminates with probability e gets discount (1 - e) and, as successors, those that do
        not terminate: exact for all values and policies. Where 0 < e < 1 (slippery FrozenLake) discounts
        differ between pairs; `with_end_state` makes a state of that. Time limits are left out.

        Args:
          env: the environment, wrapped or not, or its table P[s][a] = [(probability, next state, reward,
            terminated), ...]. An action that a state does not list, or with an empty list, is not available.
          discount: gymnasium has none; a number in [0, 1).
          initial: rho[S]; None is the environment's `initial_state_distrib`, or uniform.

        Raises:
          InputError: no such table, or one whose probabilities or states are wrong.
        """
        from bilevel_jax.interchange import gymnasium

        return gymnasium.read(env, discount, initial)

    @classmethod
    def from_mdptoolbox(cls, transition: Any, reward: Any, discount: Any, *, initial: Any = None) -> "MDP":
        """An MDP in the order of MDPToolbox.

        Args:
          transition: P[A, S, S] (stays dense), or a list of A scipy sparse matrices [S, S] (by successors).
          reward: [S], [S, A], or, of the next state too, [A, S, S] or A sparse matrices.

        Raises:
          InputError: shapes that disagree, or what `MDP` raises.
        """
        from bilevel_jax.interchange import mdptoolbox

        return mdptoolbox.read(transition, reward, discount, initial)

    def to_mdptoolbox(self) -> tuple[Any, np.ndarray, float]:
        """(P, R, discount) in the order of MDPToolbox; P[A, S, S], or A CSR matrices if not dense, R[S, A].

        All float64, rows of P divided by their sums: MDPToolbox refuses what float32 leaves of them.

        Raises:
          InputError: batch axes, traced values, several discounts, or states with fewer actions.
        """
        from bilevel_jax.interchange import mdptoolbox

        return mdptoolbox.write(self)

    @classmethod
    def from_scipy(cls, matrices: Any, reward: Any, discount: Any, *, initial: Any = None) -> "MDP":
        """An MDP of scipy sparse matrices, by successors; K is the number of entries in the fullest row.

        Args:
          matrices: a list of A matrices [S, S], or one [S A, S] with P[s, a, :] in row s A + a.
          reward: r[S, A], -inf where the state lacks the action (its row is not read).

        Raises:
          InputError: shapes that disagree, or what `MDP` raises.
        """
        from bilevel_jax.interchange import scipy_csr

        return scipy_csr.read(matrices, reward, discount, initial)

    def to_scipy(self) -> tuple[Any, np.ndarray, float]:
        """(CSR [S A, S], r[S, A], discount) as `from_scipy` takes them; `matrix[a::A]` is that of action a.

        As they are stored, in the MDP's own type: nobody looks at the sums of a scipy matrix.

        Raises:
          InputError: batch axes, traced values, or several discounts.
        """
        from bilevel_jax.interchange import scipy_csr

        return scipy_csr.write(self)

    @classmethod
    def from_quantecon(
        cls,
        reward: Any,
        transition: Any = None,
        discount: Any = None,
        s_indices: Any = None,
        a_indices: Any = None,
        *,
        initial: Any = None,
    ) -> "MDP":
        """The MDP of a QuantEcon `DiscreteDP`, or of its arguments; dense if its transition is.

        Args:
          reward: a `DiscreteDP`; or R[S, A], -inf where the state lacks the action; or R[L] of pairs.
          transition: Q[S, A, S]; or of pairs [L, S], an array or a scipy sparse matrix.
          discount: a number (`beta`).
          s_indices, a_indices: state and action of each pair, int[L]; other pairs are not available.

        Raises:
          InputError: shapes or indices that disagree, a pair that stands twice, or what `MDP` raises.
        """
        from bilevel_jax.interchange import quantecon

        return quantecon.read(reward, transition, discount, s_indices, a_indices, initial)

    def to_quantecon(self) -> tuple[Any, ...]:
        """The arguments of `DiscreteDP`: (R, Q, beta) if dense, else (R, Q, beta, s_indices, a_indices).

        R and Q are float64, rows of Q divided by their sums.

        Raises:
          InputError: batch axes, traced values, or several discounts.
        """
        from bilevel_jax.interchange import quantecon

        return quantecon.write(self)

    def with_end_state(self, *, one_action: bool = True) -> "MDP":
        """The same process with one discount for all pairs and one more state, the last, in which it has ended.

        A discount[s, a] below the largest, d, is an end with probability 1 - discount[s, a] / d: that mass
        goes to the last state, which pays nothing for ever. Values, action values and policies of the
        other states stay the same. By successors; `initial` is 0 at the end.

        Args:
          one_action: the end has action 0 alone, which is right for Shannon and Tsallis entropy (more
            actions would earn entropy). False gives it all of them, for solvers without masks.

        Raises:
          InputError: batch axes, traced values, or a transition that has no entries.
        """
        from bilevel_jax.interchange import common

        return common.with_end_state(self, one_action)

    def require_available(self, policy: jax.Array) -> None:
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


def _as_mask(available: Any, batch: tuple[int, ...], event: tuple[int, ...]) -> jax.Array:
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


def _require_an_action(available: jax.Array) -> None:
    if is_known(available):
        some = np.asarray(available).any(-1)
        if not some.all():
            state = [int(i) for i in np.argwhere(~some)[0]]
            raise InputError(
                f"available: state {state} has no action ({(~some).sum()} of {some.size} states have none); make "
                f"one available, e.g. a self-loop with reward 0"
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
