"""Labels that judge decisions against labels that judge outcomes: which learner recovers a reward from which."""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import yaml
from jax import lax
from jaxtyping import Array
from scipy.stats import t as student

import bilevel_jax as bj
from benchmarks.studies.records import draw, read_rows, write_rows
from benchmarks.studies.study import Study, main
from bilevel_jax import preferences as pf
from bilevel_jax.core.cpu import one_at_a_time_on_cpu
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.results import where_converged
from bilevel_jax.core.validation import require_setting
from bilevel_jax.estimators import OneStep
from bilevel_jax.problems.random_process import random_successors

LEARNERS = {
    "bilevel": "bilevel r(s)",
    "bilevel_given": "bilevel r(s), product given",
    "bilevel_restarts": "bilevel r(s), the best of several starts",
    "one_step": "bilevel r(s), one-step",
    "drlhf_s": "DRLHF r(s)",
    "drlhf_sa": "DRLHF r(s,a)",
    "policy_only": "policy only",
    "true_reward": "the true reward",
}
FITTED = ("bilevel", "drlhf_s", "drlhf_sa", "policy_only")
JUDGINGS = ("decisions", "outcomes")
TEACHERS = ("boltzmann", "oracle", "mistaken", "myopic", "skipping", "tying")
CHUNK = 16  # MDPs in one program, so that tuning and measuring share it
STEPS = 400  # of Levenberg and Marquardt's method, at most
TOLERANCE = 1e-5  # of the gradient at the end, relative to that at the start; 10 times as much counts as converged
RESTARTS = 8
VERDICT_PAIRS = 100  # held-out pairs that a verdict of few labels sees

_solve_system = one_at_a_time_on_cpu(jnp.linalg.solve)


@dataclasses.dataclass(frozen=True)
class DecisionsOptions:
    """What each way of learning from labels returns to, if labels judge decisions and if they judge outcomes.

    Each MDP is a Garnet with a hidden reward of states, N(0, 1), standardised to mean 0 and standard deviation 1 over
    the states. Pairs of segments of the uniform policy from uniform starts are labelled once. A teacher of outcomes
    adds up the hidden rewards of a segment's steps; one of decisions adds up the soft advantages, temperature log pi,
    of the hidden reward's soft-optimal policy. Learners know neither rationality nor temperature. What was learned is
    measured by the return of its best policy in the same MDP, and under new dynamics with the same hidden reward: 0 is
    the uniform policy, 1 the best.

    states, actions, branching: sizes of the MDPs.
    discount: of the agent.
    temperature: of the agent whose advantages the teacher of decisions adds up.
    rationality: of the teacher boltzmann; the others are perfectly rational but for what their names say.
    length: steps of a segment.
    labels: numbers of labelled pairs.
    teacher_labels: the number of pairs for the teachers other than boltzmann.
    held_out: pairs on which losses are measured.
    strengths: of the prior that is tried for each learner on the tuning MDPs.
    nearness: shares of the new dynamics in the dynamics under which returns are measured; has 0 and 1.
    mdps: measured MDPs; their seeds are 0, 1, ...
    tuning_mdps: others, with seeds 1000, 1001, ..., on which the prior's strength is chosen.
    """

    states: int = 20
    actions: int = 3
    branching: int = 2
    discount: float = 0.9
    temperature: float = 0.3
    rationality: float = 3.0
    length: int = 3
    labels: tuple[int, ...] = (50, 200, 1000)
    teacher_labels: int = 200
    held_out: int = 1000
    strengths: tuple[float, ...] = (0.01, 0.1, 0.3, 1.0, 3.0)
    nearness: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5, 1.0)
    mdps: int = 32
    tuning_mdps: int = 16


class World(NamedTuple):
    """An MDP's dynamics and new ones, [S, A, S], and its hidden reward of states, [S]."""

    old: Array
    new: Array
    hidden: Array


class Labels(NamedTuple):
    """Labelled pairs. `counts` is how much more often the first segment has each state and action, [P, S A].

    The scores of a learner are a table of states and actions, and the gain of each pair is counts @ table.
    """

    counts: Array
    label: Array
    weight: Array


