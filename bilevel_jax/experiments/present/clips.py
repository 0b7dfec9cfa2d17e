"""Clips of agents that see images: an episode's observations as an animated GIF."""

from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from PIL import Image

from bilevel_jax.environments import Environment, rollout

SMALLEST = 8  # pixels on each side; what is smaller is no image
WIDE = 160  # pixels to which small frames are enlarged
MILLISECONDS = 60  # per frame
MOST = 1000  # frames


def shows_images(environment: Environment) -> bool:
    """Whether an observation is one array [height, width] or [height, width, channels]."""
    leaves = jax.tree.leaves(environment.observation_space)
    return len(leaves) == 1 and leaves[0].ndim in (2, 3) and min(leaves[0].shape[:2]) >= SMALLEST


def episode_frames(key: Any, problem: Any, policy: Any) -> list[np.ndarray]:
    """One episode under a policy as pictures, uint8 [height, width, 3] each."""
    seen = jax.jit(lambda key: rollout(key, problem.environment, policy, batch=1, horizon=min(problem.horizon, MOST)))(
        key
    )
    frames = np.asarray(jax.tree.leaves(seen.observation)[0][0])
    return [as_picture(frame) for frame in frames[np.asarray(seen.valid[0])]]


def as_picture(frame: np.ndarray) -> np.ndarray:
    """An observation as colours, uint8 [height, width, 3].

    Bytes are grey, of three channels colours, and of more channels the last one (frames that are stacked). Other
    channels have a colour each, of which the last that is there covers the others.
    """
    channels = frame[..., None] if frame.ndim == 2 else frame
    if channels.dtype == np.uint8:
        shown = channels if channels.shape[-1] == 3 else np.repeat(channels[..., -1:], 3, -1)
        return np.ascontiguousarray(shown)
    colours = matplotlib.colormaps["tab10"]
    picture = np.zeros((*channels.shape[:2], 3), np.uint8)
    for i in range(channels.shape[-1]):
        picture[channels[..., i] > 0] = np.round(255 * np.asarray(colours(i % 10)[:3]))
    return picture


def write_clip(path: Path, frames: list[np.ndarray]) -> None:
    """Write frames as an animated GIF that begins again at its end."""
    factor = max(1, WIDE // max(frames[0].shape[:2]))
    images = [Image.fromarray(frame.repeat(factor, 0).repeat(factor, 1)) for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=MILLISECONDS, loop=0)
