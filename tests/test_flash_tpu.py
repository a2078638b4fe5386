"""The TPU kernel of prefill and training attention, interpreted on the CPU, and its tiles."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import BlockMask
from pallas_kernels.block_attention import flash_tpu, worklist
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


CLOSE = {"float32": 1e-5, "bfloat16": 2e-2}


def case(mask, entries, *, heads=2, kv_heads=1, size=64, batch=2, dtype="float32", seed=0):
    """Queries, keys and values, and gradients in the output and in the logarithms of the sums."""
    rng = np.random.default_rng(seed)
    shapes = [(entries, heads, size), *2 * [(mask.clean, kv_heads, size)], (entries, heads, size)]
    arrays = [jnp.asarray(rng.normal(size=(batch, *x)).astype(np.float32), dtype) for x in shapes]
    return arrays, jnp.asarray(rng.normal(size=(batch, entries, heads)), jnp.float32)


@partial(jax.jit, static_argnames=("mask", "window", "scale", "soft_cap", "tiles", "interpret"))
def kernel(arrays, d_lse, more, *, mask, window=0, scale=0.2, soft_cap=0.0, tiles=(16, 16),
           interpret=True):  # fmt: skip
    """Attention over clean keys, logarithms of the sums, and the gradients."""
    q, k, v, d_out = arrays
    how = dict(
        window=window, scale=scale, soft_cap=soft_cap, tile_q=tiles[0], tile_k=tiles[1],
        interpret=interpret, **more,
    )  # fmt: skip
    out, lse = flash_tpu.over_clean(q, k, v, mask, **how)
    grads = flash_tpu.over_clean_backward(q, k, v, out, lse, d_out, d_lse, mask, **how)
    return out, lse, grads


@partial(jax.jit, static_argnames=("scale", "soft_cap"))
def softmax(arrays, d_lse, allow, *, scale=0.2, soft_cap=0.0):
    """The same written out, in float32, from who sees whom, bool [B or 1, Q, C]."""
    *arrays, d_out = (x.astype(jnp.float32) for x in arrays)

    def attend(q, k, v):
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
        scores = scale * jnp.einsum("bqnh,bsnh->bnqs", q, k, precision="highest")
        scores = soft_cap * jnp.tanh(scores / soft_cap) if soft_cap else scores
        some = allow.any(axis=2)[:, None]
        scores = jnp.where(allow[:, None], scores, jnp.where(some, -jnp.inf, 0)[..., None])
        weights = jax.nn.softmax(scores, axis=-1) * some[..., None]
        lse = jax.nn.logsumexp(scores, axis=-1)
        out = jnp.einsum("bnqs,bsnh->bqnh", weights, v, precision="highest")
        return out, jnp.moveaxis(jnp.where(some, lse, 0), 1, 2)

    (out, lse), back = jax.vjp(attend, *arrays)
    some = allow.any(axis=2)[..., None]
    return out, jnp.where(some, lse, -jnp.inf), back((d_out, jnp.where(some, d_lse, 0)))


def check(mask, entries, arrays, d_lse, *, window=0, scale=0.2, soft_cap=0.0, lengths=None,
          segments=None, **options):  # fmt: skip
    more = {"lengths": lengths, "segments": segments}
    more = {name: jnp.asarray(x, jnp.int32) for name, x in more.items() if x is not None}
    got = kernel(
        arrays, d_lse, more, mask=mask, window=window, scale=scale, soft_cap=soft_cap, **options
    )
    allow = visible(mask, entries, window=window, **more)
    want = softmax(arrays, d_lse, allow, scale=scale, soft_cap=soft_cap)
    close = CLOSE[arrays[0].dtype.name]
    assert [x.dtype for x in jax.tree.leaves(got)] == [
        x.dtype for x in (arrays[0], d_lse, *arrays[:3])
    ]
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y)
        finite = np.isfinite(y)
        np.testing.assert_array_equal(x[~finite], y[~finite])
        most = np.abs(y[finite]).max(initial=1.0)
        np.testing.assert_allclose(x[finite], y[finite], atol=close * most, rtol=close)


def documents(rng, mask, entries, batch=2) -> np.ndarray:
    """Ids of documents that are in no order; noisy entries have those of their clean twins."""
    ids = rng.permutation(99)[: batch * 4].reshape(batch, 4)
    cuts = np.sort(rng.integers(0, mask.clean + 1, (batch, 3)), axis=1)
    clean = np.stack([
        row[np.searchsorted(cut, np.arange(mask.clean), side="right")]
        for row, cut in zip(ids, cuts, strict=True)
    ])  # fmt: skip
    noise = np.arange(entries - mask.clean)
    group = noise // max(mask.block, 1)
    twin = group * mask.stride + mask.offset + noise - group * mask.block
    return np.concatenate([clean, clean[:, np.minimum(twin, mask.clean - 1)]], axis=1)


@pytest.mark.parametrize("part", [16, 8])
@pytest.mark.parametrize("name", MASKS)
def test_it_is_its_definition(name, part, monkeypatch):
    monkeypatch.setattr(flash_tpu, "_PART", part)
    mask, entries = MASKS[name]

    @settings(max_examples=4)
    @given(
        seed=st.integers(0, 999),
        window=st.sampled_from([0, 1, 7, 30]),
        soft_cap=st.sampled_from([0.0, 1.5]),
        tiles=st.sampled_from([(16, 16), (16, 32), (32, 16)]),
        ragged=st.booleans(),
        packed=st.booleans(),
        dtype=st.sampled_from(["float32", "bfloat16"]),
    )
    def law(seed, window, soft_cap, tiles, ragged, packed, dtype):
        rng = np.random.default_rng(seed)
        check(
            mask, entries, *case(mask, entries, dtype=dtype, seed=seed), window=window,
            soft_cap=soft_cap, tiles=tiles,
            lengths=rng.permutation([0, rng.integers(mask.clean + 1)]) if ragged else None,
            segments=documents(rng, mask, entries) if packed else None,
        )  # fmt: skip

    law()