# Worlds and labels.


def _world(seed: Any, options: DecisionsOptions) -> World:
    keys = jax.random.split(jax.random.fold_in(jax.random.key(20), seed), 5)
    shape = (options.states, options.actions)

    def dynamics(keys: Array) -> Array:
        successor, probability = random_successors(keys, shape, options.states, options.branching)
        return jnp.sum(jax.nn.one_hot(successor, options.states) * probability[..., None], 0)

    hidden = jax.random.normal(keys[4], shape[:1])
    hidden = (hidden - jnp.mean(hidden)) / jnp.std(hidden)
    return World(dynamics(keys[:2]), dynamics(keys[2:4]), hidden)


def _of_states(reward: Array, actions: int) -> Array:
    return jnp.broadcast_to(reward[:, None], (reward.size, actions))


def _advantages(transition: Array, reward: Array, discount: Any, temperature: Any) -> Array:
    """temperature log pi* = Q - V of the soft-optimal policy, [S, A]; differentiable in reward and temperature."""
    solution = bj.solve(bj.MDP(transition, reward, discount), bj.ShannonEntropy(temperature))
    return where_converged(solution.result, solution.q - solution.value[:, None])


def _teacher(options: DecisionsOptions, which: Any, sums: Array) -> pf.ScriptedTeacher:
    """That of TEACHERS at the place `which`, for segments whose scores have these sums, [N].

    B-Pref's thresholds are shares of a mean return, which is 0 here. In their place, the median of the sums skips a
    quarter of all pairs, and a quarter of their standard deviation makes a seventh of them ties.
    """
    kinds = pf.ScriptedTeacher
    made = {
        "boltzmann": kinds.boltzmann(options.rationality),
        "oracle": kinds.oracle(),
        "mistaken": kinds.mistaken(),
        "myopic": kinds.myopic(),
        "skipping": kinds.skipping(jnp.median(sums)),
        "tying": kinds.tying(jnp.std(sums) / 4),
    }
    return jax.tree.map(lambda *leaves: jnp.stack(leaves)[which], *(made[name] for name in TEACHERS))


def _true_scores(world: World, judging: Any, options: DecisionsOptions) -> Array:
    """What the teacher adds up, [S, A]; `judging` is a place in JUDGINGS."""
    reward = _of_states(world.hidden, options.actions)
    advantages = _advantages(world.old, reward, options.discount, options.temperature)
    return jnp.where(judging == JUDGINGS.index("decisions"), advantages, reward)


def _preferences(world: World, seed: Any, judging: Any, teacher: Any, options: DecisionsOptions) -> pf.Preferences:
    """All pairs of one MDP: max(labels) to learn from, and after them those that are held out."""
    pairs = max(*options.labels, options.teacher_labels) + options.held_out
    keys = jax.random.split(jax.random.fold_in(jax.random.key(21), seed), 2)
    shape = (options.states, options.actions)
    environment = bj.environments.TabularEnvironment(bj.MDP(world.old, jnp.zeros(shape), options.discount))
    even = jnp.full(shape, 1 / options.actions)
    drawn = bj.environments.rollout(keys[0], environment, even, batch=2 * pairs, horizon=options.length)
    segments = pf.Segments.of(drawn, hidden=False)
    scores = _true_scores(world, judging, options)[segments.observation, segments.action]
    data = pf.Preferences(segments, jnp.arange(2 * pairs, dtype=jnp.int32).reshape(pairs, 2))
    return pf.labelled(keys[1], _teacher(options, teacher, jnp.sum(scores, 1)), data, scores)


def _counted(data: pf.Preferences, options: DecisionsOptions) -> Labels:
    segments, size = data.segments, options.states * options.actions
    taken = segments.observation * options.actions + segments.action
    counts = jnp.sum(jax.nn.one_hot(taken, size), 1)
    return Labels(counts[data.pairs[:, 0]] - counts[data.pairs[:, 1]], data.label, data.weight)


