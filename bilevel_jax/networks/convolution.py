"""Convolutional networks for stacked frames."""

from typing import Any, Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.sizes import size
from bilevel_jax.networks.mlp import linear
from bilevel_jax.networks.modules import Module

Channels = Literal["last", "first"]
NATURE = ((32, 8, 4), (64, 4, 2), (64, 3, 1))  # channels, size of the kernel, stride
AUTHORS = ((16, 7, 3), (16, 5, 2), (16, 3, 1), (16, 3, 1))


class NatureCNN(Module):
    """Three convolutions and a dense layer (Mnih et al. 2015), on frames.

    Frames of uint8 are divided by 255, once.

    Args:
      width: of the dense layer (static).
      channels: "last" for frames [height, width, channels]; "first" for [channels, height, width], which is how Atari's
        vector environments stack frames (static).

    Raises:
      InputError: channels that are neither; in `init`, an observation that is no frame, or one below 36 x 36.

    Example:
      >>> network = bj.networks.NatureCNN(width=32)
      >>> frames = jnp.zeros((84, 84, 4), jnp.uint8)
      >>> network.apply(network.init(jax.random.key(0), frames, 6), frames).shape
      (6,)
    """

    width: int = eqx.field(default=512, static=True, converter=size("width"))
    channels: Channels = eqx.field(default="last", static=True)

    def __check_init__(self):
        _require_order(self.channels)

    def build(self, key, observation, outputs):
        layers, flat, key = _convolutions(key, observation, self.channels, NATURE, [eqx.nn.Lambda(jax.nn.relu)])
        keys = jax.random.split(key)
        dense = [linear(keys[0], flat, self.width, 2**0.5), eqx.nn.Lambda(jax.nn.relu)]
        return eqx.nn.Sequential([*layers, *dense, linear(keys[1], self.width, outputs, 1.0)])


class RewardCNN(Module):
    """Four convolutions of 16 channels and a dense layer of 64: the reward model of the SoBiRL authors' code.

    It differs from theirs on purpose: groups of channels are normalized for each frame alone (`GroupNorm`), where they
    normalize over the batch and drop half of the activations. An estimate of r(s, a) - E_pi r(s, .) then does not
    depend on the other frames of a batch, nor on two different masks. Frames of uint8 are divided by 255, once (their
    code does it twice in two places).

    Args:
      channels: "last" or "first", see `NatureCNN` (static).

    Raises:
      InputError: channels that are neither; in `init`, an observation that is no frame, or one below 43 x 43.

    Example:
      >>> network = bj.networks.RewardCNN()
      >>> frames = jnp.zeros((84, 84, 4), jnp.uint8)
      >>> network.apply(network.init(jax.random.key(0), frames, 6), frames).shape
      (6,)
    """

    channels: Channels = eqx.field(default="last", static=True)

    def __check_init__(self):
        _require_order(self.channels)

    def build(self, key, observation, outputs):
        after = [eqx.nn.GroupNorm(4, 16), eqx.nn.Lambda(jax.nn.leaky_relu)]
        layers, flat, key = _convolutions(key, observation, self.channels, AUTHORS, after)
        keys = jax.random.split(key)
        dense = [linear(keys[0], flat, 64, 2**0.5), eqx.nn.Lambda(jax.nn.leaky_relu)]
        return eqx.nn.Sequential([*layers, *dense, linear(keys[1], 64, outputs, 1.0)])


def _require_order(channels: Any) -> None:
    if channels not in get_args(Channels):
        raise InputError(f"channels: expected last or first, got {channels!r}")


def _convolutions(
    key: Any, observation: Any, channels: Channels, sizes: Any, after: list[Any]
) -> tuple[list[Any], int, Any]:
    """(layers, length of their output, the next key). `after` follows each convolution."""
    shape = jnp.shape(observation)
    if len(shape) != 3:
        order = "[height, width, channels]" if channels == "last" else "[channels, height, width]"
        raise InputError(f"observation: expected a frame {order}, got shape {list(shape)}")
    entering, spatial = (shape[-1], shape[:2]) if channels == "last" else (shape[0], shape[1:])
    layers: list[Any] = [eqx.nn.Lambda(_scaled if channels == "first" else _moved)]
    for out, kernel, stride in sizes:
        key, own = jax.random.split(key)
        layers += [eqx.nn.Conv2d(entering, out, kernel, stride, key=own), *after]
        entering, spatial = out, tuple((edge - kernel) // stride + 1 for edge in spatial)
        if min(spatial) < 1:
            height, width = shape[:2] if channels == "last" else shape[1:]
            raise InputError(
                f"observation: a frame of {height} x {width} is too small for the convolutions (channels={channels!r})"
            )
    return [*layers, eqx.nn.Lambda(jnp.ravel)], entering * spatial[0] * spatial[1], key


def _moved(frame: jax.Array) -> jax.Array:
    """[channels, height, width] from [height, width, channels]; see `_scaled`."""
    return _scaled(jnp.moveaxis(frame, -1, 0))


def _scaled(frame: jax.Array) -> jax.Array:
    """From 0 to 1 where it was uint8."""
    made = frame.astype(jnp.result_type(float))
    return made / 255 if frame.dtype == jnp.uint8 else made
