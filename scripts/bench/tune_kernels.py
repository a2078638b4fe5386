"""Times tilings of the TPU kernels on the TPU that is here, and keeps those that beat the rule.

    pip install -e '.[tpu,dev]'
    JAX_PLATFORMS=tpu python scripts/bench/tune_kernels.py

Writes `tuned.json` beside each kernel, from where it is read: what was known of other devices
stays. Every shape is written as soon as it is timed, so a run may be stopped. A candidate is timed
in one program of many calls, each of which waits for the one before; the shortest of some runs
counts.
"""

import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tyro

from pallas_kernels import BlockMask
from pallas_kernels.block_attention import tpu as attention
from pallas_kernels.block_attention import tuned as attention_tuned
from pallas_kernels.token_stats import tpu as token_statistics
from pallas_kernels.token_stats import tuned as tokens_tuned


class Attention(NamedTuple):
    """A shape of block attention."""

    entries: int
    heads: int
    kv_heads: int
    size: int
    cache: str = "bfloat16"
    batch: int = 4
    slots: int = 32768


class Tokens(NamedTuple):
    """A shape of token statistics."""

    vocabulary: int
    dim: int
    rows: int = 32


SHAPES = {
    "LLaDA-8B": Attention(32, 32, 32, 128, slots=4096),
    "LLaDA-8B, int8": Attention(32, 32, 32, 128, "int8", slots=4096),
    "LLaDA2-mini": Attention(32, 16, 4, 128),
    "LLaDA2-mini, int8": Attention(32, 16, 4, 128, "int8"),
    "Fast-dLLM v2 7B": Attention(32, 28, 4, 128),
    "Fast-dLLM v2 7B, int8": Attention(32, 28, 4, 128, "int8"),
    "SmolLM2": Attention(32, 9, 3, 64),
    "DiffusionGemma, sliding": Attention(256, 16, 8, 256, slots=4096),
    "DiffusionGemma, full": Attention(256, 16, 2, 512),
    "LLaDA-8B, vocabulary": Tokens(126_464, 4096),
    "Fast-dLLM v2 7B, vocabulary": Tokens(152_064, 3584),
    "LLaDA2-mini, vocabulary": Tokens(157_184, 2048),
    "DiffusionGemma, vocabulary": Tokens(262_144, 2816, rows=256),
}
SMOKE = {"attention": Attention(4, 2, 1, 64, batch=2, slots=256), "tokens": Tokens(384, 128, 8)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to time."""

    minutes: float = 9.0
    """No shape begins after so many."""
    calls: int = 64
    """Calls of the kernel in a program."""
    repeat: int = 5
    """Runs of a program."""
    gain: float = 1.02
    """How much faster than the rule a tiling must be."""
    out: Path | None = None
    """A folder for the two files, attention.json and tokens.json, instead of beside the kernels."""
    interpret_smoke: bool = False
    """Without a TPU: two tiny shapes through the interpreter, a call each, to see that it runs."""


class Kernel(NamedTuple):
    """What is tuned: its table, the name there of a shape, candidates, and a run of it."""

    table: dict[str, Any]
    file: Path
    name: str
    candidates: list[Any]
    run: Callable[..., jax.Array]  # the first argument, and that of the next call, are alike
    arrays: tuple[Any, ...]


def main(options: Options) -> None:
    if jax.default_backend() != "tpu" and not options.interpret_smoke:
        device = jax.devices()[0].device_kind
        print(f"this is for a TPU, whose kernels have tilings to choose; here is {device}")
        sys.exit(2)
    if options.interpret_smoke:
        options = dataclasses.replace(options, calls=1, repeat=1)
    start, shapes = time.monotonic(), SMOKE if options.interpret_smoke else SHAPES
    for title, shape in shapes.items():
        if time.monotonic() - start > 60 * options.minutes:
            print(f"{title}: no time left")
            continue
        if isinstance(shape, Attention):
            kernel = of_attention(shape, options)
        else:
            kernel = of_tokens(shape, options)
        tune(title, kernel, options)


def tune(title: str, kernel: Kernel, options: Options) -> None:
    """Times the candidates for a shape, and writes the best if it beats the rule."""
    kernel.table.pop(kernel.name, None)
    times: dict[str | None, float] = {None: seconds(kernel, options)}  # by the rule
    for candidate in kernel.candidates:
        kernel.table[kernel.name] = candidate
        try:
            times[json.dumps(candidate)] = seconds(kernel, options)
        except Exception as error:  # the compiler's: it spills, or does not fit
            print(f"{title}: {candidate} does not run: {str(error).splitlines()[0][:120]}")
    del kernel.table[kernel.name]
    best = min(times, key=times.__getitem__)
    gain = times[None] / times[best]
    print(
        f"{title}: {times[None] * 1e6:.1f} us by the rule, {times[best] * 1e6:.1f} us with {best} "
        f"of {len(times) - 1}, x{gain:.2f}",
        flush=True,
    )
    if best is not None and gain >= options.gain:
        kernel.table[kernel.name] = json.loads(best)
    lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(kernel.table.items())]
    kernel.file.write_text("{\n" + ",\n".join(lines) + "\n}\n" if lines else "{}\n")


def seconds(kernel: Kernel, options: Options) -> float:
    """Of one call, with what the table says now."""

    @jax.jit
    def program(first, *rest):
        return jax.lax.fori_loop(0, options.calls, lambda _, x: kernel.run(x, *rest), first)

    program(*kernel.arrays).block_until_ready()
    runs = []
    for _ in range(options.repeat):
        start = time.perf_counter()
        program(*kernel.arrays).block_until_ready()
        runs.append(time.perf_counter() - start)
    return min(runs) / options.calls


def of_attention(shape: Attention, options: Options) -> Kernel:
    entries, heads, kv_heads, size, stored, batch, slots = shape
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (batch, entries, heads, size), jnp.bfloat16)
    own = jax.random.normal(keys[1], (batch, entries, kv_heads, size), jnp.bfloat16)
    kv = 40 * jax.random.normal(keys[2], (1, batch, kv_heads, slots, 2 * size), jnp.bfloat16)
    scale = jnp.full((1, batch, kv_heads, 2), 1 / 40) if stored == "int8" else None
    ends = slots - jnp.arange(batch) * (slots // (2 * batch))  # ragged

    def run(q, own, kv, scale, ends):
        return attention.block_attention(
            q, own, own, BlockMask.bidirectional(entries), cache=kv, cache_scale=scale, layer=0,
            cache_end=ends, interpret=options.interpret_smoke,
        )[0]  # fmt: skip

    rows = entries * heads // kv_heads
    return Kernel(
        attention_tuned.TUNED, file_of(attention_tuned, "attention", options),
        attention_tuned.key(rows, size, stored), list(tilings(rows, slots)), run,
        (q, own, kv.astype(stored), scale, ends),
    )  # fmt: skip


def tilings(rows: int, slots: int) -> Iterator[attention_tuned.Tiling]:
    """Candidates: slots of a step, slots and rows of an update."""
    tiles = [tile for tile in (256, 512, 1024, 2048, 4096) if tile <= slots]
    for tile, part, once in itertools.product(tiles, (128, 256, 512, 1024), (128, 256)):
        if part <= tile and (once == 128 or rows > 128):
            yield attention_tuned.Tiling(tile, part, once)


def of_tokens(shape: Tokens, options: Options) -> Kernel:
    keys = jax.random.split(jax.random.key(0), 2)
    hidden = jax.random.normal(keys[0], (shape.rows, shape.dim), jnp.bfloat16)
    vectors = jax.random.normal(keys[1], (shape.vocabulary, shape.dim), jnp.bfloat16)

    def run(hidden, vectors):
        found = token_statistics.stats(hidden, vectors, interpret=options.interpret_smoke)
        return hidden + (1e-9 * found.scores[:, :1]).astype(hidden.dtype)

    tiles = [tile for tile in (128, 256, 512, 1024, 2048, 4096) if tile <= shape.vocabulary]
    return Kernel(
        tokens_tuned.TUNED, file_of(tokens_tuned, "tokens", options),
        tokens_tuned.key(shape.dim, hidden.dtype), tiles, run, (hidden, vectors),
    )  # fmt: skip


def file_of(module: ModuleType, name: str, options: Options) -> Path:
    """Where a kernel's table is written."""
    if options.out is None:
        return Path(str(module.__file__)).with_suffix(".json")
    options.out.mkdir(parents=True, exist_ok=True)
    return options.out / f"{name}.json"


if __name__ == "__main__":
    main(tyro.cli(Options))
