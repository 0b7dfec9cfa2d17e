"""The search for wrong certificates: thousands of hard MDPs, each solved and compared with an exact reference.

python -m benchmarks.solvers.certificate_search --cases 20000 --seed 0 --out search.jsonl
python -m benchmarks.solvers.certificate_search --seed 0 --repeat 17:3  # the case that the summary names so

The cases, the reference and what is asserted are those of `tests/solvers/test_certificates.py`. A chunk is one
structure, i.e. one set of compiled programs, with `--each` calls. Its verdicts are a line of the file, and a run that
was cut off goes on after the last whole line. Every third structure checks gradients, too. Programs are compiled as
the tests compile theirs, unless `--optimized`.
"""

import argparse
import collections
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2] / "tests"
# Above so many seconds a solve of at most a hundred states is worth a look.
SLOW = 20.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", type=int, default=40, help="calls per structure")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeat", metavar="STRUCTURE:CASE", help="print one case, its arrays and its verdict")
    parser.add_argument("--optimized", action="store_true", help="compile as users do; takes five times as long")
    options = parser.parse_args()
    prepare(options.optimized)
    if options.repeat:
        index, number = map(int, options.repeat.split(":"))
        _repeat(options.seed, index, number, options.each)
        return
    if options.out is None:
        parser.error("--out FILE or --repeat STRUCTURE:CASE")
    chunks = _read(options.out)
    if chunks and (chunks[0]["seed"], chunks[0]["each"]) != (options.seed, options.each):
        parser.error(f"{options.out} is of seed {chunks[0]['seed']} and --each {chunks[0]['each']}; name another file")
    total = sum(len(chunk["verdicts"]) for chunk in chunks)
    while total < options.cases:
        chunk = examine_structure(options.seed, len(chunks), options.each)
        with options.out.open("a") as file:
            file.write(json.dumps(chunk) + "\n")
        chunks.append(chunk)
        total += len(chunk["verdicts"])
        faults = sum(len(verdict["faults"]) for verdict in chunk["verdicts"])
        print(f"{total} cases; structure {chunk['structure']}: {chunk['seconds']:.1f} s, {faults} faults", flush=True)
    print(summary(chunks))


def prepare(optimized: bool) -> None:
    """Settings of the tests for this process, and their modules on its path; before anything is computed."""
    sys.path.insert(0, str(TESTS))
    import conftest
    import jax

    if not optimized:
        wanted = conftest.FLAGS
        ours = [f"--{flag}={wanted[flag]}" for flag in sorted(conftest.known(wanted))]
        os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *ours]).strip()
    jax.config.update("jax_disable_most_optimizations", not optimized)


def _read(path: Path) -> list[dict]:
    """The whole lines; a last one that was cut off is removed."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def _batches(seed: int, index: int, each: int):
    """Structure number `index`, and its cases in batches."""
    import certificate_cases as cases
    import numpy as np

    choose = cases.Random(np.random.default_rng([seed, index]))
    of = cases.structure(choose)
    return [[cases.case(choose, of) for _ in range(of.batch or 1)] for _ in range(each)]


def examine_structure(seed: int, index: int, each: int) -> dict:
    """The verdicts of `each` calls on structure number `index`; after `prepare`."""
    import certificate_checks as checks
    import jax

    began = time.perf_counter()
    verdicts = [v for batch in _batches(seed, index, each) for v in checks.examine(batch, gradients=index % 3 == 0)]
    jax.clear_caches()
    rows = []
    for verdict in verdicts:
        row = verdict._asdict() | {"circumstance": verdict.circumstance, "case": dataclasses.asdict(verdict.case)}
        row["quality"] = None if verdict.quality != verdict.quality else verdict.quality
        del row["case"]["structure"]
        rows.append(row)
    structure = dataclasses.asdict(verdicts[0].case.structure)
    return {
        "seed": seed,
        "each": each,
        "structure": index,
        "of": structure,
        "seconds": time.perf_counter() - began,
        "verdicts": rows,
    }


def _repeat(seed: int, index: int, number: int, each: int) -> None:
    import certificate_checks as checks
    from certificate_cases import build

    batches = _batches(seed, index, each)
    size = len(batches[0])
    batch = batches[number // size]
    print(batch[number % size])
    first = build(batch[0])
    print(build(batch[number % size], first.transition if batch[0].structure.shared else None))
    print(checks.examine(batch, gradients=index % 3 == 0)[number % size])


def summary(chunks: list[dict], examples: int = 4) -> str:
    """Counts per code, faults and cases without CONVERGED by kind, with the names that repeat them."""
    rows = [(f"{c['structure']}:{i}", c["of"], v) for c in chunks for i, v in enumerate(c["verdicts"])]
    lines = [f"{len(rows)} cases, {len(chunks)} structures, {sum(c['seconds'] for c in chunks) / 60:.1f} minutes"]
    lines += _counted("codes", [(v["code"], name) for name, _, v in rows], 0)
    faults = [(kind, f"{name} ({detail})") for name, _, v in rows for kind, detail in v["faults"]]
    with_fault = sum(bool(v["faults"]) for _, _, v in rows)
    lines += [f"faults: {len(faults)} in {with_fault} cases"]
    lines += _counted("faults", faults, examples)
    by_group = [
        (f"{kind}: {of['solver']}, {v['case']['reward']}", name) for name, of, v in rows for kind, _ in v["faults"]
    ]
    lines += _counted("faults by solver and reward", by_group, examples, most=40)
    lines += _counted("notes", [(note, name) for name, _, v in rows for note in v["notes"]], examples)
    told = [(v["circumstance"], name) for name, _, v in rows if v["code"] != "CONVERGED"]
    share = len(told) / max(len(rows), 1)
    lines += [f"without CONVERGED: {len(told)}, {100 * share:.2f}% (2% are allowed)"]
    lines += _counted("without CONVERGED", told, examples, most=40)
    slow = [
        (f"{of['solver']}, {of['states']} states", f"{name} {v['seconds']:.0f} s")
        for name, of, v in rows
        if v["seconds"] > SLOW and int(name.split(":")[1]) >= max(of["batch"], 1)  # the first compiles
    ]
    lines += _counted(f"above {SLOW:g} s", slow, examples)
    quality = sorted(v["quality"] for _, _, v in rows if v["quality"] is not None)
    if quality:
        at = {q: quality[min(int(q * len(quality)), len(quality) - 1)] for q in (0.5, 0.9, 0.99, 1.0)}
        lines += ["error of a CONVERGED value in units of rounding of its part: " + str(at)]
    return "\n".join(lines)


def _counted(title: str, found: list[tuple[str, str]], examples: int, most: int = 100) -> list[str]:
    counts = collections.Counter(kind for kind, _ in found)
    lines = [f"{title}:"] if counts else []
    for kind, count in counts.most_common(most):
        named = [name for other, name in found if other == kind][:examples]
        lines.append(f"  {count:6d}  {kind}" + ("".join(f"\n            {name}" for name in named)))
    return lines


if __name__ == "__main__":
    main()
