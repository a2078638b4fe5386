"""The CUDA compiler takes the kernel of token statistics: no spills, and no scores in memory."""

import re

import jax
import jax.numpy as jnp
import pytest

from dllm_jax.testing.aot import compile_for_gpu, temporary_bytes
from pallas_kernels.token_stats import gpu

# vocabulary, hidden size, soft cap
SHAPES = {
    "LLaDA-8B": (126_464, 4096, 0.0),
    "Fast-dLLM v2 7B": (152_064, 3584, 0.0),
    "LLaDA2-mini": (157_184, 2048, 0.0),
    "DiffusionGemma": (262_144, 2816, 30.0),
    "SmolLM2": (49_152, 576, 0.0),
}
SHARED = 232_448  # bytes that a block may have


def _check(rows, vocab, dim, *, soft_cap=0.0, drawn=False, more=False, top=1):
    def asked(hidden, vocabulary, given):
        return gpu.stats(
            hidden, vocabulary, soft_cap=soft_cap, forbidden=(vocab - 1,), top=top, **given
        )

    given = {"keys": ((rows, 2), "uint32"), "temperature": ((rows, 1), "float32")} if drawn else {}
    if more:
        given |= {"bias": ((vocab,), "float32"), "scale": ((rows, 1), "float32")}
        given["active"] = ((rows,), "bool")
    shape = jax.ShapeDtypeStruct
    program, kernels = compile_for_gpu(
        "h100", asked, shape((rows, dim), jnp.bfloat16), shape((vocab, dim), jnp.bfloat16),
        {name: shape(*one) for name, one in given.items()},
    )  # fmt: skip
    text = program.as_text()
    assert sum("mosaic_gpu" in x and "custom-call(" in x for x in text.splitlines()) == 1
    (kernel,) = kernels
    assert kernel.name.startswith("token_stats")
    assert kernel.spilled == 0
    assert kernel.shared <= SHARED
    made_by = re.findall(rf"= bf16\[{vocab},{dim}\]\S* ([\w-]+)\(", text)
    assert set(made_by) == {"parameter"}, "vectors are not read where they lie"
    assert temporary_bytes(program) < max(rows * vocab * 4 / 10, 2 << 20), "scores are formed"


@pytest.mark.aot("cuda")
@pytest.mark.parametrize("drawn", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("rows", [32, 512])
@pytest.mark.parametrize("name", SHAPES)
def test_compiles_for_a_chip(name, rows, drawn):
    vocab, dim, soft_cap = SHAPES[name]
    _check(rows, vocab, dim, soft_cap=soft_cap, drawn=drawn)


@pytest.mark.aot("cuda")
@pytest.mark.parametrize("top", [1, 4])
@pytest.mark.parametrize("rows", [7, 500])
def test_everything_that_can_be_asked_at_once(rows, top):
    """Neither rows nor tokens fill a tile; of many rows, two programs share the vectors."""
    _check(rows, 50_264, 768, soft_cap=30.0, drawn=True, more=True, top=top)


@pytest.mark.aot("cuda")
@pytest.mark.parametrize("rows", [7, 300])
def test_the_largest_four(rows):
    """Of three blocks of rows, none shares the vectors with another."""
    _check(rows, 151_936, 1024, top=4)
