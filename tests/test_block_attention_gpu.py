"""The GPU kernel of block attention, interpreted on the CPU, against its definition.

What nobody may read, slots behind a row's end and in its hole, holds NaN, as does all memory that
nobody has written; and what warpgroups and copies do at once without waiting is an error.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels import BlockMask
from pallas_kernels.block_attention import gpu, reference, shares
from tests.test_block_attention_tpu import MASKS, case

needs_mosaic = pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason="the kernel needs JAX 0.12 or later"
)
STATIC = ("mask", "window", "scale", "soft_cap", "splits")


@partial(jax.jit, static_argnames=STATIC)
def attend(q, k, v, kv, more, *, mask, **options):
    return gpu.block_attention(
        q, k, v, mask, cache=kv, layer=jnp.int32(len(kv) - 1),
        interpret=plgpu.InterpretGPUParams(detect_races=True), **options, **more,
    )  # fmt: skip


@partial(jax.jit, static_argnames=STATIC)
def define(q, k, v, kv, more, *, mask, **options):
    return reference.block_attention(q, k, v, mask, cache=kv[-1], **options, **more)


def check(mask, arrays, kv, more, *, splits=1, **options):
    out, lse = attend(*arrays, kv, more, mask=mask, splits=splits, **options)
    expected, log_sum = define(*arrays, kv, more, mask=mask, **options)
    assert out.dtype == arrays[0].dtype
    assert lse.dtype == jnp.float32
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(expected, np.float32), atol=2e-2, rtol=2e-2
    )
    np.testing.assert_allclose(lse, log_sum, atol=1e-5, rtol=1e-5)


@needs_mosaic
@pytest.mark.parametrize(
    ("name", "window", "hole", "splits"),
    [
        ("bidirectional", 0, True, 2),  # a block, and its surroundings in the cache
        ("block_causal", 0, False, 1),  # finished and open blocks
        ("dual_stream", 70, True, 1),
        ("block_diagonal", 9, False, 2),
        ("drafts", 5, True, 1),
        ("causal", 1, False, 1),
    ],
)
def test_it_is_its_definition(name, window, hole, splits):
    mask, entries = MASKS[name]
    slots = 136  # two tiles, and a piece of one: the rest of it is behind the cache

    @settings(max_examples=3)
    @given(seed=st.integers(0, 999))
    def law(seed):
        rng = np.random.default_rng(seed)
        ends = rng.permutation([0, slots, *rng.integers(0, slots + 1, 2)])
        holes = np.sort(rng.integers(0, slots + 1, (4, 2)), axis=1) if hole else None
        lengths = rng.integers(0, mask.clean + 1, 4)
        check(mask, *case(
            mask, entries, ends, slots=slots, size=128, holes=holes, lengths=lengths,
            dtype="bfloat16", seed=seed,
        ), window=window, splits=splits)  # fmt: skip

    law()


@needs_mosaic
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(6, 2, 64), (2, 2, 128), (3, 1, 256)])
def test_heads(heads, kv_heads, size):
    mask = BlockMask.bidirectional(3)
    arrays, kv, more = case(
        mask, 3, [70, 0], slots=80, heads=heads, kv_heads=kv_heads, size=size, dtype="bfloat16"
    )
    check(mask, arrays, kv, more, scale=0.3)


@needs_mosaic
def test_warpgroups_and_stretches_of_queries():
    """More tiles than fit at once, and query rows of five warpgroups, in three programs of two."""
    mask = BlockMask.block_causal(100, 50)
    arrays, kv, more = case(
        mask, 100, [640], slots=640, heads=3, size=128, holes=[(500, 530)], dtype="bfloat16"
    )
    check(mask, arrays, kv, more, window=600)


@needs_mosaic
def test_soft_cap():
    """Against a softmax written out."""
    mask, cap = BlockMask.bidirectional(4), 2.0
    arrays, kv, more = case(mask, 4, [0, 19], slots=32, lengths=[0, 4], dtype="bfloat16")
    out, lse = attend(*arrays, kv, more, mask=mask, soft_cap=cap, scale=0.5, splits=2)
    assert (np.asarray(out[0], np.float32) == 0).all()  # neither a cache nor valid entries
    assert (np.asarray(lse[0]) == -np.inf).all()
    q, k, v = (np.asarray(x[1], np.float64) for x in arrays)
    prefix = np.asarray(kv[1, 1, 0, :19], np.float64)
    keys, values = (
        np.concatenate(x) for x in ((prefix[:, :64], k[:, 0]), (prefix[:, 64:], v[:, 0]))
    )
    weights = np.exp(cap * np.tanh(np.einsum("qnh,sh->qns", q, keys) * 0.5 / cap))
    total = weights.sum(axis=-1)
    np.testing.assert_allclose(lse[1], np.log(total), atol=1e-5)
    expected = np.einsum("qns,sh->qnh", weights, values) / total[..., None]
    np.testing.assert_allclose(np.asarray(out[1], np.float64), expected, atol=2e-2)


@pytest.mark.parametrize("name", MASKS)
@settings(max_examples=10)
@given(seed=st.integers(0, 9999))
def test_programs_read_what_is_seen_and_no_more(name, seed):
    """The runs of tiles of a program, and which of them need a mask, against every pair of keys."""
    mask, entries = MASKS[name]
    rng = np.random.default_rng(seed)
    slots, tile = int(rng.integers(8, 60)), 8
    rows = -(-entries // 2)  # of a program
    end, valid = (jnp.asarray(rng.integers(0, n + 1, 3), jnp.int32) for n in (slots, mask.clean))
    hole = jnp.asarray(np.sort(rng.integers(0, slots + 1, (2, 3)), axis=0), jnp.int32)
    edges = shares.edges(
        mask, entries, slots, cache_end=end, hole=tuple(hole) if rng.integers(2) else None,
        lengths=valid, window=int(rng.integers(0, 30)),
    )  # fmt: skip
    edges = jnp.pad(edges, ((0, 0), (0, 0), (0, 0), (0, 2 * rows - entries)), mode="edge")
    numbers, edges = np.asarray(shares.numbers(edges, rows, tile)), np.asarray(edges)
    places = np.arange(-(-max(slots, entries) // tile) * tile)
    for row, stretch in np.ndindex(3, 2):
        mine = numbers[row, stretch]
        bounds = edges[row, :, :, stretch * rows : (stretch + 1) * rows, None]
        a, b, c, d = np.moveaxis(bounds, 1, 0)  # each [2, rows, 1]
        seen = ((places >= a) & (places < b)) | ((places >= c) & (places < d))  # [2, rows, keys]
        listed = []
        for item in range(mine[3]):
            run = int((item >= mine[:3]).sum())
            listed.append((run // 2, int(item + mine[shares.SHIFT + run])))
        tiled = seen.reshape(*seen.shape[:2], -1, tile)
        assert listed == [tuple(x) for x in np.argwhere(tiled.any(axis=(1, 3))).tolist()]
        for kind, at in listed:
            low, high = at * tile, (at + 1) * tile
            read, whole = (
                mine[start + 4 * kind : start + 4 * kind + 4]
                for start in (shares.READ, shares.WHOLE)
            )
            inside = (
                ((low >= a) & (high <= b)).all(axis=(1, 2)),
                ((low >= c) & (high <= d)).all(axis=(1, 2)),
            )
            assert shares.inside(low, high, whole) == (inside[0] | inside[1])[kind]
            assert tiled[kind, :, at].all() or not shares.inside(low, high, whole)
            keys = places[low:high]
            readable = np.asarray(shares.inside(keys, keys + 1, read))
            np.testing.assert_array_equal(readable, seen[kind, :, low:high].any(axis=0))


def test_few_rows_are_shared_out():
    shared = partial(shares.splits, places=264)
    assert shared(264, tiles=512, uneven=False) == 1
    assert shared(32, tiles=512, uneven=False) == 8  # fills the chip once
    assert shared(128, tiles=64, uneven=True) == 4  # twice, as one row may be the longest
    assert shared(32, tiles=31, uneven=False) == 3  # of eight tiles and more
    assert shared(1, tiles=0, uneven=False) == 1


def test_what_it_does_not_take_is_named():
    def why(entries=4, heads=2, size=64, dtype="bfloat16", cached=None, ends=(2,), slots=32):
        shape = jax.ShapeDtypeStruct
        return gpu.takes(
            shape((2, entries, heads, size), dtype), shape((2, entries, 1, size), dtype),
            BlockMask.bidirectional(entries),
            cache=shape((1, 2, 1, slots, 2 * size), cached or dtype),
            cache_end=shape(ends, jnp.int32),
        )  # fmt: skip

    if jax.__version_info__ < (0, 12):
        assert "needs JAX 0.12" in why()
        return
    assert why() is None
    assert why(entries=256, heads=128, size=256) is None
    assert "per query" in why(ends=(2, 4))
    assert "257 entries" in why(entries=257)
    assert "not float32" in why(dtype="float32")
    assert "int8" in why(cached="int8")
    assert "not 80" in why(size=80)
    assert "heads of 512 leave no room" in why(size=512)
    assert "30 slots" in why(slots=30)
    arrays, kv, more = case(BlockMask.bidirectional(4), 4, [3], slots=8, size=80, dtype="bfloat16")
    with pytest.raises(ValueError, match="cannot run this: the head size must be one of"):
        gpu.block_attention(*arrays, BlockMask.bidirectional(4), cache=kv, layer=0, **more)


@needs_mosaic
@pytest.mark.parametrize(
    ("entries", "heads", "kv_heads", "size", "slots"),
    [(32, 32, 32, 128, 4096), (256, 16, 8, 256, 8192), (4, 9, 3, 64, 2048)],
)
def test_it_lowers_for_a_gpu(entries, heads, kv_heads, size, slots):
    """Layouts and copies that Mosaic GPU takes; the assembler itself is not asked."""
    shape = jax.ShapeDtypeStruct
    arrays = [shape((4, entries, n, size), jnp.bfloat16) for n in (heads, kv_heads, kv_heads)]
    cache = shape((2, 4, kv_heads, slots, 2 * size), jnp.bfloat16)
    number, row = shape((), jnp.int32), shape((4,), jnp.int32)

    def kernel(q, k, v, cache, layer, end, first, length):
        return gpu.block_attention(
            q, k, v, BlockMask.bidirectional(entries), cache=cache, layer=layer, cache_end=end,
            hole=(first, first + entries), lengths=length, window=1024, soft_cap=50.0,
        )  # fmt: skip

    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), (AxisType.Explicit,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(kernel).trace(*arrays, cache, number, row, row, row)
        lowered = traced.lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
