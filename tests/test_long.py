"""Attention in tiles against the definition, which forms all scores: results and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockMask, block_attention_lse
from pallas_kernels.block_attention import api, flash_tpu, flash_xla, long, reference, tpu
from pallas_kernels.block_attention.products import Scores
from pallas_kernels.block_attention.tiles import tiles

TILE = 4
MASKS = {
    "causal": (BlockMask.causal(11), 11),
    "bidirectional": (BlockMask.bidirectional(9), 9),
    "block_causal": (BlockMask.block_causal(10, 3), 10),
    "dual_stream": (BlockMask.dual_stream(12, 4, clean_block=4), 24),
    "two noisy texts": (BlockMask.dual_stream(8, 4, repeat=2), 24),
    "drafts": (BlockMask.dual_stream(4, 3, stride=1, offset=1), 16),
    "block_diagonal": (BlockMask.block_diagonal(3), 9),
}


def case(mask: BlockMask, entries: int, cached: str, window: int, packed: bool, dtype: str):
    rng = np.random.default_rng(entries + window)
    batch, heads, kv_heads, size, slots = 2, 4, 2, 8, 13

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    arrays = [draw(batch, entries, n, size) for n in (heads, kv_heads, kv_heads)]
    more = {"window": window, "lengths": jnp.asarray([mask.clean, rng.integers(0, mask.clean + 1)])}
    cache = None
    if cached != "nothing":
        shape = (batch, entries) if cached == "query" else (batch,)
        more["cache_end"] = jnp.asarray(rng.integers(0, slots + 1, shape))
        cache = draw(batch, kv_heads, slots, 2 * size)
    if cached == "chosen":
        more["chosen"] = jnp.asarray(rng.integers(0, 2, (batch, slots)), bool)
        more["own"] = False
    if cached == "int8":
        more["cache_scale"] = jnp.asarray(rng.uniform(0.01, 0.02, (batch, kv_heads, 2)), "float32")
        cache = jnp.asarray(rng.integers(-127, 128, (batch, kv_heads, slots, 2 * size)), jnp.int8)
    if cached == "hole":
        more["hole"] = tuple(jnp.asarray(np.sort(rng.integers(0, slots + 1, (2, batch)), axis=0)))
    if packed:
        clean = np.sort(rng.integers(0, 3, (batch, mask.clean)), axis=1)
        twins = np.resize(clean.T, (entries - mask.clean, batch)).T
        more["segments"] = jnp.asarray(np.concatenate([clean, twins], axis=1))
    return (*arrays, cache), more


@pytest.mark.parametrize(
    ("name", "cached", "window", "packed", "soft_cap", "dtype"),
    [
        ("causal", "nothing", 5, True, 0.0, "float32"),
        ("causal", "row", 0, False, 2.0, "float32"),
        ("bidirectional", "hole", 0, False, 0.0, "float32"),
        ("bidirectional", "nothing", 0, False, 0.0, "bfloat16"),
        ("block_causal", "hole", 6, False, 0.0, "float32"),
        ("block_causal", "nothing", 0, True, 2.0, "float32"),
        ("dual_stream", "nothing", 0, True, 0.0, "float32"),
        ("dual_stream", "nothing", 5, False, 2.0, "bfloat16"),
        ("drafts", "row", 5, False, 0.0, "float32"),
        ("drafts", "chosen", 0, False, 0.0, "float32"),
        ("causal", "int8", 7, False, 2.0, "float32"),
        ("block_diagonal", "query", 0, False, 2.0, "float32"),
        ("block_diagonal", "query", 4, False, 0.0, "bfloat16"),
    ],
)
def test_tiles_are_the_definition(name, cached, window, packed, soft_cap, dtype):
    """Outputs, log-sums, and the gradients of both, to queries, keys, values and the cache."""
    mask, entries = MASKS[name]
    arrays, more = case(mask, entries, cached, window, packed, dtype)
    rng = np.random.default_rng(1)
    weights = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in (arrays[0].shape,) * 2]

    @partial(jax.jit, static_argnums=0)
    def run(attention, q, k, v, cache, more):
        def loss(q, k, v, cache):
            out, lse = attention(
                q, k, v, mask, cache=cache, soft_cap=soft_cap, window=window, own=own, **more
            )
            known = jnp.where(lse > -jnp.inf, lse, 0.0)
            return (out * weights[0]).sum() + (known * weights[1][..., 0]).sum(), (out, lse)

        floats = (0, 1, 2) if cache is None or cache.dtype == jnp.int8 else (0, 1, 2, 3)
        return jax.value_and_grad(loss, floats, has_aux=True)(q, k, v, cache)

    more.pop("window")
    own = more.pop("own", True)
    (_, want), want_grads = run(reference.block_attention, *arrays, more)
    (_, got), got_grads = run(partial(long.block_attention, tile=TILE), *arrays, more)
    close = 1e-5 if dtype == "float32" else 2e-2
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (a, b)), close, close)
    for a, b in zip(got_grads, want_grads, strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=close, atol=close * np.abs(b).max())


def test_what_nobody_sees_may_be_anything():
    """Neither results nor gradients of the slots that are read know of the others."""
    mask = BlockMask.block_diagonal(4)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, (2, 8, 2, 8)) for key in keys[:3])
    cache = jax.random.normal(keys[3], (3, 2, 2, 16, 16))
    ends = jnp.array([7, 0])
    dirty = cache.at[0].set(jnp.nan).at[1, 0, :, 7:].set(jnp.nan).at[1, 1].set(jnp.nan)

    def loss(q, cache):
        out, lse = long.block_attention(
            q, k, v, mask, cache=cache, layer=jnp.int32(1), cache_end=ends, tile=TILE
        )
        return (out**2).sum() + lse.sum()

    (clean, grads), (value, found) = (
        jax.jit(jax.value_and_grad(loss, (0, 1)))(q, x) for x in (cache, dirty)
    )
    np.testing.assert_allclose(value, clean, rtol=1e-6)
    np.testing.assert_allclose(found[0], grads[0], atol=1e-6)
    np.testing.assert_allclose(found[1][1, 0, :, :7], grads[1][1, 0, :, :7], atol=1e-6)


@pytest.mark.parametrize("name", ["causal", "block_causal", "dual_stream"])
def test_the_tiles_that_are_read_are_those_of_the_mask(name):
    mask, entries = MASKS[name]
    q, kv = jnp.zeros((1, 1, 1, entries, 8)), jnp.zeros((1, 1, mask.clean, 16))
    seen = long._seen_clean(mask, 0, q, {"lengths": None, "segments": None})
    static = flash_xla.Static(Scores(1.0, 0.0), TILE)
    plan = flash_xla._Plan(static, q, kv, None, seen)
    query, key, _ = tiles(mask, entries, plan.rows, plan.width)
    read = np.zeros(plan.kinds.shape, bool)
    read[query, key] = True
    np.testing.assert_array_equal(plan.kinds > 0, read)
    assert not read.all()


def test_long_passes_form_no_matrix_of_scores():
    """Through the public function: no array with a side for queries and one for keys."""
    length = 2048
    q, kv = jnp.zeros((1, length, 2, 8)), jnp.zeros((1, length, 1, 8))
    assert length**2 > api._MOST_SCORES
    program = jax.make_jaxpr(
        jax.grad(lambda q: block_attention_lse(q, kv, kv, BlockMask.causal(length))[0].sum())
    )(q)
    text = str(program)
    assert f"{length},{length}" not in text
    assert f"{length // 4}" in text


def test_documents_of_a_packed_row_are_as_alone():
    """Two documents side by side, each with its blocks, in the training mask's two streams."""
    block, sizes = 4, (8, 12)
    total = sum(sizes)
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, 2 * total, 2, 8)) for key in keys)
    ids = np.repeat(np.arange(2), sizes)[None]
    attend = jax.jit(block_attention_lse, static_argnums=3)
    packed, _ = attend(
        q, k, v, BlockMask.dual_stream(total, block),
        segments=jnp.asarray(np.concatenate([ids, ids], axis=1)),
    )  # fmt: skip
    start = 0
    for size in sizes:
        own = np.r_[start : start + size, total + start : total + start + size]
        alone, _ = attend(*(x[:, own] for x in (q, k, v)), BlockMask.dual_stream(size, block))
        np.testing.assert_allclose(packed[:, own], alone, atol=1e-6)
        start += size


