"""Token statistics wherever XLA runs, in pieces: of rows on CPUs, of the vocabulary elsewhere.

A CPU's product takes no slice of an array without copying it, so there a piece is a few rows
against the whole vocabulary. Elsewhere it is all rows against a tile of the vocabulary, which is
read once.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.token_stats.partial import Partial, merge, of_scores
from pallas_kernels.token_stats.reference import partial_stats, scores_of, without
from pallas_kernels.token_stats.rows import over_active

STATIC = ("soft_cap", "forbidden", "top", "soft", "tile")  # options that are part of the program

_ROWS = 128  # of a piece on CPUs: enough for products at full speed
_FEW = 32  # of so many rows, or of a small vocabulary, none is left out: finding them costs more
_TILE = 4096  # tokens whose scores of these rows stay in a CPU's cache
_SCORES = 1 << 23  # elements of a piece elsewhere, 32 MiB


def stats(
    hidden, vocabulary, *, tile: int | None = None, keys=None, active=None, **options
) -> Partial:
    """As `reference.partial_stats`; `bias` [v], `scale` and `temperature` [R, 1].

    Args:
      tile: tokens of a piece of the vocabulary, on every device; by default see above.
      active: bool[R], rows that need an answer. Only CPUs leave the others out: elsewhere rows may
        be split over devices, and few cost as much as many, for all of the vocabulary is read.
    """
    size = len(vocabulary)
    if tile is not None:
        return _over_tokens(hidden, vocabulary, min(tile, size), keys=keys, **options)
    tile = min(max(_SCORES // max(len(hidden), 1) // 512 * 512, 512), size)
    static = {name: options.pop(name) for name in STATIC if name in options}
    return jax.lax.platform_dependent(
        hidden, vocabulary, active, {"keys": keys, **options},
        cpu=lambda hidden, vocabulary, active, own: _over_rows(
            hidden, vocabulary, active, **own, **static
        ),
        default=lambda hidden, vocabulary, active, own: _over_tokens(
            hidden, vocabulary, tile, **own, **static
        ),
    )  # fmt: skip


def _over_rows(hidden, vocabulary, active, *, keys=None, scale=None, temperature=None, **options):
    """A few rows at a time against all of the vocabulary."""
    count = len(hidden)
    per_row = {"hidden": hidden, "keys": keys, "scale": scale, "temperature": temperature}
    if active is not None and count > _FEW and len(vocabulary) >= 2 * _TILE:
        most = min(count, _ROWS)
        return over_active(
            lambda rows: _of_few(vocabulary=vocabulary, **rows, **options), per_row, active,
            (-(-most // 2), most),
        )  # fmt: skip
    if count <= _ROWS:
        return _of_few(vocabulary=vocabulary, **per_row, **options)
    pieces = -(-count // _ROWS)
    size = -(-count // pieces)
    fold = lambda x: jnp.pad(x, ((0, pieces * size - count), (0, 0)), mode="edge").reshape(  # noqa: E731
        pieces, size, -1
    )
    found = jax.lax.map(
        lambda rows: _of_few(vocabulary=vocabulary, **rows, **options),
        jax.tree.map(fold, per_row),
    )
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], found)


def _of_few(
    hidden, vocabulary, *, first=0, bias=None, scale=None, soft_cap=0.0, forbidden=(), soft=False,
    **options,
) -> Partial:  # fmt: skip
    """All scores of a few rows, and their statistics a tile at a time, which stays in the cache."""
    size = len(vocabulary)
    if soft or size < 2 * _TILE:  # the mean vector is a product, which takes no slice
        return partial_stats(
            hidden, vocabulary, first=first, bias=bias, scale=scale, soft_cap=soft_cap,
            forbidden=forbidden, soft=soft, **options,
        )  # fmt: skip
    scores = scores_of(hidden, vocabulary, bias=bias, scale=scale, soft_cap=soft_cap)

    def at(start, width):
        ids = first + start + jnp.arange(width, dtype=jnp.int32)
        own = jax.lax.dynamic_slice_in_dim(scores, start, width, axis=1)
        return of_scores(without(own, ids, forbidden), ids, **options)

    return _merged(at, size, _TILE)


def _over_tokens(hidden, vocabulary, tile: int, *, first=0, bias=None, **options) -> Partial:
    """All rows against a tile of the vocabulary at a time."""
    one = partial(partial_stats, hidden, **options)

    def at(start, size):
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
        own = None if bias is None else cut(bias)
        return one(cut(vocabulary), first=first + start, bias=own)

    return _merged(at, len(vocabulary), tile)


def _merged(at: Callable[..., Partial], size: int, tile: int) -> Partial:
    """The statistics of `size` tokens out of those of tiles, `at(start, width)`."""
    whole = size // tile
    found = at(0, tile)
    if whole > 1:
        found = jax.lax.fori_loop(
            1, whole, lambda i, before: merge(before, at(i * tile, tile)), found
        )
    if rest := size - whole * tile:
        found = merge(found, at(whole * tile, rest))
    return found
