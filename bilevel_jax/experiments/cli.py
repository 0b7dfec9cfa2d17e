"""The command line: bilevel-jax run | compare | report | list | plot | label."""

import argparse
import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bilevel_jax import __version__
from bilevel_jax.core.errors import InputError
from bilevel_jax.experiments.interruption import InterruptionError, noticed


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point.

    Returns:
      The exit status: 0; 2 for bad input, also where the device refuses; 130 and 143 after SIGINT and SIGTERM; 141
      where nobody reads on.
    """
    parser = _parser()
    # argparse takes overrides on one side of --out only; the rest it leaves over.
    options, rest = parser.parse_known_args(arguments)
    if rest and (any(word.startswith("-") for word in rest) or not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    for stream in (sys.stdout, sys.stderr):  # names and titles may have letters that a terminal has not
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        with _interruptible(options), _compiling():
            if options.command in COMPUTING:
                _require_device()
            options.command(options)
        sys.stdout.flush()
    except BrokenPipeError:  # of `| head`; Python would flush once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except InputError as error:
        print(f"bilevel-jax: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"bilevel-jax: error: {error.name} is not installed; pip install 'bilevel_jax[cli]'", file=sys.stderr)
        return 2
    except InterruptionError as error:
        kept = "; the state is kept: the same command with this --out goes on from there"
        print(f"bilevel-jax: interrupted{kept if hasattr(options, 'fresh') else ''}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("bilevel-jax: interrupted; what was kept last is in the directory", file=sys.stderr)
        return 130
    except _device_errors() as error:
        text = " ".join(str(error).split())
        print(
            f"bilevel-jax: error: JAX or the device refused: {text:.300}; choose a smaller problem, a lower "
            f"memory_limit_mb, or another device by JAX_PLATFORMS",
            file=sys.stderr,
        )
        return 2
    return 0


def _device_errors() -> tuple[type[Exception], ...]:
    """What JAX raises where the device has no room, or does not exist."""
    import jax

    return (jax.errors.JaxRuntimeError, MemoryError)


def _require_device() -> None:
    """Raise InputError where JAX finds no device; it says so by an error of its own kind for each reason."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS", "")
        raise InputError(
            f"JAX_PLATFORMS={asked}: JAX finds no such device ({error}); unset it, or install one"
        ) from None


@contextlib.contextmanager
def _interruptible(options: argparse.Namespace) -> Iterator[None]:
    """Signals end a command that computes where it looks for them, or at its end; a second one ends the process."""
    if options.command not in COMPUTING:
        yield
        return
    with noticed(again=signal.SIG_DFL) as stop:
        yield
        stop.check()


@contextlib.contextmanager
def _compiling() -> Any:
    """With JAX_DISABLE_JIT set there is nothing to compile, and experiments are made of compiled programs."""
    import jax

    with jax.disable_jit(False):
        yield


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bilevel-jax", description="Bilevel reinforcement learning experiments.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run a config", description="Run a YAML config; see configs/.")
    run.set_defaults(command=_run)
    compare = commands.add_parser(
        "compare",
        help="compare algorithms on problems",
        description="Compare algorithms on problems; see configs/compare/.",
    )
    compare.set_defaults(command=_compare)
    for command, example in ((run, "optimizer.learning_rate=0.1"), (compare, "budget.transitions=100000")):
        command.add_argument("config", help="path of a YAML config, e.g. configs/four_rooms.yaml")
        command.add_argument("overrides", nargs="*", metavar="key=value", help=f"e.g. {example}")
        command.add_argument(
            "--out", type=Path, help="directory of the results, where an earlier start goes on; default runs/NAME-TIME"
        )
        command.add_argument(
            "--fresh", action="store_true", help="begin anew; what is in the directory is moved into before-1 there"
        )
    report = commands.add_parser("report", help="one Markdown page of several comparisons")
    help_of_sources = "what --out of a comparison was, or a Markdown file"
    report.add_argument("sources", nargs="+", type=Path, metavar="DIR", help=help_of_sources)
    report.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page, e.g. docs/benchmarks.md")
    report.set_defaults(command=_report)
    listing = commands.add_parser("list", help="problems, algorithms, and everything else that a config can name")
    listing.add_argument("modules", nargs="*", metavar="MODULE", help="import these first, e.g. my_problem.py")
    listing.set_defaults(command=_list)
    plot = commands.add_parser("plot", help="draw the pictures of a finished run again")
    plot.add_argument("directory", type=Path, metavar="DIR", help="what --out was")
    plot.set_defaults(command=_plot)
    label = commands.add_parser("label", help="show a page on which people label pairs of clips")
    label.add_argument("directory", type=Path, metavar="DIR", help="holds labels.jsonl, see docs/preferences.md")
    label.add_argument("--by", default="", metavar="NAME", help="the name that the page suggests")
    label.add_argument("--host", default="127.0.0.1", help="an address of this machine; default 127.0.0.1, it alone")
    label.add_argument("--port", type=int, default=8765, help="default 8765; 0 is a free one")
    label.add_argument("--fps", type=float, default=15.0, help="steps per second; default 15")
    label.set_defaults(command=_label)
    return parser


def _run(options: argparse.Namespace) -> None:
    from bilevel_jax.experiments.config import load
    from bilevel_jax.experiments.present.plots import plot
    from bilevel_jax.experiments.present.run import run

    config = load(options.config, options.overrides)
    summary, directory = run(config, options.out, fresh=options.fresh)
    with noticed() as stop:
        stop.check()
    plot(directory)
    for line in summary.get("labels", ()):
        print(line)
    value = summary["final_value"]
    print(
        f"{config.name}: {summary['runs']} runs in {summary['seconds']:.1f} s "
        f"(compile {summary['compile_seconds']:.1f} s), "
        f"best final objective {'none' if value is None else format(value, '.6g')}"
    )
    _print_files(directory)


def _compare(options: argparse.Namespace) -> None:
    from bilevel_jax.experiments.comparison import load_comparison
    from bilevel_jax.experiments.present.compare import compare

    comparison = load_comparison(options.config, options.overrides)
    summary, directory = compare(comparison, options.out, lambda line: print(line, flush=True), fresh=options.fresh)
    print((directory / "table.md").read_text(encoding="utf-8"))
    print(f"{comparison.name}: {summary['runs']} runs in {summary['seconds']:.1f} s")
    _print_files(directory)


def _print_files(directory: Path) -> None:
    for path in sorted(directory.iterdir()):
        if not path.name.startswith("."):
            print(f"  {path}")


def _report(options: argparse.Namespace) -> None:
    from bilevel_jax.experiments.present.report import report

    for path in report(options.sources, options.out):
        print(path)


def _list(options: argparse.Namespace) -> None:
    from bilevel_jax.experiments.keys import CompareSection, RunSection
    from bilevel_jax.experiments.modules import import_module
    from bilevel_jax.experiments.present.listing import listing

    for name in options.modules:
        import_module(name, Path())
    print(listing(RunSection, CompareSection))


def _plot(options: argparse.Namespace) -> None:
    from bilevel_jax.experiments.present.plots import plot

    for path in plot(options.directory):
        print(path)


def _label(options: argparse.Namespace) -> None:
    from bilevel_jax.experiments.labelling.server import serve

    serve(options.directory, by=options.by, host=options.host, port=options.port, fps=options.fps)


# Commands that use the device.
COMPUTING = (_run, _compare, _plot)

if __name__ == "__main__":
    sys.exit(main())
