"""Restarted GMRES."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import lax

from bilevel_jax.adjoint.krylov import KrylovSolver
from bilevel_jax.adjoint.preconditioners import Preconditioner
from bilevel_jax.reductions import matmul
from bilevel_jax.validation import plain, require_setting

# Basis vectors are kept in blocks of about this many, so that products with a basis half full read half of it;
# in one block below so many states, where the program pays for its operations and not for memory.
BLOCK = 8
BLOCKED_FROM = 8192


class GMRES(KrylovSolver):
    """Restarted GMRES (Saad and Schultz 1986), preconditioned on the right, the true residual checked each cycle.

    A cycle ends as soon as its own estimate meets the tolerance. Orthogonalization is classical
    Gram-Schmidt, repeated where a vector loses half of its length (Daniel et al. 1976). On slow-mixing
    chains restarts can stagnate: `BiCGStab` then needs fewer products and much less memory.

    Args:
      tolerance: |b - A x|_2 / |b|_2 at which to stop; None means 1e-10 in float64, 1e-5 in float32, or
        what rounding leaves to reach if that is more. A tolerance given and out of reach is reported.
      restart: Krylov dimension of a cycle (static).
      max_cycles: cycles at most.
      preconditioner: None, `Jacobi()`, `ConstantDeflation()` or `NeumannPreconditioner(terms)`.
      fall_back: whether an LU factorization follows where products gain too little, up to 5,000 states (static).

    Raises:
      InputError: restart below 1, tolerance or max_cycles below 0, tolerance from 1 on, no `Preconditioner`.
    """

    tolerance: Any = None
    restart: int = eqx.field(default=30, static=True, converter=plain)
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

        def body(carry):
            step, blocks, vector, rotation, inverse, _ = carry
            image = contraction(vector)
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
            solved = jnp.where(index < step, -matmul(inverse, jnp.where(index < step, turned, 0)), unit) / safe
            inverse = inverse.at[:, step].set(jnp.where(diagonal > 0, solved, 0))
            return step + 1, blocks, vector, rotation, inverse, norm * jnp.abs(rotation[step + 1, 0])

        def unfinished(carry):
            return (carry[0] < most) & (carry[-1] > 0.95 * target)

        zero = jnp.asarray(0, jnp.int32)
        start = (
            zero,
            basis.put(basis.empty(), zero, first),
            first,
            jnp.eye(rows, dtype=dtype),
            jnp.zeros((rows, rows), dtype),
            norm,
        )
        steps, blocks, _, rotation, inverse, _ = lax.while_loop(unfinished, body, start)
        coordinates = matmul(inverse, jnp.where(index < steps, norm * rotation[:, 0], 0))
        return basis.combine(blocks, coordinates, jnp.maximum(steps - 1, 0)), steps


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