@pytest.mark.parametrize("lengths", [None, [6]])
def test_a_noisy_entry_sees_its_own_document_wherever_it_lies(lengths):
    """Also where the last clean key before its group is another document's, or padding."""
    mask = BlockMask.dual_stream(8, 4, stride=0, offset=8)
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, 12, 1, 8)) for key in keys)
    ids = jnp.array([[7, 7, 7, 7, 1, 1, 3, 3, 7, 1, 3, 9]])
    more = {"segments": ids, "lengths": None if lengths is None else jnp.array(lengths)}
    got = jax.jit(partial(long.block_attention, mask=mask, tile=TILE))(q, k, v, **more)
    want = jax.jit(partial(reference.block_attention, mask=mask))(q, k, v, **more)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), got, want)


def test_segments_and_a_cache_exclude_each_other():
    x = jnp.zeros((1, 4, 2, 4))
    with pytest.raises(ValueError, match="packed rows, which have no cache"):
        block_attention_lse(
            x, x, x, BlockMask.causal(4), cache=jnp.zeros((1, 2, 8, 8)), cache_end=jnp.array([3]),
            segments=jnp.zeros((1, 4), jnp.int32),
        )  # fmt: skip


@pytest.mark.parametrize("cached", [False, True])
def test_the_kernels_of_a_tpu_make_a_long_pass(cached, monkeypatch):
    """Through the public function, interpreted: both streams, or a chunk against a cache."""
    for module, name in (
        (flash_tpu, "over_clean"), (flash_tpu, "over_clean_backward"), (tpu, "block_attention")
    ):  # fmt: skip
        monkeypatch.setattr(module, name, partial(getattr(module, name), interpret=True))
    length = 320 if cached else 24
    mask = BlockMask.block_causal(length, 8) if cached else BlockMask.dual_stream(length, 8)
    entries = length if cached else 2 * length
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (
        jax.random.normal(key, (2, entries, n, 64)) for key, n in zip(keys, (2, 1, 1), strict=False)
    )
    more = {"lengths": jnp.array([length, 9])}
    cache = None
    if cached:
        cache = jax.random.normal(keys[3], (3, 2, 1, 32, 128))
        more |= {"cache_end": jnp.array([32, 7]), "layer": jnp.int32(1)}

    def loss(q, k, v, cache, implementation):
        out, lse = block_attention_lse(
            q, k, v, mask, cache=cache, implementation=implementation, **more
        )
        return (out**2).sum() + jnp.where(lse > -jnp.inf, lse, 0.0).sum()

    floats = (0, 1, 2, 3) if cached else (0, 1, 2)
    run = jax.jit(jax.value_and_grad(loss, floats), static_argnums=4)
    got, want = (run(q, k, v, cache, how) for how in ("tpu", "xla"))
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5, rtol=1e-4), got, want)
