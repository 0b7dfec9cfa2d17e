"""Who labels which pair next, and what becomes of the answers. Nothing here knows HTTP."""

import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bilevel_jax.core.errors import InputError
from bilevel_jax.experiments.labelling.clips import as_clip, words
from bilevel_jax.preferences.file import PreferenceFile
from bilevel_jax.preferences.waiting import Follower

NAME = "labels.jsonl"
LEASE = 60.0  # seconds; the page asks again long before
LONGEST_NAME = 80
LISTED = 20  # refused lines that are sent
VALUES = (1, 0.5, 0, None)  # the first is better, equal, the second is better, skipped


class OtherFileError(InputError):
    """An answer to a question of another file, such as of one that lay in the same place before."""


class UnavailableError(InputError):
    """The file cannot be read now. What was asked may be asked again."""


class Desk:
    """Hands out pairs of a file, each to one person at a time, and writes the answers into it.

    A person gets a pair that they have not answered and that nobody else looks at, first one that nobody has judged.
    It is theirs for `lease` seconds from the last request on. All methods may be called by several threads.

    Args:
      directory: where labels.jsonl is, a `PreferenceFile`; other programs may append to it.
      lease: in seconds.
      now: a clock, in seconds.

    Raises:
      InputError: there is no such directory or file, or the file has no header.

    Example:
      >>> import tempfile
      >>> directory = tempfile.mkdtemp()
      >>> file = PreferenceFile.create(f"{directory}/labels.jsonl", jnp.zeros(2), bj.environments.Discrete(3), length=4)
      >>> Desk(directory).next("Ada")["pair"] is None  # there is none yet
      True
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, lease: float = LEASE, now: Callable[[], float] = time.monotonic
    ):
        directory = Path(directory)
        if not directory.is_dir():
            raise InputError(f"DIR: there is no directory {directory}; make one that holds {NAME}")
        path = directory / NAME
        if not path.exists():
            raise InputError(
                f"DIR: {directory} holds no {NAME}; make it by bilevel_jax.preferences.PreferenceFile.create"
            )
        self.follower = Follower(path)
        self._lease, self._now = lease, now
        self._leases: dict[int, tuple[str, float]] = {}  # of a pair: who looks at it, and until when
        self._lock = threading.Lock()
        self._opened()

    def next(self, by: Any, holding: Any = None, file: Any = None) -> dict[str, Any]:
        """Return a pair to label, or None where nothing is left, with its clips unless it is the one that they hold.

        Args:
          by: who asks.
          holding: the number of the pair that they look at. They keep it while it is theirs.
          file: of which file that pair is, as in what this returned; None does not check it.

        Raises:
          InputError: what is no name; the file is gone (`UnavailableError`).
        """
        with self._lock:
            self._look()
            return self._offer(_as_person(by), holding if file in (None, self._id) else None)

    def label(self, by: Any, pair: Any, value: Any, file: Any = None) -> dict[str, Any]:
        """Write an answer, and return the next pair. An answer that is there already is not written again.

        Args:
          by: who answers.
          pair: its number.
          value: 1 the first is better, 0.5 equal, 0 the second is, None skipped.
          file: of which file the pair is, as in what `next` returned; None does not check it.

        Raises:
          InputError: what is no name, pair or value; the file is gone, or another one (`OtherFileError`).
          OSError: the answer cannot be written, e.g. because the disk is full.
        """
        by = _as_person(by)
        if isinstance(value, bool) or value not in VALUES:
            raise InputError(f"value: expected 1, 0.5, 0 or null, got {value!r:.40}")
        with self._lock:
            self._look()
            if file not in (None, self._id):
                raise OtherFileError("file: the answer is to a question of another file; it was not written")
            if type(pair) is not int or pair not in self.follower.contents.pairs:
                raise InputError(f"pair: there is no pair {pair!r:.40}")
            given = self._answers(pair, by)
            if not given or given[-1] != value:
                self._file.append_label(pair, value, by=by)
                self._look()
            return self._offer(by)

    def undo(self, by: Any) -> dict[str, Any]:
        """Take back the last answer of a person, and return its pair, to be labelled again.

        Raises:
          InputError: what is no name; they have no answer; the file is gone.
          OSError: it cannot be written.
        """
        by = _as_person(by)
        with self._lock:
            self._look()
            pairs = self.follower.history.get(by)
            if not pairs:
                raise InputError(f"undo: {by} has no answer that could be taken back")
            pair = pairs[-1]
            self._file.undo(pair, by=by)
            self._look()
            return self._offer(by, first=pair)

    def _opened(self) -> None:
        """The file is another one than before."""
        self._file = PreferenceFile(self.follower.path)
        self._identity = self.follower.identity
        # Pairs of one file must not get the answers of another: pages outlive the server, and files keep their names.
        mark = f"{os.path.realpath(self.follower.path)} {self._identity}"
        self._id = hashlib.sha256(mark.encode()).hexdigest()[:16]
        self._leases.clear()

    def _look(self) -> None:
        try:
            self.follower.look()
            if self.follower.identity != self._identity:
                self._opened()
        except InputError as error:
            raise UnavailableError(str(error)) from None

    def _answers(self, pair: int, by: str) -> list[float | None]:
        return self.follower.contents.labels.get(pair, {}).get(by, [])

    def _seen(self, pair: int) -> tuple[int, int]:
        """How many people have judged a pair, and how many have skipped it."""
        latest = [labels[-1] for labels in self.follower.contents.labels.get(pair, {}).values() if labels]
        return len(latest) - latest.count(None), latest.count(None)

    def _offer(self, by: str, holding: Any = None, first: int | None = None) -> dict[str, Any]:
        time = self._now()
        self._leases = {pair: lease for pair, lease in self._leases.items() if lease[1] > time}
        contents = self.follower.contents
        left = [pair for pair in contents.pairs if not self._answers(pair, by)]

        def order(pair: int) -> tuple[bool, bool, tuple[int, int]]:
            holder = self._leases.get(pair, (None,))[0]
            mine = holder == by or (pair == holding and holder is None)
            return holder not in (None, by), not mine, self._seen(pair)

        # Of pairs alike, the first in the file. What was taken back comes again, whoever looks at it.
        pair = min(left, key=order, default=None) if first is None else first
        self._leases = {leased: lease for leased, lease in self._leases.items() if lease[0] != by}
        if pair is not None:
            self._leases.setdefault(pair, (by, time + self._lease))
        mine = [labels[-1] for people in contents.labels.values() if (labels := people.get(by))]
        refused = [{"line": line.line, "reason": line.reason} for line in self.follower.refused[:LISTED]]
        return {
            "file": self._id,
            **words(contents.header),
            "pair": None if pair is None else self._shown(pair, with_clips=pair != holding),
            "counts": {
                "mine": len(mine),
                "skipped": mine.count(None),
                "all": self.follower.labelled(),
                "pairs": len(contents.pairs),
                "left": len(left),
            },
            "refused": {"count": len(self.follower.refused), "lines": refused},
        }

    def _shown(self, pair: int, *, with_clips: bool) -> dict[str, Any]:
        contents = self.follower.contents
        sides = (contents.pairs[pair].first, contents.pairs[pair].second)
        clips = [as_clip(contents.segments[side], contents.header) for side in sides] if with_clips else None
        return {"number": pair, "clips": clips}


def _as_person(by: Any) -> str:
    name = by.strip() if isinstance(by, str) else ""
    if not 0 < len(name) <= LONGEST_NAME or not name.isprintable():
        raise InputError(f"by: expected a name of 1 to {LONGEST_NAME} printable letters, got {by!r:.100}")
    return name