@functools.partial(jax.jit, static_argnums=3)
def _data(seeds: Array, judging: Any, teacher: Any, options: DecisionsOptions) -> tuple[World, Labels]:
    def one(seed: Any) -> tuple[World, Labels]:
        world = _world(seed, options)
        return world, _counted(_preferences(world, seed, judging, teacher, options), options)

    return jax.vmap(one)(seeds)


# Learners: a table of scores [S, A] at parameters, and a prior. All are in the units of the labels: the reward is
# rationality times reward, and the temperature is the product of rationality and temperature, which is all that labels
# tell of the two.


class Model(NamedTuple):
    """`scores(x)` is a table [S, A] and `prior(x)` what its parameters cost beside the sum of the labels' losses."""

    start: Array
    scores: Callable[[Array], Array]
    prior: Callable[[Array], Array]


def _model(learner: str, transition: Array, strength: Any, options: DecisionsOptions) -> Model:
    states, actions = options.states, options.actions
    zeros = jnp.zeros(states)

    def ridge(weights: Array) -> Array:
        return strength * jnp.sum(weights**2) / 2

    if learner == "drlhf_s":
        return Model(zeros, lambda x: _of_states(x, actions), ridge)
    if learner == "drlhf_sa":
        return Model(jnp.zeros(states * actions), lambda x: x.reshape(states, actions), ridge)
    if learner == "bilevel_given":
        product = options.rationality * options.temperature
        return Model(zeros, lambda x: _advantages(transition, _of_states(x, actions), options.discount, product), ridge)
    if learner in ("bilevel", "bilevel_restarts", "one_step"):

        def scores(x: Array) -> Array:
            return _advantages(transition, _of_states(x[:-1], actions), options.discount, jnp.exp(x[-1]))

        # The logarithm of the product is N(0, 1), for all strengths.
        return Model(jnp.zeros(states + 1), scores, lambda x: ridge(x[:-1]) + x[-1] ** 2 / 2)

    # Log-softmax of free numbers; the ridge draws it to the uniform policy, which made the segments.
    def scores_of_policy(x: Array) -> Array:
        product = jnp.exp(x[-1])
        return product * jax.nn.log_softmax(x[:-1].reshape(states, actions) / product, -1)

    return Model(jnp.zeros(states * actions + 1), scores_of_policy, lambda x: ridge(x[:-1]) + x[-1] ** 2 / 2)


class Fit(NamedTuple):
    """Parameters, the norm of the gradient there relative to that at the start, and the objective."""

    x: Array
    gradient: Array
    objective: Array


def _fit(model: Model, labels: Labels) -> Fit:
    """Levenberg and Marquardt's method: the curvature is that of the labels' losses, with the scores linearised."""

    def at(x: Array) -> tuple[Array, Array, Array]:
        scores, slopes = model.scores(x), jax.jacfwd(model.scores)(x)
        gain, slope = labels.counts @ scores.reshape(-1), labels.counts @ slopes.reshape(-1, x.size)
        chance = jax.nn.sigmoid(gain)
        loss = jnp.sum(labels.weight * -pf.log_likelihood(gain, jnp.zeros_like(gain), labels.label))
        gradient = slope.T @ (labels.weight * (chance - labels.label)) + jax.grad(model.prior)(x)
        curvature = slope.T @ ((labels.weight * chance * (1 - chance))[:, None] * slope)
        return loss + model.prior(x), gradient, curvature + jax.hessian(model.prior)(x)

    first = at(model.start)
    wanted = TOLERANCE * jnp.linalg.norm(first[1])

    def step(carry):
        x, (value, gradient, curvature), damping, count = carry
        new = x - _solve_system(curvature + damping * jnp.eye(x.size), gradient)
        there = at(new)
        better = there[0] < value  # False for NaN
        damping = jnp.where(better, damping / 5, damping * 4)
        kept = jax.tree.map(functools.partial(jnp.where, better), (new, there), (x, (value, gradient, curvature)))
        return *kept, damping, count + 1

    def goes_on(carry):
        _, (_, gradient, _), damping, count = carry
        return (jnp.linalg.norm(gradient) > wanted) & (count < STEPS) & (damping < 1e12)

    x, (value, gradient, _), _, _ = lax.while_loop(goes_on, step, (model.start, first, jnp.asarray(1.0), 0))
    return Fit(x, jnp.linalg.norm(gradient) / jnp.linalg.norm(first[1]), value)


