"""Three modes of one set of weights on fifty prompts: equality, cost, speed, and quality.

    python scripts/bench/modes.py --out scripts/bench/results/modes-cpu

Greedy. Every prompt is answered by `ar` and by `self_speculative`, alone and in ragged batches of
eight, side by side in one run, warm; then by block diffusion at several thresholds, whose answers
are scored by the causal mode. Writes <out>.json, <out>.md and <out>.png.
"""

import dataclasses
import json
import os
import platform
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import dllm_jax as dj
from dllm_jax.bench.report import commit
from dllm_jax.nn.head import logits_of
from dllm_jax.nn.transformer import forward

PROMPTS = Path(__file__).with_name("prompts.txt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Modes:
    """What to run."""

    out: Path
    """Where the results go, without a suffix."""
    model: str = "smollm2-135m-instruct"
    adapter: str = "auto"
    max_new_tokens: int = 64
    widths: tuple[int, ...] = (1, 2, 4)
    """Drafts of self-speculation, to be compared."""
    block_size: int = 4
    thresholds: tuple[float, ...] = (0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 0.99)
    batch: int = 8
    dtype: str = "float32"
    parts: tuple[Literal["alone", "batches", "diffusion"], ...] = ("alone", "batches", "diffusion")
    """What to run; parts left out keep what <out>.json has of them."""
    limit: int | None = None
    """Only the first so many prompts."""


def main(config: Modes) -> None:
    """Runs everything and writes the files."""
    model, params = dj.load(config.model, dtype=config.dtype, adapter=config.adapter)
    tokenizer = dj.Tokenizer.load(config.model)
    prompts = PROMPTS.read_text().splitlines()[: config.limit]
    rows = [tokenizer.chat(prompt) for prompt in prompts]
    ask = partial(dj.generate, model, params, max_new_tokens=config.max_new_tokens)
    file = config.out.with_suffix(".json")
    report = json.loads(file.read_text()) if file.exists() else {}
    report |= {
        "settings": {k: str(v) for k, v in dataclasses.asdict(config).items()},
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "date": time.strftime("%Y-%m-%d"),
        "commit": report.get("commit", {}) | dict.fromkeys(config.parts, commit()),
    }
    if "alone" in config.parts:
        report["alone"] = alone(ask, rows, config)
    ar_answers = report["alone"][0]["answers"]
    if "batches" in config.parts:
        report["batches"] = in_batches(ask, rows, ar_answers, config)
    if "diffusion" in config.parts:
        report["diffusion"] = diffusion(ask, model, params, rows, ar_answers, config)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report) + "\n")
    table = markdown(report, config)
    config.out.with_suffix(".md").write_text(table)
    picture(report, config.out.with_suffix(".png"))
    print(table)


def answers(result) -> list[list[int]]:
    """The tokens of each row, without padding."""
    return [
        np.asarray(t)[: int(n)].tolist() for t, n in zip(result.tokens, result.lengths, strict=True)
    ]


def timed(ask, rows, recipe):
    """A result and its seconds."""
    start = time.perf_counter()
    result = jax.block_until_ready(ask(rows, recipe=recipe))
    return result, time.perf_counter() - start


