"""What the TPU kernel of block attention should cost, by the compiler's own schedule.

    pip install "jax[tpu]"
    python scripts/bench/tpu_bundles.py --out scripts/bench/results/tpu-bundles.md

No TPU is needed: libtpu compiles the kernel for a chip that is not there and writes its final
bundles, one a cycle if nothing stalls. A step of the grid costs the longer of its transfer and its
bundles; the share of the roofline is the time that the valid slots alone take to arrive over that.
The clocks are those at which the peak FLOP/s come out right, as none is documented, and the latency
of a transfer is not in the model: compare variants with it rather than chips, and measure on a chip
before promising a number.
"""

import dataclasses
import importlib.metadata
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import tyro

KERNEL = "block_attention_decode"
BATCH, SLOTS = 4, 32768
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
BUNDLE = re.compile(r"^\s*(?:0x)?[0-9a-f]+\s+(LH|LB|LE|PB|PF|CT)?\s*:\s*>*")


class Chip(NamedTuple):
    topology: str
    hertz: float  # inferred, see above
    bandwidth: float  # of HBM as published, bytes/s


CHIPS = {"v5e": Chip("v5e:2x2", 1.5e9, 819e9), "v6e": Chip("v6e:2x2", 1.75e9, 1640e9)}


class Shape(NamedTuple):
    entries: int
    heads: int
    kv_heads: int
    size: int
    tile: int | None = None
    cache: str = "bfloat16"


# What the kernel was tuned for, at several tiles, and others at the tile of the heuristic.
SHAPES = {
    "block 32, 4 heads a kv head, 128": [
        Shape(32, 16, 4, 128, tile) for tile in (None, 512, 1024, 2048, 4096)
    ],
    "block 4, 4 heads a kv head, 128": [Shape(4, 16, 4, 128)],
    "block 32, LLaDA-8B": [Shape(32, 32, 32, 128)],
    "block 32, Fast-dLLM v2 7B": [Shape(32, 28, 4, 128)],
    "block 32, SmolLM2": [Shape(32, 9, 3, 64)],
    "block 32, 4 heads a kv head, 128, int8": [
        Shape(32, 16, 4, 128, tile, "int8") for tile in (None, 1024, 2048)
    ],
    "block 32, LLaDA-8B, int8": [Shape(32, 32, 32, 128, cache="int8")],
}


class Region(NamedTuple):
    """A stretch of bundles between branches."""

    bundles: int
    loop: bool  # a loop begins here
    used: dict[str, float]  # share of each unit's slots


class Cost(NamedTuple):
    """Bundles of one step's parts."""

    step: int  # of any step: the loop, its transfers and branches
    own: int  # a row begins
    whole: int  # a tile as it is
    cut: int  # a tile of which a part is masked
    write: int  # a row ends
    used: dict[str, float]  # of `whole`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What to write."""

    out: Path
    """Where the table goes."""
    chips: tuple[str, ...] = tuple(CHIPS)
    rows: tuple[int, ...] = (4096, 16384)
    """Valid slots of the rows whose cost is estimated, besides that of a single tile."""


def main(report: Report) -> None:
    lines = []
    for chip in report.chips:
        for title, shapes in SHAPES.items():
            for shape in shapes:
                cost, tile = measure(CHIPS[chip], shape)
                lines.append(line(report, CHIPS[chip], shape, tile, cost, f"{chip} | {title}"))
                print(lines[-1], flush=True)
    versions = ", ".join(f"{x} {importlib.metadata.version(x)}" for x in ("jax", "libtpu"))
    clocks = ", ".join(
        f"{name} {chip.hertz / 1e9:g} GHz and {chip.bandwidth / 1e9:g} GB/s"
        for name, chip in CHIPS.items()
    )
    rows = [f"row of {row}" for row in report.rows]
    head = ["chip", "shape", "tile", "step", "whole tile", "cut tile", "transfer", "MXU", "VALU",
            "spills", "share of roofline", *rows]  # fmt: skip
    text = f"""Static model of the TPU kernel of block attention, bfloat16, the cache int8 where it
says so; nothing was timed.
Versions: {versions}.

Bundles of any step of the grid (step) and, besides, of a tile as it is (whole) or masked (cut), the
cycles that a tile's transfer takes, and the use of the units in a whole tile. Tile: cache slots; *
as the heuristic has it. Share of the HBM roofline: over whole tiles, and over rows of about so many
valid slots, ends falling anywhere in a tile, with their own entries and results.
Assumed: {clocks}.

| {" | ".join(head)} |
|{"---|" * len(head)}
"""
    report.out.write_text(text + "".join(f"| {x} |\n" for x in lines))


def line(report: Report, chip: Chip, shape: Shape, tile: int, cost: Cost, title: str) -> str:
    item = {"bfloat16": 2, "int8": 1}[shape.cache]
    cycles = item * 2 * max(shape.size, 64) * chip.hertz / chip.bandwidth  # of a slot's transfer
    shares = [tile * cycles / max(tile * cycles, cost.step + cost.whole)]
    shares += [row_share(cost, row, tile, cycles) for row in report.rows]
    cells = [
        title, f"{tile}{'' if shape.tile else ' *'}", cost.step, cost.whole, cost.cut,
        f"{tile * cycles:.0f}", *(f"{cost.used[x]:.0%}" for x in ("MXU", "VALU")),
        f"{cost.used['spills']:.0f}", *(f"{x:.0%}" for x in shares),
    ]  # fmt: skip
    return " | ".join(map(str, cells))


