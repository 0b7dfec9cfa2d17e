"""The lines of a file of preferences: what each says, and which are refused and why. See docs/preferences.md."""

import datetime
import json
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from bilevel_jax.core.errors import InputError
from bilevel_jax.preferences.encoding import (
    RefusedError,
    decode,
    decode_shapes,
    decode_space,
    decode_tree,
    require_fields,
    short,
)

FORMAT, VERSION = "bilevel_jax.preferences", 1
HEADER = ("format", "version", "observation", "action_space", "length", "next_observation", "reward", "about")
KINDS = ("segment", "pair", "label", "undo", "torn")
LARGEST = 2**31 - 1


class Header(NamedTuple):
    """The first line of a file: what its segments are made of.

    `observation` has the shapes and dtypes of one, an array or dicts of arrays; `action_space` is as JSON has it;
    `length` is H; `next_observation` and `reward` say whether segments have them; `about` is free.
    """

    observation: Any
    action_space: dict[str, Any]
    length: int
    next_observation: bool
    reward: bool
    about: Any


class RefusedLine(NamedTuple):
    """A line that was not used: its number from 1 on, and what is wrong with it."""

    line: int
    reason: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.reason}"


class Segment(NamedTuple):
    """One segment's arrays, [H, ...]."""

    observation: Any
    action: np.ndarray
    next_observation: Any
    valid: np.ndarray
    reward: np.ndarray | None


class Pair(NamedTuple):
    """One pair: identities of its segments, the kind of source, the iteration."""

    first: int
    second: int
    source: str
    iteration: int


def parse(text: bytes) -> dict[str, Any]:
    """Return a line as an object. Raises RefusedError where it is no JSON, has NaN, or names a field twice.

    Example:
      >>> parse(b'{"undo": 3}')
      {'undo': 3}
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RefusedError:
        raise
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"no JSON ({error})") from None
    if not isinstance(value, dict):
        raise RefusedError(f"expected an object, got {short(value)}")
    return value


def read_header(value: dict[str, Any]) -> Header:
    """Return the header that the first line is. Raises RefusedError."""
    if value.get("format") != FORMAT:
        raise RefusedError(f"the first line is no header of {FORMAT}")
    if value.get("version") != VERSION or type(value["version"]) is not int:
        raise RefusedError(f"version {short(value.get('version'))} is not known; this library reads {VERSION}")
    require_fields(value, HEADER, name="header")
    length = _number("length", value["length"], 1)
    for name in ("next_observation", "reward"):
        if not isinstance(value[name], bool):
            raise RefusedError(f"{name}: expected true or false, got {short(value[name])}")
    decode_space(value["action_space"])
    observation = decode_shapes("observation", value["observation"])
    return Header(
        observation, value["action_space"], length, value["next_observation"], value["reward"], value["about"]
    )


class Contents:
    """What the lines of a file say, taken one by one. `take` raises RefusedError and then has changed nothing.

    Args:
      segments, pairs: numbers that lines may refer to, and that no line may give again, without their contents.
    """

    def __init__(self, header: Header, segments: Iterable[int] = (), pairs: Iterable[int] = ()):
        self.header = header
        self._numbers = {"segment": set(segments), "pair": set(pairs)}
        self.space, self.action_dtype, self.action_shape = decode_space(header.action_space)
        self.segments: dict[int, Segment] = {}
        self.pairs: dict[int, Pair] = {}
        # Of each pair, all labels of each person that were not taken back, the oldest first; None is skipped.
        self.labels: dict[int, dict[str, list[float | None]]] = {}

    def take(self, value: dict[str, Any]) -> None:
        """Read one line that is not the first."""
        kinds = [kind for kind in KINDS if kind in value]
        if not kinds:
            raise RefusedError(f"expected one of {', '.join(KINDS)}, got an object with {short(', '.join(value))}")
        getattr(self, f"_{kinds[0]}")(value)

    def _segment(self, value: dict[str, Any]) -> None:
        header = self.header
        optional = ["next_observation"] * header.next_observation + ["reward"] * header.reward
        require_fields(value, ("segment", "observation", "action", "valid", *optional), name="segment")
        number = _new("segment", value["segment"], self._numbers["segment"])
        lead = (header.length,)
        observation = decode_tree("observation", value["observation"], header.observation, lead)
        action = decode("action", value["action"], self.action_dtype, lead + self.action_shape)
        self._require_action(action)
        following = reward = None
        if header.next_observation:
            following = decode_tree("next_observation", value["next_observation"], header.observation, lead)
        if header.reward:
            reward = decode("reward", value["reward"], np.dtype(np.float64), lead)
        valid = decode("valid", value["valid"], np.dtype(bool), lead)
        self.segments[number] = Segment(observation, action, following, valid, reward)
        self._numbers["segment"].add(number)

    def _pair(self, value: dict[str, Any]) -> None:
        require_fields(value, ("pair", "first", "second", "source", "iteration"), name="pair")
        number = _new("pair", value["pair"], self._numbers["pair"])
        first, second = (_known(side, value[side], self._numbers["segment"], "segment") for side in ("first", "second"))
        source = _text("source", value["source"])
        self.pairs[number] = Pair(first, second, source, _number("iteration", value["iteration"], 0))
        self._numbers["pair"].add(number)

    def _label(self, value: dict[str, Any]) -> None:
        require_fields(value, ("label", "value", "by", "time"), name="label")
        pair = _known("label", value["label"], self._numbers["pair"], "pair")
        label = as_label(value["value"])
        person = _text("by", value["by"])
        _require_time(value["time"])
        self.labels.setdefault(pair, {}).setdefault(person, []).append(label)

    def _undo(self, value: dict[str, Any]) -> None:
        require_fields(value, ("undo", "by", "time"), name="undo")
        pair = _known("undo", value["undo"], self._numbers["pair"], "pair")
        person = _text("by", value["by"])
        _require_time(value["time"])
        labels = self.labels.get(pair, {}).get(person)
        if not labels:
            raise RefusedError(f"undo: {short(person)} has no label of pair {pair} that could be taken back")
        labels.pop()

    def _torn(self, value: dict[str, Any]) -> None:
        raise RefusedError("torn: the line before this one was not cut off")

    def _require_action(self, action: np.ndarray) -> None:
        if isinstance(self.space, int):
            if ((action < 0) | (action >= self.space)).any():
                raise RefusedError(f"action: expected numbers from 0 to {self.space - 1}")
            return
        low, high = (np.broadcast_to(bound, action.shape).astype(action.dtype) for bound in self.space)
        if ((action < low) | (action > high)).any():
            raise RefusedError("action: one is outside the box of the header")


def as_label(value: Any) -> float | None:
    """Return a label as a number from 0 to 1, or None for skipped. Raises RefusedError.

    Example:
      >>> as_label(1), as_label(None)
      (1.0, None)
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise RefusedError(
            f"value: a label is 1 (the first is better), 0.5, 0 or null (skipped), or between, got {short(value)}"
        )
    return float(value)


