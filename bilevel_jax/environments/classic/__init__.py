"""Classic control tasks whose physics are numbers: leaves that can be traced, swept and changed."""

from bilevel_jax.environments.classic.cart_pole import CartPole
from bilevel_jax.environments.classic.mountain_car import MountainCar
from bilevel_jax.environments.classic.pendulum import Pendulum

__all__ = ["CartPole", "MountainCar", "Pendulum"]
