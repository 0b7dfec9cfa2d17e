"""What `bilevel-jax list` prints."""

from experiment_helpers import command

import bilevel_jax as bj
from bilevel_jax import problems
from bilevel_jax.experiments.choices import KINDS, choices, optimizers, projections


def test_list():
    called = command("list")
    assert called.code == 0
    assert called.err == ""
    for name in problems.names():
        spec = problems.spec(name)
        assert f"  {name}: {spec.summary}" in called.out
        for option, default in vars(spec.options()).items():
            assert f"{option} = {default}" in called.out
    kinds = [choices((base,)) for base in (*KINDS.values(), bj.algorithms.Algorithm)]
    for found in (*kinds, optimizers(), projections()):
        assert found
        for choice in found.values():
            assert f"  {choice.name}: {choice.summary}" in called.out
            for option in choice.options:
                shown = "(has to be given)" if option.required else f"= {option.default}"
                assert f"{option.name} {shown}" in called.out
    assert "transition = dense   (dense | successor | stencil)" in called.out
    assert "penalty = value   (value | bellman)" in called.out


def test_list_has_the_keys_at_the_top():
    top = command("list").out.partition("problems (")[0]
    for key in ("iterations = 500", "record_every = 10", "seed = 0", "precision = float64", "memory_limit_mb = 4096.0"):
        assert key in top
