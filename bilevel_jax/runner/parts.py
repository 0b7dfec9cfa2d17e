"""What the named sections of a config stand for: solvers, adjoints, optimizers."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj

LOWER = {
    # M-SoBiRL's own: the last T V as it is.
    "value_iteration": functools.partial(bj.ValueIteration, centred=False),
    "policy_iteration": bj.PolicyIteration,
    "auto": bj.Auto,
}
ADJOINT = {
    "descent": bj.Descent,
    "direct": bj.Direct,
    "gmres": bj.GMRES,
    "bicgstab": bj.BiCGStab,
    "neumann": bj.Neumann,
}


def named(table: Mapping[str, Callable], section: dict[str, Any]) -> Any:
    """What the section's name stands for in the table, made with the section's other keys."""
    return table[section["name"]](**{k: v for k, v in section.items() if k != "name"})


def _plain(rule: Any) -> Any:
    def make(learning_rate: Any, clip_norm: Any = None) -> optax.GradientTransformation:
        if clip_norm is None:
            return rule(learning_rate)
        return optax.chain(optax.clip_by_global_norm(clip_norm), rule(learning_rate))

    return optax.inject_hyperparams(make)


def _lbfgs(memory_size: int, line_search_steps: int) -> optax.GradientTransformation:
    search = optax.scale_by_zoom_linesearch(max_linesearch_steps=line_search_steps, initial_guess_strategy="one")
    return optax.lbfgs(memory_size=memory_size, linesearch=search)


OPTIMIZERS = {"sgd": _plain(optax.sgd), "adam": _plain(optax.adam), "lbfgs": _lbfgs}


def optimizer_numbers(section: dict[str, Any]) -> dict[str, Any]:
    """What the optimizer of a section is made of."""
    return {k: v for k, v in section.items() if k != "name" and v is not None}


def build_optimizer(section: dict[str, Any]) -> optax.GradientTransformation:
    """The optimizer of a section, with its learning rate and norm in its state's `hyperparams`."""
    return OPTIMIZERS[section["name"]](**optimizer_numbers(section))


def with_numbers(state: Any, section: dict[str, Any]) -> Any:
    """An algorithm's state whose optimizer has the numbers of the section, which may be traced."""
    if not hasattr(state.optimizer_state, "hyperparams"):
        return state
    hyperparams = jax.tree.map(
        lambda old, new: jnp.asarray(new, old.dtype), state.optimizer_state.hyperparams, optimizer_numbers(section)
    )
    optimizer_state = state.optimizer_state._replace(hyperparams=hyperparams)
    return eqx.tree_at(lambda s: s.optimizer_state, state, optimizer_state)
