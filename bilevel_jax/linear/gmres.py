"""Restarted GMRES."""

from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bilevel_jax.core.arrays import Count, Flag, PerState, Scalar
from bilevel_jax.core.reductions import matmul
from bilevel_jax.core.validation import plain, require_setting
from bilevel_jax.linear.krylov import KrylovSolver
from bilevel_jax.linear.preconditioners import Preconditioner

# Basis vectors are kept in blocks of about this many, so that products with a basis half full read half of it;
# in one block below so many states, where the program pays for its operations and not for memory.
BLOCK = 8
BLOCKED_FROM = 8192


class GMRES(KrylovSolver):
    """Restarted GMRES (Saad and Schultz 1986), preconditioned on the right; each cycle checks the true residual.

    A cycle ends as soon as its own estimate meets the tolerance. Orthogonalization is classical Gram-Schmidt, repeated
    where a vector loses half of its length (Daniel et al. 1976). On slow-mixing chains restarts can stagnate:
    `BiCGStab` then needs fewer products and much less memory.

    Args:
      tolerance: |b - A x|_2 / |b|_2 at which to stop. None means 1e-10 in float64, 1e-5 in float32, or the residual
        that rounding leaves if that is larger. A tolerance that is given and cannot be reached is reported.
      restart: the dimension of a cycle's Krylov space (static).
      max_cycles: the largest number of cycles.
      preconditioner: None, `Jacobi()`, `ConstantDeflation()` or `NeumannPreconditioner(terms)`.
      fall_back: whether an LU factorization follows where products gain too little, up to 5,000 states (static).

    Raises:
      InputError: restart below 1, tolerance or max_cycles below 0, tolerance from 1 on, no `Preconditioner`.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> policy = jnp.array([[0.5, 0.5], [1.0, 0.0]])
      >>> bj.policy_value(mdp, policy, bj.GMRES(restart=10)).round(2).tolist()
      [2.75, 2.25]
    """

    tolerance: Any = None
    restart: int = eqx.field(default=30, static=True, converter=plain("restart"))
    max_cycles: Any = 100
    preconditioner: Preconditioner | None = None
    fall_back: bool = eqx.field(default=False, static=True)

    def __check_init__(self):
        require_setting("restart", self.restart, 1, "20 to 50 is usual", whole=True)
        require_setting("max_cycles", self.max_cycles, 0, "100 is usual", whole=True)

    def limits(self):
        return self.max_cycles, jnp.iinfo(jnp.int32).max

    def segment(self, contraction, gap, norm, target, budget):
        """One cycle: Arnoldi's relation for the contraction K, and the least squares for I - K."""
        dtype, size = gap.dtype, min(self.restart, gap.shape[0])
        basis = Basis.of(size + 1, gap.shape[0], dtype)
        rows = basis.rows
        index = jnp.arange(rows, dtype=jnp.int32)
        first = gap / norm
        most = jnp.minimum(jnp.asarray(size, jnp.int32), budget)

        def orthogonalize(blocks, vector, step):
            weights = jnp.where(index <= step, basis.dots(blocks, vector, step), 0)
            left = vector - basis.combine(blocks, weights, step)
            return left, weights, jnp.linalg.norm(left)

        def body(now: Arnoldi) -> Arnoldi:
            step, blocks, rotation = now.step, now.blocks, now.rotation
            image = contraction(now.vector)
            vector, weights, length = orthogonalize(blocks, image, step)

            def again(vector, weights, _):
                vector, more, length = orthogonalize(blocks, vector, step)
                return vector, weights + more, length

            lost = length < 0.5 * jnp.linalg.norm(image)
            vector, weights, length = lax.cond(lost, again, lambda *same: same, vector, weights, length)
            vector = jnp.where(length > 0, vector / length, 0)
            blocks = basis.put(blocks, step + 1, vector)
            # The new column of the Hessenberg matrix of I - K, and the rotation that makes it triangular.
            unit = (index == step).astype(dtype)
            column = unit - weights - jnp.where(index == step + 1, length, 0)
            turned = matmul(rotation, column)
            above, below = turned[step], turned[step + 1]
            diagonal = jnp.hypot(above, below)
            safe = jnp.where(diagonal > 0, diagonal, 1)
            cosine, sine = jnp.where(diagonal > 0, above / safe, 1), below / safe
            upper, lower = rotation[step], rotation[step + 1]
            rotation = rotation.at[step].set(cosine * upper + sine * lower)
            rotation = rotation.at[step + 1].set(cosine * lower - sine * upper)
            # The triangle's inverse grows by a column: no substitution at the end. A zero on the diagonal is left out.
            solved = jnp.where(index < step, -matmul(now.inverse, jnp.where(index < step, turned, 0)), unit) / safe
            return Arnoldi(
                step=step + 1,
                blocks=blocks,
                vector=vector,
                rotation=rotation,
                inverse=now.inverse.at[:, step].set(jnp.where(diagonal > 0, solved, 0)),
                length=norm * jnp.abs(rotation[step + 1, 0]),
            )

        def unfinished(now: Arnoldi) -> Flag:
            return (now.step < most) & (now.length > 0.95 * target)

        zero = jnp.asarray(0, jnp.int32)
        start = Arnoldi(
            step=zero,
            blocks=basis.put(basis.empty(), zero, first),
            vector=first,
            rotation=jnp.eye(rows, dtype=dtype),
            inverse=jnp.zeros((rows, rows), dtype),
            length=norm,
        )
        end = lax.while_loop(unfinished, body, start)
        coordinates = matmul(end.inverse, jnp.where(index < end.step, norm * end.rotation[:, 0], 0))
        return basis.combine(end.blocks, coordinates, jnp.maximum(end.step - 1, 0)), end.step


