"""The TPU compiler takes the kernels of prefill and training attention, forward and backward."""

from typing import NamedTuple

import jax
import pytest

from dllm_jax.testing.aot import CHIPS, compile_for, temporary_bytes
from pallas_kernels import BlockMask
from pallas_kernels.block_attention import flash_tpu


class Shape(NamedTuple):
    """Of one call of a known model."""

    heads: int
    kv_heads: int
    size: int
    mask: BlockMask
    entries: int
    window: int = 0
    ragged: bool = False
    packed: bool = False
    dtype: str = "bfloat16"


LENGTH = 4096
TRAINING = BlockMask.dual_stream(LENGTH, 32)
SHAPES = {
    "LLaDA-8B": Shape(32, 32, 128, TRAINING, 2 * LENGTH, packed=True),
    "LLaDA-8B, float32": Shape(32, 32, 128, TRAINING, 2 * LENGTH, dtype="float32"),
    "Fast-dLLM v2 7B": Shape(
        28, 4, 128, BlockMask.dual_stream(LENGTH, 32, repeat=2), 3 * LENGTH, packed=True
    ),
    "LLaDA2-mini": Shape(16, 4, 128, TRAINING, 2 * LENGTH, ragged=True),
    "DiffusionGemma, sliding": Shape(16, 8, 256, TRAINING, 2 * LENGTH, window=1024, ragged=True),
    "DiffusionGemma, full": Shape(16, 2, 512, TRAINING, 2 * LENGTH),
    "SmolLM2": Shape(9, 3, 64, TRAINING, 2 * LENGTH, packed=True),
    "LLaDA-8B, prefill": Shape(32, 32, 128, BlockMask.causal(LENGTH), LENGTH, ragged=True),
    "SDAR-8B, prefill": Shape(32, 8, 128, BlockMask.block_causal(LENGTH, 4), LENGTH),
    "no shape is round": Shape(6, 2, 128, BlockMask.dual_stream(1000, 8), 2000),
}
# A program takes seconds to compile: quick tests have each kernel on each chip, and slow ones more.
FORWARD = [
    *(("SmolLM2", chip) for chip in CHIPS),
    *(
        pytest.param(name, chip, marks=pytest.mark.slow)
        for name in ("LLaDA-8B", "DiffusionGemma, full")
        for chip in CHIPS
    ),
    pytest.param(*("LLaDA-8B, float32", "v5e"), marks=pytest.mark.slow),
    pytest.param(*("Fast-dLLM v2 7B", "v5p"), marks=pytest.mark.slow),
    pytest.param(*("LLaDA2-mini", "tpu7x"), marks=pytest.mark.slow),
    pytest.param(*("DiffusionGemma, sliding", "v5e"), marks=pytest.mark.slow),
    ("LLaDA-8B, prefill", "v6e"),
    ("SDAR-8B, prefill", "v5p"),
    ("no shape is round", "v5e"),
]
BACKWARD = [
    *(("SmolLM2", chip) for chip in CHIPS),
    *(
        pytest.param(*pair, marks=pytest.mark.slow)
        for pair in (
            *(("LLaDA2-mini", chip) for chip in CHIPS),
            ("LLaDA-8B", "v5e"),
            ("LLaDA-8B, float32", "v5p"),
            ("Fast-dLLM v2 7B", "v6e"),
            ("DiffusionGemma, sliding", "v5e"),
            ("DiffusionGemma, full", "tpu7x"),
        )
    ),
    ("no shape is round", "v5e"),
]


def compiled(shape: Shape, chip: str, run):
    """Kernels of `run(arrays, **how)` for a row, and its temporaries in units of the queries.

    The compiler holds heads of less than 128 in registers that are not full.
    """
    q, k = (
        jax.ShapeDtypeStruct((1, length, n, shape.size), shape.dtype)
        for length, n in ((shape.entries, shape.heads), (shape.mask.clean, shape.kv_heads))
    )
    numbers = jax.ShapeDtypeStruct((1, shape.entries, shape.heads), "float32")
    lengths, segments = (jax.ShapeDtypeStruct(x, "int32") for x in ((1,), (1, shape.entries)))

    def call(arrays, lengths, segments):
        return run(
            arrays, mask=shape.mask, window=shape.window, scale=shape.size**-0.5,
            lengths=lengths if shape.ragged else None,
            segments=segments if shape.packed else None,
        )  # fmt: skip

    program = compile_for(chip, call, (q, k, k, q, numbers, q, numbers), lengths, segments)
    text = program.as_text().splitlines()
    kernels = sum("custom-call(" in line and "tpu_custom_call" in line for line in text)
    queries = q.size // shape.size * max(shape.size, 128) * q.dtype.itemsize
    return kernels, temporary_bytes(program) / queries


@pytest.mark.aot("tpu")
@pytest.mark.parametrize(("name", "chip"), FORWARD)
def test_it_compiles(name, chip):
    """Beside queries, keys, values and results as the kernel has them, nothing is held."""
    kernels, held = compiled(
        SHAPES[name], chip, lambda arrays, **how: flash_tpu.over_clean(*arrays[:3], **how)
    )
    assert kernels == 1
    assert held < 4.5


@pytest.mark.aot("tpu")
@pytest.mark.parametrize(("name", "chip"), BACKWARD)
def test_the_backward_pass_compiles(name, chip):
    kernels, held = compiled(
        SHAPES[name], chip, lambda arrays, **how: flash_tpu.over_clean_backward(*arrays, **how)
    )
    assert kernels == 1
    assert held < 9