def alone(ask, rows, config: Modes) -> list[dict[str, Any]]:
    """Each prompt alone, `ar` and every width in turn; the first row is that of `ar`."""
    recipes = _recipes(config)
    for bucket in {-(-len(row) // 64) for row in rows}:  # compile first
        row = next(r for r in rows if -(-len(r) // 64) == bucket)
        for recipe in recipes.values():
            timed(ask, [row], recipe)
    found: dict[str, dict[str, Any]] = {
        name: {"mode": name, "answers": [], "nfe": 0, "queries": 0, "seconds": 0.0}
        for name in recipes
    }
    for row in rows:
        for name, recipe in recipes.items():
            result, took = timed(ask, [row], recipe)
            entry = found[name]
            entry["answers"] += answers(result)
            entry["nfe"] += int(result.nfe[0])
            entry["queries"] += int(result.queries[0])
            entry["seconds"] += took
    plain = found["ar"]["answers"]
    for entry in found.values():
        tokens = sum(map(len, entry["answers"]))
        entry["equal"] = sum(a == b for a, b in zip(entry["answers"], plain, strict=True))
        entry["tokens_per_forward"] = tokens / entry["nfe"]
        entry["overhead"] = entry["queries"] / tokens
        entry["tokens_per_second"] = tokens / entry["seconds"]
        if entry["mode"] != "ar":
            del entry["answers"]
    return _against_ar(list(found.values()))


def _recipes(config: Modes) -> dict[str, Any]:
    widths = {f"speculative, width {w}": w for w in config.widths}
    speculative = {n: dj.recipes.self_speculative(width=w) for n, w in widths.items()}
    return {"ar": dj.recipes.ar(), **speculative}


def _against_ar(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for row in table:
        row["speedup"] = row["tokens_per_second"] / table[0]["tokens_per_second"]
    return table


def _batches(rows, size: int):
    """Yields (indices, ragged batch) of one shape; the first rows fill up the last batch."""
    for start in range(0, len(rows), size):
        index = [(start + i) % len(rows) for i in range(size)]
        yield index, dj.pad([rows[i] for i in index], bucket=128)


def in_batches(ask, rows, ar_answers, config: Modes) -> list[dict[str, Any]]:
    """Ragged batches, at several widths, against what `ar` answered to each prompt alone."""
    table: list[dict[str, Any]] = []
    for name, recipe in _recipes(config).items():
        timed(ask, next(_batches(rows, config.batch))[1], recipe)
        equal, nfe, tokens, queries, seconds = set(), 0, 0, 0, 0.0
        for index, batch in _batches(rows, config.batch):
            result, took = timed(ask, batch, recipe)
            seconds += took
            equal |= {i for i, a in zip(index, answers(result), strict=True) if a == ar_answers[i]}
            nfe, tokens = nfe + int(result.nfe.sum()), tokens + int(result.lengths.sum())
            queries += int(result.queries.sum())
        table.append({
            "mode": name,
            "equal": len(equal),
            "tokens_per_forward": tokens / nfe,
            "overhead": queries / tokens,
            "tokens_per_second": tokens / seconds,
        })  # fmt: skip
    return _against_ar(table)


def diffusion(ask, model, params, rows, ar_answers, config: Modes) -> list[dict]:
    """Tokens per forward and the causal mode's log-likelihood of the answer, by threshold."""
    table = [{
        "threshold": None,
        "tokens_per_forward": 1.0,
        "overhead": 1.0,
        "log_likelihood": score(model, params, rows, ar_answers, config),
    }]  # fmt: skip
    for threshold in config.thresholds:
        recipe = dj.recipes.block_diffusion(block_size=config.block_size, threshold=threshold)
        kept, nfe, queries = {}, {}, {}
        for index, batch in _batches(rows, config.batch):
            result = ask(batch, recipe=recipe)
            for place, (i, answer) in enumerate(zip(index, answers(result), strict=True)):
                kept[i], nfe[i] = answer, int(result.nfe[place])
                queries[i] = int(result.queries[place])
        tokens = sum(map(len, kept.values()))
        by_row = [kept[i] for i in range(len(rows))]
        table.append({
            "threshold": threshold,
            "tokens_per_forward": tokens / sum(nfe.values()),
            "overhead": sum(queries.values()) / tokens,
            "log_likelihood": score(model, params, rows, by_row, config),
        })  # fmt: skip
    return table


def score(model, params, rows, kept, config: Modes) -> float:
    """Mean nats of an answer token under the causal mode (0 is certainty)."""

    @jax.jit
    def log_likelihood(params, tokens):
        hidden = forward(model, params, tokens[:, :-1], canvas=False).hidden
        logits = jax.nn.log_softmax(logits_of(model, params, hidden))
        return jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]

    total = count = 0
    width = -(-max(len(r) + len(a) for r, a in zip(rows, kept, strict=True)) // 64) * 64
    for start in range(0, len(rows), config.batch):
        index = [(start + i) % len(rows) for i in range(config.batch)]
        batch = dj.pad([rows[i] + kept[i] for i in index], bucket=width)
        nats = np.asarray(log_likelihood(params, batch.tokens))
        for place, i in enumerate(index[: len(rows) - start]):
            answer = slice(len(rows[i]) - 1, len(rows[i]) + len(kept[i]) - 1)
            total, count = total + nats[place, answer].sum(), count + len(kept[i])
    return float(total / count)


def markdown(report: dict[str, Any], config: Modes) -> str:
    """The results as tables."""
    count = len(report["alone"][0]["answers"])
    lines = [
        f"{report['device']}, {report['cores']} cores, jax {report['versions']['jax']}, "
        f"{report['date']}, commit {', '.join(f'{c} ({p})' for p, c in report['commit'].items())}; "
        f"{count} prompts, up to {config.max_new_tokens} tokens, greedy, {config.dtype}.",
    ]
    for title, part in (("alone", "alone"), (f"ragged batches of {config.batch}", "batches")):
        lines += [
            "",
            f"| {title} | answers equal to `ar` alone | tokens per forward | overhead | tokens/s "
            "| against `ar` |",
            "|---|---|---|---|---|---|",
        ]
        for r in report[part]:
            lines.append(
                f"| {r['mode']} | {r['equal']} of {count} | {r['tokens_per_forward']:.2f} "
                f"| {r['overhead']:.1f} | {r['tokens_per_second']:.1f} | {r['speedup']:.2f}x |"
            )
    lines += [
        "",
        f"| diffusion, block {config.block_size}, threshold | tokens per forward | overhead "
        "| nats per answer token under `ar` |",
        "|---|---|---|---|",
    ]
    for r in report["diffusion"]:
        name = "(`ar` itself)" if r["threshold"] is None else f"{r['threshold']:g}"
        lines.append(
            f"| {name} | {r['tokens_per_forward']:.2f} | {r['overhead']:.1f} "
            f"| {r['log_likelihood']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def picture(report: dict, path: Path) -> None:
    """Tokens per forward against log-likelihood."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4))
    rows = report["diffusion"][1:]
    x = [row["tokens_per_forward"] for row in rows]
    axis.plot(
        x, [row["log_likelihood"] for row in rows], marker="o", label="diffusion, by threshold"
    )
    for row in rows:
        axis.annotate(
            f"{row['threshold']:g}", (row["tokens_per_forward"], row["log_likelihood"]),
            textcoords="offset points", xytext=(5, 5), fontsize=8,
        )  # fmt: skip
    ar = report["diffusion"][0]
    axis.plot(ar["tokens_per_forward"], ar["log_likelihood"], "s", label="ar")
    fast = max(row["tokens_per_forward"] for row in report["alone"])
    axis.plot(fast, ar["log_likelihood"], "^", label="self_speculative")
    axis.set_xlabel("tokens per forward")
    axis.set_ylabel("nats per answer token under the causal mode")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Modes, description=__doc__))
