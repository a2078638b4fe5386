"""The TPU kernel of prefill and training attention, interpreted on the CPU, and its tiles."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import BlockMask
from pallas_kernels.block_attention import worklist
from pallas_kernels.block_attention.tiles import CUT, WHOLE, seen, tiles

MASKS = {
    "causal": (BlockMask.causal(40), 40),
    "bidirectional": (BlockMask.bidirectional(23), 23),
    "block_causal": (BlockMask.block_causal(40, 8), 40),
    "dual_stream": (BlockMask.dual_stream(40, 8), 80),
    "some blocks": (BlockMask.dual_stream(30, 5), 45),
    "drafts": (BlockMask.dual_stream(6, 3, stride=1, offset=1), 6 + 7 * 3),
    "clean_block": (BlockMask.dual_stream(36, 4, clean_block=4), 72),
}


def visible(mask, entries, *, window=0, lengths=None, segments=None) -> np.ndarray:
    """Which clean keys each query of each row sees, bool [B, Q, C], as the docstrings say."""
    lengths = np.array([mask.clean]) if lengths is None else np.asarray(lengths)
    key = np.arange(mask.clean)
    allow = np.asarray(mask.dense(entries))[None, :, : mask.clean]
    allow = allow & (key < lengths[:, None, None])
    if window:
        place = worklist.place(mask, jnp.arange(entries)[None], jnp.asarray(lengths)[:, None])
        allow = allow & (key > np.asarray(place)[..., None] - window)
    if segments is not None:
        segments = np.asarray(segments)
        allow = allow & (segments[:, :, None] == segments[:, None, : mask.clean])
    return allow


@pytest.mark.parametrize("name", MASKS)
@given(
    tile_q=st.integers(1, 50), tile_k=st.integers(1, 50), window=st.sampled_from([0, 1, 3, 9, 60])
)
def test_tiles_are_those_of_the_dense_mask(name, tile_q, tile_k, window):
    mask, entries = MASKS[name]
    allow = visible(mask, entries, window=window)[0]
    first, end = seen(mask, entries, window)
    key = np.arange(mask.clean)
    np.testing.assert_array_equal(allow, (first[:, None] <= key) & (key < end[:, None]))
    past = -entries % tile_q, -mask.clean % tile_k
    allow = np.pad(allow, ((0, past[0]), (0, past[1])))
    cells = allow.reshape(len(allow) // tile_q, tile_q, -1, tile_k)
    want = np.where(cells.all(axis=(1, 3)), WHOLE, np.where(cells.any(axis=(1, 3)), CUT, 0))
    query, found, kind = tiles(mask, entries, tile_q, tile_k, window)
    np.testing.assert_array_equal(np.stack(np.nonzero(want)), np.stack([query, found]))
    np.testing.assert_array_equal(want[query, found], kind)


@given(
    name=st.sampled_from(list(MASKS)),
    tile=st.sampled_from([4, 7]),
    window=st.sampled_from([0, 1, 5, 20]),
    length=st.floats(0, 1),
)
def test_ragged_tiles_are_enough_for_any_length(name, tile, window, length):
    mask, entries = MASKS[name]
    allow = visible(mask, entries, window=window, lengths=[int(length * mask.clean)])[0]
    listed = np.zeros((-(-entries // tile), -(-mask.clean // tile)), bool)
    query, key, _ = tiles(mask, entries, tile, tile, window, ragged=True)
    listed[query, key] = True
    query, key = np.nonzero(allow)
    assert listed[query // tile, key // tile].all()
