"""The bytes that a denoising pass moves on a TPU, over the least that must move, by the compiler.

    python scripts/bench/decode_bytes.py --out scripts/bench/results/decode-bytes

Compiles the loop of a decoder over denoising passes (every layer with attention over the cache, and
the statistics of the vocabulary) of real models for TPUs that need not be there, and counts what
the scheduled program moves through HBM (`dllm_jax.bench.traffic`): in each pass, and once before
them (weights that are laid out anew). Where a chip does not hold the model, fewer layers are
compiled and the loop over them is counted as deep as the model is. The least: each weight once, the
valid slots of the cache once, the embeddings of the block; of experts all, as if each were chosen.
Needs the extra `aot`; writes <out>.json and <out>.md as it goes, and keeps what is there already:
remove them to begin anew. Half a minute a program on two cores.
"""

import dataclasses
import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from dllm_jax.bench.report import commit
from dllm_jax.bench.traffic import Moved, traffic
from dllm_jax.cache import KVCache
from dllm_jax.nn.gemma import GemmaConfig
from dllm_jax.nn.head import stats_of
from dllm_jax.nn.transformer import TransformerConfig, forward
from dllm_jax.nn.tree import param_shapes
from dllm_jax.plan import NAMED
from dllm_jax.testing.aot import compile_for
from pallas_kernels import BlockMask, TokenStats

BLOCK, PASSES = 32, 16


def named(name: str, **changes: Any) -> TransformerConfig | GemmaConfig:
    """A published architecture in bfloat16."""
    own = dict(dtype="bfloat16", param_dtype="bfloat16")
    return dataclasses.replace(NAMED[name].config, **own, **changes)


MODELS: dict[str, TransformerConfig | GemmaConfig] = {
    "LLaDA-8B": named("llada-8b"),
    "Fast-dLLM v2 7B": named("fast-dllm-v2-7b"),
    "LLaDA2-mini": named("llada2-mini-16b"),
    "DiffusionGemma": named("diffusion-gemma-26b", layer_types=("sliding",) * 5 + ("full",)),
    "SmolLM2-135M": named("smollm2-135m", adapter=None),
}
# Layers in the loop over them: of a Gemma periods, of six layers each; and not those before it.
DEPTHS = {"LLaDA-8B": 32, "Fast-dLLM v2 7B": 28, "LLaDA2-mini": 19, "DiffusionGemma": 5,
          "SmolLM2-135M": 30}  # fmt: skip


