"""The directory of an experiment's results: which experiment it belongs to, and who writes into it now."""

import contextlib
import errno
import itertools
import json
import os
import socket
import time
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from bilevel_jax.core.errors import InputError
from bilevel_jax.experiments.checkpoints import SUFFIX, remove_parts, replacing
from bilevel_jax.experiments.config import RECORD
from bilevel_jax.experiments.trainer import CELLS, CHECKPOINTS

LOCK = ".bilevel-jax.lock"
# Keys that change how an experiment is run, and none of its numbers.
WITHOUT_EFFECT = ("memory_limit_mb", "checkpoint", "modules")
# What each command writes: names or patterns.
FILES = {
    "run": (
        *(RECORD, "metrics.csv", "runs.csv", "summary.json", "final.npz", CELLS, CHECKPOINTS),
        *("learning_curves.png", "incentive.png"),
    ),
    "compare": (
        *(RECORD, "curves.csv", "table.csv", "table.md", "summary.json", "index.html", CELLS, CHECKPOINTS),
        *("curves-[0-9]*.png", "best-[0-9]*.png"),
    ),
}


@contextlib.contextmanager
def claimed(
    directory: Path | None, name: str, kind: str, values: dict[str, Any], *, fresh: bool = False, changes: bool = False
) -> Iterator[Path]:
    """The directory, made, locked and described, for as long as the context lasts.

    Args:
      directory: None is a new one, runs/NAME-TIME.
      name: of the config.
      kind: "run" or "compare".
      values: the checked config.
      fresh: whether the files of an earlier experiment are moved away, into before-1, before-2, ...
      changes: whether a changed config goes on in the same directory; otherwise it is refused.

    Raises:
      InputError: it cannot be written; another process writes into it; it holds another experiment, or files that
        would be overwritten.
    """
    try:
        directory = _new(name) if directory is None else directory
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory):
            if fresh:
                _move_away(directory)
            _require_own(directory, kind, values, changes)
            remove_parts(directory, [name for name in FILES[kind] if name not in (CELLS, CHECKPOINTS)])
            for place in (CELLS, CHECKPOINTS):
                remove_parts(directory / place, [f"*{SUFFIX}"])
            write_text(directory / RECORD, yaml.safe_dump({"command": kind, **values}, sort_keys=False))
            yield directory
    except OSError as error:
        # Others are not of the directory: nobody reads the output on, or the user's own code failed.
        own = error.filename is not None and Path(str(error.filename)).is_relative_to(str(directory))
        if isinstance(error, BrokenPipeError) or not (own or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)):
            raise
        raise InputError(
            f"--out {directory}: cannot be written ({error}); give another directory, or room on the disk. What was "
            f"finished before is kept"
        ) from None


def write_text(path: Path, text: str) -> None:
    """Write a file so that it has either the new content or its old content."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", newline="")


def recorded(directory: Path) -> dict[str, Any] | None:
    """The record of the directory's experiment; None where there is none, or a file that is none."""
    try:
        found = yaml.safe_load((directory / RECORD).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError):
        return None
    return found if isinstance(found, dict) and found.get("command") in list(FILES) else None


def _new(name: str) -> Path:
    """A directory that nobody has, also if two start in the same second."""
    start = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in range(1, 1000):
        made = Path("runs") / (start if number == 1 else f"{start}-{number}")
        with contextlib.suppress(FileExistsError):
            made.mkdir(parents=True)
            return made
    raise InputError(f"runs/{start}: a thousand of this name exist; give --out")


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Nobody else writes into the directory. The system releases the lock of a process that ends in any way."""
    try:
        import fcntl
    except ImportError:  # on Windows
        yield
        return
    # A link is not followed: what it leads to is not ours to write to.
    handle = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    with os.fdopen(handle, "r+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(file.read())
            raise InputError(
                f"--out {directory}: {holder} writes into it now; wait for it, or give another directory"
            ) from None
        file.truncate(0)
        file.write(json.dumps({"process": os.getpid(), "host": socket.gethostname()}))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _holder(text: str) -> str:
    try:
        found = json.loads(text)
        return f"process {found['process']} on {found['host']}"
    except (ValueError, KeyError):
        return "another process"


def _written(directory: Path, kind: str) -> list[Path]:
    """What is there of the files that this command writes, links that lead nowhere among them."""
    return sorted(path for path in directory.iterdir() if any(fnmatchcase(path.name, name) for name in FILES[kind]))


def _next_before(directory: Path) -> Path:
    """The directory that --fresh moves earlier experiments to."""
    taken = {path.name for path in directory.iterdir()}
    return directory / next(name for name in map("before-{}".format, itertools.count(1)) if name not in taken)


def _move_away(directory: Path) -> None:
    """What earlier experiments left, into a directory within."""
    here = {path for kind in FILES for path in _written(directory, kind)}
    if not here:
        return
    away = _next_before(directory)
    away.mkdir()
    for path in here:
        path.rename(away / path.name)


def _require_own(directory: Path, kind: str, values: dict[str, Any], changes: bool) -> None:
    """Raise InputError where the directory is not this experiment's."""
    before = recorded(directory)
    if before is None:
        for path in _written(directory, kind):
            raise InputError(
                f"--out {directory}: {path.name} is there already and would be overwritten; give another directory, or "
                f"--fresh, which moves it into {_next_before(directory)}"
            )
        return
    if before.get("command") != kind:
        raise InputError(
            f"--out {directory}: holds what bilevel-jax {before.get('command')} wrote; give another directory, or "
            "--fresh"
        )
    different = _differences({k: v for k, v in before.items() if k != "command"}, values)
    if different and not changes:
        raise InputError(
            f"--out {directory}: holds a run of another config ({'; '.join(different[:5])}); give another directory, "
            f"the same config to go on, or --fresh to begin anew beside it"
        )


def _differences(old: Any, new: Any, key: str = "") -> list[str]:
    """What differs between two configs, by dotted key."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [f"{key}: was {old!r}, is {new!r}"]
    found = []
    for name in dict.fromkeys((*old, *new)):
        if key or name not in WITHOUT_EFFECT:
            found += _differences(old.get(name), new.get(name), f"{key}.{name}" if key else str(name))
    return found
