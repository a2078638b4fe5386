"""Tokens' vectors out of a table that may be split over a mesh, by tokens and by columns."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dllm_jax.sharding import axis_sizes, mapped, spec, spec_of, split

_COLUMNS = "fsdp"


def lookup(vectors: Float[Array, "V D"], tokens: Int[Array, "B Q"]) -> Float[Array, "B Q D"]:
    """The vector of each token; ids are held within bounds.

    On a mesh no part of the table travels: over "tensor" each device has vectors for some tokens,
    and zeros are added for the others; over "fsdp" it has some columns, and looks them up for the
    rows of all.
    """
    sizes = axis_sizes()
    if not sizes:
        return jnp.take(vectors, tokens, axis=0, mode="clip")
    tokens = jnp.clip(tokens, 0, len(vectors) - 1)
    by, rows = split("vocab", len(vectors)), split("batch", len(tokens))
    columns = _COLUMNS if vectors.shape[1] % sizes.get(_COLUMNS, 1) == 0 else None
    columns = columns if _COLUMNS in sizes else None
    lie = spec_of(tokens.shape, "batch", "length")

    def run(vectors, tokens):
        travels = columns is not None and columns in rows
        if travels:
            tokens = jax.lax.all_gather(tokens, columns, tiled=True)
        if by:
            tokens = tokens - jax.lax.axis_index(*by) * len(vectors)
        here = (tokens >= 0) & (tokens < len(vectors))
        found = jnp.take(vectors, tokens, axis=0, mode="clip")
        if by:
            found = jax.lax.psum(jnp.where(here[..., None], found, 0), by)
        if travels:
            return jax.lax.all_to_all(found, columns, 0, 2, tiled=True)
        return found if columns is None else jax.lax.all_gather(found, columns, axis=2, tiled=True)

    return mapped(run, (spec(by, columns), lie), lie)(vectors, tokens)
