"""The simulators that problems name: classic control, and environments of gymnax."""

import functools
import importlib
from collections.abc import Callable
from typing import Any, Literal

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.options import nearest
from bilevel_jax.environments import Environment, GymnaxEnvironment
from bilevel_jax.environments.classic import CartPole, MountainCar, Pendulum

Classic = Literal["cart_pole", "mountain_car", "pendulum"]

CLASSIC: dict[str, Callable[[], Environment]] = {
    "cart_pole": CartPole,
    "mountain_car": MountainCar,
    "pendulum": Pendulum,
}


def of_gymnax(name: str) -> Environment:
    """An environment of gymnax by its name.

    Raises:
      InputError: gymnax is not installed, or has no such environment.
    """
    if not isinstance(name, str):
        raise InputError(f'gymnax: expected a text such as "Breakout-MinAtar", got {name!r}')
    try:
        gymnax = importlib.import_module("gymnax")
    except ImportError as error:
        raise InputError(f"gymnax: {name!r} needs gymnax ({error}); pip install 'bilevel_jax[gymnax]'") from None
    known = gymnax.registered_envs
    if name not in known:
        raise InputError(f"gymnax: no environment {name!r}{nearest(name, known)}; there are {', '.join(known)}")
    return GymnaxEnvironment(*_made(gymnax.make, name))


@functools.cache
def _made(make: Callable[[str], Any], name: str) -> Any:
    """One object per name: it is static, and another one would compile again."""
    return make(name)