def _best_fit(model: Model, labels: Labels) -> Fit:
    """The fit with the lowest objective, from the usual start and from random ones as large as the hidden reward."""
    away = 3 * jax.random.normal(jax.random.key(22), (RESTARTS - 1, model.start.size))
    starts = model.start[None] + jnp.concatenate([jnp.zeros_like(away[:1]), away.at[:, -1].multiply(1 / 3)])
    fits = jax.vmap(lambda start: _fit(model._replace(start=start), labels))(starts)
    return jax.tree.map(lambda leaf: leaf[jnp.nanargmin(fits.objective)], fits)


class DecisionLabels(bj.Problem):
    """The bilevel fit as a problem of the library: the upper level pays for labels of the lower level's log pi.

    x is the reward of states, and last the logarithm of the temperature, both in units of the labels.
    """

    transition: Array
    discount: Array
    labels: Labels
    strength: Array
    actions: int = eqx.field(static=True)

    def reward(self, x: Array) -> bj.Table:
        return bj.Table(_of_states(x[:-1], self.actions))

    def mdp(self, x: Array) -> bj.MDP:
        return bj.MDP(self.transition, self.reward(x).values, self.discount)

    def regularizer(self, x: Array) -> bj.ShannonEntropy:
        return bj.ShannonEntropy(jnp.exp(x[-1]))

    def objective(self, x: Array, solution: Any) -> Array:
        return self.paid(x, jnp.log(solution.policy))

    def paid(self, x: Array, log_policy: Array) -> Array:
        gain = self.labels.counts @ (jnp.exp(x[-1]) * log_policy).reshape(-1)
        losses = -pf.log_likelihood(gain, jnp.zeros_like(gain), self.labels.label)
        return self.labels.weight @ losses + self.strength * jnp.sum(x[:-1] ** 2) / 2 + x[-1] ** 2 / 2


def _problem(transition: Array, labels: Labels, strength: Any, options: DecisionsOptions) -> DecisionLabels:
    discount = jnp.asarray(options.discount)
    return DecisionLabels(transition, discount, labels, jnp.asarray(strength), options.actions)


class _Steps(NamedTuple):
    observation: Array
    action: Array


_one_step: Any = OneStep()  # whose surrogate reads less than its types ask for


def one_step_gradient(problem: DecisionLabels, x: Array) -> Array:
    """The gradient in the reward of states by `OneStep`, exact otherwise: all states and actions, each with its credit.

    Q and V change by the reward of the step itself, which is the same for all actions: log pi does not change.
    """
    solution = bj.solve(problem.mdp(x), problem.regularizer(x))
    log_policy = jnp.log(solution.policy)
    credit = jax.grad(problem.paid, 1)(x, log_policy) / jnp.exp(x[-1])
    states, actions = jnp.indices(log_policy.shape, jnp.int32)

    def surrogate(x: Array) -> Array:
        made = _one_step.surrogate(None, None, problem, x, solution.policy, _Steps(states, actions), credit)
        return made + problem.strength * jnp.sum(x[:-1] ** 2) / 2

    return jax.grad(surrogate)(x)[:-1]


# What a learner is worth.


class Measured(NamedTuple):
    """`gain`: returns, [nearness]. `losses`: of the held-out pairs. `gradient`: at the end, of that at the start.

    `product` is the temperature that was fitted, NaN where none was.
    """

    gain: Any
    losses: Any
    gradient: Any
    product: Any


