"""The kernels run on a device that has them, against XLA's forms: skipped elsewhere."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockMask, block_attention_lse, cross_entropy, token_stats

DEVICES = [pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("gpu", "tpu")]
TPU = [pytest.param("tpu", marks=pytest.mark.tpu)]


def close(got, want, by=2e-2):
    """By relative error, of what is finite in both."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_array_equal(np.isfinite(a), np.isfinite(b))
        a, b = (np.where(np.isfinite(x), x, 0) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=by, atol=by * max(np.abs(b).max(), 1e-6))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(8, 2, 128), (9, 3, 64), (8, 4, 256)])
@pytest.mark.parametrize("entries", [4, 32, 128])
@pytest.mark.parametrize("more", [{}, {"window": 300}, {"soft_cap": 20.0}], ids=str)
def test_a_block_against_a_cache(device, heads, kv_heads, size, entries, more):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (
        jax.random.normal(key, (3, entries, n, size), jnp.bfloat16)
        for key, n in zip(keys, (heads, kv_heads, kv_heads), strict=False)
    )
    cache = jax.random.normal(keys[3], (2, 3, kv_heads, 2048, 2 * size), jnp.bfloat16)
    ends = jnp.array([2048, 777, 0])
    cache = jnp.where(jnp.arange(2048)[:, None] < ends[:, None, None, None], cache, jnp.nan)
    run = jax.jit(
        partial(block_attention_lse, mask=BlockMask.block_causal(entries, 4), **more),
        static_argnames="implementation",
    )
    arrays = {
        "cache": cache, "layer": jnp.int32(1), "cache_end": ends,
        "hole": (jnp.array([100, 0, 0]), jnp.array([100 + entries, 0, 0])),
    }  # fmt: skip
    close(
        run(q, k, v, **arrays, implementation=device), run(q, k, v, **arrays, implementation="xla")
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [7, 64, 512])
@pytest.mark.parametrize("top", [1, 4])
def test_token_statistics(device, rows, top):
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (rows, 1024), jnp.bfloat16)
    vectors = jax.random.normal(keys[1], (50_304, 1024), jnp.bfloat16) / 8
    run = jax.jit(
        partial(token_stats, soft_cap=30.0, forbidden=(5,), top=top),
        static_argnames="implementation",
    )
    noise = jax.random.bits(keys[2], (rows, 2), jnp.uint32)
    own = {"keys": noise, "temperature": jnp.float32(0.7), "active": jnp.arange(rows) % 3 > 0}
    got, want = (run(hidden, vectors, **own, implementation=x) for x in (device, "xla"))
    assert (got.ids == want.ids).mean() > 0.99
    assert (got.drawn.ids == want.drawn.ids).mean() > 0.99
    close((got.log_z, got.entropy, got.scores), (want.log_z, want.entropy, want.scores), by=1e-3)


@pytest.mark.parametrize("device", TPU)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(8, 2, 128), (9, 3, 64)])
def test_two_streams_forward_and_backward(device, heads, kv_heads, size):
    length = 1024
    mask = BlockMask.dual_stream(length, 32, clean_block=32)
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [
        jax.random.normal(key, (2, 2 * length, n, size), jnp.bfloat16)
        for key, n in zip(keys, (heads, kv_heads, kv_heads), strict=True)
    ]
    twice = jnp.tile(jnp.arange(length) // 300, (2, 2))

    def loss(q, k, v, implementation):
        out, _ = block_attention_lse(
            q, k, v, mask, segments=twice, lengths=jnp.array([length, 700]),
            implementation=implementation,
        )  # fmt: skip
        return (out.astype(jnp.float32) ** 2).mean()

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2)), static_argnums=3)
    close(run(*arrays, device), run(*arrays, "xla"))


@pytest.mark.parametrize("device", TPU)
def test_cross_entropy_and_its_gradient(device):
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (384, 1024), jnp.bfloat16)
    vectors = jax.random.normal(keys[1], (50_304, 1024), jnp.bfloat16) / 8
    targets = jax.random.randint(keys[2], (384,), 6, 50_000)

    def loss(hidden, vectors, implementation):
        return cross_entropy(
            hidden, vectors, targets, forbidden=(5,), implementation=implementation
        ).nats.mean()

    run = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)
    close(run(hidden, vectors, device), run(hidden, vectors, "xla"))
