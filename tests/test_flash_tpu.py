"""The TPU kernel of prefill and training attention, interpreted on the CPU, and its tiles."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels import BlockMask
from pallas_kernels.block_attention import flash_steps, flash_tpu, reference, worklist
from pallas_kernels.block_attention.tiles import CUT, WHOLE, seen, tiles

MASKS = {
    "causal": (BlockMask.causal(40), 40),
    "bidirectional": (BlockMask.bidirectional(23), 23),
    "block_causal": (BlockMask.block_causal(40, 8), 40),
    "dual_stream": (BlockMask.dual_stream(40, 8), 80),
    "some blocks": (BlockMask.dual_stream(30, 5), 45),
    "drafts": (BlockMask.dual_stream(6, 3, stride=1, offset=1), 6 + 7 * 3),
    "clean_block": (BlockMask.dual_stream(36, 4, clean_block=4), 72),
    "two noisy texts": (BlockMask.dual_stream(24, 4, clean_block=4, repeat=2), 72),
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
    allow = visible(mask, entries, window=window, **more)
    nothing = ~allow.any(axis=2)[..., None]  # is seen: what comes back for the sum is no number
    got = kernel(
        arrays, jnp.where(nothing, jnp.nan, d_lse), more, mask=mask, window=window, scale=scale,
        soft_cap=soft_cap, **options,
    )  # fmt: skip
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


def drawn(name, seed, *, ragged, packed, dtype="float32", **options):
    """Checks a case whose lengths, one of them 0, and documents are drawn."""
    mask, entries = MASKS[name]
    rng = np.random.default_rng(seed)
    lengths = rng.permutation([0, rng.integers(mask.clean + 1)]) if ragged else None
    segments = documents(rng, mask, entries) if packed else None
    arrays = case(mask, entries, dtype=dtype, seed=seed)
    check(mask, entries, *arrays, lengths=lengths, segments=segments, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("causal", dict(ragged=True, packed=False)),
        ("bidirectional", dict(ragged=False, packed=True, dtype="bfloat16")),
        ("block_causal", dict(ragged=False, packed=True, window=7)),
        ("dual_stream", dict(ragged=True, packed=True, dtype="bfloat16")),
        ("some blocks", dict(ragged=True, packed=False, window=9, tiles=(16, 32))),
        ("drafts", dict(ragged=True, packed=False, window=1)),
        ("clean_block", dict(ragged=False, packed=True, soft_cap=1.5)),
    ],
)
def test_it_is_its_definition(name, options, monkeypatch):
    monkeypatch.setattr(flash_tpu, "_PART", 8)
    given(st.integers(0, 999))(
        settings(max_examples=5)(lambda seed: drawn(name, seed, **options))
    )()


@pytest.mark.slow
@pytest.mark.parametrize("part", [16, 8])
@pytest.mark.parametrize("name", MASKS)
def test_it_is_its_definition_however_it_is_called(name, part, monkeypatch):
    monkeypatch.setattr(flash_tpu, "_PART", part)

    @settings(max_examples=5)
    @given(
        seed=st.integers(0, 999),
        window=st.sampled_from([0, 1, 7, 30]),
        soft_cap=st.sampled_from([0.0, 1.5]),
        tiles=st.sampled_from([(16, 16), (16, 32), (32, 16)]),
        ragged=st.booleans(),
        packed=st.booleans(),
        dtype=st.sampled_from(["float32", "bfloat16"]),
    )
    def law(seed, **options):
        kernel.clear_cache()  # of another size of parts
        drawn(name, seed, **options)

    law()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "dtype"), [(6, 2, 128, "bfloat16"), (3, 3, 64, "float32")]
)
def test_heads(heads, kv_heads, size, dtype):
    """Several kv heads of several query heads in a step; sizes of tiles by default."""
    mask = BlockMask.dual_stream(150, 25)
    arrays = case(mask, 300, heads=heads, kv_heads=kv_heads, size=size, dtype=dtype, batch=1)
    check(mask, 300, *arrays, tiles=(None, None))


def test_with_the_noisy_groups_own_squares_it_is_block_attention():
    """The sum of two parts, merged by the logarithms of their sums, forward and backward."""
    mask, entries = BlockMask.dual_stream(24, 4, clean_block=4), 48
    arrays, _ = case(mask, entries, heads=4, kv_heads=2)
    q, k, v = arrays[0], *(jnp.concatenate([x, x[:, ::-1]], axis=1) for x in arrays[1:3])
    how = dict(scale=0.2, tile_q=16, tile_k=16, interpret=True)
    lengths = jnp.array([24, 9])

    @jax.custom_vjp
    def over_clean(q, k, v):
        return flash_tpu.over_clean(q, k, v, mask, lengths=lengths, **how)

    def forward(q, k, v):
        out = over_clean(q, k, v)
        return out, (q, k, v, *out)

    def backward(saved, grad):
        return flash_tpu.over_clean_backward(*saved, *grad, mask, lengths=lengths, **how)

    over_clean.defvjp(forward, backward)

    def merged(q, k, v):
        out, lse = over_clean(q, k[:, :24], v[:, :24])
        noisy = (x[:, 24:].reshape(12, 4, *x.shape[2:]) for x in (q, k, v))
        own, own_lse = reference.block_attention(*noisy, BlockMask.bidirectional(4), scale=0.2)
        own, own_lse = own.reshape(2, 24, 4, -1), own_lse.reshape(2, 24, 4)
        both = jnp.logaddexp(lse[:, 24:], own_lse)
        shares = (jnp.exp(x - both)[..., None] for x in (lse[:, 24:], own_lse))
        noisy = sum(x * y for x, y in zip(shares, (out[:, 24:], own), strict=True))
        return jnp.concatenate([out[:, :24], noisy], axis=1)

    def defined(q, k, v):
        return reference.block_attention(q, k, v, mask, lengths=lengths, scale=0.2)[0]

    def run(function):
        out, back = jax.vjp(function, q, k, v)
        return out, back(jnp.cos(out))

    got, want = jax.jit(run, static_argnums=0)(merged), jax.jit(run, static_argnums=0)(defined)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5, rtol=1e-5), got, want)


def test_nothing_is_read_that_is_not_there():
    """The interpreter that moves every tile by its own copy, with memory that begins as NaN."""
    mask = BlockMask.dual_stream(24, 8)
    params = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")
    check(
        mask, 40, *case(mask, 40), window=9, lengths=[24, 3], segments=np.arange(80).reshape(2, 40),
        interpret=params,
    )  # fmt: skip


@partial(jax.jit, static_argnames=("mask", "entries", "window"))
def listed_steps(mask, entries, window, lengths, segments):
    return flash_steps.steps(
        mask, entries, 16, 16, 8, window=window, lengths=lengths, segments=segments
    )


@pytest.mark.parametrize(
    ("name", "window"), list(zip(MASKS, [7, 0, 0, 0, 7, 1, 30, 7], strict=True))
)
@given(seed=st.integers(0, 999))
@settings(max_examples=8)
def test_steps_are_what_is_seen(name, window, seed):
    """Each pair that is seen lies in an active tile, and in a whole one all are."""
    mask, entries = MASKS[name]
    rng = np.random.default_rng(seed)
    lengths = jnp.asarray(rng.permutation([0, rng.integers(mask.clean + 1)]), jnp.int32)
    segments = jnp.asarray(documents(rng, mask, entries), jnp.int32)
    allow = visible(mask, entries, window=window, lengths=lengths, segments=segments)
    found = listed_steps(mask, entries, window, lengths, segments)
    first, end = (np.asarray(x)[:, :entries, None] for x in (found.first, found.end))
    key = np.arange(mask.clean)
    np.testing.assert_array_equal(allow, (first <= key) & (key < end))
    cells = np.pad(allow, ((0, 0), (0, -entries % 16), (0, -mask.clean % 16)))
    cells = cells.reshape(2, cells.shape[1] // 16, 16, -1, 16)
    flags, query = np.asarray(found.flags), np.asarray(found.query)
    listed = np.zeros((2, cells.shape[1], cells.shape[3]), int)
    assert (np.sort(np.unique(query)) == np.arange(cells.shape[1])).all()
    edges = np.diff(query, prepend=-1) != 0, np.diff(query, append=-1) != 0
    np.testing.assert_array_equal(flags & flash_steps.FIRST != 0, np.stack([edges[0]] * 2))
    np.testing.assert_array_equal(flags & flash_steps.LAST != 0, np.stack([edges[1]] * 2))
    active = flags & ~(flash_steps.FIRST | flash_steps.LAST)
    for row in range(2):
        read = active[row] != 0
        listed[row, query[read], np.asarray(found.key)[row][read]] = active[row][read]
    assert (listed[cells.any(axis=(2, 4))] != 0).all()
    assert cells.all(axis=(2, 4))[listed == flash_steps.WHOLE].all()
    steps = cells.reshape(*cells.shape[:2], 2, 8, -1, 2, 8).any(axis=(3, 6))
    assert not steps[:, :, 0, :, 1][listed == flash_steps.STEPPED].any()


def test_what_it_does_not_take_is_named():
    def why(heads=2, kv_heads=1, size=64, clean=64, dtype="float32", keys=None, batch=2, **more):
        shape = jax.ShapeDtypeStruct
        return flash_tpu.takes(
            shape((batch, clean, heads, size), dtype),
            shape((batch, clean, kv_heads, size), keys or dtype),
            BlockMask.causal(clean), **more,
        )  # fmt: skip

    assert why() is None
    assert why(heads=16, kv_heads=2, size=512, clean=4096, dtype="bfloat16", gradient=True) is None
    assert why(heads=4, size=128, clean=32768, dtype="bfloat16", gradient=True) is None
    assert "no clean entries" in why(clean=0)
    assert "not float16" in why(dtype="float16")
    assert "float32 and bfloat16" in why(keys="bfloat16")
    assert "head size 80" in why(size=80)
    assert why(size=512, clean=16384) is None
    assert "bytes of vector memory" in why(size=512, clean=16384, gradient=True)
    assert "bytes of scalar memory" in why(clean=32768, batch=64)
    arrays = case(BlockMask.causal(4), 4, size=80)[0][:3]
    with pytest.raises(ValueError, match="cannot run this: head size 80"):
        flash_tpu.over_clean(*arrays, BlockMask.causal(4), scale=1.0)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "mask", "entries", "dtype"),
    [
        (32, 32, 128, BlockMask.dual_stream(4096, 32), 8192, "bfloat16"),
        (16, 8, 256, BlockMask.block_causal(1000, 32), 1000, "bfloat16"),
        (9, 3, 64, BlockMask.dual_stream(64, 4), 128, "float32"),
    ],
)
def test_it_lowers_for_a_tpu(heads, kv_heads, size, mask, entries, dtype):
    """Block shapes and operations that the TPU compiler takes; the compiler itself is not asked."""
    shape = jax.ShapeDtypeStruct
    q, k = (
        shape((2, length, n, size), dtype)
        for length, n in ((entries, heads), (mask.clean, kv_heads))
    )
    arrays = (q, k, k, q), shape((2, entries, heads), jnp.float32)
    more = {"lengths": shape((2,), jnp.int32), "segments": shape((2, entries), jnp.int32)}
    device = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("x",), (AxisType.Explicit,), abstract_device=device)
    call = partial(kernel, mask=mask, window=512, tiles=(None, None), interpret=False)
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(call).trace(*arrays, more).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("tpu_custom_call") == 2
