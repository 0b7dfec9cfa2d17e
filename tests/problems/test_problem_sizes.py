"""Sizes of problems: whatever they are, they are refused with a remedy, or built in the memory that there is."""

import dataclasses
import time
from pathlib import Path

import jax
import pytest

import bilevel_jax as bj
from bilevel_jax.core import memory

GIB = 2**30
SIZES = {
    name: [
        field.name
        for field in dataclasses.fields(bj.problems.spec(name).options)
        if type(field.default) is int and field.name != "seed"
    ]
    for name in bj.problems.names()
}
BESIDE = {"demonstrations": {"length": 100}, "length": {"demonstrations": 1}}  # of inverse_rl
LARGE = (10_000, 1_000_000)
CASES = [
    pytest.param(
        name, {size: most} | (BESIDE.get(size, {}) if name == "inverse_rl" else {}), id=f"{name}-{size}-{most}"
    )
    for name, sizes in SIZES.items()
    for size in sizes
    for most in LARGE
]


def square(side, letters):
    """A map without walls, with each of the letters once."""
    rows = ["." * side] * side
    return (letters + rows[0][len(letters) :], *rows[1:])


MAPS = {
    "environment_design": {},
    "four_rooms": {},
    "reward_shaping": {"layout": "grid"},
    "inverse_rl": {"grounds": ".gto", "expert": (0.0, 1.0, 1.0, 1.0)},
}


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    monkeypatch.setattr(memory, "machine_memory", lambda: GIB)


def peak():
    """(the most memory that was in use since `reset`, what is in use now), in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    numbers = {line.split()[0]: 1024 * int(line.split()[1]) for line in lines if line.startswith(("VmHWM", "VmRSS"))}
    return numbers["VmHWM:"], numbers["VmRSS:"]


def build_or_refuse(name, options):
    """Whether a problem is built. It takes 1 GiB and 5 s of the processor, or InputError is raised."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is in use now
    before, started = peak()[1], time.process_time()
    try:
        jax.block_until_ready(bj.problems.make(name, **options))
    except bj.InputError:
        assert time.process_time() - started < 1
        return False
    assert peak()[0] - before < GIB
    assert time.process_time() - started < 5
    return True


linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")


@linux
@pytest.mark.parametrize("most", [*LARGE, 2**31, 10**30])
@pytest.mark.parametrize("name", [name for name, sizes in SIZES.items() if len(sizes) > 1])
def test_all_sizes_together_are_refused(name, most):
    has_room = name == "reward_shaping" and most == 10_000  # states of a chain and steps, which nothing multiplies
    assert build_or_refuse(name, dict.fromkeys(SIZES[name], most)) == has_room


@linux
@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), CASES)
def test_large_sizes_are_refused_or_built(name, options):
    build_or_refuse(name, options)


@linux
@pytest.mark.parametrize(("name", "side"), [("four_rooms", 160), *((name, 2000) for name in MAPS)])
def test_large_maps_are_refused(name, side):
    assert not build_or_refuse(name, MAPS[name] | {"rows": square(side, "sgto")})


@linux
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("four_rooms", {"transition": "successor"}),
        ("four_rooms", {"transition": "stencil"}),
        ("environment_design", {}),
        ("reward_shaping", {"layout": "grid"}),
    ],
)
def test_maps_of_many_cells_are_built(name, options):
    assert build_or_refuse(name, options | {"rows": square(160, "sgto")})


REFUSED = {
    "all cells goals": (
        "four_rooms",
        {"rows": ("st" + "g" * 98, *("g" * 100,) * 99), "transition": "successor"},
        r"rows: 16 arrays \[9998, 10000, 4\] would take .* GiB",
    ),
    "goals": ("four_rooms", {"goals": ((1, 1),) * 1_000_000}, r"goals: 16 arrays \[1000000, 104, 4\]"),
    "segments": ("tabular_rlhf", {"length": 10_000}, r"length: 10000 steps make about 10\^7782 segments"),
    "goods": ("tax_design", {"households": ((1.0,) * 10_001,)}, r"grid: 21 points make .* of about 10\^4774 entries"),
    "types": ("tax_design", {"households": ((1e-5, 1.0),) * 100_000}, r"households: 16 arrays \[100000, 21, 9\]"),
    "levels": ("tax_design", {"grid": 2, "hours_levels": 10, "spending_levels": 100}, r"grid: .* GiB, this machine"),
    "horizon": ("reward_shaping", {"horizon": 10**12}, r"horizon must be at most 1000000"),
    "successors": ("garnet", {"states": 6000, "branching": 6000, "actions": 1}, r"states, actions: 8 arrays"),
    "followers": ("multi_follower", {"followers": 1000, "states": 1000}, r"followers: 3 arrays \[1000, 1000, 1000\]"),
    "dimension": ("synthetic", {"dimension": 10_000}, r"dimension: 4 arrays \[10000, 10000\]"),
    "features": (
        "inverse_rl",
        {"rows": square(40, "s"), "grounds": ".", "expert": (0.0,), "features": "pair"},
        "features",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_products_of_sizes_are_refused(case):
    name, options, message = REFUSED[case]
    with pytest.raises(bj.InputError, match=message):
        bj.problems.make(name, **options)
