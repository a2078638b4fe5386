"""The TPU compiler takes the kernel of block attention, and copies no cache for it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from dllm_jax.testing.aot import CHIPS, compile_for, temporary_bytes
from pallas_kernels import BlockMask, block_attention_lse


class Shape(NamedTuple):
    """Of one call of a known model."""

    heads: int
    kv_heads: int
    size: int
    entries: int
    batch: int
    slots: int
    mask: str = "bidirectional"
    window: int = 0
    hole: bool = False
    dtype: str = "bfloat16"
    widened: bool = False  # whether the cache is int8
    lanes: int = 0  # of the cache, if more than `2 * size`
    each: bool = False  # whether each query has an end of its own
    pieces: int = 0  # of the cache, to choose from
    own: bool = True


SHAPES = {
    "LLaDA-8B": Shape(32, 32, 128, 32, 4, 4096, hole=True),
    "LLaDA-8B, no shape is round": Shape(32, 32, 128, 7, 2, 5000, hole=True),
    "LLaDA-8B, float32": Shape(32, 32, 128, 32, 1, 4096, dtype="float32"),
    "Fast-dLLM v2 7B": Shape(28, 4, 128, 32, 16, 32768, mask="block_causal"),
    "Fast-dLLM v2 7B, a sub-block": Shape(28, 4, 128, 4, 16, 32768, hole=True),
    "LLaDA2-mini": Shape(16, 4, 128, 256, 4, 32768, mask="block_causal"),
    "DiffusionGemma, sliding": Shape(16, 8, 256, 256, 2, 32768, mask="block_diagonal", window=1024),
    "DiffusionGemma, full": Shape(16, 2, 512, 256, 4, 32768, mask="block_diagonal"),
    "SmolLM2": Shape(9, 3, 64, 32, 16, 16384, mask="dual_stream"),
    "SmolLM2, narrow": Shape(9, 3, 64, 4, 16, 16384, mask="block_diagonal"),
    "LLaDA-8B, int8": Shape(32, 32, 128, 32, 4, 4096, hole=True, widened=True),
    "Fast-dLLM v2 7B, int8, chosen": Shape(
        28, 4, 128, 32, 16, 32768, mask="block_causal", widened=True, each=True, pieces=256
    ),
    "LLaDA2-mini, chosen": Shape(16, 4, 128, 32, 4, 32768, hole=True, pieces=1024),
    "LLaDA2-mini, prefill": Shape(
        16, 4, 128, 512, 4, 32768, mask="block_causal", window=8192, own=False
    ),
    "SmolLM2, int8": Shape(9, 3, 64, 32, 16, 16384, mask="block_diagonal", widened=True),
    "a head of 80": Shape(32, 32, 80, 32, 4, 4096, lanes=256),
    "a head of 96, int8": Shape(32, 32, 96, 32, 4, 4096, lanes=256, widened=True),
}


# A program takes seconds to compile: quick tests have each shape on one chip, slow ones on all.
PAIRS = [
    pytest.param(name, chip, marks=[pytest.mark.slow] if (i + j) % len(CHIPS) else [])
    for i, name in enumerate(SHAPES)
    for j, chip in enumerate(CHIPS)
]


@pytest.mark.aot("tpu")
@pytest.mark.parametrize(("name", "chip"), PAIRS)
def test_it_compiles_without_a_copy_of_the_cache(name, chip):
    """Two calls in a scan over layers, as a model makes them."""
    shape, layers = SHAPES[name], 2
    heads, kv_heads, size, entries, batch, slots = shape[:6]
    lanes = shape.lanes or 2 * size
    mask = {
        "bidirectional": BlockMask.bidirectional(entries),
        "block_causal": BlockMask.block_causal(entries, max(entries // 2, 1)),
        "block_diagonal": BlockMask.block_diagonal(entries),
        "dual_stream": BlockMask.dual_stream(entries // 2, entries // 2, stride=0, offset=entries),
    }[shape.mask]

    def attend(q, kv, cache, scale, chosen, end, length):
        def layer(q, number):
            out, _ = block_attention_lse(
                q, kv, kv, mask, cache=cache, layer=number, cache_scale=scale, chosen=chosen,
                cache_end=end, lengths=length, own=shape.own, window=shape.window,
                hole=(length, length + entries) if shape.hole else None,
            )  # fmt: skip
            return out, None

        return jax.lax.scan(layer, q, jnp.arange(layers))[0]

    of, cached = jax.ShapeDtypeStruct, (layers, batch, kv_heads, slots, lanes)
    arrays = [
        of((batch, entries, heads, size), shape.dtype),
        of((batch, entries, kv_heads, size), shape.dtype),
        of(cached, "int8" if shape.widened else shape.dtype),
        of((layers, batch, kv_heads, 2), "float32") if shape.widened else None,
        of((batch, shape.pieces), "bool") if shape.pieces else None,
        of((batch, entries) if shape.each else (batch,), "int32"),
        of((batch,), "int32"),
    ]
    program = compile_for(chip, attend, *arrays)
    text = program.as_text().splitlines()
    assert sum("custom-call(" in line and "tpu_custom_call" in line for line in text) == 1
    cache = f"{batch},{kv_heads},{slots},{lanes}]"
    assert not [x for x in text if cache in x and (" copy(" in x or " copy-start(" in x)]
    # Queries in the kernel's order, and its results, but nothing the size of a cache.
    of_a_layer = batch * kv_heads * slots * lanes * arrays[2].dtype.itemsize
    assert temporary_bytes(program) < of_a_layer / 8
