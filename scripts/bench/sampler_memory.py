"""What sampling holds in memory, with and without the scores of all tokens, by the TPU compiler.

    python scripts/bench/sampler_memory.py --out scripts/bench/results/sampler-memory

Compiles one decode step's sampler (hidden states of every row's block in; token, confidence,
entropy and margin out) for a TPU that need not be there, dense and streamed, and the whole step of
an 8B LLaDA around it. Needs the extra `aot`; writes <out>.json and <out>.md. A few minutes.
"""

import dataclasses
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro

from dllm_jax.bench.report import commit
from dllm_jax.testing.aot import compile_for, temporary_bytes
from pallas_kernels import BlockMask, token_stats

DIM = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to compile."""

    out: Path
    """Where the results go, without a suffix."""
    chip: str = "v5p"
    """A key of `dllm_jax.testing.aot.CHIPS`."""
    blocks: tuple[int, ...] = (32, 256)
    vocabularies: tuple[int, ...] = (126_464, 262_144)
    batches: tuple[int, ...] = (1, 16)
    context: int = 256
    """Cached tokens a row in the whole step."""


def main(options: Options) -> None:
    """Compiles everything, writes the files."""
    rows = []
    for vocab in options.vocabularies:
        for block in options.blocks:
            for batch in options.batches:
                rows.append(measure(options, vocab, block, batch))
                print(json.dumps(rows[-1]), flush=True)
    report = {
        "chip": options.chip,
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(markdown(report, options))


def measure(options: Options, vocab: int, block: int, batch: int) -> dict:
    """Temporary bytes of the sampler and of the step around it, dense and streamed."""
    found = {"vocabulary": vocab, "block": block, "batch": batch}
    hidden = jax.ShapeDtypeStruct((batch * block, DIM), jnp.bfloat16)
    vectors = jax.ShapeDtypeStruct((vocab, DIM), jnp.bfloat16)
    for name, sampler in (("dense", dense), ("streamed", streamed)):
        alone = compile_for(options.chip, sampler, hidden, vectors)
        found[f"sampler_{name}"] = temporary_bytes(alone)
        whole = compile_for(options.chip, *step(options, vocab, block, batch, sampler))
        found[f"step_{name}"] = temporary_bytes(whole)
    return found


def dense(hidden, vectors):
    """The scores of all tokens, and what a decoder wants of them."""
    scores = jnp.einsum("rd,vd->rv", hidden, vectors, preferred_element_type=jnp.float32)
    probs = jax.nn.softmax(scores)
    entropy = -(probs * jnp.log(jnp.maximum(probs, 1e-38))).sum(axis=1)
    best, ids = jax.lax.top_k(probs, 2)
    return ids[:, 0], best[:, 0], entropy, best[:, 0] - best[:, 1]


def streamed(hidden, vectors):
    """The same by `token_stats`."""
    found = token_stats(hidden, vectors, top=2)
    best = jnp.exp(found.scores - found.log_z[:, None])
    return found.ids[:, 0], best[:, 0], found.entropy, best[:, 0] - best[:, 1]


def step(options: Options, vocab: int, block: int, batch: int, sampler):
    """A denoising step of an 8B LLaDA behind a cache, and its arguments."""
    from dllm_jax.nn.transformer import TransformerConfig, forward
    from dllm_jax.nn.tree import param_shapes

    config = TransformerConfig(
        family="llada", vocab_size=vocab, num_layers=32, dim=DIM, num_heads=32, num_kv_heads=32,
        head_dim=128, ffn_dim=12_288, rope_theta=500_000.0, attention="bidirectional",
        alignment="same_position", mask_id=vocab - 1, dtype="bfloat16", param_dtype="bfloat16",
    )  # fmt: skip
    model = config.build()
    cache = jax.eval_shape(lambda: model.cache(batch, options.context + block))

    def run(params, tokens, cache):
        hidden = forward(
            model, params, tokens, mask=BlockMask.bidirectional(block), cache=cache,
            cache_end=cache.lengths,
        ).hidden  # fmt: skip
        return sampler(hidden.reshape(-1, DIM), params["head"])

    tokens = jax.ShapeDtypeStruct((batch, block), jnp.int32)
    return run, param_shapes(config), tokens, cache


def markdown(report: dict, options: Options) -> str:
    """The results as a table."""
    mib = lambda x: f"{x / 2**20:,.2f}"  # noqa: E731
    lines = [
        f"Temporary memory in MiB, by the compiler for {report['chip']}, jax {report['jax']}, "
        f"{report['date']}, commit {report['commit']}. The sampler alone (hidden size {DIM}, "
        f"bfloat16), and the whole step of an 8B LLaDA behind a cache of {options.context} tokens.",
        "",
        "| vocabulary | block | batch | sampler, dense | streamed | ratio | step, dense "
        "| streamed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in report["rows"]:
        ratio = r["sampler_dense"] / max(r["sampler_streamed"], 1)
        lines.append(
            f"| {r['vocabulary']:,} | {r['block']} | {r['batch']} | {mib(r['sampler_dense'])} | "
            f"{mib(r['sampler_streamed'])} | {ratio:,.0f}x | {mib(r['step_dense'])} | "
            f"{mib(r['step_streamed'])} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
