"""Cases as arguments of the library, and the library run on them."""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from certificate_cases import Case, Numbers, Structure, stencil_offsets
from certificate_reference import Reference
from helpers import make_regularizer

import bilevel_jax as bj

SOLVERS = {
    "auto": bj.Auto,
    "value iteration": bj.ValueIteration,
    "last backup": functools.partial(bj.ValueIteration, centred=False),
    "policy iteration": bj.PolicyIteration,
    "modified policy iteration": bj.ModifiedPolicyIteration,
    "newton krylov": bj.NewtonKrylov,
    "anderson": bj.AndersonIteration,
    "adaptive": bj.AdaptivePolicyIteration,
}


class Known(NamedTuple):
    """A case, its numbers and their solution; `start` and `tolerance` are what the library is given."""

    case: Case
    numbers: Numbers
    reference: Reference
    implied: float
    start: np.ndarray | None
    tolerance: Any


class Scaled(bj.Problem):
    """x scales the reward, shifts each state's, and is discount and temperature; the objective is linear in V."""

    transition: Any
    reward: Any
    factor: Any
    available: Any
    reference: Any
    cotangent: Any
    structure: Structure = eqx.field(static=True)

    def mdp(self, x):
        reward = x["scale"] * self.reward + x["shift"][:, None]
        discount = x["discount"] if self.factor is None else x["discount"] * self.factor
        return bj.MDP(as_transition(self.structure, self.transition), reward, discount, available=self.available)

    def regularizer(self, x):
        if self.structure.kind == "unregularized":
            return bj.Unregularized()
        return make_regularizer(self.structure.kind, x["temperature"], self.reference)

    def objective(self, x, solution):
        del x
        return jnp.sum(self.cotangent * solution.value)


@jax.jit
def grad_of_solve(problem, x, solver, start):
    def objective(x):
        solution = bj.solve(problem.mdp(x), problem.regularizer(x), solver=solver, initial_value=start)
        return problem.objective(x, solution)

    return jax.grad(objective)(x)


def as_transition(of: Structure, arrays):
    match of.representation:
        case "dense":
            return bj.DenseTransition(arrays["probability"])
        case "successor":
            return bj.SuccessorTransition(arrays["successor"], arrays["probability"])
    offsets = [(offset,) for offset in stencil_offsets(of.states)]
    return bj.StencilTransition(offsets, arrays["probability"], (of.states,))


def _arrays(of: Structure, numbers: list[Numbers], get):
    found = [get(n) for n in numbers]
    return None if found[0] is None else np.stack(found) if of.batch else found[0]


def _transition(of: Structure, numbers: list[Numbers]):
    if of.shared:
        return as_transition(of, numbers[0].transition)
    keys = numbers[0].transition
    return as_transition(of, {key: _arrays(of, numbers, lambda n, key=key: n.transition[key]) for key in keys})


def solve(of: Structure, known: list[Known]):
    numbers = [k.numbers for k in known]
    get = functools.partial(_arrays, of, numbers)
    discount = get(lambda n: n.discounts if of.ending else n.discount)
    mdp = bj.MDP(_transition(of, numbers), get(lambda n: n.reward), discount, available=get(lambda n: n.available))
    regularizer = bj.Unregularized()
    if of.kind != "unregularized":
        regularizer = make_regularizer(of.kind, get(lambda n: n.temperature), get(lambda n: n.reference))
    start = None if not of.warm else np.stack([k.start for k in known]) if of.batch else known[0].start
    solver = SOLVERS[of.solver](tolerance=known[0].tolerance)
    solution = jax.tree.map(np.asarray, bj.solve(mdp, regularizer, solver=solver, initial_value=start))
    if not of.batch:
        return [solution]
    return [jax.tree.map(lambda leaf, i=i: leaf[i], solution) for i in range(len(known))]


def differentiate(of: Structure, known: Known):
    numbers = known.numbers
    problem = Scaled(
        {k: jnp.asarray(v) for k, v in numbers.transition.items()},
        *(
            None if a is None else jnp.asarray(a)
            for a in (numbers.reward, numbers.factor, numbers.available, numbers.reference, numbers.cotangent)
        ),
        of,
    )
    one = numbers.reward.dtype.type(1)
    x = {"scale": one, "shift": np.zeros(of.states, one.dtype), "discount": numbers.discount}
    if of.kind != "unregularized":
        x["temperature"] = numbers.temperature
    x = jax.tree.map(jnp.asarray, x)
    solver = SOLVERS[of.solver](tolerance=known.tolerance)
    method = bj.Implicit(solver=solver)
    made = bj.hypergradient(problem, x, method=method, initial_value=known.start)
    return jax.tree.map(np.asarray, (made, grad_of_solve(problem, x, solver, known.start)))
