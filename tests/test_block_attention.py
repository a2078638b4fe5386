"""Block attention against a dense softmax, its masks written out entry by entry."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import BlockMask, block_attention, block_attention_lse
from pallas_kernels.block_attention import reference
from pallas_kernels.block_attention.quantised import dequantise, quantise


def dense_attention(q, k, v, allow, scale=None):
    heads = q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, heads, axis=2) for x in (k, v))
    scores = np.einsum("bqnh,bsnh->bnqs", q, k) * (scale or q.shape[-1] ** -0.5)
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


@pytest.mark.parametrize("soft_cap", [0.0, 2.0])
def test_results_over_parts_of_the_cache_merge(soft_cap):
    """By their log-sums; from one layer of the cache of all; with the soft cap as defined."""
    keys = jax.random.split(jax.random.key(2), 4)
    q, k, v = (3 * jax.random.normal(key, (2, 3, 2, 8)) for key in keys[:3])
    kv = jax.random.normal(keys[3], (4, 2, 2, 9, 16))
    mask, ends = BlockMask.bidirectional(3), jnp.array([9, 5])
    out, lse = block_attention_lse(
        q, k, v, mask, cache=kv, layer=jnp.int32(2), cache_end=ends, soft_cap=soft_cap
    )
    none = jnp.zeros(2, jnp.int32)  # of the entries: the cache alone, or in two parts
    alone = partial(
        block_attention_lse, q, k, v, mask, cache=kv[2], lengths=none, soft_cap=soft_cap
    )
    own = block_attention_lse(q, k, v, mask, soft_cap=soft_cap)
    cached = alone(cache_end=ends)
    parts = [
        alone(cache_end=jnp.array([3, 0])),
        alone(cache_end=ends, hole=(none, jnp.array([3, 0]))),
    ]
    assert (parts[0][1][1] == -jnp.inf).all()
    for (expected, total), pieces in (((out, lse), [own, cached]), (cached, parts)):
        merged = jnp.logaddexp(pieces[0][1], pieces[1][1])
        np.testing.assert_allclose(merged, total, atol=1e-5)
        shares = [jnp.exp(piece[1] - merged)[..., None] for piece in pieces]
        mixed = shares[0] * pieces[0][0] + shares[1] * pieces[1][0]
        np.testing.assert_allclose(mixed, expected, atol=1e-5)

    scores = np.einsum("bqnh,bsnh->bnqs", q, k) / 8**0.5
    if soft_cap:
        scores = soft_cap * np.tanh(scores / soft_cap)
    np.testing.assert_allclose(
        own[1], np.moveaxis(scipy.special.logsumexp(scores, axis=-1), 1, 2), atol=1e-5
    )
    weights = scipy.special.softmax(scores, axis=-1)
    np.testing.assert_allclose(own[0], np.einsum("bnqs,bsnh->bqnh", weights, v), atol=1e-5)


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


@pytest.mark.parametrize("own", [True, False])
def test_bytes_in_chosen_pieces_of_a_padded_cache(own):
    """An int8 cache with room beside each head, of which rows read some pieces."""
    rng = np.random.default_rng(3)
    mask, entries, slots, size, half = BlockMask.dual_stream(2, 2, stride=0, offset=2), 4, 12, 8, 10
    q = rng.normal(size=(3, entries, 4, size)).astype(np.float32)
    k, v = rng.normal(size=(2, 3, entries, 2, size)).astype(np.float32)
    stored = rng.integers(-127, 128, (3, 2, slots, 2 * half)).astype(np.int8)
    scale = rng.uniform(0.005, 0.05, (3, 2, 2)).astype(np.float32)
    ends, chosen = np.array([12, 7, 9]), rng.random((3, 4)) < 0.5
    attend = jax.jit(partial(block_attention_lse, mask=mask, own=own))
    out, lse = attend(q, k, v, cache=stored, cache_end=ends, cache_scale=scale, chosen=chosen)
    prefix = np.moveaxis(stored.reshape(3, 2, slots, 2, half) * scale[:, :, None, :, None], 1, 2)
    keys = np.concatenate([prefix[:, :, :, 0, :size], k], axis=1)
    values = np.concatenate([prefix[:, :, :, 1, :size], v], axis=1)
    seen = (np.arange(slots) < ends[:, None]) & np.repeat(chosen, 3, axis=1)
    allow = np.concatenate([
        np.broadcast_to(seen[:, None], (3, entries, slots)),
        np.broadcast_to(own & np.asarray(mask.dense(entries)), (3, entries, entries)),
    ], axis=2)  # fmt: skip
    np.testing.assert_allclose(out, dense_attention(q, keys, values, allow), atol=2e-6)
    scores = np.einsum("bqnh,bsnh->bqns", q, np.repeat(keys, 2, axis=2)) / size**0.5
    scores = np.where(allow[:, :, None], scores, -np.inf)
    np.testing.assert_allclose(lse, scipy.special.logsumexp(scores, axis=-1), atol=2e-6)


def test_bytes_are_the_nearest_and_clipped():
    kv = jax.random.normal(jax.random.key(0), (2, 3, 5, 8))
    scale = jnp.stack([jnp.abs(x).max((2, 3)) for x in (kv[..., :4], kv[..., 4:])], -1) / 127
    bytes_of = quantise(kv, scale)
    off = np.abs(dequantise(bytes_of, scale) - kv).reshape(2, 3, 5, 2, 4)
    assert (off <= 0.501 * np.asarray(scale)[:, :, None, :, None]).all()
    assert int(jnp.abs(bytes_of.astype(jnp.int32)).max()) == 127
    clipped = quantise(9 * kv, scale)
    np.testing.assert_array_equal(jnp.abs(clipped) == 127, jnp.abs(9 * kv) >= 126.5 * jnp.repeat(
        scale, 4, axis=-1)[..., None, :])  # fmt: skip
    assert int(clipped.min()) == -127


MASKS = (
    BlockMask.causal(6),
    BlockMask.block_causal(6, 3),
    BlockMask.dual_stream(6, 3),
    BlockMask.dual_stream(3, 3, stride=0, offset=3),
    BlockMask.dual_stream(6, 3, repeat=2),
    BlockMask.block_diagonal(3),
)


def windowed(mask: BlockMask, entries: int, slots: int, row: dict, window: int) -> np.ndarray:
    """Who sees whom in one row, bool[entries, slots + entries]: the definition of `window`."""
    allow = np.zeros((entries, slots + entries), bool)
    dense = np.asarray(mask.dense(entries))
    for q in range(entries):
        end, (first, second) = row["ends"][q], row["hole"] or (slots, slots)
        base = first if row["hole"] else end
        clean = [k for k in range(mask.clean) if dense[q, k] and k < row["length"]]
        place = base + (
            q if q < mask.clean else min(int(mask.clean_end(jnp.int32(q))), row["length"])
        )
        for slot in range(slots):
            inside = slot < end and not first <= slot < second
            allow[q, slot] = inside and (not window or slot > place - window)
        for k in clean:
            allow[q, slots + k] = not window or base + k > place - window
        for k in range(mask.clean, entries):
            allow[q, slots + k] = dense[q, k]
    return allow


@settings(max_examples=10)
@given(
    mask=st.sampled_from(MASKS),
    cached=st.sampled_from(["nothing", "row", "query", "hole"]),
    window=st.integers(0, 12),
    seed=st.integers(0, 99),
)
def test_a_window_is_its_definition(mask, cached, window, seed):
    rng = np.random.default_rng(seed)
    batch, heads, kv_heads, size, slots = 2, 2, 1, 4, 9
    entries = mask.clean + mask.block * (2 if mask.block else 0) * mask.repeat
    q, k, v = (
        rng.normal(size=(batch, entries, n, size)).astype(np.float32)
        for n in (heads, kv_heads, kv_heads)
    )
    lengths = rng.integers(0, mask.clean + 1, batch)
    kv = rng.normal(size=(batch, kv_heads, slots, 2 * size)).astype(np.float32)
    ends = rng.integers(0, slots + 1, (batch, entries if cached == "query" else 1))
    holes = np.sort(rng.integers(0, slots + 1, (batch, 2)), axis=1)
    more = {}
    if cached != "nothing":
        more = dict(cache=kv, cache_end=ends if cached == "query" else ends[:, 0])
    if cached == "hole":
        more["hole"] = (holes[:, 0], holes[:, 1])
    more = jax.tree.map(jnp.asarray, more)
    out = block_attention(
        *map(jnp.asarray, (q, k, v)), mask, lengths=jnp.asarray(lengths), window=window, scale=0.7,
        **more,
    )  # fmt: skip
    ends = np.broadcast_to(ends if cached != "nothing" else 0 * ends, (batch, entries))
    allow = np.stack([
        windowed(mask, entries, slots, dict(ends=ends[b], length=lengths[b],
                 hole=tuple(holes[b]) if cached == "hole" else None), window)
        for b in range(batch)
    ])  # fmt: skip
    prefix = np.moveaxis(kv, 1, 2)
    keys = np.concatenate([prefix[..., :size], k], axis=1)
    values = np.concatenate([prefix[..., size:], v], axis=1)
    expected = dense_attention(q, keys, values, allow, scale=0.7)
    np.testing.assert_allclose(out, expected, atol=2e-6)


@pytest.mark.parametrize("mask", [BlockMask.causal(3), BlockMask.block_diagonal(3)])
def test_a_window_reads_no_slot_outside_it(mask):
    """A sliding layer's share of a cache is as long as its window, however long the cache."""
    q, kv, ends = jnp.ones((2, 3, 2, 4)), jnp.ones((2, 3, 1, 4)), jnp.array([37, 34])
    cache = jnp.full((2, 1, 64, 8), jnp.nan).at[:, :, 30:37].set(1.0)

    def attend(cache):
        return block_attention(q, kv, kv, mask, cache=cache, cache_end=ends, window=5)

    np.testing.assert_allclose(attend(cache), 1.0)
    made = [var.aval.shape for eqn in jax.make_jaxpr(attend)(cache).eqns for var in eqn.outvars]
    assert not any(64 in shape for shape in made)


