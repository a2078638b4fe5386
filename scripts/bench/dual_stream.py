"""Attention of dual-stream training, in tiles against a dense mask, side by side on the CPU.

    python scripts/bench/dual_stream.py --out scripts/bench/results/dual-stream

`[clean ; noisy]`, each of `length`, at several block sizes: how many of the scores that are
computed someone sees (a property of the tiles, on every device), and the time and memory of the
forward and the backward pass beside `jax.nn.dot_product_attention` under the mask written out. The
sides take turns, warm, in one process. Memory is what the compiled program holds beside its
arguments. Writes <out>.json and <out>.md. A few minutes, 12 GB.
"""

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from dllm_jax.bench.report import commit
from dllm_jax.testing.aot import temporary_bytes
from pallas_kernels import BlockMask, block_attention
from pallas_kernels.block_attention import flash_steps
from pallas_kernels.block_attention.tiles import tiles

TILES = (512, 256)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to run."""

    out: Path
    """Where the results go, without a suffix."""
    length: int = 4096
    """Tokens of each stream."""
    blocks: tuple[int, ...] = (4, 32, 256)
    heads: int = 4
    kv_heads: int = 2
    size: int = 64
    repeat: int = 3
    """Runs of each side."""


def useful(mask: BlockMask, length: int) -> int:
    """Pairs of a query and a key that it sees."""
    index = jnp.arange(2 * length)
    return int(mask.clean_end(index).sum()) + length * mask.block


def computed(mask: BlockMask, length: int, tile: int) -> int:
    """Pairs of the tiles that are computed, and of the noisy groups' own squares."""
    return len(tiles(mask, 2 * length, tile, tile)[0]) * tile**2 + length * mask.block


def computed_by_kernel(mask: BlockMask, length: int, tile: int, part: int = 128) -> int:
    """The same of the TPU kernel, which leaves out squares of `part` above a diagonal."""
    flags = np.asarray(flash_steps.steps(mask, 2 * length, tile, tile, part).flags)
    whole = int((flags & (flash_steps.WHOLE | flash_steps.CUT) > 0).sum())
    stepped = int((flags & flash_steps.STEPPED > 0).sum())
    stairs = sum(part * (tile - i) for i in range(0, tile, part))
    return whole * tile**2 + stepped * stairs + length * mask.block


def main(options: Options) -> None:
    """Runs everything, writes the files."""
    report = {
        "jax": jax.__version__,
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "load": os.getloadavg(),
        "length": options.length,
        "shape": [options.heads, options.kv_heads, options.size],
        "rows": [measure(options, block) for block in options.blocks],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    text = markdown(report)
    options.out.with_suffix(".md").write_text(text)
    print(text)


def measure(options: Options, block: int) -> dict:
    """Shares, median seconds and memory at one block size."""
    length = options.length
    mask = BlockMask.dual_stream(length, block, clean_block=block)
    found: dict = {"block": block}
    for tile in TILES:
        found[f"share_{tile}"] = useful(mask, length) / computed(mask, length, tile)
        by_kernel = computed_by_kernel(mask, length, tile)
        found[f"kernel_share_{tile}"] = useful(mask, length) / by_kernel
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [
        jax.random.normal(key, (1, 2 * length, heads, options.size))
        for key, heads in zip(keys, [options.heads] + 2 * [options.kv_heads], strict=True)
    ]

    def tiled(q, k, v):
        return block_attention(q, k, v, mask)

    def dense(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, mask=mask.dense(2 * length)[None, None])

    def gradient(attend: Callable, *arrays):
        return jax.grad(lambda *x: (attend(*x) ** 2).sum(), (0, 1, 2))(*arrays)

    for name, forms in {
        "forward": (tiled, dense),
        "gradient": (partial(gradient, tiled), partial(gradient, dense)),
    }.items():
        programs = [jax.jit(form).lower(*arrays).compile() for form in forms]
        results = [jax.block_until_ready(program(*arrays)) for program in programs]
        jax.tree.map(partial(np.testing.assert_allclose, atol=2e-4, rtol=2e-3), *results)
        del results
        seconds: list[list[float]] = [[], []]
        for _ in range(options.repeat):
            for program, times in zip(programs, seconds, strict=True):
                start = time.perf_counter()
                jax.block_until_ready(program(*arrays))
                times.append(time.perf_counter() - start)
        found[name] = {
            side: {"seconds": statistics.median(times), "bytes": temporary_bytes(program)}
            for side, times, program in zip(("tiled", "dense"), seconds, programs, strict=True)
        }
    print(json.dumps(found), flush=True)
    return found


def markdown(report: dict) -> str:
    """The table of a report."""
    heads, kv_heads, size = report["shape"]
    lines = [
        f"Two streams of {report['length']:,}, {heads} heads of {size} ({kv_heads} of keys),"
        f" float32, {report['cores']} CPU cores, jax {report['jax']}, {report['date']}, commit"
        f" {report['commit']}, load {report['load'][0]:.1f}; medians, the sides in turn. Useful:"
        " scores that some query sees, of those computed.",
        "",
        "| block | useful, tiles of 512 | of 256 | TPU kernel, 512 | 256 | forward, s: tiled |"
        " dense | ratio | gradient, s: tiled | dense | ratio | memory, forward: tiled | dense |"
        " gradient: tiled | dense |",
        "|" + "---|" * 15,
    ]
    for row in report["rows"]:
        cells = [str(row["block"])]
        cells += [f"{row[f'{by}share_{tile}']:.3f}" for by in ("", "kernel_") for tile in TILES]
        for name in ("forward", "gradient"):
            ours, theirs = (row[name][side]["seconds"] for side in ("tiled", "dense"))
            cells += [f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.1f}x"]
        for name in ("forward", "gradient"):
            cells += [f"{row[name][side]['bytes'] >> 20:,} MiB" for side in ("tiled", "dense")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
