"""Products that a bound rests on ask for all bits; shown with operands of ten bits, as accelerators have by default."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj

RNG = np.random.default_rng(0)
STATES, ACTIONS = 24, 3
P = RNG.dirichlet(np.full(STATES, 0.3), (STATES, ACTIONS))
R = RNG.normal(size=(STATES, ACTIONS))
MASK = np.ones((STATES, ACTIONS), bool)
MASK[::3, 1] = False


def mdp(**kind):
    return bj.MDP(P.astype(np.float32), R.astype(np.float32), np.float32(0.99), **kind)


def dot_products(jaxpr):
    """Every matrix product of a program, those inside loops, branches and derivative rules included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for parameter in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from dot_products(inner)


def products_of(function, *arguments):
    return list(dot_products(jax.make_jaxpr(function)(*arguments).jaxpr))


def solved(solver, regularizer):
    return lambda m: bj.solve(m, regularizer, solver=solver)


PROGRAMS = {
    "policy iteration": solved(bj.PolicyIteration(), bj.ShannonEntropy(0.1)),
    "adaptive": solved(bj.AdaptivePolicyIteration(), bj.ShannonEntropy(0.1)),
    "value iteration": solved(bj.ValueIteration(), bj.Unregularized()),
    "anderson": solved(bj.AndersonIteration(), bj.TsallisEntropy(0.1)),
    "gmres": solved(bj.NewtonKrylov(krylov=bj.GMRES()), bj.KLDivergence(0.1, np.full(ACTIONS, 1 / ACTIONS))),
    "gradient": lambda m: jax.grad(lambda m: bj.solve(m, bj.ShannonEntropy(0.1)).value.sum())(m),
    "gradient by gmres": lambda m: jax.grad(
        lambda m: bj.solve(m, bj.ShannonEntropy(0.1), adjoint=bj.GMRES()).value.sum()
    )(m),
    "average reward": lambda m: bj.solve_average_reward(m, bj.ShannonEntropy(0.1)),
    "finite horizon": lambda m: bj.solve_finite_horizon(m, bj.ShannonEntropy(0.1), 5),
    "occupancy": lambda m: bj.occupancy(m, jnp.full((STATES, ACTIONS), 1 / ACTIONS, jnp.float32)),
    "stationary": lambda m: bj.stationary_distribution(m, jnp.full((STATES, ACTIONS), 1 / ACTIONS, jnp.float32)),
    "hyper-gradient": lambda m: bj.hypergradient(
        bj.BilevelProblem(
            jax.tree_util.Partial(lambda m, x: m.replace(reward=m.reward + x[None]), m),
            bj.ShannonEntropy(0.1),
            lambda x, solution: solution.value.sum(),
        ),
        jnp.zeros(ACTIONS, jnp.float32),
    ),
}


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_every_product_asks_for_all_bits(name):
    found = products_of(PROGRAMS[name], mdp())
    assert found, "the process is dense: it is multiplied with"
    for equation in found:
        precision = equation.params["precision"]
        asked = precision if isinstance(precision, tuple) else (precision,)
        assert set(asked) == {jax.lax.Precision.HIGHEST}, equation.source_info


def test_the_test_sees_products_that_do_not_ask():
    assert products_of(lambda m: m.transition.probability @ m.reward[:, 0], mdp())[0].params["precision"] is None


def ten_bits(x):
    """x as TF32 has it."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=10)


@pytest.fixture
def accelerator(monkeypatch):
    """`dot_general` as on an accelerator: operands of ten bits unless all are asked for."""
    exact = jax.lax.dot_general
    seen = []

    def rounded(lhs, rhs, dimension_numbers, precision=None, *arguments, **others):
        asked = precision if isinstance(precision, tuple) else (precision,)
        if set(asked) != {jax.lax.Precision.HIGHEST}:
            seen.append(lhs.shape)
            lhs, rhs = ten_bits(lhs), ten_bits(rhs)
        return exact(lhs, rhs, dimension_numbers, precision, *arguments, **others)

    jax.clear_caches()
    for module in (jax.lax, jax._src.lax.lax):
        monkeypatch.setattr(module, "dot_general", rounded)
    yield seen
    jax.clear_caches()


def reference():
    value = np.zeros(STATES, np.longdouble)
    p, r = P.astype(np.float32).astype(np.longdouble), R.astype(np.float32).astype(np.longdouble)
    discount = np.longdouble(np.float32(0.99))
    for _ in range(6000):
        value = np.where(MASK, r + discount * np.einsum("saj,j->sa", p, value), -np.inf).max(1)
    return value


@pytest.mark.slow
@pytest.mark.parametrize(
    "solver", [bj.PolicyIteration(), bj.ValueIteration(), bj.AndersonIteration(), bj.AdaptivePolicyIteration()]
)
def test_bounds_hold_where_products_have_ten_bits(accelerator, solver):
    exact = reference()
    solution = bj.check(bj.solve(mdp(available=MASK), bj.Unregularized(), solver=solver))
    error = np.abs(np.asarray(solution.value, np.longdouble) - exact).max()
    assert error <= float(solution.stats.error_bound) < 0.02
    assert accelerator == []


@pytest.mark.slow
def test_ten_bits_would_break_the_bound(accelerator):
    # The control: a kernel whose products do not ask for all bits. Its probabilities have few, so that V alone is cut.
    class Careless(bj.DenseTransition):
        def expect(self, values):
            return (self._rows() @ values).reshape(self.probability.shape[:-1])

    p = np.zeros_like(P, np.float32)
    for row in p.reshape(-1, STATES):
        row[RNG.choice(STATES, 4, replace=False)] = 0.25
    careful = bj.MDP(p, R.astype(np.float32), np.float32(0.99))
    careless = careful.replace(transition=Careless(p))
    exact, cut = (bj.solve(m, bj.Unregularized(), solver=bj.ValueIteration()) for m in (careful, careless))
    assert accelerator
    error = np.abs(np.asarray(exact.value) - np.asarray(cut.value)).max()
    assert error > 2 * float(exact.stats.error_bound) + float(cut.stats.error_bound)
