"""Mask specs against brute force, and block attention against a dense softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import BlockMask, block_attention


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
                behind = min(group * mask.stride + mask.offset, mask.clean)
                same = k >= mask.clean and (k - mask.clean) // mask.block == group
                allow[q, k] = (k < behind) or same
    return allow


@given(
    st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3), st.integers(0, 3)
)
def test_dual_stream_is_its_definition(clean, block, groups, stride, offset):
    mask = BlockMask.dual_stream(clean, block, stride=stride, offset=offset)
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


def dense_attention(q, k, v, allow):
    heads = q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, heads, axis=2) for x in (k, v))
    scores = np.einsum("bqnh,bsnh->bnqs", q, k) * q.shape[-1] ** -0.5
    scores = np.where(allow[:, None], scores, -np.inf)
    top = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
    total = weights.sum(axis=-1, keepdims=True)
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    return np.einsum("bnqs,bsnh->bqnh", weights, v)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    ("mask", "entries"),
    [
        (BlockMask.causal(5), 5),
        (BlockMask.bidirectional(4), 4),
        (BlockMask.block_causal(6, 3), 6),
        (BlockMask.dual_stream(4, 3, stride=1, offset=1), 4 + 4 * 3),
        (BlockMask.block_diagonal(3), 9),
    ],
)
def test_attention_is_a_masked_softmax(mask, entries, cached):
    keys = jax.random.split(jax.random.key(0), 4)
    batch, heads, kv_heads, size, slots = 3, 4, 2, 8, 7
    q = jax.random.normal(keys[0], (batch, entries, heads, size))
    k, v = (jax.random.normal(key, (batch, entries, kv_heads, size)) for key in keys[1:3])
    lengths = np.array([mask.clean, max(mask.clean - 2, 0), mask.clean])
    index = np.arange(entries)
    valid = (index >= mask.clean) | (index < lengths[:, None])
    allow = np.asarray(mask.dense(entries))[None] & valid[:, None, :]
    more = {}
    if cached:
        ends = np.array([0, 3, slots])
        kv = np.array(jax.random.normal(keys[3], (batch, kv_heads, slots, 2 * size)))
        for row, end in enumerate(ends):
            kv[row, :, end:] = np.nan  # nobody may read it
        more = dict(cache=jnp.asarray(kv), cache_end=jnp.asarray(ends))
        prefix = np.moveaxis(np.nan_to_num(kv), 1, 2)
        k_all = np.concatenate([prefix[..., :size], k], axis=1)
        v_all = np.concatenate([prefix[..., size:], v], axis=1)
        seen = np.broadcast_to(np.arange(slots) < ends[:, None, None], (batch, entries, slots))
        allow = np.concatenate([seen, allow], axis=2)
    else:
        k_all, v_all = np.asarray(k), np.asarray(v)
    out = block_attention(q, k, v, mask, lengths=jnp.asarray(lengths), **more)
    expected = dense_attention(np.asarray(q), k_all, v_all, allow)
    np.testing.assert_allclose(out, expected, atol=2e-6)


def test_a_prefix_of_its_own_for_each_query():
    keys = jax.random.split(jax.random.key(1), 4)
    q = jax.random.normal(keys[0], (1, 4, 2, 4))
    k, v = (jax.random.normal(key, (1, 4, 2, 4)) for key in keys[1:3])
    kv = jax.random.normal(keys[3], (1, 2, 6, 8))
    ends = jnp.array([[2, 2, 5, 5]])
    both = block_attention(q, k, v, BlockMask.block_diagonal(2), cache=kv, cache_end=ends)
    for group, end in ((0, 2), (1, 5)):
        part = slice(2 * group, 2 * group + 2)
        alone = block_attention(
            q[:, part], k[:, part], v[:, part], BlockMask.block_diagonal(2),
            cache=kv, cache_end=jnp.array([end]),
        )  # fmt: skip
        np.testing.assert_allclose(both[:, part], alone, atol=1e-6)


def test_bad_shapes_are_named():
    x = jnp.zeros((1, 5, 2, 4))
    with pytest.raises(ValueError, match="5 entries do not fit"):
        block_attention(x, x, x, BlockMask.dual_stream(2, 2))
    with pytest.raises(ValueError, match="come together"):
        block_attention(x, x, x, BlockMask.causal(5), cache=jnp.zeros((1, 2, 3, 8)))
    with pytest.raises(ValueError, match="multiple of"):
        block_attention(jnp.zeros((1, 5, 3, 4)), x, x, BlockMask.causal(5))
