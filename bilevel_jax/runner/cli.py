"""The command line: bilevel-jax run | compare | report | study | list | plot."""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bilevel_jax.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit status: 0, 2 for bad input, 130 when interrupted."""
    parser = _parser()
    # argparse takes overrides on one side of --out only; the rest it leaves over.
    options, rest = parser.parse_known_args(arguments)
    if rest and (any(word.startswith("-") for word in rest) or not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    try:
        options.command(options)
    except InputError as error:
        print(f"bilevel-jax: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"bilevel-jax: error: {error.name} is not installed; pip install 'bilevel_jax[cli]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bilevel-jax: interrupted; finished runs are in the directory", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bilevel-jax", description="Bilevel reinforcement learning experiments.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run a config", description="Run a YAML config; see configs/.")
    run.add_argument("config", help="path of a YAML config")
    run.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. optimizer.learning_rate=0.1")
    run.add_argument("--out", type=Path, help="directory of the results; default runs/NAME-TIME")
    run.set_defaults(command=_run)
    compare = commands.add_parser(
        "compare", help="compare methods on problems", description="Compare methods on problems; see configs/compare/."
    )
    compare.add_argument("config", help="path of a YAML config")
    compare.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. budget.transitions=100000")
    compare.add_argument(
        "--out", type=Path, help="directory of the results, where an earlier start goes on; default runs/NAME-TIME"
    )
    compare.set_defaults(command=_compare)
    report = commands.add_parser("report", help="one Markdown page of several comparisons")
    help_of_sources = "what --out of a comparison was, or a Markdown file"
    report.add_argument("sources", nargs="+", type=Path, metavar="DIR", help=help_of_sources)
    report.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page, e.g. docs/benchmarks.md")
    report.set_defaults(command=_report)
    study = commands.add_parser("study", help="run a study", description="Run a study; see configs/studies/.")
    study.add_argument("config", help="path of a YAML config")
    study.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. seeds=3")
    study.add_argument("--out", type=Path, help="directory of the results; default runs/NAME-TIME")
    study.set_defaults(command=_study)
    listing = commands.add_parser("list", help="problems, algorithms and their options")
    listing.add_argument("modules", nargs="*", metavar="MODULE", help="import these first, e.g. my_problem.py")
    listing.set_defaults(command=_list)
    plot = commands.add_parser("plot", help="draw the pictures of a finished run again")
    plot.add_argument("directory", type=Path, metavar="DIR", help="what --out was")
    plot.set_defaults(command=_plot)
    return parser


def _run(options: argparse.Namespace) -> None:
    from bilevel_jax.runner.config import load
    from bilevel_jax.runner.plots import plot
    from bilevel_jax.runner.run import run

    config = load(options.config, options.overrides)
    directory = options.out or Path("runs") / f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    summary = run(config, directory)
    plot(directory)
    value = summary["final_value"]
    print(
        f"{config.name}: {summary['runs']} runs in {summary['seconds']:.1f} s "
        f"(compile {summary['compile_seconds']:.1f} s), "
        f"best final objective {'none' if value is None else format(value, '.6g')}"
    )
    for path in sorted(directory.iterdir()):
        print(f"  {path}")


def _compare(options: argparse.Namespace) -> None:
    from bilevel_jax.runner.compare.compare import compare
    from bilevel_jax.runner.compare.config import load

    comparison = load(options.config, options.overrides)
    directory = options.out or Path("runs") / f"{comparison.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    summary = compare(comparison, directory, lambda line: print(line, flush=True))
    print((directory / "table.md").read_text())
    print(f"{comparison.name}: {summary['runs']} runs in {summary['seconds']:.1f} s")
    for path in sorted(directory.iterdir()):
        print(f"  {path}")


def _report(options: argparse.Namespace) -> None:
    from bilevel_jax.runner.compare.report import report

    for path in report(options.sources, options.out):
        print(path)


def _study(options: argparse.Namespace) -> None:
    from bilevel_jax.runner.studies.study import load, run

    study = load(options.config, options.overrides)
    directory = options.out or Path("runs") / f"{study.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    run(study, directory, lambda line: print(line, flush=True))
    for path in sorted(directory.iterdir()):
        print(f"  {path}")


def _list(options: argparse.Namespace) -> None:
    from bilevel_jax.problems import names, spec
    from bilevel_jax.runner.compare.config import CompareSection
    from bilevel_jax.runner.methods import METHODS
    from bilevel_jax.runner.modules import import_module
    from bilevel_jax.runner.schema import SECTIONS, RunSection
    from bilevel_jax.runner.studies.study import STUDIES, options_of

    for name in options.modules:
        import_module(name, Path())
    print("keys at the top")
    _describe("config", (RunSection.__doc__ or "").strip().splitlines()[0], RunSection)
    print("\nproblems (section `problem`)")
    for name in names():
        _describe(name, spec(name).summary, spec(name).options)
    for place, choices in SECTIONS.items():
        print(f"\nsection `{place}`")
        for kind in choices:
            _describe(kind().name, (kind.__doc__ or "").strip().splitlines()[0], kind)
    print("\nmethods (list `methods` of a comparison)")
    for name, method in METHODS.items():
        _describe(name, method.summary, method.options)
        print(f"      optimizer = {' | '.join(method.optimizers)}")
    print("\nkeys at the top of a comparison, beside the lists `problems` and `methods`")
    _describe("config", (CompareSection.__doc__ or "").strip().splitlines()[0], CompareSection)
    print("\nstudies (key `study`)")
    for name in STUDIES:
        kind = options_of(name)
        _describe(name, (kind.__doc__ or "").strip().splitlines()[0], kind)


def _describe(name: str, summary: str, kind: type) -> None:
    print(f"  {name}: {summary}")
    for field in dataclasses.fields(kind):
        if field.name == "name":
            continue
        if field.default is not dataclasses.MISSING:
            print(f"      {field.name} = {field.default}")
        elif field.default_factory is not dataclasses.MISSING:
            made: Any = field.default_factory()
            print(f"      {field.name} = {getattr(made, 'name', made)}")


def _plot(options: argparse.Namespace) -> None:
    from bilevel_jax.runner.plots import plot

    for path in plot(options.directory):
        print(path)


if __name__ == "__main__":
    sys.exit(main())