@functools.partial(jax.jit, static_argnums=(0, 5))
def _learned(
    learner: str, worlds: World, labels: Labels, held_out: Labels, strength: Any, options: DecisionsOptions
) -> Measured:
    """Fit a learner to the labels of each MDP and measure what it learned."""

    def one(world: World, labels: Labels, held_out: Labels) -> Measured:
        none = jnp.asarray(jnp.nan)
        if learner == "true_reward":
            return _measured(world, _of_states(world.hidden, options.actions), none, jnp.zeros(()), none, options)
        model = _model(learner, world.old, strength, options)
        if learner == "one_step":
            problem = _problem(world.old, labels, strength, options)
            fit = Fit(model.start, jnp.linalg.norm(one_step_gradient(problem, model.start)), none)
        elif learner == "bilevel_restarts":
            fit = _best_fit(model, labels)
        else:
            fit = _fit(model, labels)
        gradient = fit.gradient
        if learner == "bilevel":  # the library's, in place of the fit's own
            problem = _problem(world.old, labels, strength, options)
            ends = [bj.hypergradient(problem, x, with_error=False).gradient for x in (fit.x, model.start)]
            gradient = jnp.linalg.norm(ends[0]) / jnp.linalg.norm(ends[1])
        scores = model.scores(fit.x)
        gain = held_out.counts @ scores.reshape(-1)
        losses = -pf.log_likelihood(gain, jnp.zeros_like(gain), held_out.label)
        has_product = learner in ("bilevel", "bilevel_restarts", "policy_only")
        product = jnp.exp(fit.x[-1]) if has_product else none
        if learner == "policy_only":
            return _measured(world, scores, losses, gradient, product, options, carried=True)
        reward = scores if learner == "drlhf_sa" else _of_states(fit.x[: options.states], options.actions)
        return _measured(world, reward, losses, gradient, product, options)

    return jax.vmap(one)(worlds, labels, held_out)


def _measured(
    world: World, table: Array, losses: Array, gradient: Array, product: Array, options: DecisionsOptions, carried=False
) -> Measured:
    """`table` is a reward, or the scores of a policy that is carried over to all dynamics as it is."""
    hidden = _of_states(world.hidden, options.actions)
    even = jnp.full_like(hidden, 1 / options.actions)

    def gain(nearness: Any) -> Array:
        transition = (1 - nearness) * world.old + nearness * world.new
        process = bj.MDP(transition, hidden, options.discount)

        def best(reward: Array) -> Array:
            solution = bj.solve(bj.MDP(transition, reward, options.discount), bj.Unregularized())
            return where_converged(solution.result, solution.policy)

        def earned(policy: Array) -> Array:
            return bj.policy_value(process, policy) @ process.initial

        if carried:
            policy = jax.nn.one_hot(jnp.argmax(table, -1), options.actions)
        else:  # a reward that is the same everywhere says nothing
            policy = jnp.where(jnp.ptp(table) == 0, even, best(table))
        least, most = earned(even), earned(best(hidden))
        return (earned(policy) - least) / (most - least)

    return Measured(jax.vmap(gain)(jnp.asarray(options.nearness)), losses, gradient, product)


# The study.


class Setting(NamedTuple):
    judging: str
    teacher: str
    labels: int


def settings(options: DecisionsOptions) -> list[Setting]:
    made = [Setting(judging, "boltzmann", count) for judging in JUDGINGS for count in options.labels]
    rest = [Setting(j, teacher, options.teacher_labels) for j in JUDGINGS for teacher in TEACHERS]
    return made + [setting for setting in rest if setting not in made]


def run(options: DecisionsOptions, directory: Path, report: Callable[[str], None]) -> None:
    """Write decisions.csv (a row per setting, learner and MDP), and what follows from it.

    decisions_tuning.csv: means over the tuning MDPs for each strength of the prior. decisions_table.csv: means and
    standard errors over the MDPs. decisions_paired.csv: the bilevel fit less each other learner, MDP by MDP.
    Settings whose rows are there already are not run again.
    """
    _check(options)
    rows, tuning = _begun(options, directory)
    for setting in settings(options):
        if setting not in map(_setting, rows):
            tried, made = _run_setting(setting, options)
            tuning, rows = tuning + tried, rows + made
            write_rows(directory / "decisions_tuning.csv", tuning)
            write_rows(directory / "decisions.csv", rows)
        _report(setting, rows, options, report)
    rows = read_rows(directory / "decisions.csv")  # with the digits that are kept
    write_rows(directory / "decisions_table.csv", _table(rows, options))
    write_rows(directory / "decisions_paired.csv", _paired(rows, options))


