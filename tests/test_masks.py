"""Mask specs against brute force."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import BlockMask


def brute(mask: BlockMask, length: int) -> np.ndarray:
    """The definition of `BlockMask`, entry by entry."""
    allow = np.zeros((length, length), bool)
    for q in range(length):
        for k in range(length):
            if q < mask.clean:
                end = min((q // mask.clean_block + 1) * mask.clean_block, mask.clean)
                allow[q, k] = k < end
            else:
                group = (q - mask.clean) // mask.block
                behind = min(group // mask.repeat * mask.stride + mask.offset, mask.clean)
                same = k >= mask.clean and (k - mask.clean) // mask.block == group
                allow[q, k] = (k < behind) or same
    return allow


@given(
    st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3), st.integers(0, 3),
    st.integers(1, 3),
)  # fmt: skip
def test_dual_stream_is_its_definition(clean, block, groups, stride, offset, repeat):
    mask = BlockMask.dual_stream(clean, block, stride=stride, offset=offset, repeat=repeat)
    length = clean + block * groups
    np.testing.assert_array_equal(mask.dense(length), brute(mask, length))


def test_named_patterns():
    lower = np.tril(np.ones((6, 6), bool))
    np.testing.assert_array_equal(BlockMask.causal(6).dense(6), lower)
    assert BlockMask.bidirectional(6).dense(6).all()
    blocks = np.arange(6) // 2
    expected = blocks[:, None] >= blocks[None, :]
    np.testing.assert_array_equal(BlockMask.block_causal(6, 2).dense(6), expected)
    expected = blocks[:, None] == blocks[None, :]
    np.testing.assert_array_equal(BlockMask.block_diagonal(2).dense(6), expected)


def test_training_mask_of_block_diffusion():
    """[clean ; noisy]: the closed form of BD3-LM with a causal clean stream."""
    length, block = 8, 4
    dense = np.asarray(BlockMask.dual_stream(length, block).dense(2 * length))
    i = np.arange(length)
    np.testing.assert_array_equal(dense[:length, :length], i[:, None] >= i[None, :])
    assert not dense[:length, length:].any()
    np.testing.assert_array_equal(
        dense[length:, :length], i[:, None] // block > i[None, :] // block
    )
    np.testing.assert_array_equal(
        dense[length:, length:], i[:, None] // block == i[None, :] // block
    )
