"""The TPU compiler takes the kernel of block attention, and copies no cache for it.

libtpu compiles for a TPU that is not there. It is a process of its own, once a chip, as JAX has
eight CPU devices here. A call stands in a scan over layers, as a model makes it.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

CHIPS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


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
}
QUICK = ("Fast-dLLM v2 7B", "SmolLM2")
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'jax[tpu]'"
)


@needs_libtpu
@pytest.mark.parametrize(
    ("chip", "names"),
    [("v5e:2x2", QUICK)]
    + [pytest.param(chip, tuple(SHAPES), marks=pytest.mark.slow) for chip in CHIPS],
)
def test_it_compiles_without_a_copy_of_the_cache(chip, names):
    root = Path(__file__).resolve().parents[1]
    found = subprocess.run(
        [sys.executable, __file__, chip, *names], capture_output=True, text=True, check=False,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(root)}, timeout=500,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-4000:]
    reports = json.loads(found.stdout.splitlines()[-1])
    assert set(reports) == set(names)
    for name, report in reports.items():
        assert report["kernels"] == 1, name
        assert not report["copies"], name
        # Queries in the kernel's order, and its results, but nothing the size of a cache.
        assert report["temporary"] < report["layer"] / 8, (name, report)


def main(chip: str, names: list[str]) -> None:
    reports = {name: compiled(chip, SHAPES[name]) for name in names}
    print(json.dumps(reports))


def compiled(chip: str, shape: Shape) -> dict:
    """What the compiler made of two layers of attention, in bytes."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from pallas_kernels.block_attention import tpu
    from pallas_kernels.masks import BlockMask

    layers, (heads, kv_heads, size, entries, batch, slots) = 2, shape[:6]
    mask = {
        "bidirectional": BlockMask.bidirectional(entries),
        "block_causal": BlockMask.block_causal(entries, max(entries // 2, 1)),
        "block_diagonal": BlockMask.block_diagonal(entries),
        "dual_stream": BlockMask.dual_stream(entries // 2, entries // 2, stride=0, offset=entries),
    }[shape.mask]

    def attend(q, kv, cache, end, length):
        def layer(q, number):
            out, _ = tpu.block_attention(
                q, kv, kv, mask, cache=cache, layer=number, cache_end=end, lengths=length,
                hole=(length, length + entries) if shape.hole else None, window=shape.window,
            )  # fmt: skip
            return out, None

        return jax.lax.scan(layer, q, jnp.arange(layers))[0]

    found = topologies.get_topology_desc(platform="tpu", topology_name=chip)
    mesh = Mesh(np.array(found.devices[:1]), ("x",), axis_types=(AxisType.Explicit,))
    placed = NamedSharding(mesh, PartitionSpec())
    arrays = [
        jax.ShapeDtypeStruct(dims, dtype, sharding=placed)
        for dims, dtype in (
            ((batch, entries, heads, size), shape.dtype),
            ((batch, entries, kv_heads, size), shape.dtype),
            ((layers, batch, kv_heads, slots, 2 * size), shape.dtype),
            ((batch,), "int32"),
            ((batch,), "int32"),
        )
    ]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(attend).trace(*arrays).lower(lowering_platforms=("tpu",))
        program = lowered.compile()
    text = program.as_text().splitlines()
    cache = f"{batch},{kv_heads},{slots},{2 * size}]"
    return {
        "kernels": sum("custom-call(" in line and "tpu_custom_call" in line for line in text),
        "copies": [x for x in text if cache in x and (" copy(" in x or " copy-start(" in x)],
        "temporary": program.memory_analysis().temp_size_in_bytes,
        "layer": arrays[2].size * arrays[2].dtype.itemsize // layers,  # of the cache
    }


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