def _check(options: DecisionsOptions) -> None:
    for name in ("states", "actions", "branching", "length", "teacher_labels", "held_out", "mdps", "tuning_mdps"):
        require_setting(name, getattr(options, name), 1, "the default is what is kept", whole=True)
    if options.branching > options.states:
        raise InputError(f"branching: expected at most the number of states {options.states}, got {options.branching}")
    if not {0.0, 1.0} <= set(options.nearness):
        raise InputError(
            f"nearness: expected 0 and 1 among them, the same and the new dynamics, got {options.nearness}"
        )
    for name in ("labels", "strengths"):
        if min(getattr(options, name)) <= 0:
            raise InputError(f"{name}: expected numbers above 0, got {getattr(options, name)}")


def _begun(options: DecisionsOptions, directory: Path) -> tuple[list[Any], list[Any]]:
    """The rows that an earlier run with these options left."""
    values = {"study": "decisions", **json.loads(json.dumps(dataclasses.asdict(options)))}
    config, kept = directory / "config.yaml", directory / "decisions.csv"
    if kept.exists() and (not config.exists() or yaml.safe_load(config.read_text()) != values):
        raise InputError(f"--out {directory}: has rows of other options; give another directory")
    config.write_text(yaml.safe_dump(values, sort_keys=False))
    if not kept.exists():
        return [], []
    rows, tuning = read_rows(kept), read_rows(directory / "decisions_tuning.csv")
    done = {_setting(row) for row in rows}
    return rows, [row for row in tuning if _setting(row) in done]


def _setting(row: dict[str, Any]) -> Setting:
    return Setting(row["judging"], row["teacher"], int(row["labels"]))


def _gains(options: DecisionsOptions) -> list[str]:
    """Columns of returns: gain_0 in the same dynamics, gain_1 in the new ones."""
    return [f"gain_{share:g}" for share in options.nearness]


def _run_setting(setting: Setting, options: DecisionsOptions) -> tuple[list[Any], list[Any]]:
    """The rows of the tuning and of the measured MDPs."""
    tuned, tuning = {}, []
    data = _chunks(range(1000, 1000 + options.tuning_mdps), setting, options)
    weights = _weights(data)
    for learner in FITTED:
        reached = []
        for strength in options.strengths:
            made = _learn(learner, data, strength, options)
            reached.append(float(np.mean([_mean_loss(*pair) for pair in zip(made.losses, weights, strict=True)])))
            gains = dict(zip(_gains(options), made.gain.mean(0).tolist(), strict=True))
            row = {**setting._asdict(), "learner": learner, "strength": strength, "loss": reached[-1], **gains}
            tuning.append({**row, "converged": float(np.mean(made.gradient <= 10 * TOLERANCE)), "mdps": len(weights)})
        tuned[learner] = options.strengths[int(np.argmin(reached))]
    tuned |= {"one_step": tuned["bilevel"], "true_reward": tuned["bilevel"]}
    # Checks, each in one or two settings: the right product, and whether other starts lead to better fits.
    if setting[1:] == ("boltzmann", options.teacher_labels):
        tuned["bilevel_restarts"] = tuned["bilevel"]
        if setting.judging == "decisions":
            tuned["bilevel_given"] = tuned["bilevel"]
    data = _chunks(range(options.mdps), setting, options)
    weights = _weights(data)
    made = {learner: _learn(learner, data, tuned[learner], options) for learner in LEARNERS if learner in tuned}
    rows = []
    for learner, measured in made.items():
        for seed in range(options.mdps):
            verdicts = ["", ""]
            if learner == "bilevel":
                losses = [made[name].losses[seed] for name in ("drlhf_s", "bilevel")]
                verdicts = [
                    pf.judged_by(losses[0][:pairs], losses[1][:pairs], weights[seed][:pairs]).kind
                    for pairs in (VERDICT_PAIRS, options.held_out)
                ]
            rows.append({
                **setting._asdict(),
                "learner": learner,
                "seed": seed,
                "strength": tuned[learner] if learner in FITTED else "",
                **dict(zip(_gains(options), measured.gain[seed].tolist(), strict=True)),
                "loss": _mean_loss(measured.losses[seed], weights[seed]) if learner != "true_reward" else "",
                "gradient": float(measured.gradient[seed]),
                "product": float(measured.product[seed]) if np.isfinite(measured.product[seed]) else "",
                "verdict_few": verdicts[0],
                "verdict": verdicts[1],
            })  # fmt: skip
    return tuning, rows


