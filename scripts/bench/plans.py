"""Plans of real runs on real topologies, compiled without them: `dllm-jax plan` in a row.

    python scripts/bench/plans.py --out scripts/bench/results/plans

Needs the extra `aot`; writes <out>.json and <out>.md as it goes, and keeps what is there already:
remove them to begin anew. From seconds to minutes a plan.
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

RUNS: dict[str, dict[str, Any]] = {
    "LLaDA-8B, v5e-8": dict(model="llada-8b", topology="v5e:2x4", batch=16, context=4096),
    "LLaDA-8B, v6e-8": dict(model="llada-8b", topology="v6e:2x4", batch=64, context=4096),
    "Fast-dLLM v2 7B at 100K, v6e-8": dict(
        model="fast-dllm-v2-7b", topology="v6e:2x4", batch=16, context=102_400
    ),
    # A v5p-8 is eight cores, two of which are a device.
    "LLaDA2-mini 16B, v5p-8": dict(
        model="llada2-mini-16b", topology="v5p:2x2x1", batch=32, context=32_768
    ),
    "LLaDA2-flash 100B, v6e-64": dict(
        model="llada2-flash-100b", topology="v6e:8x8", batch=64, context=32_768
    ),
    "SmolLM2-135M, tri-mode, v5e-1": dict(
        model="smollm2-135m", topology="v5e:1x1", mode="train", batch=32, context=512, block=8
    ),
    "LLaDA2-flash 100B, v5p-512": dict(
        model="llada2-flash-100b",
        topology="v5p:4x8x8",
        mode="train",
        batch=256,
        context=4096,
        mesh=dict(fsdp=16, expert=16),
    ),
    "LLaDA2-flash 100B, v5e-256": dict(
        model="llada2-flash-100b",
        topology="v5e:16x16",
        mode="train",
        batch=256,
        context=4096,
        mesh=dict(fsdp=16, expert=4, tensor=4),
        accumulate=4,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to plan."""

    out: Path
    """Where the results go, without a suffix."""
    runs: tuple[str, ...] = tuple(RUNS)
    effort: str = "low"


def main(options: Options) -> None:
    """Compiles everything, writes the files."""
    before = options.out.with_suffix(".json")
    plans = json.loads(before.read_text())["plans"] if before.exists() else {}
    plans = {name: refreshed(name, own) for name, own in plans.items()}
    write(plans, options)
    for name in options.runs:
        if name in plans:
            continue
        plans[name] = plan(**RUNS[name], effort=options.effort).to_dict()
        plans = {own: plans[own] for own in RUNS if own in plans}
        print(json.dumps({name: plans[name]}), flush=True)
        write(plans, options)


def refreshed(name: str, own: dict[str, Any]) -> dict[str, Any]:
    """A plan that was compiled before, with the closed forms of today."""
    asked: dict[str, Any] = {**RUNS[name], "mesh": own["mesh"] or None}
    new = plan(**asked, compiling=False).to_dict()
    closed = ("memory", "estimate", "work", "time", "bound", "tokens_per_second")
    return {**own, **{part: new[part] for part in closed}}


def write(plans: dict[str, Any], options: Options) -> None:
    """<out>.json and <out>.md."""
    report = {
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "effort": options.effort,
        "plans": plans,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(markdown(report))


def markdown(report: dict[str, Any]) -> str:
    """The plans as a table, and their collectives."""
    lines = [
        "Plans, compiled for topologies that were not there by the TPU compiler (jax"
        f" {report['jax']}, {report['effort']} effort, {report['date']}, commit"
        f" {report['commit']}); nothing was run. Memory is of one device, in GB. Decoding: one"
        " denoising step on its state and cache, in bfloat16. Training: one step on the dual"
        " stream, every position noisy once, each layer computed again; parameters, gradients and"
        " the moments of AdamW in float32, products in bfloat16; of SmolLM2 the adapter alone is"
        " trained. Tokens/s: all rows together, at the chips' peaks, which no run reaches, and for"
        " decoding at the tokens a row writes in a pass that are reported for the model, or 1.",
        "",
        "| run | mesh | rows x positions | peak | closed form | ratio | of it held | may use |"
        " fits | collectives: times, MB sent | bound by | ms | tokens/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [line(name, own) for name, own in report["plans"].items()]
    refused = {n: own["reason"] for n, own in report["plans"].items() if own["reason"]}
    lines += ["", *(f"* {name}: {reason[:600]}" for name, reason in refused.items())]
    return "\n".join(lines).rstrip() + "\n"


def line(name: str, own: dict[str, Any]) -> str:
    """A row of the table."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in own["mesh"].items()) or "one device"
    head = f"| {name}, {own['mode']} | {mesh} | {own['batch']} x {own['context']:,} |"
    compiled, closed = own["compiled"], f"{own['estimate'] / 1e9:.2f}"
    sizes = f" - | {closed} | - | - |"
    talk = "-"
    if compiled:
        held = sum(compiled["arguments"].values())
        ratio = own["estimate"] / compiled["peak"]
        sizes = f" {compiled['peak'] / 1e9:.2f} | {closed} | {ratio:.3f} | {held / 1e9:.2f} |"
        talk = "; ".join(
            f"{x['kind']} {x['count']:,}, {x['bytes'] / 1e6:,.1f}" for x in compiled["exchanges"]
        )
    fits = "yes" if own["fits"] else "no"
    seconds = max(own["time"].values())
    return (
        f"{head}{sizes} {own['limit'] / 1e9:.1f} | {fits} | {talk or 'none'} | {own['bound']} |"
        f" {1e3 * seconds:,.1f} | {own['tokens_per_second']:,.0f} |"
    )


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main(tyro.cli(Options, description=__doc__))