def row_share(cost: Cost, slots: int, tile: int, cycles: float) -> float:
    """Share of the roofline over a row of about `slots` valid slots, the mean over its ends."""
    ends = [slots - tile // 2 + (2 * i + 1) * tile // 32 for i in range(16)]
    transfer, spent = tile * cycles, 0.0
    for end in ends:
        whole, rest = divmod(end, tile)
        steps = [cost.step + cost.whole] * whole + [cost.step + cost.cut] * bool(rest)
        steps[0] += cost.own
        steps[-1] += cost.write
        spent += sum(max(transfer, step) for step in steps)
    return sum(ends) * cycles / spent


def measure(chip: Chip, shape: Shape) -> tuple[Cost, int]:
    """Compiles in a process of its own, as libtpu reads where to dump when it loads."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        done = subprocess.run(
            [sys.executable, __file__, "--compile", chip.topology, json.dumps(shape)],
            env={**os.environ, **ENVIRONMENT, "LIBTPU_INIT_ARGS": flags},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr[-4000:])
        return bodies(regions(Path(folder))), int(done.stdout.splitlines()[-1])


def regions(folder: Path) -> list[Region]:
    listing = next(
        x for x in folder.glob(f"*{KERNEL}*-final_bundles.txt") if "analysis" not in x.name
    )
    table = next(folder.glob(f"*{KERNEL}*final_hlo-static-per-bundle-utilization.txt"))
    units, slots, _, *use = table.read_text().splitlines()[1:]
    names, slots = [x.strip() for x in units.split(",")], [int(x) for x in slots.split()]
    used = [[int(x) for x in row.split()] for row in use if row.strip()]
    bundles = [(m[1], row) for row in listing.read_text().splitlines() if (m := BUNDLE.match(row))]
    if len(bundles) != len(used):
        raise ValueError(f"{len(bundles)} bundles, but the use of {len(used)}")
    cuts = {0, len(bundles)}
    for i, (mark, text) in enumerate(bundles):
        cuts |= ({i} if mark else set()) | ({i + 1} if "sbr.rel" in text else set())
    cuts = sorted(cuts)
    found = []
    for start, stop in itertools.pairwise(cuts):
        sums = {n: sum(row[k] for row in used[start:stop]) for k, n in enumerate(names)}
        shares = {n: sums[n] / (slots[k] * (stop - start)) for k, n in enumerate(names)}
        shares["spills"] = sums.get("VSTORE:SPILL", 0)
        found.append(Region(stop - start, bundles[start][0] == "LB", shares))
    return found


def bodies(found: list[Region]) -> Cost:
    """The kernel's parts by their order: own entries, a whole tile, a cut one, the results."""
    begin = next(i for i, x in enumerate(found) if x.loop)
    sizes = [x.bundles for x in found]

    def largest(start: int, stop: int) -> int:
        return max(range(start, stop), key=lambda i: sizes[i])

    whole, cut = sorted(sorted(range(len(found)), key=lambda i: -sizes[i])[:2])
    own, write = largest(begin + 1, whole), largest(cut + 1, len(found))
    step = sum(sizes[begin:]) - sum(sizes[i] for i in (own, whole, cut, write))
    return Cost(step, sizes[own], sizes[whole], sizes[cut], sizes[write], found[whole].used)


def compile_for(topology: str, shape: Shape) -> int:
    """Compiles one call for a chip, and returns its tile."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from pallas_kernels.block_attention import tpu
    from pallas_kernels.block_attention.tuned import tiling
    from pallas_kernels.masks import BlockMask

    mask = BlockMask.bidirectional(shape.entries)
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    mesh = Mesh(np.array(found.devices[:1]), ("x",), axis_types=(AxisType.Explicit,))
    placed = NamedSharding(mesh, PartitionSpec())

    def of(*dims, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=placed)

    def attend(q, kv, cache, scale, end):
        return tpu.block_attention(
            q, kv, kv, mask, cache=cache, layer=0, cache_end=end, tile=shape.tile,
            cache_scale=scale if shape.cache == "int8" else None,
        )  # fmt: skip

    entries, heads, kv_heads, size, tile, cached = shape
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(attend).trace(
            of(BATCH, entries, heads, size), of(BATCH, entries, kv_heads, size),
            of(1, BATCH, kv_heads, SLOTS, 2 * size, dtype=cached),
            of(1, BATCH, kv_heads, 2, dtype=jnp.float32), of(BATCH, dtype=jnp.int32),
        )  # fmt: skip
        traced.lower(lowering_platforms=("tpu",)).compile()
        return tiling(entries * heads // kv_heads, size, cached, SLOTS, tile).tile


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compile"]:
        print(compile_for(sys.argv[2], Shape(*json.loads(sys.argv[3]))))
    else:
        main(tyro.cli(Report))
