"""A file of preferences: JSON Lines to which several programs and people append. See docs/preferences.md."""

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import ArrayLike, Integer

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.validation import as_array, as_size
from bilevel_jax.environments.spaces import Space, as_space
from bilevel_jax.preferences.dataset import Preferences
from bilevel_jax.preferences.encoding import (
    RefusedError,
    as_action_space,
    encode,
    encode_shapes,
    encode_space,
    encode_tree,
)
from bilevel_jax.preferences.lines import (
    FORMAT,
    LARGEST,
    VERSION,
    Contents,
    Header,
    RefusedLine,
    as_label,
    as_line,
    parse,
    read_header,
    torn_by,
)
from bilevel_jax.preferences.segments import Segments


class Reading(NamedTuple):
    """What a file says.

    `preferences` has the segments and the pairs in the order of the file. `segment_ids` and `pair_ids` are their
    numbers there. The label of a pair is the mean over people of each one's latest; who skipped does not count. Its
    weight is 1, or 0 where nobody has judged it. `people` is how many have, and `labels` has the latest of each person,
    None where skipped. `refused` are lines that were not used, and `torn` the numbers of lines that a crash cut off.
    """

    preferences: Preferences
    header: Header
    action_space: Space
    segment_ids: tuple[int, ...]
    pair_ids: tuple[int, ...]
    labels: tuple[dict[str, float | None], ...]
    people: np.ndarray
    refused: tuple[RefusedLine, ...]
    torn: tuple[int, ...]


