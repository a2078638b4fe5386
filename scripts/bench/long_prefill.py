"""A long prompt on the CPU: in chunks, whole, and with all scores formed.

    python scripts/bench/long_prefill.py --out scripts/bench/results/long-prefill

A model of 10M parameters answers a prompt of `length` tokens with one block of SDAR's decoding, the
prompt in chunks and whole, each in a process of its own: the largest difference of what is cached
and of log-probabilities, the seconds, and the memory that the process grew by. Beside it, what the
compiled prefill holds besides its arguments and results, for several lengths; the form that makes
the [L, L] scores of each head is only compiled. Writes <out>.json and <out>.md. Minutes, 3 GB.
"""

import dataclasses
import functools
import json
import math
import os
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from dllm_jax.bench.report import commit

BLOCK = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to run."""

    out: Path
    """Where the results go, without a suffix."""
    length: int = 32_768
    """Tokens of the prompt that is answered."""
    chunk: int = 2048
    lengths: tuple[int, ...] = (32_768, 16_384, 8192)
    """Of the prompts whose programs are compiled."""


def main(options: Options) -> None:
    """Runs and compiles everything, writes the files."""
    sides = {}
    for name, chunk in (("in chunks", options.chunk), ("whole", 0)):
        sides[name] = apart(answer, options.length, chunk)
        print(name, {k: v for k, v in sides[name].items() if k != "found"}, flush=True)
    found = [side.pop("found") for side in sides.values()]
    same = bool((found[0]["tokens"] == found[1]["tokens"]).all())
    differences = {name: float(np.abs(found[0][name] - found[1][name]).max())
                   for name in ("cache", "logprobs")}  # fmt: skip
    report = {
        "length": options.length,
        "chunk": options.chunk,
        "parameters": apart(parameters),
        "sides": sides,
        "tokens_equal": same,
        "differences": differences,
        "rows": [],
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "jax": version("jax"),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for length in options.lengths:
        report["rows"].append({
            "length": length,
            "in chunks": apart(compiled, length, options.chunk),
            "whole": apart(compiled, length, 0),
            "scores formed": apart(compiled, length, 0, True),
        })  # fmt: skip
        print(report["rows"][-1], flush=True)
        options.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(markdown(report))


def apart(function, *args):
    """What a function returns in a new process, whose memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def answer(length: int, chunk: int) -> dict:
    """One answer: what it held, how long it took, and what was found."""
    import jax

    from dllm_jax.decode.generate import _generate

    program, arguments = lowered(_generate, length, chunk)
    program = program.compile()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    state = jax.block_until_ready(program(*arguments))
    seconds = time.perf_counter() - start
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    answered = slice(int(state.prompt[0]), int(state.written[0]))
    found = {
        "cache": np.asarray(state.cache.kv[..., :length, :]),
        "tokens": np.asarray(state.tokens[0, answered]),
        "logprobs": np.asarray(state.logprobs[0, answered]),
    }
    cache = state.cache.kv.nbytes
    return {"seconds": seconds, "grown": grown * 1024, "cache": cache, "found": found}


def compiled(length: int, chunk: int, naive: bool = False) -> int:
    """Bytes that the prefill's program holds beside its arguments and results."""
    from dllm_jax.decode.generate import _start
    from dllm_jax.testing.aot import temporary_bytes
    from pallas_kernels.block_attention import api

    if naive:
        api._MOST_SCORES = 1 << 62
    return temporary_bytes(lowered(_start, length, chunk)[0].compile())


def lowered(function, length: int, chunk: int):
    """The program of a prompt and the block behind it, and the arrays that it takes."""
    import jax

    from dllm_jax import recipes
    from dllm_jax.decode.generate import pad
    from dllm_jax.decode.prompt import edge

    model, params = made()
    ids = np.random.default_rng(0).integers(2, model.config.mask_id, length)
    recipe = recipes.sdar(block_size=BLOCK)
    job = edge(model, pad([ids.tolist()]), recipe, BLOCK, None, chunk)
    arguments = (params, job.prompt, job.recipe, job.budget, job.keys, None)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    return function.lower(model, *shapes, size=job.size, memory=job.memory), arguments


@functools.cache
def made():
    """A block-causal model of 10M parameters with random weights."""
    import jax
    import jax.numpy as jnp

    from dllm_jax.nn.transformer import TransformerConfig

    config = TransformerConfig(
        vocab_size=16_384, num_layers=4, dim=256, num_heads=4, num_kv_heads=2, head_dim=64,
        ffn_dim=1536, max_length=1 << 17, tied_head=True, attention="block_causal",
        block_size=BLOCK, alignment="same_position", mask_id=16_383,
    )  # fmt: skip
    model = config.build()
    params: Any = model.init(jax.random.key(0), jnp.zeros((1, BLOCK), jnp.int32))["params"]
    # As large as those of a trained model: attention is then more than an average.
    attention = params["layers"]["attention"]
    attention |= {name: 4 * attention[name] for name in ("q", "k")}
    return model, {**params, "embed": 10 * params["embed"]}


def parameters() -> int:
    """How many the model has."""
    import jax

    return sum(math.prod(x.shape) for x in jax.tree.leaves(made()[1]))


def markdown(report: dict) -> str:
    """The results as tables."""
    mib = lambda x: f"{x / 2**20:,.0f} MiB"  # noqa: E731
    cache = next(iter(report["sides"].values()))["cache"]
    difference = report["differences"]
    lines = [
        f"A prompt of {report['length']:,} tokens and a block of {BLOCK}, {report['parameters']:,}"
        f" parameters, float32, chunks of {report['chunk']:,}; {report['cores']} CPU cores, jax"
        f" {report['jax']}, {report['date']}, commit {report['commit']}, load"
        f" {report['load'][0]:.1f}. The cache is {mib(cache)}, and part of what each process grew"
        " by.",
        "",
        f"In chunks against whole: tokens {'equal' if report['tokens_equal'] else 'differ'},"
        f" log-probabilities within {difference['logprobs']:.1e}, keys and values within"
        f" {difference['cache']:.1e}.",
        "",
        "| | seconds | the process grew by |",
        "|---|---|---|",
    ]
    for name, side in report["sides"].items():
        lines.append(f"| {name} | {side['seconds']:.0f} | {mib(side['grown'])} |")
    lines += [
        "",
        "What the compiled prefill holds beside its arguments and results (the cache is one):",
        "",
        "| tokens | in chunks | whole | scores formed |",
        "|---|---|---|---|",
    ]
    for row in report["rows"]:
        sides = (mib(row[name]) for name in ("in chunks", "whole", "scores formed"))
        lines.append(f"| {row['length']:,} | {' | '.join(sides)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
