"""What the first call costs: a problem and its hyper-gradient in a process of their own, not compiled before.

    python -m benchmarks.gradients.first_call

For each problem of the registry: seconds to construct it, and to trace, lower and compile its hyper-gradient, and the
number of programs that the construction compiles. CPU seconds of the whole process, stabler than wall time here;
medians of RUNS processes. Writes results/first_call.json.
"""

import json
import statistics
import subprocess
import sys

from benchmarks.common.timing import RESULTS, machine

PROBLEMS = ("synthetic", "garnet", "four_rooms", "tax_design", "stackelberg", "tabular_rlhf")
RUNS = 3

CHILD = """
import json, sys, time
import jax
jax.config.update("jax_enable_x64", True)
import bilevel_jax as bj

programs = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: programs.append(1) if name.endswith("backend_compile_duration") else None
)
jax.numpy.zeros(3).block_until_ready()  # the backend has started
programs.clear()
clock = [time.process_time()]
problem = bj.problems.make(sys.argv[1])
compiled = len(programs)
clock.append(time.process_time())
x = jax.eval_shape(problem.start, jax.random.key(0))
stages = jax.jit(lambda x: bj.hypergradient(problem, x)).trace(x)
clock.append(time.process_time())
stages = stages.lower()
clock.append(time.process_time())
stages.compile()
clock.append(time.process_time())
names = ("construct", "trace", "lower", "compile")
spent = {name: later - now for name, now, later in zip(names, clock, clock[1:])}
print(json.dumps(spent | {"programs": compiled}))
"""


def first_call(problem: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", CHILD, problem], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    figures = {}
    for problem in PROBLEMS:
        runs = [first_call(problem) for _ in range(RUNS)]
        figures[problem] = {name: round(statistics.median(run[name] for run in runs), 2) for name in runs[0]}
        print(problem, figures[problem], flush=True)
    text = json.dumps({"machine": machine(), "problems": figures}, indent=2)
    (RESULTS / "first_call.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