@pytest.mark.parametrize(
    ("mask", "entries"),
    [
        (BlockMask.causal(11), 11),
        (BlockMask.block_causal(11, 3), 11),
        (BlockMask.dual_stream(8, 2), 16),
    ],
)
def test_queries_in_pieces_change_no_number(mask, entries):
    shapes = ((2, entries, heads, 8) for heads in (4, 2, 2))
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]

    @partial(jax.jit, static_argnums=0)
    def passed(piece, *arrays):
        def run(*arrays):
            options = dict(lengths=jnp.array([mask.clean, 5]), window=6, piece=piece)
            return reference.block_attention(*arrays, mask, **options)

        out, back = jax.vjp(run, *arrays)
        return out, back(jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), jnp.sin(x), 0), out))

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        passed(4, *arrays),
        passed(0, *arrays),
    )


def test_bad_shapes_are_named():
    x = jnp.zeros((1, 5, 2, 4))
    with pytest.raises(ValueError, match="5 entries do not fit"):
        block_attention(x, x, x, BlockMask.dual_stream(2, 2))
    with pytest.raises(ValueError, match="come together"):
        block_attention(x, x, x, BlockMask.causal(5), cache=jnp.zeros((1, 2, 3, 8)))
    with pytest.raises(ValueError, match="multiple of"):
        block_attention(jnp.zeros((1, 5, 3, 4)), x, x, BlockMask.causal(5))
    with pytest.raises(ValueError, match="window=-1 must be 0"):
        block_attention(x, x, x, BlockMask.causal(5), window=-1)
    cache, ends = jnp.zeros((1, 2, 6, 8), jnp.int8), jnp.array([3])
    ask = partial(block_attention_lse, x, x, x, BlockMask.causal(5), cache_end=ends)
    with pytest.raises(ValueError, match="is what an int8 cache has; this one is int8"):
        ask(cache=cache)
    scale = jnp.ones((1, 2, 2))
    with pytest.raises(ValueError, match="is what an int8 cache has; this one is float32"):
        ask(cache=jnp.zeros((1, 2, 6, 8)), cache_scale=scale)
    with pytest.raises(ValueError, match=r"must be \(1, 2, 2\)"):
        ask(cache=cache, cache_scale=scale[:, :1])
    with pytest.raises(ValueError, match="6 slots are not 4 equal pieces"):
        ask(cache=cache, cache_scale=scale, chosen=jnp.ones((1, 4), bool))
    with pytest.raises(ValueError, match="6 lanes does not hold keys and values of 4"):
        ask(cache=cache[..., :6], cache_scale=scale)
    with pytest.raises(ValueError, match="there is none"):
        block_attention_lse(x, x, x, BlockMask.causal(5), own=False)
