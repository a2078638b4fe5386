"""Peak memory of decoding against context and against block, by the TPU compiler.

    python scripts/bench/decode_memory.py --out scripts/bench/results/decode-memory

Compiles one denoising step (its cache, its state, every layer, the statistics of the vocabulary)
of models of 8B parameters for one chip that need not be there, and asks the compiler for the peak.
Needs the extra `aot`, and `plot` for the picture; writes <out>.json, <out>.md and <out>.png as it
goes, and keeps what is there already: remove them to begin anew.
"""

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import tyro

from dllm_jax.bench.report import commit
from dllm_jax.plan import plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to compile."""

    out: Path
    """Where the results go, without a suffix."""
    models: tuple[str, ...] = ("sdar-8b", "llada-8b")
    """Eight key/value heads, and as many as there are query heads."""
    topology: str = "v5p:1x1x1"
    batch: int = 1
    block: int = 32
    """Where the context varies."""
    context: int = 10_240
    """Where the block varies."""
    contexts: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072)
    blocks: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def main(options: Options) -> None:
    """Compiles everything, writes the files."""
    before = options.out.with_suffix(".json")
    rows = json.loads(before.read_text())["rows"] if before.exists() else []
    done = {(r["model"], r["context"], r["block"]) for r in rows}
    shapes = [(options.context, block) for block in options.blocks]
    shapes += [(context, options.block) for context in options.contexts]
    for model in options.models:
        for context, block in shapes:
            if (model, context, block) not in done:
                rows.append(row(options, model, context, block))
                print(json.dumps(rows[-1]), flush=True)
                write(rows, options)


def row(options: Options, model: str, context: int, block: int) -> dict[str, Any]:
    """The peak of a step, and what it is made of."""
    found = plan(model, options.topology, batch=options.batch, context=context, block=block)
    own: dict[str, Any] = {"model": model, "context": context, "block": block}
    if found.compiled is None:
        return {**own, "reason": found.reason}
    compiled = found.compiled
    return {
        **own,
        "peak": compiled.peak,
        "weights": compiled.arguments["params"],
        "state": compiled.arguments["state"],
        "closed_form": found.estimate,
        "seconds": round(compiled.seconds, 1),
    }


def rest(r: dict[str, Any]) -> int:
    """Bytes beyond weights, cache and state."""
    return r["peak"] - r["weights"] - r["state"]


def write(rows: list[dict[str, Any]], options: Options) -> None:
    """<out>.json, <out>.md and, where matplotlib is there, <out>.png."""
    report = {
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "topology": options.topology,
        "batch": options.batch,
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(markdown(report, options))
    plot(report, options)


def markdown(report: dict[str, Any], options: Options) -> str:
    """The results as two tables a model."""
    lines = [
        f"Peak memory of one denoising step on one {report['topology'].split(':')[0]} in bfloat16,"
        f" batch {report['batch']}, by the TPU compiler (jax {report['jax']}, {report['date']},"
        f" commit {report['commit']}); nothing was run. Bytes in GB. Rest: beyond weights, cache"
        " and the state of the decoder; its share is of the peak. Closed form:"
        " `dllm_jax.roofline`. Behind a cache of finished blocks the pass that is compiled holds"
        " two blocks, the one that is denoised and the finished one that it caches. Of LLaDA it is"
        " the pass over a block; the one over the whole canvas that opens a block is a prefill."
    ]
    for model in options.models:
        for title, kept in parts(report["rows"], model, options):
            lines += ["", f"**{model}**, {title}", "",
                      "| context | block | weights | cache, state | rest | peak | rest's share |"
                      " closed form / peak |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
            lines += [line(r) for r in kept]
    return "\n".join(lines) + "\n"


def parts(rows: list[dict[str, Any]], model: str, options: Options):
    """The rows of a model, against context and against block."""
    own = sorted((r for r in rows if r["model"] == model), key=lambda r: (r["context"], r["block"]))
    against = [r for r in own if r["block"] == options.block and r["context"] in options.contexts]
    yield f"block {options.block}", against
    yield f"context {options.context:,}", [r for r in own if r["context"] == options.context]


def line(r: dict[str, Any]) -> str:
    """A row of a table."""
    head = f"| {r['context']:,} | {r['block']} |"
    if "reason" in r:
        return f"{head} | | | | | {r['reason'][:200]} |"
    sizes = " | ".join(f"{n / 1e9:.3f}" for n in (r["weights"], r["state"], rest(r), r["peak"]))
    ratio = r["closed_form"] / r["peak"]
    return f"{head} {sizes} | {rest(r) / r['peak']:.2%} | {ratio:.3f} |"


def plot(report: dict[str, Any], options: Options) -> None:
    """What the peak is made of, against context and against block."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(options.models), 2, figsize=(10, 3.4 * len(options.models)), squeeze=False
    )
    for model, own in zip(options.models, axes, strict=True):
        for axis, (title, kept) in zip(own, parts(report["rows"], model, options), strict=True):
            kept = [r for r in kept if "peak" in r]
            if len(kept) < 2:
                continue
            name = "context" if title.startswith("block") else "block"
            stacked = [[r["weights"] / 1e9 for r in kept], [r["state"] / 1e9 for r in kept],
                       [rest(r) / 1e9 for r in kept]]  # fmt: skip
            labels = ("weights", "cache, state", "all else")
            axis.stackplot([r[name] for r in kept], stacked, labels=labels)
            axis.set_xscale("log", base=2)
            axis.set_xlabel(f"{name} (tokens)")
            axis.set_title(f"{model}, {title}", fontsize=10)
            axis.set_ylim(0)
        own[0].set_ylabel("GB on one chip")
    axes[0][0].legend(loc="upper left", fontsize=8)
    figure.tight_layout()
    figure.savefig(options.out.with_suffix(".png"), dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main(tyro.cli(Options, description=__doc__))
