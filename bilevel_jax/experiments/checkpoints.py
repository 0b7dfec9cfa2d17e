"""Files that survive an interruption: they are written under another name first, and checked when they are read."""

import contextlib
import dataclasses
import json
import os
import struct
import time
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

SUFFIX = ".npz"
# What reading a damaged zip file may raise: RuntimeError where a flipped bit says that it is encrypted, or newer.
DAMAGED = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    RuntimeError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside this one to write to. It takes the place of the file if nothing is raised, and is removed else."""
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def remove_parts(directory: Path, names: Iterable[str]) -> None:
    """Remove what processes that were killed left of files of these names or patterns, which they were replacing."""
    parts = [path for path in directory.glob("*.part*") if path.suffix.removeprefix(".part").isdecimal()]
    for path in parts:
        if path.is_file() and not path.is_symlink() and any(fnmatchcase(path.stem, name) for name in names):
            path.unlink(missing_ok=True)


def write_arrays(path: Path, arrays: dict[str, Any], described: dict[str, Any] | None = None) -> None:
    """Write arrays by name, and a description, so that a file of this name is whole or is not there.

    Args:
      path: a name that ends in .npz.
      arrays: numpy arrays, or values that numpy turns into arrays; no objects.
      described: values that JSON can write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    note = {} if described is None else {"described": np.asarray(json.dumps(described))}
    with replacing(path) as part, part.open("wb") as file:
        np.savez(file, **arrays, **note)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """Return what `write_arrays` wrote, or None where the file is damaged, which the checksums of zip files show."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as opened:
            arrays = dict(opened)
        described = json.loads(str(arrays.pop("described"))) if "described" in arrays else {}
    except DAMAGED:
        return None
    return arrays, described


@dataclasses.dataclass
class Checkpoints:
    """The latest states of one chunk of runs: `keep` files NAME-NUMBER.npz in a directory.

    minutes: the time between two that `due` asks for. points: the number of points between two; None sets no such rule.
    """

    directory: Path
    name: str
    minutes: float
    points: int | None
    keep: int
    written: float = dataclasses.field(default_factory=time.monotonic)

    def due(self, point: int | None = None) -> bool:
        """Return whether one is to be written now, at a point of the curves or between two of them."""
        if point is not None and self.points is not None and point % self.points == 0:
            return True
        return time.monotonic() - self.written >= 60 * self.minutes

    def write(self, arrays: dict[str, Any], described: dict[str, Any]) -> None:
        """Write one, and remove those that are too many."""
        numbers = [number for number, _ in self._files()]
        path = self.directory / f"{self.name}-{max(numbers, default=0) + 1}{SUFFIX}"
        write_arrays(path, arrays, described)
        self.written = time.monotonic()
        for _, old in self._files()[self.keep :]:
            old.unlink(missing_ok=True)

    def latest(self) -> Iterable[tuple[Path, dict[str, np.ndarray], dict[str, Any]]]:
        """Yield those that are whole, the newest first. A damaged one is skipped with a warning that names it."""
        for _, path in self._files():
            found = read_arrays(path)
            if found is None:
                warnings.warn(f"{path} is damaged; the one before is taken, if there is one", stacklevel=2)
                continue
            yield path, *found

    def remove(self) -> None:
        """Remove all: the chunk is finished."""
        for _, path in self._files():
            path.unlink(missing_ok=True)

    def _files(self) -> list[tuple[int, Path]]:
        """Numbers and paths, the newest first."""
        found = []
        for path in self.directory.glob(f"{self.name}-*{SUFFIX}"):
            number = path.name[len(self.name) + 1 : -len(SUFFIX)]
            if number.isdecimal():
                found.append((int(number), path))
        return sorted(found, reverse=True)
