"""Classic tasks whose physics, or walls, are numbers: leaves that can be traced, swept and changed."""

from bilevel_jax.environments.classic.acrobot import Acrobot
from bilevel_jax.environments.classic.cart_pole import CartPole
from bilevel_jax.environments.classic.grid_walk import GridWalk
from bilevel_jax.environments.classic.mountain_car import MountainCar
from bilevel_jax.environments.classic.pendulum import Pendulum

__all__ = ["Acrobot", "CartPole", "GridWalk", "MountainCar", "Pendulum"]