def torn_by(value: dict[str, Any]) -> int | None:
    """Return the number of the line that this one says was cut off by a crash; None where it says nothing like it."""
    if set(value) == {"torn"} and type(value["torn"]) is int:
        return value["torn"]
    return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RefusedError(f"the field {short(twice)} is there twice")
    return made


def _no_constant(name: str) -> Any:
    raise RefusedError(f"{name} is no number")


def _number(name: str, value: Any, least: int) -> int:
    if type(value) is not int or not least <= value <= LARGEST:
        raise RefusedError(f"{name}: expected a whole number from {least} on, got {short(value)}")
    return value


def _new(name: str, value: Any, known: set[int]) -> int:
    number = _number(name, value, 0)
    if number in known:
        raise RefusedError(f"{name}: there is a {name} {number} already")
    return number


def _known(name: str, value: Any, known: set[int], kind: str) -> int:
    number = _number(name, value, 0)
    if number not in known:
        raise RefusedError(f"{name}: there is no {kind} {number} before this line")
    return number


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise RefusedError(f"{name}: expected a name, got {short(value)}")
    return value


def _require_time(value: Any) -> None:
    try:
        datetime.datetime.fromisoformat(value)
    except (TypeError, ValueError):
        raise RefusedError(f"time: expected ISO 8601, such as 2025-01-31T12:00:00+00:00, got {short(value)}") from None


def as_line(value: dict[str, Any]) -> bytes:
    """Return an object as a line. Raises InputError where JSON cannot hold it, or has NaN.

    Example:
      >>> as_line({"undo": 3})
      b'{"undo":3}\\n'
    """
    try:
        text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"about: it cannot be written as JSON ({error}); give texts, numbers, lists and dicts"
        ) from None
    return text.encode("ascii") + b"\n"