HBM = {"v5e": 15, "v6e": 31, "v5p": 94, "tpu7x": 94}  # GiB that a program may use, about


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to compile."""

    out: Path
    """Where the results go, without a suffix."""
    chips: tuple[str, ...] = ("v5e", "v6e", "v5p", "tpu7x")
    models: tuple[str, ...] = tuple(MODELS)
    shapes: tuple[tuple[int, int], ...] = ((1, 4096), (16, 32_768), (16, 4096), (1, 32_768))
    """Batch, and cached tokens a row."""


def main(options: Options) -> None:
    """Compiles everything, writes the files."""
    before = options.out.with_suffix(".json")
    rows = json.loads(before.read_text())["rows"] if before.exists() else []
    done = {tuple(r[name] for name in ("batch", "context", "chip", "model")) for r in rows}
    for batch, context in options.shapes:
        for chip in options.chips:
            for model in options.models:
                if (batch, context, chip, model) in done:
                    continue
                rows.append(row(chip, model, batch, context))
                print(json.dumps({k: v for k, v in rows[-1].items() if k != "most"}), flush=True)
                write(rows, options.out)


def row(chip: str, model: str, batch: int, context: int) -> dict[str, Any]:
    """What a step moves, or why it is not known."""
    own = {"chip": chip, "model": model, "batch": batch, "context": context}
    for depth in dict.fromkeys(min(depth, DEPTHS[model]) for depth in (32, 8, 4, 2)):
        if arguments_bytes(deep(model, depth), batch, context) > HBM[chip] << 30:
            continue
        try:
            found, least = measure(chip, model, batch, context, depth)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            continue
        each, once = a_pass(found)
        most = [{"bytes": m.total, "times": m.times, "text": brief(m.text)} for m in found[:12]]
        sizes = {"compiled_layers": depth, "bytes": each, "once": once, "least": least}
        return {**own, **sizes, "ratio": each / least, "most": most}
    return {
        **own,
        "reason": "not compiled: two layers (DiffusionGemma: twelve) and their cache do not fit",
    }


def a_pass(found: list[Moved]) -> tuple[int, int]:
    """Bytes of one pass, and of what is done once for all of them."""
    once = sum(moved.total for moved in found if moved.times < PASSES)
    return (sum(moved.total for moved in found) - once) // PASSES, once


def measure(
    chip: str, model: str, batch: int, context: int, layers: int
) -> tuple[list[Moved], int]:
    """Instructions by what they move in all passes of the model, and the least of one in bytes."""
    shallow, whole = deep(model, layers), deep(model, DEPTHS[model])
    name = "Gemma" if isinstance(whole, GemmaConfig) else "Transformer"
    run, *arguments = step(shallow, batch, context)
    # Grouped products are not for explicit shardings, in which programs are compiled here.
    run = jax.sharding.auto_axes(run, out_sharding=jax.sharding.PartitionSpec())
    text = compile_for(chip, run, *arguments).as_text()
    found = traffic(text or "", {f"{name}/while": DEPTHS[model]}, {"ragged-dot": experts(whole)})
    return found, least_bytes(whole, batch, context)


def arguments_bytes(config: TransformerConfig | GemmaConfig, batch: int, context: int) -> int:
    """Of the weights and the cache."""
    cache = jax.eval_shape(lambda: config.build().cache(batch, context).kv)
    return _size(param_shapes(config)) + _size(cache)


def _size(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def experts(config: TransformerConfig | GemmaConfig) -> int:
    """Of a layer: what a grouped product reads at most, each once."""
    if isinstance(config, GemmaConfig):
        return config.num_experts
    return config.moe.num_experts if config.moe else 0


def deep(model: str, depth: int) -> TransformerConfig | GemmaConfig:
    """A model with so many layers, or periods of layers, in its loop."""
    config = MODELS[model]
    if isinstance(config, GemmaConfig):
        return dataclasses.replace(config, layer_types=config.layer_types * depth)
    before = config.moe.first_dense if config.moe else 0
    return dataclasses.replace(config, num_layers=before + depth)


def step(config: TransformerConfig | GemmaConfig, batch: int, context: int):
    """Denoising passes behind a cache, each of what the one before chose; and their arguments."""
    model = config.build()
    kv = jax.eval_shape(lambda: model.cache(batch, context).kv)
    tokens, lengths = (
        jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((batch, BLOCK), (batch,))
    )

    def run(params, tokens, kv, lengths):
        mask, cache = BlockMask.block_diagonal(BLOCK), KVCache(kv, lengths)

        def once(found):
            hidden = forward(model, params, found.ids[..., 0], mask=mask, cache=cache).hidden
            return stats_of(model, params, hidden, top=2)

        scores = jnp.zeros((*tokens.shape, 2))
        first = TokenStats(scores[..., 0], scores[..., 0], tokens[..., None].repeat(2, 2), scores)
        return jax.lax.fori_loop(0, PASSES, lambda _, found: once(found), first)

    return run, param_shapes(config), tokens, kv, lengths


def least_bytes(config: TransformerConfig | GemmaConfig, batch: int, context: int) -> int:
    """Weights once, all valid slots once (of a window, those in it), the block's embeddings."""
    params = dict(param_shapes(config))
    embed = params["embed"]
    tied = isinstance(config, GemmaConfig) or config.tied_head
    if isinstance(config, GemmaConfig):
        del params["conditioning"]  # of a canvas that has been denoised before
    cache = jax.eval_shape(lambda: config.build().cache(batch, context).kv)
    if isinstance(config, GemmaConfig):
        inside = min(context, config.window - 1)
        sliding, full = _size(cache[0]) * inside // context, _size(cache[1])
        read = sliding + full
    else:
        read = _size(cache)
    rows = batch * BLOCK * embed.shape[1] * embed.dtype.itemsize
    return _size(params) - (0 if tied else _size(embed)) + rows + read


def brief(text: str) -> str:
    """An instruction without what only a compiler reads."""
    text = re.sub(r", (metadata|backend_config|frontend_attributes|sharding|operand_layout).*", "",
                  text)  # fmt: skip
    return re.sub(r"\{[\d,]*:T[^}]*?(S\(\d\))?\}", lambda m: m[1] or "", text)[:300]


def write(rows: list[dict[str, Any]], out: Path) -> None:
    """<out>.json and <out>.md."""
    report = {
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "block": BLOCK,
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    out.with_suffix(".md").write_text(markdown(report))


def markdown(report: dict[str, Any]) -> str:
    """The results as a table."""
    lines = [
        f"GB of HBM traffic of one denoising pass of a block of {report['block']} in bfloat16, by "
        f"the TPU compiler's own program (jax {report['jax']}, {report['date']}, commit "
        f"{report['commit']}); nothing was run. Least: every weight once (all experts), the valid "
        "slots once, the block's embeddings. Once: what is moved before the first of "
        f"{PASSES} passes, for all of them: weights that are laid out anew, caches that fit vector "
        "memory (of the layers that were compiled). Whether a chip holds the whole model is not "
        "asked.",
        "",
        "| model | batch | context | chip | layers compiled | least | a pass | ratio | once |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    key = lambda r: (r["model"], r["batch"], r["context"])  # noqa: E731
    for r in sorted(report["rows"], key=key):
        head = f"| {r['model']} | {r['batch']} | {r['context']:,} | {r['chip']} |"
        if "reason" in r:
            lines.append(f"{head} | | | | {r['reason']} |")
        else:
            sizes = f"{r['least'] / 1e9:.2f} | {r['bytes'] / 1e9:.2f} | {r['ratio']:.3f}"
            lines.append(f"{head} {depth_of(r)} | {sizes} | {r['once'] / 1e9:.2f} |")
    return "\n".join(lines) + "\n"


def depth_of(r: dict[str, Any]) -> str:
    """Of how many layers in the loop how many were compiled."""
    each = 6 if r["model"] == "DiffusionGemma" else 1
    return f"{each * r['compiled_layers']} of {each * DEPTHS[r['model']]}"


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main(tyro.cli(Options, description=__doc__))
