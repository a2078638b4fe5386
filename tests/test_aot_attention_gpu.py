"""The CUDA compiler takes the kernel of block attention without spills, and copies no cache."""

import jax
import jax.numpy as jnp
import pytest

from dllm_jax.testing.aot import compile_for_gpu, temporary_bytes
from pallas_kernels import BlockMask
from pallas_kernels.block_attention import gpu
from tests.test_aot_tpu_attention import SHAPES, Shape

SHARED = 232448  # bytes that a program of an H100 may have
TAKEN = {
    name: shape
    for name, shape in SHAPES.items()
    # Else XLA runs it: `gpu.takes`
    if shape.dtype == "bfloat16"
    and shape.size in (64, 128, 256)
    and shape == shape._replace(widened=False, lanes=0, each=False, pieces=0, own=True)
} | {
    "soft cap, heads of 128": Shape(28, 4, 128, 32, 2, 8192, window=1024, hole=True),
    "soft cap, heads of 256": Shape(16, 8, 256, 256, 2, 8192, window=1024, hole=True),
}


@pytest.mark.aot("cuda")
@pytest.mark.parametrize("name", TAKEN)
def test_it_compiles_without_spills_or_a_copy_of_the_cache(name):
    """Two calls in a scan over layers, as a model makes them."""
    shape, layers = TAKEN[name], 2
    heads, kv_heads, size, entries, batch, slots = shape[:6]
    mask = {
        "bidirectional": BlockMask.bidirectional(entries),
        "block_causal": BlockMask.block_causal(entries, max(entries // 2, 1)),
        "block_diagonal": BlockMask.block_diagonal(entries),
        "dual_stream": BlockMask.dual_stream(entries // 2, entries // 2, stride=0, offset=entries),
    }[shape.mask]

    def attend(q, kv, cache, end, length):
        def layer(q, number):
            out, _ = gpu.block_attention(
                q, kv, kv, mask, cache=cache, layer=number, cache_end=end, lengths=length,
                hole=(length, length + entries) if shape.hole else None, window=shape.window,
                soft_cap=50.0 if "soft cap" in name else 0.0,
            )  # fmt: skip
            return out, None

        return jax.lax.scan(layer, q, jnp.arange(layers))[0]

    arrays = [
        jax.ShapeDtypeStruct(dims, dtype)
        for dims, dtype in (
            ((batch, entries, heads, size), shape.dtype),
            ((batch, entries, kv_heads, size), shape.dtype),
            ((layers, batch, kv_heads, slots, 2 * size), shape.dtype),
            ((batch,), "int32"),
            ((batch,), "int32"),
        )
    ]
    program, (kernel,) = compile_for_gpu("h100", attend, *arrays)
    text = program.as_text().splitlines()
    assert sum("custom-call(" in x and "block_attention_decode" in x for x in text) == 1
    assert kernel.name == "block_attention_decode"
    assert kernel.spilled == 0
    assert kernel.shared <= SHARED
    # As many programs as the grid counts on fit on a multiprocessor, each with 1 KiB more.
    places = gpu._TILINGS[size, kernel.threads // 128].places
    assert places * kernel.threads * kernel.registers <= 1 << 16
    assert places * (kernel.shared + 1024) <= 233472
    cache = f"{batch},{kv_heads},{slots},{2 * size}]"
    assert not [x for x in text if cache in x and (" copy(" in x or " copy-start(" in x)]
    # Queries in the kernel's order, and its results, but nothing the size of a cache.
    of_a_layer = arrays[2].size * arrays[2].dtype.itemsize // layers
    assert temporary_bytes(program) < of_a_layer / 8
