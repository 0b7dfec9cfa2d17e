"""Segments as what the page draws: pictures where observations are images, numbers otherwise."""

import base64
import math
from typing import Any

import numpy as np

from bilevel_jax.preferences.lines import Header, Segment

SMALLEST = 8  # pixels on each side; what is smaller is no image
LARGEST = 256  # pixels on each side; of what is larger every second one is sent, or every third, ...
MOST = 64  # entries of other observations that are sent
# Colours of channels that are no picture, which people who do not see red and green alike tell apart.
COLOURS = np.array(
    [
        *((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (213, 94, 0)),
        *((204, 121, 167), (0, 114, 178), (190, 190, 190), (150, 90, 40), (140, 110, 230)),
    ],
    np.uint8,
)


def as_clip(segment: Segment, header: Header) -> dict[str, Any]:
    """Return the valid steps of a segment, and what the last one led to if the file has it, as JSON can hold them.

    The first image among the leaves of an observation is shown alone. Otherwise the entries of all leaves are sent, of
    which the page makes a drawing or plots. Rewards are not sent: who labels must not see them.

    Example:
      >>> from bilevel_jax.preferences.lines import read_header
      >>> header = read_header(
      ...     {
      ...         "format": "bilevel_jax.preferences", "version": 1, "observation": {"shape": [2], "dtype": "float32"},
      ...         "action_space": {"discrete": 2}, "length": 3, "next_observation": False, "reward": False, "about": {},
      ...     }
      ... )
      >>> valid = np.array([True, True, False])
      >>> clip = as_clip(Segment(np.zeros((3, 2), np.float32), np.array([0, 1, 1]), None, valid, None), header)
      >>> clip["entries"], clip["actions"], clip["length"]
      ([[0.0, 0.0], [0.0, 0.0]], [[0], [1]], 3)
    """
    steps = np.flatnonzero(segment.valid)
    leaves = {name: leaf[steps] for name, leaf in _leaves("", segment.observation)}
    if header.next_observation and len(steps):
        after = dict(_leaves("", segment.next_observation))
        leaves = {name: np.concatenate([leaf, after[name][steps[-1:]]]) for name, leaf in leaves.items()}
    clip = {
        "length": len(segment.valid),
        "steps": len(steps),
        "actions": _flat(segment.action[steps])[:, :MOST].tolist(),
        "discrete": "discrete" in header.action_space,
    }
    images = [leaf for leaf in leaves.values() if leaf.ndim in (3, 4) and min(leaf.shape[1:3]) >= SMALLEST]
    if images:
        stride = -(-max(images[0].shape[1:3]) // LARGEST)
        pictures = as_pictures(images[0][:, ::stride, ::stride])
        pixels = base64.b64encode(pictures.tobytes()).decode("ascii")
        return clip | {"height": pictures.shape[1], "width": pictures.shape[2], "pixels": pixels}
    flat = {name: _flat(leaf) for name, leaf in leaves.items()}
    names = [
        f"{name} {place}" if leaf.ndim > 1 else name
        for name, leaf in leaves.items()
        for place in range(flat[name].shape[1])
    ]
    # Booleans and whole numbers are drawn as numbers, too.
    entries = np.concatenate([leaf.astype(np.float64) for leaf in flat.values()], 1)[:, :MOST]
    return clip | {"entries": entries.tolist(), "names": names[:MOST], "size": len(names)}


def as_pictures(frames: np.ndarray) -> np.ndarray:
    """Return frames [T, height, width] or [T, height, width, channels] as colours, uint8 [T, height, width, 3].

    Bytes are grey, of three channels colours, and of more channels the last one (frames that are stacked). Floats and
    whole numbers of one channel are grey, of three colours; they are scaled if they are not from 0 to 1. Other channels
    have a colour each, of which the last that is there covers the others.

    Example:
      >>> as_pictures(np.array([[[True, False]]]))[0, 0].tolist()
      [[230, 159, 0], [0, 0, 0]]
    """
    frames = frames[..., None] if frames.ndim == 3 else frames
    channels = frames.shape[-1]
    if frames.dtype == np.uint8:
        return np.ascontiguousarray(frames if channels == 3 else np.repeat(frames[..., -1:], 3, -1))
    if frames.dtype != bool and channels in (1, 3):
        least, most = min(0.0, frames.min(initial=0)), max(1.0, frames.max(initial=1))
        grey = np.round(255 * ((frames - least) / (most - least))).astype(np.uint8)
        return np.ascontiguousarray(np.broadcast_to(grey, (*frames.shape[:3], 3)))
    pictures = np.zeros((*frames.shape[:3], 3), np.uint8)
    for channel in range(channels):
        pictures[frames[..., channel] > 0] = COLOURS[channel % len(COLOURS)]
    return pictures


def words(header: Header) -> dict[str, Any]:
    """Return what `about` of a file says to people: its "question" and "environment", and lists of names, "actions" of
    discrete actions and "channels" of images, with their colours. What is not there, or of another kind, is left out.

    Example:
      >>> about = {"question": "Which one is faster?", "channels": ["paddle", "ball"]}
      >>> found = words(Header(None, {"discrete": 2}, 5, False, False, about))
      >>> found["question"], found["actions"], found["legend"][0]
      ('Which one is faster?', [], {'name': 'paddle', 'colour': '#e69f00'})
    """
    about = header.about if isinstance(header.about, dict) else {}
    texts = {name: about[name] if isinstance(about.get(name), str) else None for name in ("question", "environment")}
    actions, channels = (about[name] if isinstance(about.get(name), list) else [] for name in ("actions", "channels"))
    colours = [f"#{bytes(colour).hex()}" for colour in COLOURS]
    named = [{"name": str(name), "colour": colours[place % len(colours)]} for place, name in enumerate(channels)]
    return texts | {"actions": list(map(str, actions)), "legend": named}


def _flat(leaf: np.ndarray) -> np.ndarray:
    return leaf.reshape(len(leaf), math.prod(leaf.shape[1:]))


def _leaves(name: str, tree: Any) -> list[tuple[str, np.ndarray]]:
    if not isinstance(tree, dict):
        return [(name or "entry", tree)]
    return [found for key, value in tree.items() for found in _leaves(f"{name}.{key}" if name else key, value)]
