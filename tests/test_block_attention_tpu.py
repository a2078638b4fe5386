"""The TPU kernel of block attention, interpreted on the CPU, against its definition.

What nobody may read, slots behind a row's end, in its hole and in pieces not chosen, holds NaN, or
127 where the cache is int8.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels import BlockMask, block_attention
from pallas_kernels.block_attention import reference, tpu, worklist
from pallas_kernels.block_attention.tuned import tiling

CLOSE = {"float32": 1e-5, "bfloat16": 2e-2}
MASKS = {
    "bidirectional": (BlockMask.bidirectional(4), 4),
    "causal": (BlockMask.causal(3), 3),
    "block_causal": (BlockMask.block_causal(8, 4), 8),
    "dual_stream": (BlockMask.dual_stream(4, 4, stride=0, offset=4), 8),
    "drafts": (BlockMask.dual_stream(2, 2, stride=1, offset=1), 6),
    "block_diagonal": (BlockMask.block_diagonal(3), 6),
}


def case(mask, entries, ends, *, slots, heads=2, kv_heads=1, size=64, lanes=None, holes=None,
         lengths=None, chosen=None, dtype="float32", widened=False, seed=0, layers=2):  # fmt: skip
    """Random arguments of a call, whose layer that is not all NaN is the last.

    Args:
      ends: of each row, or of each query of it.
      lanes: of the cache, if more than `2 * size`.
      widened: whether the cache is int8.
    """
    rng = np.random.default_rng(seed)
    batch, lanes = len(ends), lanes or 2 * size

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    q, k, v = (draw(batch, entries, n, size) for n in (heads, kv_heads, kv_heads))
    kv = np.full((layers, batch, kv_heads, slots, lanes), 127 if widened else np.nan, np.float32)
    kv[-1] = rng.integers(-127, 128, kv.shape[1:]) if widened else draw(*kv.shape[1:])
    unread = np.zeros((batch, slots), bool)
    for row, end in enumerate(np.reshape(ends, (batch, -1)).max(axis=1)):
        unread[row, end:] = True
        if holes is not None:
            unread[row, slice(*holes[row])] = True
    if chosen is not None:
        unread |= ~np.repeat(chosen, slots // chosen.shape[1], axis=1)
    np.moveaxis(kv[-1], 1, 2)[unread] = 127 if widened else np.nan
    more = {"cache_end": jnp.asarray(ends, jnp.int32)}
    if widened:
        more["cache_scale"] = jnp.asarray(rng.uniform(0.01, 0.03, (layers, batch, kv_heads, 2)))
        more["cache_scale"] = more["cache_scale"].astype(jnp.float32)
    if chosen is not None:
        more["chosen"] = jnp.asarray(chosen)
    if holes is not None:
        more["hole"] = tuple(jnp.asarray(holes, jnp.int32).T)
    if lengths is not None:
        more["lengths"] = jnp.asarray(lengths, jnp.int32)
    kv = jnp.asarray(kv, jnp.int8 if widened else dtype)
    return [jnp.asarray(x, dtype) for x in (q, k, v)], kv, more


@partial(
    jax.jit, static_argnames=("mask", "own", "window", "scale", "tile", "soft_cap", "interpret")
)
def attend(q, k, v, kv, more, *, mask, own=True, window=0, scale=None, tile=16, soft_cap=0.0,
           interpret=True):  # fmt: skip
    return tpu.block_attention(
        q, k, v, mask, cache=kv, layer=len(kv) - 1, own=own, window=window, scale=scale,
        soft_cap=soft_cap, tile=tile, interpret=interpret, **more,
    )  # fmt: skip


@partial(jax.jit, static_argnames=("mask", "own", "window", "scale"))
def define(q, k, v, kv, more, *, mask, own=True, window=0, scale=None):
    if "cache_scale" in more:
        more = {**more, "cache_scale": more["cache_scale"][-1]}
    return reference.block_attention(
        q, k, v, mask, cache=kv[-1], own=own, window=window, scale=scale, **more
    )


def check(mask, arrays, kv, more, *, own=True, window=0, scale=None, **options):
    static = dict(mask=mask, own=own, window=window, scale=scale)
    out, lse = attend(*arrays, kv, more, **static, **options)
    expected, log_sum = define(*arrays, kv, more, **static)
    assert out.dtype == arrays[0].dtype
    assert lse.dtype == jnp.float32
    close = CLOSE[out.dtype.name]
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(expected, np.float32), atol=close, rtol=close
    )
    np.testing.assert_allclose(lse, log_sum, atol=close, rtol=close)


@pytest.mark.parametrize(
    ("name", "window", "hole", "dtype"),
    [
        ("bidirectional", 0, True, "float32"),  # a block, and its surroundings in the cache
        ("block_causal", 0, False, "bfloat16"),  # finished and open blocks
        ("dual_stream", 9, True, "bfloat16"),
        ("block_diagonal", 20, False, "float32"),
        ("bidirectional", 5, False, "float32"),
        ("block_causal", 1, True, "float32"),
        ("causal", 9, True, "float32"),
        ("causal", 0, False, "bfloat16"),
        ("dual_stream", 0, False, "float32"),
        ("drafts", 0, True, "float32"),
        ("drafts", 5, False, "bfloat16"),
        ("block_diagonal", 0, True, "bfloat16"),
    ],
)
def test_it_is_its_definition(name, window, hole, dtype):
    mask, entries = MASKS[name]
    slots = 56

    @settings(max_examples=10)
    @given(seed=st.integers(0, 999))
    def law(seed):
        rng = np.random.default_rng(seed)
        ends = rng.permutation([0, slots, *rng.integers(0, slots + 1, 2)])
        holes = np.sort(rng.integers(0, slots + 1, (4, 2)), axis=1) if hole else None
        lengths = rng.integers(0, mask.clean + 1, 4)
        check(mask, *case(
            mask, entries, ends, slots=slots, holes=holes, lengths=lengths, dtype=dtype, seed=seed
        ), window=window)  # fmt: skip

    law()


@pytest.mark.parametrize(
    ("name", "window", "hole", "each", "pieces", "dtype", "widened"),
    [
        ("bidirectional", 0, False, False, False, "float32", True),
        ("block_causal", 5, True, False, True, "bfloat16", True),
        ("dual_stream", 9, True, True, False, "float32", False),
        ("block_diagonal", 30, False, True, True, "float32", True),
        ("causal", 0, False, True, False, "bfloat16", False),
        ("drafts", 0, False, False, True, "float32", False),
    ],
)
def test_int8_and_ends_of_queries_and_chosen_pieces(
    name, window, hole, each, pieces, dtype, widened
):
    mask, entries = MASKS[name]
    slots = 96

    @settings(max_examples=10)
    @given(seed=st.integers(0, 999))
    def law(seed):
        rng = np.random.default_rng(seed)
        ends = np.array([0, slots, *rng.integers(0, slots + 1, 2)])
        if each:
            ends = np.maximum(ends[:, None] - rng.integers(0, 40, (4, entries)), 0)
        holes = np.sort(rng.integers(0, slots + 1, (4, 2)), axis=1) if hole else None
        check(mask, *case(
            mask, entries, ends, slots=slots, heads=4, kv_heads=2, holes=holes,
            lengths=rng.integers(0, mask.clean + 1, 4), dtype=dtype, seed=seed, widened=widened,
            chosen=rng.random((4, 3)) < 0.5 if pieces else None,
        ), window=window, tile=32)  # fmt: skip

    law()


def test_an_int8_cache_loses_nothing_of_the_own_entries():
    """With a scale that would round the own keys and values away, were they put on it."""
    mask = BlockMask.bidirectional(4)
    arrays, kv, more = case(mask, 4, [0, 0], slots=32, dtype="bfloat16")
    expected, total = attend(*arrays, kv, more, mask=mask, tile=32)
    more["cache_scale"] = jnp.full((2, 2, 1, 2), 1e-30, jnp.float32)
    out, lse = attend(*arrays, jnp.zeros(kv.shape, jnp.int8), more, mask=mask, tile=32)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(lse, total)


@pytest.mark.parametrize(("size", "lanes", "widened"), [(96, 256, True), (40, 128, False)])
def test_heads_that_are_padded_in_the_cache(size, lanes, widened):
    """What the cache holds beside a head, here anything, has no influence."""
    mask = BlockMask.bidirectional(3)
    check(mask, *case(
        mask, 3, [21, 40], slots=64, heads=4, kv_heads=2, size=size, lanes=lanes, widened=widened
    ), tile=32)  # fmt: skip


@pytest.mark.parametrize("each", [False, True])
def test_a_long_pass_over_the_cache_alone(each):
    """More entries than the kernel holds at once, in which pieces of the pass stand for rows."""
    mask, slots = BlockMask.bidirectional(259), 96
    ends = np.array([0, 96, 70])
    if each:
        ends = np.maximum(ends[:, None] - np.arange(259) // 8, 0)
    arrays, kv, more = case(
        mask, 259, ends, slots=slots, heads=2, kv_heads=1, widened=True,
        holes=None if each else [(0, 0), (10, 50), (60, 80)],
        chosen=np.array([[1, 1, 1], [1, 0, 1], [0, 1, 1]], bool),
    )  # fmt: skip
    check(mask, arrays, kv, more, own=False, window=0 if each else 60, tile=32)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "dtype"),
    [(6, 2, 64, "bfloat16"), (2, 2, 128, "float32"), (3, 1, 256, "bfloat16")],
)
def test_heads(heads, kv_heads, size, dtype):
    mask = BlockMask.bidirectional(3)
    arrays, kv, more = case(
        mask, 3, [21, 0], slots=24, heads=heads, kv_heads=kv_heads, size=size, dtype=dtype
    )
    check(mask, arrays, kv, more, scale=0.3, tile=None)


def test_parts_of_a_tile_and_stretches_of_queries():
    """A tile of two parts, a part of which is behind the end; and more queries than fit at once."""
    mask = BlockMask.bidirectional(100)
    arrays, kv, more = case(mask, 100, [1024, 700], slots=1024, heads=3, layers=1)
    sizes = tiling(300, 64, "float32", 1024, 1024)
    assert sizes.tile > sizes.part
    assert sizes.rows < 300
    check(mask, arrays, kv, more, tile=1024)


@pytest.mark.parametrize("widened", [False, True])
def test_nothing_is_read_that_is_not_seen(widened):
    """The interpreter that moves every tile by its own copy, with memory that begins as NaN."""
    mask, holes = BlockMask.block_causal(4, 2), [(0, 0), (3, 29), (16, 32)]
    ends, slots, tile, chosen = np.array([0, 30, 48]), 48, 16, None
    if widened:
        ends, slots, tile = np.maximum(ends[:, None] + np.arange(4) - 3, 0), 96, 32
        chosen = np.array([[1, 1, 1], [1, 0, 0], [0, 1, 1]], bool)
    arrays, kv, more = case(mask, 4, ends, slots=slots, holes=holes, chosen=chosen, widened=widened)
    params = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")
    check(mask, arrays, kv, more, window=18, tile=tile, interpret=params)


def test_soft_cap_and_logarithm_of_the_sum():
    """Against a softmax written out, as the definition has neither."""
    mask, entries, cap = BlockMask.bidirectional(4), 4, 2.0
    arrays, kv, more = case(mask, entries, [0, 19], slots=32, lengths=[0, 4])
    out, lse = attend(*arrays, kv, more, mask=mask, soft_cap=cap, scale=0.5)
    assert (np.asarray(out[0]) == 0).all()  # neither a cache nor valid entries: nothing is seen
    assert (np.asarray(lse[0]) == -np.inf).all()
    q, k, v = (np.asarray(x[1], np.float64) for x in arrays)
    prefix = np.asarray(kv[1, 1, 0, :19], np.float64)
    keys, values = (
        np.concatenate(x) for x in ((prefix[:, :64], k[:, 0]), (prefix[:, 64:], v[:, 0]))
    )
    scores = cap * np.tanh(np.einsum("qnh,sh->qns", q, keys) * 0.5 / cap)
    weights = np.exp(scores)
    total = weights.sum(axis=-1)
    np.testing.assert_allclose(lse[1], np.log(total), atol=1e-5)
    expected = np.einsum("qns,sh->qnh", weights, values) / total[..., None]
    np.testing.assert_allclose(out[1], expected, atol=1e-5)


def test_results_merge_by_their_sums():
    """Attention over a cache is that over its halves, weighed by their sums."""
    mask = BlockMask.block_diagonal(4)
    arrays, kv, _ = case(mask, 4, [32, 32], slots=32, layers=1)
    none = jnp.zeros(2, jnp.int32)

    def over(start, stop):
        return attend(
            *arrays, kv, {"cache_end": none + stop, "hole": (none, none + start)}, mask=mask
        )

    everything, total = over(0, 32)
    first, low = over(0, 16)
    second, high = over(16, 32)
    own, both = over(0, 0)  # is in each half
    parts = np.stack([first, second, -np.asarray(own)])
    share = np.exp(np.stack([low, high, both]) - np.asarray(total))[..., None]
    np.testing.assert_allclose((parts * share).sum(axis=0), everything, atol=1e-5)


def test_steps_read_what_is_seen_and_no_more():
    ends, holes = np.array([0, 5, 40, 64]), np.array([(0, 0), (0, 0), (8, 32), (0, 64)])
    mask = BlockMask.bidirectional(4)

    def listed(chosen=None, **more):
        more = {"cache_end": jnp.asarray(ends), **more}
        hole, seen = more.get("hole"), worklist.reach(mask, 4, **more)
        found = worklist.steps(seen, jnp.full(4, 4), 16, 64, hole=hole, chosen=chosen)
        found = jax.tree.map(np.asarray, found)
        rows = zip(found.row, found.source, found.tile, found.flags, strict=True)
        return [tuple(map(int, x)) for x in rows][: int(found.total)]

    first, last, whole, cut = worklist.FIRST, worklist.LAST, worklist.WHOLE, worklist.CUT
    assert listed() == [
        (0, 0, 0, first | last), (1, 1, 0, first | last | cut), (2, 2, 0, first | whole),
        (2, 2, 1, whole), (2, 2, 2, last | cut), (3, 3, 0, first | whole), (3, 3, 1, whole),
        (3, 3, 2, whole), (3, 3, 3, last | whole),
    ]  # fmt: skip
    pieces = jnp.array([(1, 1), (1, 0), (0, 1), (1, 0)], bool)
    assert listed(chosen=pieces) == [
        (0, 0, 0, first | last), (1, 1, 0, first | last | cut), (2, 2, 2, first | last | cut),
        (3, 3, 0, first | whole), (3, 3, 1, last | whole),
    ]  # fmt: skip
    assert listed(hole=tuple(jnp.asarray(holes.T))) == [
        (0, 0, 0, first | last), (1, 1, 0, first | last | cut), (2, 2, 0, first | cut),
        (2, 2, 2, last | cut), (3, 2, 2, first | last),
    ]  # fmt: skip
    each = ends[:, None] - np.array([(0, 0), (0, 5), (0, 9), (0, 20)])
    assert listed(cache_end=each)[2:] == [
        (2, 2, 0, first | whole), (2, 2, 1, cut), (2, 2, 2, last | cut), (3, 3, 0, first | whole),
        (3, 3, 1, whole), (3, 3, 2, cut), (3, 3, 3, last | cut),
    ]  # fmt: skip
    # Entry 0 at 40 sees slots from 31 on, entry 3 from 34 on; at 64, from 55 and 58 on.
    assert listed(window=10) == [
        (0, 0, 0, first | last), (1, 1, 0, first | last | cut), (2, 2, 1, first | cut),
        (2, 2, 2, last | cut), (3, 3, 3, first | last | cut),
    ]  # fmt: skip


def test_what_it_does_not_take_is_named():
    def why(entries=4, heads=2, size=64, dtype="float32", cached=None, ends=(2,), **more):
        shape = jax.ShapeDtypeStruct
        return tpu.takes(
            shape((2, entries, heads, size), dtype), shape((2, entries, 1, size), dtype),
            BlockMask.bidirectional(entries),
            cache=shape((1, 2, 1, 32, 2 * size), cached or dtype),
            cache_end=shape(ends, jnp.int32), **more,
        )  # fmt: skip

    assert why() is None
    assert why(dtype="bfloat16", size=512, entries=256, heads=8) is None
    assert why(ends=(2, 4), cached="int8") is None
    assert "257 entries" in why(entries=257)
    assert why(entries=257, own=False) is None
    pieces = partial(jax.ShapeDtypeStruct, dtype=jnp.bool)
    assert why(chosen=pieces((2, 4))) is None
    assert "4 pieces to choose from are not whole tiles of 32" in why(
        cached="int8", chosen=pieces((2, 4))
    )
    assert "not float16" in why(dtype="float16")
    assert "bfloat16 and float32" in why(dtype="bfloat16", cached="float32")
    assert "head size 80 in a cache of 160 lanes" in why(size=80)
    assert "tile=12" in why(tile=12)
    assert "bytes of vector memory" in why(entries=256, heads=128, size=512)
    arrays, kv, more = case(BlockMask.bidirectional(4), 4, [3], slots=8, size=80)
    with pytest.raises(ValueError, match="pad its last axis to 256"):
        tpu.block_attention(*arrays, BlockMask.bidirectional(4), cache=kv, layer=0, **more)


@pytest.mark.parametrize(
    ("entries", "heads", "kv_heads", "size", "slots", "widened"),
    [
        (32, 32, 32, 128, 4096, True),
        (32, 28, 4, 128, 32768, False),
        (256, 16, 8, 256, 8192, False),
        (4, 9, 3, 64, 2048, True),
    ],
)
def test_it_lowers_for_a_tpu(entries, heads, kv_heads, size, slots, widened):
    """Block shapes and operations that the TPU compiler takes; the compiler itself is not asked."""
    shape = jax.ShapeDtypeStruct
    arrays = [shape((4, entries, n, size), jnp.bfloat16) for n in (heads, kv_heads, kv_heads)]
    cache = shape((2, 4, kv_heads, slots, 2 * size), jnp.int8 if widened else jnp.bfloat16)
    number, row = shape((), jnp.int32), shape((4,), jnp.int32)
    scale = shape((2, 4, kv_heads, 2), jnp.float32) if widened else None
    end, chosen = (shape((4, entries), jnp.int32), shape((4, 32), bool)) if widened else (row, None)

    def kernel(q, k, v, cache, scale, chosen, layer, end, first, length):
        return tpu.block_attention(
            q, k, v, BlockMask.bidirectional(entries), cache=cache, cache_scale=scale, layer=layer,
            cache_end=end, chosen=chosen, hole=(first, first + entries), lengths=length,
            window=1024,
        )  # fmt: skip

    device = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("x",), (AxisType.Explicit,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(kernel).trace(*arrays, cache, scale, chosen, number, end, row, row)
        lowered = traced.lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text()


@pytest.mark.parametrize("widened", [False, True])
def test_the_gradient_is_that_of_the_definition(monkeypatch, widened):
    """Through the public function, as on a TPU but interpreted."""
    monkeypatch.setattr(tpu, "block_attention", partial(tpu.block_attention, interpret=True))
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, (2, 4, 2, 64)) for key in keys[:3])
    kv = jax.random.normal(keys[3], (3, 2, 2, 16, 128))

    stored = jnp.round(40 * kv).astype(jnp.int8)

    def loss(q, k, v, kv, implementation):
        cached = dict(cache=stored, cache_scale=kv[:, :, :, 0, :2]) if widened else dict(cache=kv)
        out = block_attention(
            q, k, v, BlockMask.causal(4), **cached, layer=jnp.int32(1),
            cache_end=jnp.array([16, 7]), implementation=implementation,
        )  # fmt: skip
        return (out**2).sum()

    kv = jnp.abs(kv) / 40 if widened else kv
    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)), static_argnums=4)
    got, want = (run(q, k, v, kv, how) for how in ("tpu", "xla"))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5), got, want)


def test_what_the_kernel_does_not_take_is_said():
    q = jnp.zeros((1, 4, 2, 40))
    cache = jnp.zeros((1, 2, 16, 80))
    ask = partial(
        block_attention, q, q, q, BlockMask.causal(4), cache=cache, cache_end=jnp.array([3])
    )
    with pytest.raises(ValueError, match="does not take this: keys and values of head size 40"):
        ask(implementation="tpu")
    with pytest.raises(ValueError, match="implementation='cuda' is none of"):
        ask(implementation="cuda")