class Arnoldi(NamedTuple):
    """Where a cycle stands: the steps made, the basis as blocks of rows, and its last vector [S].

    The Hessenberg matrix is kept as the `rotation` that makes it triangular and the triangle's `inverse`, both
    [rows, rows]. `length`: 2-norm of the residual.
    """

    step: Count
    blocks: tuple[Float[Array, "block S"], ...]
    vector: PerState
    rotation: Float[Array, "rows rows"]
    inverse: Float[Array, "rows rows"]
    length: Scalar


class Basis(eqx.Module):
    """Vectors as rows of equal blocks; products with the first `last` + 1 of them read no further blocks."""

    count: int
    block: int
    size: int
    dtype: Any

    @staticmethod
    def of(vectors, size, dtype):
        count = -(-vectors // BLOCK) if size >= BLOCKED_FROM else 1
        return Basis(count, -(-vectors // count), size, dtype)

    @property
    def rows(self):
        return self.count * self.block

    def empty(self):
        return tuple(jnp.zeros((self.block, self.size), self.dtype) for _ in range(self.count))

    def dots(self, blocks, vector, last):
        """Inner products with all vectors, [rows]."""

        def with_first(used):
            rest = jnp.zeros(((self.count - used) * self.block,), self.dtype)
            return lambda: jnp.concatenate([*(matmul(block, vector) for block in blocks[:used]), rest])

        return lax.switch(last // self.block, [with_first(n + 1) for n in range(self.count)])

    def combine(self, blocks, weights, last):
        """The sum of weights[i] times vector i, [size]."""
        parts = jnp.split(weights, self.count)

        def of_first(used):
            return lambda: (
                sum(matmul(w, block) for w, block in zip(parts[1:used], blocks[1:used], strict=True))
                + matmul(parts[0], blocks[0])
            )

        return lax.switch(last // self.block, [of_first(n + 1) for n in range(self.count)])

    def put(self, blocks, row, vector):
        """The blocks with `vector` as vector number `row`; the other blocks get one of their own rows back."""
        zero = jnp.zeros_like(row)
        out = []
        for number, block in enumerate(blocks):
            at = (jnp.clip(row - number * self.block, 0, self.block - 1), zero)
            old = lax.dynamic_slice(block, at, (1, self.size))
            new = jnp.where(row // self.block == number, vector[None], old)
            out.append(lax.dynamic_update_slice(block, new, at))
        return tuple(out)
