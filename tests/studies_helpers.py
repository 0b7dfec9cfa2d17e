"""What the tests of the studies share: calling one's command line in-process."""

import contextlib
import io
from pathlib import Path

from experiment_helpers import Called

from benchmarks.studies.study import Study, main


def call(study: Study, *arguments: str | Path) -> Called:
    """`python -m benchmarks.studies.NAME ARGUMENTS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(study, [str(argument) for argument in arguments])
        except SystemExit as end:  # of argparse
            code = int(end.code or 0)
    return Called(code, out.getvalue(), err.getvalue())
