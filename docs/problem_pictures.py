"""A picture of every registered problem, after some exact upper iterations, for docs/problems.md.

Run it as `python docs/problem_pictures.py [NAME ...]`; it writes docs/images/problems/NAME.png.
"""

import sys
from pathlib import Path

import jax
import optax

import bilevel_jax as bj
from bilevel_jax.experiments.present.pictures import picture

FOLDER = Path(__file__).parent / "images" / "problems"
LEARNING_RATE, ITERATIONS = 0.05, 600
# By name of the picture: the problem, its options, and another number of iterations where it takes one.
VARIANTS = {
    "four_rooms": ("four_rooms", {"temperature": 0.005}, 1500),
    "four_rooms_doors": ("four_rooms", {"penalties": "doors", "closed": 0.2, "temperature": 0.005}, 1500),
    "reward_shaping_grid": ("reward_shaping", {"layout": "grid", "temperature": 0.02}, 600),
    "synthetic": ("synthetic", {}, 20),  # at its minimum all is 0
    "tax_design": ("tax_design", {}, 300),
}
WITH_MODEL = [name for name in bj.problems.names() if isinstance(bj.problems.make(name), bj.Problem)]
CASES = {name: (name, {}, ITERATIONS) for name in WITH_MODEL} | VARIANTS


def draw(case: str) -> Path:
    """Train and draw a case. Returns where the picture is."""
    name, options, iterations = CASES[case]
    problem = bj.problems.make(name, **options)
    algorithm = bj.algorithms.m_sobirl(
        problem, optax.adam(LEARNING_RATE), solver=bj.PolicyIteration(), adjoint=bj.Direct()
    )
    key = jax.random.key(0)
    state = algorithm.init(key, problem.start(key))
    state, info = jax.jit(lambda s: jax.lax.scan(lambda s, _: algorithm.step(key, s), s, length=iterations))(state)
    bj.check(info)
    solution = bj.solve(problem.mdp(state.x), problem.regularizer(state.x))
    title = f"{case.replace('_', ' ')}: objective {info.objective[0]:.3g} at the start, {info.objective[-1]:.3g} here"
    path = FOLDER / f"{case}.png"
    picture(problem, state.x, solution, title).savefig(path, dpi=70, bbox_inches="tight")
    return path


def main(names: list[str]) -> None:
    """Draw the named cases, or all."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for case in names or CASES:
        path = draw(case)
        print(f"{path} {path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main(sys.argv[1:])