def _chunks(seeds: range, setting: Setting, options: DecisionsOptions) -> list[tuple[World, Labels, Labels]]:
    made = []
    for first in range(0, len(seeds), CHUNK):
        own = jnp.asarray(seeds[first : first + CHUNK])
        worlds, labels = _data(own, JUDGINGS.index(setting.judging), TEACHERS.index(setting.teacher), options)
        held_out = jax.tree.map(lambda leaf: leaf[:, -options.held_out :], labels)
        labels = jax.tree.map(lambda leaf: leaf[:, : setting.labels], labels)
        made.append((worlds, labels, held_out))
    return made


def _learn(learner: str, data: list[Any], strength: float, options: DecisionsOptions) -> Measured:
    made = [jax.device_get(_learned(learner, *chunk, strength, options)) for chunk in data]
    return Measured(*(np.concatenate(leaves) for leaves in zip(*made, strict=True)))


def _weights(data: list[tuple[World, Labels, Labels]]) -> np.ndarray:
    return np.concatenate([np.asarray(held_out.weight) for _, _, held_out in data])


def _mean_loss(losses: Any, weight: np.ndarray) -> float:
    return float(losses @ weight / weight.sum())


def _groups(rows: list[dict[str, Any]]) -> dict[Setting, dict[str, list[dict[str, Any]]]]:
    """Rows by setting and learner, sorted by MDP."""
    made: dict[Setting, dict[str, list[dict[str, Any]]]] = {}
    for row in sorted(rows, key=lambda row: int(row["seed"])):
        made.setdefault(_setting(row), {}).setdefault(row["learner"], []).append(row)
    return made


def _column(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([float(row[name]) if row[name] != "" else np.nan for row in rows])


def _table(rows: list[dict[str, Any]], options: DecisionsOptions) -> list[dict[str, Any]]:
    """Means and standard errors over the MDPs, for each setting and learner."""
    table, groups = [], _groups(rows)
    for setting in settings(options):
        for learner in (name for name in LEARNERS if name in groups[setting]):
            own = groups[setting][learner]
            made: dict[str, Any] = {**setting._asdict(), "learner": learner, "strength": own[0]["strength"]}
            for name in (*_gains(options), "loss"):
                values = _column(own, name)
                made |= {name: float(values.mean()), f"{name}_standard_error": _standard_error(values)}
            made["converged"] = float(np.mean(_column(own, "gradient") <= 10 * TOLERANCE))
            made["largest_gradient"] = float(_column(own, "gradient").max())
            made["median_product"] = float(np.median(_column(own, "product")))
            for name, words in (("few", "verdict_few"), ("all", "verdict")):
                named = [row[words] for row in own]
                made |= {
                    f"says_{kind}_{name}": named.count(kind) if any(named) else "" for kind in (*JUDGINGS, "unclear")
                }
            # What there is not stays empty.
            made = {name: "" if value != value else value for name, value in made.items()}
            table.append({**made, "mdps": len(own)})
    return table


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(values.size)) if values.size > 1 else float("nan")


def _paired(rows: list[dict[str, Any]], options: DecisionsOptions) -> list[dict[str, Any]]:
    """The bilevel fit's return less each other learner's in the same MDP: means, and half of their 95% intervals."""
    made, groups = [], _groups(rows)
    for setting in settings(options):
        for learner in (name for name in LEARNERS if name in groups[setting] and name != "bilevel"):
            row: dict[str, Any] = {**setting._asdict(), "against": learner}
            for name in _gains(options):
                difference = _column(groups[setting]["bilevel"], name) - _column(groups[setting][learner], name)
                quantile = float(student.ppf(0.975, max(difference.size - 1, 1)))
                row |= {name: float(difference.mean()), f"{name}_margin": quantile * _standard_error(difference)}
            made.append(row)
    return made


