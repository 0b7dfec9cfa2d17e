"""Calls of the library with every annotation checked, in a process of their own: see test_annotations.py."""

import tempfile

import jax
import jax.numpy as jnp
import jaxtyping
import optax
from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as type checkers have it

with jaxtyping.install_import_hook("bilevel_jax", "annotations.checked"):
    import bilevel_jax as bj


def lower_level(problem, x):
    hg = bj.check(bj.hypergradient(problem, x))
    jax.vmap(lambda x: bj.hypergradient(problem, x, with_error=False).gradient)(jnp.stack([x, x]))
    mdp, regularizer = problem.mdp(x), problem.regularizer(x)
    for solver in (bj.ValueIteration(1e-3), bj.AdaptivePolicyIteration(1e-3), bj.AndersonIteration(1e-3)):
        bj.check(bj.solve(mdp, regularizer, solver=solver, initial_value=hg.solution.value))
    bj.solve_finite_horizon(mdp, regularizer, 3)
    bj.solve_average_reward(mdp, regularizer)
    bj.occupancy(mdp, hg.solution.policy)


def algorithms(problem, x):
    key = jax.random.key(0)
    for name in (
        "m_sobirl",
        "sobirl",
        "stoc_sobirl",
        "amd",
        "pbrl",
        "hpgd",
        "bc_hg",
        "attenuating_actor_critic",
        "two_policy_penalty",
    ):
        algorithm = bj.algorithms.make_algorithm(name, problem, optax.adam(0.1))
        _, info = algorithm.step(key, algorithm.init(key, x))
        assert jnp.isfinite(info.gradient_norm), name


def preferences(path):
    key, pf = jax.random.key(0), bj.preferences
    environment = bj.environments.TabularEnvironment(bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9))
    trajectories = bj.environments.rollout(key, environment, jnp.full((2, 2), 0.5), batch=4, horizon=6)
    for ends in ("exclude", "hide", "show"):
        cut = pf.cut_segments(key, trajectories, 3, 8, ends=ends)
    segments = pf.Segments.of(cut.trajectories)
    data = pf.Preferences(segments, pf.uniform_pairs(key, 8, 10))
    for teacher in (pf.Teacher(), pf.ScriptedTeacher.boltzmann()):
        data = pf.labelled(key, teacher, data)
    pf.ScriptedTeacher().mean_label(segments.reward[:4], segments.reward[4:])
    train, held_out = pf.split(key, pf.compacted(pf.concatenate(data, data)), 0.5)
    outcome = pf.outcome_scores(bj.Table(jnp.eye(2)), train.segments)
    decision = pf.decision_scores(jnp.full((2, 2), 0.5), train.segments, 0.3)
    pf.fit_rationality(pf.gains(train, outcome), train.label, train.weight)
    jax.vmap(lambda scale: pf.preference_loss(train, scale * outcome, 1.0))(jnp.ones(2))
    pf.judged_by(pf.pair_losses(held_out, outcome, 1.5), pf.pair_losses(held_out, decision))
    buffer = pf.PreferenceBuffer(data, 16).add(pf.subset(data, pf.minibatches(key, data, 5)[0]), jnp.asarray(True))
    pf.draw(key, buffer.preferences(), int(buffer.judged))
    buffer.draw(key, 3)
    pf.near_on_policy_pairs(key, jnp.arange(8), 3, newest=4)
    pf.select(key, pf.disagreement(jnp.ones((3, 9))), 2)
    file = pf.PreferenceFile.create(path, environment.observation_space, environment.action_space, 3)
    (pair,) = file.append_pairs([file.append_segments(segments)[:2]])
    file.append_label(pair, 1, by="Ada")
    file.undo(pair, by="Ada")
    assert file.read().preferences.count == 1


if __name__ == "__main__":
    import annotations  # by the name that the hook looks the checker up under

    garnet = annotations.bj.problems.make("garnet", states=4, actions=2, horizon=6)
    start = garnet.start(jax.random.key(0))
    annotations.lower_level(garnet, start)
    annotations.algorithms(garnet, start)
    with tempfile.TemporaryDirectory() as folder:
        annotations.preferences(f"{folder}/labels.jsonl")
    print("true")
