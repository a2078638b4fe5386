"""A decode step with the scores of all tokens, and with token statistics, side by side on the CPU.

    python scripts/bench/vocabulary_cpu.py --out scripts/bench/results/vocabulary-cpu

A LLaDA body of 12 layers of 768 with a vocabulary of 126,464: a block of 32 against a cache of 384,
then token, confidence, entropy and margin of every position. The two take turns, warm, in one
process. Memory is what the compiled program holds beside its arguments. Writes <out>.json and
<out>.md.
"""

import dataclasses
import json
import os
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from dllm_jax.bench.report import commit
from dllm_jax.nn.transformer import TransformerConfig, forward
from dllm_jax.testing.aot import temporary_bytes
from pallas_kernels import BlockMask, token_stats

BLOCK, CONTEXT = 32, 384
CONFIG = TransformerConfig(
    family="llada", vocab_size=126_464, num_layers=12, dim=768, num_heads=12, num_kv_heads=12,
    head_dim=64, ffn_dim=2048, max_length=1024, attention="bidirectional",
    alignment="same_position", mask_id=126_336,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to run."""

    out: Path
    """Where the results go, without a suffix."""
    batches: tuple[int, ...] = (1, 4, 16)
    repeat: int = 12
    """Runs of each side."""


def dense(hidden, vectors):
    """What a decoder wants of the scores of all tokens."""
    scores = jnp.einsum("rd,vd->rv", hidden, vectors, preferred_element_type=jnp.float32)
    probs = jax.nn.softmax(scores)
    best, ids = jax.lax.top_k(probs, 2)
    entropy = -(probs * jnp.log(jnp.maximum(probs, jnp.finfo(jnp.float32).tiny))).sum(axis=1)
    return ids[:, 0], best[:, 0], entropy, best[:, 0] - best[:, 1]


def plain(hidden, vectors):
    """As `dense`, without the margin: reductions only, which XLA vectorises."""
    scores = jnp.einsum("rd,vd->rv", hidden, vectors, preferred_element_type=jnp.float32)
    probs = jax.nn.softmax(scores)
    entropy = -(probs * jnp.log(jnp.maximum(probs, jnp.finfo(jnp.float32).tiny))).sum(axis=1)
    return scores.argmax(axis=1), probs.max(axis=1), entropy


def streamed(hidden, vectors):
    """The same as `dense` by `token_stats`."""
    found = token_stats(hidden, vectors, top=2)
    best = jnp.exp(found.scores - found.log_z[:, None])
    return found.ids[:, 0], best[:, 0], found.entropy, best[:, 0] - best[:, 1]


SIDES = {"dense": dense, "dense_without_margin": plain, "streamed": streamed}


def main(options: Options) -> None:
    """Runs everything, writes the files."""
    model = CONFIG.build()
    params = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    rows = [measure(options, model, params, batch) for batch in options.batches]
    report = {
        "jax": jax.__version__,
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "load": os.getloadavg(),
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    text = markdown(report)
    options.out.with_suffix(".md").write_text(text)
    print(text)


def measure(options: Options, model, params, batch: int) -> dict:
    """Median seconds of a step with each sampler, and the memory of its program."""
    cache = dataclasses.replace(
        model.cache(batch, CONTEXT), lengths=jnp.full(batch, CONTEXT, jnp.int32)
    )
    tokens = jax.random.randint(jax.random.key(1), (batch, BLOCK), 0, 126_000)
    found: dict = {"batch": batch}
    programs, seconds = {}, {name: [] for name in SIDES}
    for name, sampler in SIDES.items():

        def step(params, tokens, cache, sampler=sampler):
            hidden = forward(
                model, params, tokens, mask=BlockMask.bidirectional(BLOCK), cache=cache
            ).hidden
            return sampler(hidden.reshape(-1, CONFIG.dim), params["head"])

        programs[name] = jax.jit(step).lower(params, tokens, cache).compile()
        found[f"{name}_bytes"] = temporary_bytes(programs[name])
    answers = {name: run(params, tokens, cache) for name, run in programs.items()}
    for name, answer in answers.items():  # the same tokens, as surely
        np.testing.assert_array_equal(answer[0], answers["dense"][0], err_msg=name)
        np.testing.assert_allclose(answer[1], answers["dense"][1], rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(answer[2], answers["dense"][2], rtol=1e-4, err_msg=name)
    for _ in range(options.repeat):
        for name, run in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(params, tokens, cache))
            seconds[name].append(time.perf_counter() - start)
    return found | {name: statistics.median(own) for name, own in seconds.items()}


def markdown(report: dict) -> str:
    """The results as a table."""
    lines = [
        f"{report['cores']} CPU cores, float32, jax {report['jax']}, {report['date']}, commit "
        f"{report['commit']}, load {report['load'][0]:.1f}; medians, the sides in turn.",
        "",
        "| batch | dense, ms | dense without margin, ms | streamed, ms | streamed / faster dense "
        "| memory, dense | streamed | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in report["rows"]:
        fastest = min(r["dense"], r["dense_without_margin"])
        least = min(r["dense_bytes"], r["dense_without_margin_bytes"])
        lines.append(
            f"| {r['batch']} | {1e3 * r['dense']:.0f} | {1e3 * r['dense_without_margin']:.0f} | "
            f"{1e3 * r['streamed']:.0f} | {r['streamed'] / fastest:.2f} "
            f"| {least / 2**20:.0f} MiB | {r['streamed_bytes'] / 2**20:.0f} MiB "
            f"| {least / r['streamed_bytes']:.1f}x |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
