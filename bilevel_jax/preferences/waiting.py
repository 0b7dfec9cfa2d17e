"""Following a file of preferences while others write it, and waiting for their labels."""

import math
import os
import time
from typing import Any

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.validation import as_size
from bilevel_jax.preferences.encoding import RefusedError
from bilevel_jax.preferences.lines import Contents, RefusedLine, parse, read_header, torn_by

LONGEST_POLL = 3600.0  # seconds


class Follower:
    """What a file of preferences says, read on as it grows.

    `look` reads what was appended since the last time. It takes whole lines only and no lock: nobody who writes waits
    for it. It refuses the lines that `PreferenceFile.read` refuses, and keeps all others. If another file has taken
    the place of the one that was read, it begins again.

    `contents` are the segments, pairs and labels. `refused` are the lines that were not used. `history` has for each
    person the pairs of the labels that count or could count again, the latest last. `identity` tells files apart.

    Args:
      path: an existing file, see `PreferenceFile.create`.

    Raises:
      InputError: there is no such file, or its first line is no header.

    Example:
      >>> import tempfile
      >>> from bilevel_jax.preferences.file import PreferenceFile
      >>> path = tempfile.mkdtemp() + "/labels.jsonl"
      >>> file = PreferenceFile.create(path, jnp.zeros(2), bj.environments.Discrete(3), length=4)
      >>> follower = Follower(path)
      >>> follower.contents.header.length, follower.labelled()
      (4, 0)
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        self.identity = (-1, -1)
        self.look()

    def look(self) -> None:
        """Read what was appended. Raises InputError where the file is gone, or has no header."""
        try:
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
                identity = (status.st_dev, status.st_ino)
                if identity != self.identity or status.st_size < self._offset:
                    self._begin(file.readline())
                    self.identity = identity
                file.seek(self._offset)
                data = file.read()
        except OSError as error:
            raise InputError(f"path: {self.path} cannot be read ({error.strerror})") from None
        *lines, tail = data.split(b"\n")
        if lines and not self._ended:  # the end of a line that was taken without it
            lines.pop(0)
            self._offset, self._ended = self._offset + 1, True
        for line in lines:
            self._offset += len(line) + 1
            self._take(line)
        # A line without its end is one that somebody is writing, or that a crash cut off, unless it is whole.
        if tail and self._ended and _is_whole(tail):
            self._offset, self._ended = self._offset + len(tail), False
            self._take(tail)

    def labelled(self, *, skipped: bool = False) -> int:
        """How many pairs have a label of somebody. `skipped` counts pairs, too, that people have only skipped."""
        latest = ([labels[-1] for labels in people.values() if labels] for people in self.contents.labels.values())
        return sum(bool(labels) and (skipped or set(labels) != {None}) for labels in latest)

    def _begin(self, first: bytes) -> None:
        try:
            header = read_header(parse(first))
        except RefusedError as error:
            raise InputError(f"path: {self.path}, line 1: {error}") from None
        self.contents = Contents(header)
        self.refused: list[RefusedLine] = []
        self.history: dict[str, list[int]] = {}
        self._offset, self._ended = len(first), first.endswith(b"\n")
        self._line = 1  # the number of the last line
        self._broken = 0  # the number of the last line that is no JSON, as what a crash cuts off

    def _take(self, line: bytes) -> None:
        self._line += 1
        try:
            value = parse(line)
        except RefusedError as error:
            self.refused.append(RefusedLine(self._line, str(error)))
            self._broken = self._line
            return
        if self._broken == self._line - 1 == torn_by(value):
            self.refused.pop()
            return
        try:
            self.contents.take(value)
        except RefusedError as error:
            self.refused.append(RefusedLine(self._line, str(error)))
            return
        if "label" in value:
            self.history.setdefault(value["by"], []).append(value["label"])
        elif "undo" in value:
            pairs = self.history[value["by"]]
            del pairs[len(pairs) - 1 - pairs[::-1].index(value["undo"])]


def wait_for_labels(
    path: str | os.PathLike[str], count: int, timeout: float | None, poll: float = 1.0, *, skipped: bool = False
) -> int:
    """Wait until people have labelled `count` pairs of a file, or the time is over.

    The file may be written all the while, by any number of programs; waiting locks none of them out. Ctrl-C ends it.

    Args:
      path: a `PreferenceFile`.
      count: how many pairs of the file must have a label, those of earlier calls included.
      timeout: after how many seconds to go on with the labels that there are; 0 only looks. None waits for ever: if
        the file has fewer pairs, or people skip some, that is until somebody ends the program.
      poll: seconds between two looks at the file, above 0 and at most 3600.
      skipped: whether a pair counts, too, that people have only skipped. It is answered, but `PreferenceFile.read`
        has it with weight 0.

    Returns:
      How many pairs have labels. It is below `count` if the time was over.

    Raises:
      InputError: there is no such file, or it vanishes; a count below 0, a negative timeout, a poll that is no time.

    Example:
      >>> import tempfile
      >>> path = tempfile.mkdtemp() + "/labels.jsonl"
      >>> file = bj.preferences.PreferenceFile.create(path, jnp.zeros(2), bj.environments.Discrete(3), length=4)
      >>> bj.preferences.wait_for_labels(path, 20, timeout=0.1, poll=0.05)  # nobody has labelled anything
      0
    """
    count = as_size("count", count, "give a number of pairs", least=0)
    seconds = math.inf if timeout is None else _as_seconds("timeout", timeout)
    if seconds < 0:
        raise InputError(f"timeout: expected seconds from 0 on, or None to wait for ever, got {timeout}")
    if not 0 < _as_seconds("poll", poll) <= LONGEST_POLL:
        raise InputError(f"poll: expected seconds above 0 and at most {LONGEST_POLL:.0f}, got {poll}")
    end = time.monotonic() + seconds
    follower = Follower(path)
    while (found := follower.labelled(skipped=skipped)) < count and (left := end - time.monotonic()) > 0:
        time.sleep(min(float(poll), left))
        follower.look()
    return found


def _as_seconds(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise InputError(f"{name}: expected a number of seconds, got {value!r}")
    return float(value)


def _is_whole(line: bytes) -> bool:
    """Whether a line is JSON. No beginning of an object is one."""
    try:
        parse(line)
    except RefusedError:
        return False
    return True
