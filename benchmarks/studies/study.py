"""What every study is: options, a run that writes tables, a picture of them; and its command line."""

import argparse
import dataclasses
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import yaml

from benchmarks.common.options import add_options, parse, read_options
from benchmarks.common.timing import RESULTS
from bilevel_jax.core.errors import InputError

STUDIES = RESULTS / "studies"


class Study(NamedTuple):
    """`run(options, directory, report)` writes tables, `plot(directory)` a picture of them.

    `cases`: by name, the options of each run whose results are kept; the first is the default.
    """

    name: str
    cases: Mapping[str, Any]
    run: Callable[[Any, Path, Callable[[str], None]], None]
    plot: Callable[[Path], None]


def main(study: Study, arguments: Sequence[str] | None = None) -> int:
    """Run a study as the command line says. Returns the exit status: 0, or 2 for bad input."""
    case, out, options = read(study, arguments)
    directory = STUDIES / case if out is None else out
    try:
        run(study, options, directory, lambda line: print(line, flush=True))
    except InputError as error:
        print(f"{study.name}: error: {error}", file=sys.stderr)
        return 2
    for path in sorted(directory.iterdir()):
        print(f"  {path}")
    return 0


def read(study: Study, arguments: Sequence[str] | None = None) -> tuple[str, Path | None, Any]:
    """The case, --out and the options of a command line, which ends the process where it is wrong."""
    choice = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first = next(iter(study.cases))
    choice.add_argument("--case", choices=study.cases, default=first, help=f"whose defaults (default: {first})")
    choice.add_argument("--out", type=Path, help="directory of the results (default: benchmarks/results/studies/CASE)")
    case = choice.parse_known_args(arguments)[0].case
    defaults = study.cases[case]
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.studies.{study.name}",
        description=_head(type(defaults)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[choice],
        allow_abbrev=False,
    )
    add_options(parser, defaults)
    given = parse(parser, arguments)
    return case, given.out, read_options(given, defaults)


def _head(kind: type) -> str:
    """The docstring up to the lines of its fields."""
    names = {field.name for field in dataclasses.fields(kind)}
    lines = [line.strip() for line in (kind.__doc__ or "").splitlines()]
    fields = (i for i, line in enumerate(lines) if line.split(":")[0].split(",")[0] in names)
    return "\n".join(lines[: next(fields, len(lines))]).strip()


def run(study: Study, options: Any, directory: Path, report: Callable[[str], None]) -> None:
    """Run it in float64 and write its tables, its picture, config.yaml and study.json into the directory.

    Raises:
      InputError: the directory cannot be written, or the study refuses an option.
    """
    started = time.perf_counter()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with jax.enable_x64(True):
            study.run(options, directory, report)
        study.plot(directory)
        values = {"study": study.name, **json.loads(json.dumps(dataclasses.asdict(options)))}
        (directory / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        summary = {
            "study": study.name,
            "seconds": round(time.perf_counter() - started, 1),
            "device": str(jax.devices()[0].device_kind),
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("bilevel_jax", "jax", "jaxlib", "optax", "equinox")},
            },
        }
        (directory / "study.json").write_text(json.dumps(summary, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"--out {directory}: cannot be written ({error}); give another directory") from None


def make_problem(section: Mapping[str, Any]) -> Any:
    """The registered problem of an option such as {"name": "garnet", "states": 20}. Raises InputError."""
    import bilevel_jax as bj

    return bj.problems.make(str(section.get("name")), **{key: value for key, value in section.items() if key != "name"})
