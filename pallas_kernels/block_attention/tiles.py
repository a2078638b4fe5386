"""Which tiles of queries and clean keys a mask fills, before anything runs: numpy alone.

query tile 0 | CUT                          of a causal mask: what is above the diagonal is in
query tile 1 | WHOLE  CUT                   no list, what is below it needs no mask
query tile 2 | WHOLE  WHOLE  CUT
"""

import numpy as np

from pallas_kernels.masks import BlockMask

# A tile in which every query sees every key, and one in which some pair is not seen.
WHOLE, CUT = 1, 2


def tiles(
    mask: BlockMask, entries: int, tile_q: int, tile_k: int, window: int = 0, *,
    ragged: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """The tiles of queries and clean keys that are not empty, by query tile and then by key tile.

    Lengths and segments of a row, which are not known yet, empty some and cut others; they add none
    but where lengths meet a window, which is what `ragged` is for.

    Args:
      entries: queries; keys are the `mask.clean` first ones.
      tile_q, tile_k: queries and keys of a tile. The last ones may reach past the end, and are CUT.
      window: a query sees only the keys behind its place less this; 0: all.
      ragged: rows have lengths, and a short one moves the windows of its noisy queries down.

    Returns:
      (query tile, key tile, kind), int32 [steps] each. A query tile that sees nothing has no step.
    """
    first, end = seen(mask, entries, window)
    least = np.where(np.arange(entries) < mask.clean, first, 0) if ragged else first
    lo = np.arange(-(-mask.clean // tile_k)) * tile_k
    hi = lo + tile_k
    some = np.maximum(least[:, None], lo) < np.minimum(end[:, None], hi)
    every = (first[:, None] <= lo) & (hi <= end[:, None])
    # Queries of the last tile that do not exist see nothing.
    shape = -(-entries // tile_q), tile_q, len(lo)
    past = (0, -entries % tile_q), (0, 0)
    some, every = np.pad(some, past).reshape(shape), np.pad(every, past).reshape(shape)
    query, key = np.nonzero(np.any(some, axis=1))
    kind = np.where(np.all(every, axis=1)[query, key], WHOLE, CUT)
    return query.astype(np.int32), key.astype(np.int32), kind.astype(np.int32)


def seen(mask: BlockMask, entries: int, window: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The clean keys [first, end) that each query sees, int [entries] each, in rows of full length.

    `BlockMask.clean_end` and `worklist.place` in numpy: theirs are traced inside of a `jit`.
    """
    index = np.arange(entries)
    end = np.minimum((index // mask.clean_block + 1) * mask.clean_block, mask.clean)
    clean = index < mask.clean
    if mask.block:
        group = (index - mask.clean) // mask.block // mask.repeat
        behind = np.minimum(group * mask.stride + mask.offset, mask.clean)
        end = np.where(clean, end, behind)
    first = np.maximum(np.where(clean, index, end) - window + 1, 0) if window else 0 * index
    return first, end