class PreferenceFile:
    """A file of segments, pairs and labels, to which lines are only ever appended.

    Several processes and threads may append and read at once, on one machine: each call writes its lines as a whole,
    under a lock, and returns when they are on disk. If a program is killed while it writes, the next one that appends
    marks the line that was cut off; no line is ever removed or changed. The file is data: reading it runs none of it.

    Args:
      path: an existing file, see `create`.

    Raises:
      InputError: there is no such file, or its first line is no header.

    Example:
      >>> import tempfile
      >>> path = tempfile.mkdtemp() + "/labels.jsonl"
      >>> file = bj.preferences.PreferenceFile.create(
      ...     path, jnp.zeros(2), bj.environments.Discrete(3), length=4, next_observation=False, reward=False
      ... )
      >>> segments = bj.preferences.Segments(
      ...     jnp.zeros((2, 4, 2)), jnp.zeros((2, 4), jnp.int32), valid=jnp.ones((2, 4), bool)
      ... )
      >>> one, two = file.append_segments(segments)
      >>> (pair,) = file.append_pairs([[one, two]], source="uniform")
      >>> file.append_label(pair, 1, by="Ada")
      >>> file.append_label(pair, 0.5, by="Ben")
      >>> file.read().preferences.label.tolist()
      [0.75]
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        try:
            with open(self.path, "rb") as file:
                self.header = read_header(parse(file.readline()))
        except RefusedError as error:
            raise InputError(f"path: {self.path}, line 1: {error}") from None
        except OSError as error:
            raise InputError(f"path: {self.path} cannot be read ({error.strerror}); make one by create") from None
        # What was read of the file so far: its bytes, its lines, and the numbers that are taken.
        self._seen, self._lines = 0, 0
        self._segments: set[int] = set()
        self._pairs: set[int] = set()

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        observation: Any,
        action_space: Any,
        length: int,
        *,
        next_observation: bool = True,
        reward: bool = True,
        about: Any = None,
    ) -> "PreferenceFile":
        """Make a file that has a header and nothing else.

        Args:
          path: a file that does not exist yet, in a folder that does.
          observation: one, or its shapes and dtypes (`Environment.observation_space`): an array or dicts of arrays.
          action_space: `Discrete` or `Box`, or one of gymnasium's.
          length: H, the steps of each segment.
          next_observation, reward: whether segments have them.
          about: anything that JSON holds, e.g. the task and who asked.

        Raises:
          InputError: the file exists; what is no observation, space or length.
        """
        header = {
            "format": FORMAT,
            "version": VERSION,
            "observation": encode_shapes("observation", observation),
            "action_space": encode_space(as_space("action_space", action_space)),
            "length": as_size("length", length),
            "next_observation": bool(next_observation),
            "reward": bool(reward),
            "about": {} if about is None else about,
        }
        path = os.fspath(path)
        part = f"{path}.part{os.getpid()}"
        try:
            with open(part, "wb") as file:
                file.write(as_line(header))
                file.flush()
                os.fsync(file.fileno())
            os.link(part, path)  # whole, or not at all, and never over another file
        except FileExistsError:
            raise InputError(f"path: {path} exists; open it by PreferenceFile(path), or take another name") from None
        finally:
            if os.path.exists(part):
                os.unlink(part)
        return cls(path)

    def append_segments(self, segments: Segments) -> tuple[int, ...]:
        """Append segments [N, H] and return their numbers in the file.

        Raises:
          InputError: segments that are not as the header says, NaN or infinities in them.
        """
        header = self.header
        if segments.length != header.length:
            raise InputError(f"segments: expected {header.length} steps as in the header, got {segments.length}")
        given = {"next_observation": segments.next_observation, "reward": segments.reward}
        for name, value in given.items():
            if getattr(header, name) and value is None:
                raise InputError(f"segments: they have no {name}, which the header asks for")
        arrays = jax.tree.map(np.asarray, segments)
        values = []
        for n in range(segments.count):
            one = jax.tree.map(lambda leaf, n=n: leaf[n], arrays)
            value = {
                "observation": encode_tree("observation", one.observation),
                "action": encode("action", one.action),
                "valid": one.valid.tolist(),
            }
            if header.next_observation:
                value["next_observation"] = encode_tree("next_observation", one.next_observation)
            if header.reward:
                value["reward"] = encode("reward", one.reward.astype(np.float64))
            values.append(value)
        self._check(values)
        with self._appending() as write:
            start = _first_free(self._segments, len(values))
            ids = tuple(range(start, start + len(values)))
            write([{"segment": number, **value} for number, value in zip(ids, values, strict=True)])
        return ids

    def append_pairs(
        self,
        pairs: Integer[ArrayLike, "P 2"] | Any,
        *,
        source: str = "pairs",
        iteration: int = 0,
    ) -> tuple[int, ...]:
        """Append pairs of numbers of segments in the file, [P, 2], and return their own numbers.

        Raises:
          InputError: a segment that is not in the file, no source, or a negative iteration.
        """
        array = np.asarray(pairs)
        if array.ndim != 2 or array.shape[1] != 2 or (array.size and array.dtype.kind not in "iu"):
            raise InputError(f"pairs: expected whole numbers [P, 2], got {array.dtype}{list(array.shape)}")
        with self._appending() as write:
            unknown = sorted({int(entry) for entry in array.flat} - self._segments)
            if unknown:
                raise InputError(f"pairs: there is no segment {unknown[0]} in {self.path}; append it first")
            start = _first_free(self._pairs, len(array))
            ids = tuple(range(start, start + len(array)))
            rows = array.tolist()
            values = [
                {"pair": number, "first": row[0], "second": row[1], "source": source, "iteration": iteration}
                for number, row in zip(ids, rows, strict=True)
            ]
            _try(Contents(self.header, segments=self._segments), values)
            write(values)
        return ids

    def append_label(self, pair: int, value: float | None, *, by: str, time: str | None = None) -> None:
        """Append a person's label of a pair: 1 the first is better, 0 the second, 0.5 equal, None skipped.

        Args:
          by: who says so.
          time: ISO 8601; None is now.

        Raises:
          InputError: no such pair, a label outside [0, 1], no name, no time.
        """
        try:
            label = as_label(value.item() if isinstance(value, np.generic) else value)
        except RefusedError as error:
            raise InputError(str(error)) from None
        pair = _as_id(pair)
        self._append_about(pair, {"label": pair, "value": label, "by": by, "time": time or _now()})

    def undo(self, pair: int, *, by: str, time: str | None = None) -> None:
        """Take back a person's latest label of a pair; the one before it, if there is one, counts again.

        Raises:
          InputError: no such pair, no name, no time. That there is a label is checked by `read`.
        """
        pair = _as_id(pair)
        self._append_about(pair, {"undo": pair, "by": by, "time": time or _now()})

    def read(self, *, strict: bool = True) -> Reading:
        """Read the whole file.

        Lines that are no JSON or not of the format, numbers that are taken or unknown, labels outside [0, 1] and wrong
        shapes are refused by their line's number. A line that a crash cut off is no error: `torn` has its number.

        Args:
          strict: raise if a line is refused. False: return all that is right, and the refused lines with the reasons.

        Raises:
          InputError: there is no header, or (if strict) lines are refused; the first few are named.
        """
        with self._opened(os.O_RDONLY, exclusive=False) as descriptor:
            data = _read_from(descriptor, 0)
        contents, refused, torn = _read_lines(self.path, data)
        if strict and refused:
            shown = "; ".join(str(line) for line in refused[:5])
            more = f"; and {len(refused) - 5} more" if len(refused) > 5 else ""
            raise InputError(f"path: {self.path}: {shown}{more}; read(strict=False) returns the rest")
        return _reading(contents, refused, torn)

    def _check(self, values: list[dict[str, Any]]) -> None:
        """Raise where segments are not as the header says: what is written can be read."""
        _try(Contents(self.header), [{"segment": number, **value} for number, value in enumerate(values)])

    def _append_about(self, pair: int, value: dict[str, Any]) -> None:
        contents = Contents(self.header, pairs=[pair])
        contents.labels = {pair: {value["by"]: [None]}} if isinstance(value["by"], str) else {}
        _try(contents, [value])
        with self._appending() as write:
            if pair not in self._pairs:
                raise InputError(f"pair: there is no pair {pair} in {self.path}; append it first")
            write([value])

    @contextlib.contextmanager
    def _opened(self, flags: int, *, exclusive: bool) -> Iterator[int]:
        try:
            import fcntl
        except ImportError:
            raise InputError("path: files of preferences need a system with fcntl.flock, which Windows lacks") from None
        descriptor = os.open(self.path, flags)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
            yield descriptor
        finally:
            os.close(descriptor)  # which gives the lock back

    @contextlib.contextmanager
    def _appending(self) -> Iterator[Any]:
        """Lock the file, look at what others have appended, and give a function that writes lines and waits for the
        disk."""
        with self._opened(os.O_RDWR | os.O_APPEND, exclusive=True) as descriptor:
            before = self._look_at(_read_from(descriptor, self._seen))

            def write(values: list[dict[str, Any]]) -> None:
                data = before + b"".join(map(as_line, values))
                # One call, which takes all but where the disk is full; then it raises, and the next one mends it.
                while data:
                    data = data[os.write(descriptor, data) :]
                os.fsync(descriptor)

            yield write

    def _look_at(self, data: bytes) -> bytes:
        """Note the numbers in lines that others have appended; return what to write in front of the next line."""
        *lines, tail = data.split(b"\n")
        for line in lines:
            self._note(line)
            self._seen += len(line) + 1
            self._lines += 1
        if not tail:
            return b""
        try:
            parse(tail)
        except RefusedError:
            return b"\n" + as_line({"torn": self._lines + 1})
        self._note(tail)
        return b"\n"  # only the end of the line was lost

    def _note(self, line: bytes) -> None:
        try:
            value = parse(line)
        except RefusedError:
            return
        for kind, known in (("segment", self._segments), ("pair", self._pairs)):
            if type(value.get(kind)) is int and 0 <= value[kind] <= LARGEST:
                known.add(value[kind])


def _as_id(pair: Any) -> int:
    return as_size("pair", pair, "give the number of a pair in the file", least=0)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _first_free(taken: set[int], count: int) -> int:
    start = max(taken, default=-1) + 1
    if start + count - 1 > LARGEST:
        raise InputError(f"path: the file has a number of {start - 1}, there is no room for {count} after it")
    return start


def _try(contents: Contents, values: list[dict[str, Any]]) -> None:
    """Raise InputError if lines would be refused."""
    for value in values:
        try:
            contents.take(value)
        except RefusedError as error:
            raise InputError(str(error)) from None


def _read_from(descriptor: int, start: int) -> bytes:
    with os.fdopen(os.dup(descriptor), "rb") as file:
        file.seek(start)
        return file.read()


def _read_lines(path: str, data: bytes) -> tuple[Contents, list[RefusedLine], tuple[int, ...]]:
    *lines, tail = data.split(b"\n")
    if tail:
        lines.append(tail)
    try:
        contents = Contents(read_header(parse(lines[0] if lines else b"")))
    except RefusedError as error:
        raise InputError(f"path: {path}, line 1: {error}") from None
    refused: list[RefusedLine] = []
    torn: list[int] = []
    broken = 0  # the last line that is no JSON, as what a crash cuts off
    for number, line in enumerate(lines[1:], 2):
        try:
            value = parse(line)
        except RefusedError as error:
            refused.append(RefusedLine(number, str(error)))
            broken = number
            continue
        try:
            if broken == number - 1 == torn_by(value):
                torn.append(refused.pop().line)
            else:
                contents.take(value)
        except RefusedError as error:
            refused.append(RefusedLine(number, str(error)))
    if tail and broken == len(lines):
        torn.append(refused.pop().line)  # nobody has appended since the crash
    return contents, refused, tuple(torn)


def _reading(contents: Contents, refused: list[RefusedLine], torn: tuple[int, ...]) -> Reading:
    header, pairs = contents.header, contents.pairs
    places = {number: place for place, number in enumerate(contents.segments)}
    latest = [
        {person: labels[-1] for person, labels in contents.labels.get(number, {}).items() if labels} for number in pairs
    ]
    judged = [[label for label in of_pair.values() if label is not None] for of_pair in latest]
    people = np.asarray([len(of_pair) for of_pair in judged], np.int32)
    label = np.asarray([sum(of_pair) / len(of_pair) if of_pair else 0.5 for of_pair in judged], np.float64)
    sources = tuple(dict.fromkeys(pair.source for pair in pairs.values())) or ("pairs",)
    preferences = Preferences(
        _stacked(contents),
        np.asarray([[places[pair.first], places[pair.second]] for pair in pairs.values()], np.int32).reshape(-1, 2),
        label.astype(jax.dtypes.canonicalize_dtype(float)),
        people > 0,
        np.asarray([sources.index(pair.source) for pair in pairs.values()], np.int32),
        np.asarray([pair.iteration for pair in pairs.values()], np.int32),
        sources,
    )
    return Reading(
        preferences,
        header,
        as_action_space(header.action_space),
        tuple(contents.segments),
        tuple(pairs),
        tuple(latest),
        people,
        tuple(refused),
        torn,
    )


def _stacked(contents: Contents) -> Segments:
    """All segments, [N, H]; there may be none. JAX's dtypes: float64 stays what it is where JAX has it."""
    header, lead = contents.header, (len(contents.segments), contents.header.length)

    def stacked(parts: list[Any], dtype: Any, shape: tuple[int, ...]) -> Any:
        return as_array("segments", np.asarray(parts, dtype).reshape(*lead, *shape))

    def trees(parts: list[Any], like: Any) -> Any:
        if isinstance(like, dict):
            return {name: trees([part[name] for part in parts], inner) for name, inner in like.items()}
        return stacked(parts, like.dtype, like.shape)

    found = list(contents.segments.values())
    return Segments(
        trees([one.observation for one in found], header.observation),
        stacked([one.action for one in found], contents.action_dtype, contents.action_shape),
        trees([one.next_observation for one in found], header.observation) if header.next_observation else None,
        valid=stacked([one.valid for one in found], bool, ()),
        reward=stacked([one.reward for one in found], np.float64, ()) if header.reward else None,
    )
