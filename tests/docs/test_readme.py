"""README and docs: their links lead somewhere, the files of their claims exist, and README's program runs."""

import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page):
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(page):
    """The links of a page that lead nowhere."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        there = page.parent / name if name else page
        if not name.startswith("http") and not (there.exists() and (not anchor or anchor in anchors(there))):
            yield target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert list(broken(page)) == []


def test_a_broken_link_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One\n[a](#one) [b](#two) [c](missing.md)\n")
    assert list(broken(page)) == ["#two", "missing.md"]


def claims():
    """The rows of README's table of claims, (claim, number, file)."""
    _, table = README.read_text().split("| claim | number | file |\n|---|---|---|\n")
    rows = table.split("\n\n")[0].splitlines()
    return [tuple(cell.strip() for cell in row.strip("|").split("|")) for row in rows]


def test_every_claim_has_its_file():
    assert len(claims()) > 20
    for claim, number, file in claims():
        assert claim, file
        assert number, claim
        assert re.fullmatch(r"`[^`]+`(, `[^`]+`)*", file), file
        for name in re.findall(r"`([^`]+)`", file):
            assert (ROOT / name).exists() or (ROOT / "benchmarks" / "results" / name).exists(), file


def run(blocks, names):
    """Run blocks of Python as a user does: JAX's own settings, float32 unless they ask for float64."""
    wide = any('"jax_enable_x64", True' in block for block in blocks)
    with jax.enable_x64(wide), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks:
            exec(compile(block, "README.md", "exec"), names)


def python_blocks():
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_ten_lines_run(capsys):
    run(python_blocks()[:1], {})
    assert len(capsys.readouterr().out.split()) >= 3


@pytest.mark.slow
def test_the_longer_program_goes_on_from_them(capsys):
    assert len(python_blocks()) == 2
    run(python_blocks(), {})
    assert len(capsys.readouterr().out.splitlines()) > 5


@pytest.mark.slow
@pytest.mark.parametrize(("page", "printed"), [("failures.md", "[ True False  True]\n"), ("solvers.md", "")])
def test_the_program_of_a_page_runs(page, printed, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    run([block], {})
    assert capsys.readouterr().out == printed
