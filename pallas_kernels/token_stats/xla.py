"""Token statistics wherever XLA runs, in pieces: of rows on CPUs, of the vocabulary elsewhere.

A CPU's product takes no slice of an array without copying it, so there a piece is a few rows
against the whole vocabulary. Elsewhere it is all rows against a tile of the vocabulary, which is
read once.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.token_stats.partial import Partial, merge
from pallas_kernels.token_stats.reference import partial_stats

STATIC = ("soft_cap", "forbidden", "top", "soft", "tile")  # options that are part of the program

_ROWS = 64  # of a piece on CPUs: enough for products at full speed
_SCORES = 1 << 23  # elements of a piece elsewhere, 32 MiB


def stats(hidden, vocabulary, *, tile: int | None = None, keys=None, **options) -> Partial:
    """As `reference.partial_stats`; `bias` [v], `scale` and `temperature` [R, 1].

    Args:
      tile: tokens of a piece of the vocabulary, on every device; by default see above.
    """
    size = len(vocabulary)
    if tile is not None:
        return _over_tokens(hidden, vocabulary, min(tile, size), keys=keys, **options)
    tile = min(max(_SCORES // max(len(hidden), 1) // 512 * 512, 512), size)
    static = {name: options.pop(name) for name in STATIC if name in options}
    return jax.lax.platform_dependent(
        hidden, vocabulary, {"keys": keys, **options},
        cpu=lambda hidden, vocabulary, own: _over_rows(hidden, vocabulary, **own, **static),
        default=lambda hidden, vocabulary, own: _over_tokens(
            hidden, vocabulary, tile, **own, **static
        ),
    )  # fmt: skip


def _over_rows(hidden, vocabulary, *, keys=None, scale=None, temperature=None, **options):
    """A few rows at a time against all of the vocabulary."""
    count = len(hidden)
    if count <= _ROWS:
        return partial_stats(
            hidden, vocabulary, keys=keys, scale=scale, temperature=temperature, **options
        )
    pieces = -(-count // _ROWS)
    size = -(-count // pieces)
    fold = lambda x: jnp.pad(x, ((0, pieces * size - count), (0, 0)), mode="edge").reshape(  # noqa: E731
        pieces, size, -1
    )
    per_row = {"hidden": hidden, "keys": keys, "scale": scale, "temperature": temperature}
    folded = jax.tree.map(fold, per_row)

    def piece(rows):
        return partial_stats(rows.pop("hidden"), vocabulary, **rows, **options)

    found = jax.lax.map(piece, folded)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], found)


def _over_tokens(hidden, vocabulary, tile: int, *, first=0, bias=None, **options) -> Partial:
    """All rows against a tile of the vocabulary at a time."""
    whole = len(vocabulary) // tile
    one = partial(partial_stats, hidden, **options)

    def at(start, size):
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
        own = None if bias is None else cut(bias)
        return one(cut(vocabulary), first=first + start, bias=own)

    found = at(0, tile)
    if whole > 1:
        found = jax.lax.fori_loop(
            1, whole, lambda i, before: merge(before, at(i * tile, tile)), found
        )
    if rest := len(vocabulary) - whole * tile:
        found = merge(found, at(whole * tile, rest))
    return found