def _report(setting: Setting, rows: list[Any], options: DecisionsOptions, report: Callable[[str], None]) -> None:
    own = _groups(rows)[setting]
    gains = [(name, _column(own[name], "gain_0").mean(), _column(own[name], "gain_1").mean()) for name in own]
    text = ", ".join(f"{name} {same:.2f} / {new:.2f}" for name, same, new in gains)
    report(f"{setting.labels} labels of {setting.judging}, {setting.teacher}: {text}")


def plot(directory: Path) -> None:
    """decisions.png: returns against labels for both judgings, and the bilevel fit's advantage against the dynamics."""
    options = yaml.safe_load((directory / "config.yaml").read_text())
    table, paired = (read_rows(directory / f"decisions_{name}.csv") for name in ("table", "paired"))
    colors = {"bilevel": "C0", "drlhf_s": "C1", "drlhf_sa": "C2", "policy_only": "C3"}

    def returns(judging: str) -> Callable[[Any], None]:
        def paint(axes: Any) -> None:
            for place, (learner, color) in enumerate(colors.items()):
                own = [
                    r for r in table if (r["judging"], r["teacher"], r["learner"]) == (judging, "boltzmann", learner)
                ]
                own = [row for row in own if int(row["labels"]) in options["labels"]]
                # Moved apart a little, so that error bars do not cover each other.
                labels = _column(own, "labels") * 1.03 ** (place - 1.5)
                for gain, style, label in (("gain_1", "o-", LEARNERS[learner]), ("gain_0", "o:", None)):
                    means, errors = _column(own, gain), _column(own, f"{gain}_standard_error")
                    shown = {"color": color, "linewidth": 1.6, "markersize": 4, "capsize": 2, "elinewidth": 1}
                    axes.errorbar(labels, means, errors, fmt=style, label=label, **shown)
            axes.plot([], [], "-", color="0.3", label="under new dynamics")
            axes.plot([], [], ":", color="0.3", label="in the same dynamics")
            axes.set_xscale("log")
            axes.set_xticks(options["labels"], [str(count) for count in options["labels"]])
            axes.minorticks_off()
            axes.set_ylim(-0.12, 1.06)
            axes.set_xlabel("labelled pairs")
            axes.set_ylabel("true return (0: uniform policy, 1: best)")
            axes.set_title(f"labels judge {judging}", fontsize=10)
            axes.legend(frameon=False, fontsize=8, ncol=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))

        return paint

    def distance(axes: Any) -> None:
        setting = ("decisions", "boltzmann", str(options["teacher_labels"]))
        shares = np.array(options["nearness"])
        for place, learner in enumerate(name for name in colors if name != "bilevel"):
            (row,) = (
                r for r in paired if (r["judging"], r["teacher"], r["labels"], r["against"]) == (*setting, learner)
            )
            means = np.array([float(row[f"gain_{share:g}"]) for share in shares])
            margins = np.array([float(row[f"gain_{share:g}_margin"]) for share in shares])
            shown = {"color": colors[learner], "linewidth": 1.6, "markersize": 4, "capsize": 2, "elinewidth": 1}
            axes.errorbar(shares + 0.008 * (place - 1), means, margins, fmt="o-", label=LEARNERS[learner], **shown)
        axes.axhline(0, color="0.4", linewidth=1)
        axes.set_xlabel("share of the new dynamics")
        axes.set_ylabel("return of bilevel r(s) less that of ...")
        axes.set_title(f"{setting[2]} labels of decisions, 95% intervals", fontsize=10)
        axes.legend(frameon=False, fontsize=8, ncol=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))

    draw(directory / "decisions.png", *map(returns, JUDGINGS), distance)


STUDY = Study("decisions", {"decisions": DecisionsOptions()}, run, plot)

if __name__ == "__main__":
    sys.exit(main(STUDY))
