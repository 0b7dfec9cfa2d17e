"""Types of arrays that stand in many signatures, for one problem: batch axes come by vmap, or are spelled out."""

from jaxtyping import Array, Bool, Float, Int

# One number.
Scalar = Float[Array, ""]
Count = Int[Array, ""]
Flag = Bool[Array, ""]

# One number per state, and one per state-action pair.
PerState = Float[Array, " S"]
PerPair = Float[Array, "S A"]
