"""What the tests of the command-line runner share: calling it in-process and reading what it wrote."""

import contextlib
import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bilevel_jax.experiments import cli


class Called(NamedTuple):
    """One call of the command line: exit status and what it printed."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The line that explains the exit, without the progress bar."""
        return self.err.replace("\r", "\n").strip().split("\n")[-1]


def command(*arguments: str | Path) -> Called:
    """Call `bilevel-jax` in this process. Unlike capsys, it works in fixtures of a module too."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(argument) for argument in arguments])
    return Called(code, out.getvalue(), err.getvalue())


def run(config: Path, out: Path, overrides: Sequence[str] = ()) -> Called:
    return command("run", config, *overrides, "--out", out)


def write(directory: Path, text: str, name: str = "config.yaml") -> Path:
    path = directory / name
    path.write_text(text)
    return path


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))
