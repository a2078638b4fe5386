"""Fast-dLLM v1's dual cache on a LLaDA body of 110M parameters, against eager PyTorch, on the CPU.

    python -m venv /tmp/tv && /tmp/tv/bin/pip install torch numpy safetensors
    nice -n -10 python scripts/bench/llada_cpu.py --out scripts/bench/results/llada-cpu \\
        --torch-python /tmp/tv/bin/python

Two processes, this one and that of llada_torch.py, take turns on the same weights, threads and
prompts, in float32, warm; their tokens and forward passes must be the same. Weights are random, and
scaled so that some confidences pass the threshold. Then where the time goes: each side's passes and
scores, and what the machine's matrix products cost there. Writes <out>.json and <out>.md; about six
minutes on two cores.
"""

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from dllm_jax.bench.report import commit

HERE = Path(__file__).parent
PARTS = ("passes over the canvas", "passes over the block", "vocabulary and choice", "the rest")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Duel:
    """What to run."""

    out: Path
    """Where the results go, without a suffix."""
    torch_python: Path
    """A Python that has torch, numpy and safetensors."""
    folder: Path = Path("runs/llada-cpu")
    """Where the published folder of the model is, or will be written."""
    prompt: int = 128
    new_tokens: int = 256
    block: int = 32
    threshold: float = 0.9
    batch: int = 1
    threads: int = 2
    repeat: int = 3
    """Runs of each side and each way to commit."""
    modes: tuple[str, ...] = ("threshold", "quota")
    """Which of the two ways to commit."""


def main(config: Duel) -> None:
    """Runs everything and writes the files."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: config.threads])  # XLA's threads
    ours = Ours(config)
    theirs = Theirs(config)
    rows = np.random.default_rng(1).integers(0, 16_000, (config.batch, config.prompt)).tolist()
    report: dict[str, Any] = {
        "settings": {k: str(v) for k, v in dataclasses.asdict(config).items()},
        "device": _cpu(),
        "versions": {"python": platform.python_version(), **ours.about(), **theirs.ask("about")},
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "load_before": os.getloadavg(),
    }
    for mode in config.modes:
        report[mode] = duel(ours, theirs, rows, mode, config)
    report["gemm"] = products(ours, theirs, config)
    report["load_after"] = os.getloadavg()
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    table = markdown(report, config)
    config.out.with_suffix(".md").write_text(table)
    print(table)


def duel(ours, theirs, rows, mode: str, config: Duel) -> dict[str, Any]:
    """Both sides in turn; medians of seconds, and of seconds by part."""
    ours.decode(rows, mode, warm=True)
    theirs.decode(rows, mode, warm=True)
    runs: dict[str, list[dict]] = {"ours": [], "theirs": []}
    for _ in range(config.repeat):
        for name, side in (("ours", ours), ("theirs", theirs)):
            runs[name].append(side.decode(rows, mode))
    a, b = runs["ours"][0], runs["theirs"][0]
    wrong = np.asarray(a["tokens"]) != np.asarray(b["tokens"])
    if wrong.any() or a["forwards"] != b["forwards"]:
        raise SystemExit(
            f"{mode}: {wrong.sum()} tokens differ, the first at {np.argwhere(wrong)[:1].tolist()};"
            f" forward passes {a['forwards']} and {b['forwards']}"
        )
    tokens = config.batch * config.new_tokens
    found: dict[str, Any] = {"forwards": a["forwards"], "tokens": tokens}
    for name in runs:
        seconds = [run["seconds"] for run in runs[name]]
        found[name] = {"seconds": seconds, "tokens_per_second": tokens / statistics.median(seconds)}
    found["theirs"]["parts"] = _median([run["parts"] for run in runs["theirs"]])
    found["ours"]["parts"] = ours.parts(
        rows, mode, found["forwards"], statistics.median(found["ours"]["seconds"])
    )
    found["ratio"] = found["ours"]["tokens_per_second"] / found["theirs"]["tokens_per_second"]
    return found


class Ours:
    """dllm_jax in this process."""

    def __init__(self, config: Duel):
        import dllm_jax as dj

        self.config, self.dj = config, dj
        if not config.folder.exists():
            dj.export(config.folder, *_random_model())
        self.model, self.params = dj.load(config.folder)

    def about(self) -> dict[str, Any]:
        import jax

        return {"jax": jax.__version__}

    def recipe(self, mode: str, warm: bool = False):
        make = partial(self.dj.recipes.fast_dllm_dual, block_size=self.config.block)
        if mode == "threshold":  # numbers are traced: another threshold is the same program
            recipe = make(threshold=0.0 if warm else self.config.threshold)
        else:
            recipe = make(steps_per_block=2 if warm else self.config.block)
        return dataclasses.replace(recipe, ending="never")

    def decode(self, rows, mode: str, warm: bool = False) -> dict[str, Any]:
        import jax

        start = time.perf_counter()
        out = self.dj.generate(
            self.model, self.params, rows, recipe=self.recipe(mode, warm),
            max_new_tokens=self.config.new_tokens,
        )  # fmt: skip
        jax.block_until_ready(out)
        seconds = time.perf_counter() - start
        tokens = np.asarray(out.tokens).tolist()
        return {"tokens": tokens, "forwards": int(out.nfe.max()), "seconds": seconds}

    def parts(self, rows, mode: str, forwards: int, total: float) -> dict[str, float]:
        """Seconds by part: those of one pass and one step of each kind, times their number."""
        import jax

        from dllm_jax.decode import denoise, passes
        from dllm_jax.decode.prompt import checked, edge

        config, model = self.config, self.model
        states = self.dj.stream(
            model, self.params, rows, recipe=self.recipe(mode), max_new_tokens=config.new_tokens
        )
        opened, inside = next(states), next(states)
        job = edge(model, checked(rows, model.config), self.recipe(mode), config.new_tokens, None)
        recipe: Any = job.recipe
        served = np.ones(config.batch, bool)

        @partial(jax.jit, static_argnames="wide")
        def passed(params, state, *, wide):
            kind = passes.whole_canvas if wide else passes.around_block
            out = kind(model, params, recipe, state, served)
            return out.hidden, out.state.cache.kv if wide else None

        @partial(jax.jit, static_argnames="wide")
        def stepped(params, state, *, wide):
            out = denoise.step(model, params, recipe, None, state, served, wide=wide)
            return out.tokens, out.stale, out.cache.kv if wide else None

        timed = partial(_timed, self.params)
        wide, narrow = timed(passed, opened, wide=True), timed(passed, inside, wide=False)
        scores = [
            timed(stepped, opened, wide=True) - wide,
            timed(stepped, inside, wide=False) - narrow,
        ]
        blocks = config.new_tokens // config.block
        counts = np.asarray([blocks, forwards - blocks])
        spent = [counts[0] * wide, counts[1] * narrow, float(counts @ scores)]
        return dict(zip(PARTS, [*spent, total - sum(spent)], strict=True))

    def gemm(self, rows: int, inner: int, columns: int, count: int, repeat: int) -> list[float]:
        """As `llada_torch.gemm`: the weights as ours lie, [inner, columns]."""
        import jax
        import jax.numpy as jnp

        keys = jax.random.split(jax.random.key(0), count + 1)
        x = jax.random.normal(keys[0], (rows, inner))
        weights = [jax.random.normal(key, (inner, columns)) for key in keys[1:]]

        @jax.jit
        def products(x, weights):
            carry = jnp.float32(0)
            for weight in weights:  # each product waits for the one before
                carry = ((x + carry) @ weight)[0, 0] * 1e-9
            return carry

        found = []
        for _ in range(repeat + 1):
            start = time.perf_counter()
            jax.block_until_ready(products(x, weights))
            found.append(time.perf_counter() - start)
        return found[1:]


class Theirs:
    """llada_torch.py in a process of its own."""

    def __init__(self, config: Duel):
        self.config = config
        command = [config.torch_python, HERE / "llada_torch.py", config.folder, config.threads]
        self.process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, do: str, **request) -> Any:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def decode(self, rows, mode: str, warm: bool = False) -> dict[str, Any]:
        config = self.config
        how: dict[str, Any] = {"threshold": 0.0 if warm else config.threshold}
        if mode == "quota":
            how = {"steps": 2 if warm else config.block}
        out = self.ask(
            "decode", prompt=rows, new_tokens=config.new_tokens, block=config.block, **how
        )
        parts = [out["parts"][name] for name in ("wide", "narrow", "scores")]
        return {
            "tokens": [row[config.prompt :] for row in out["tokens"]],
            "forwards": sum(out["passes"]),
            "seconds": out["seconds"],
            "parts": dict(zip(PARTS, [*parts, out["seconds"] - sum(parts)], strict=True)),
        }

    def gemm(self, **shape) -> list[float]:
        return self.ask("gemm", **shape)


def products(ours, theirs, config: Duel) -> list[dict[str, Any]]:
    """GFLOP/s of the model's matrix products on both sides, each weight read once a round."""
    block, canvas = (config.batch * n for n in (config.block, config.prompt + config.new_tokens))
    table = []
    for rows in (block, canvas):
        for inner, columns, count in (
            (768, 768, 24),
            (768, 2048, 12),
            (2048, 768, 12),
            (768, 16384, 2),
        ):
            shape = {"rows": rows, "inner": inner, "columns": columns, "count": count, "repeat": 5}
            flops = 2 * rows * inner * columns * count / 1e9
            rates = [flops / statistics.median(side.gemm(**shape)) for side in (ours, theirs)]
            table.append({"rows": rows, "inner": inner, "columns": columns,
                          "ours": rates[0], "theirs": rates[1]})  # fmt: skip
    return table


def _random_model():
    """A LLaDA body with random weights, from a seed, whose answers rounding does not decide."""
    import jax
    import jax.numpy as jnp

    from dllm_jax.nn.transformer import TransformerConfig

    config = TransformerConfig(
        family="llada", vocab_size=16_384, num_layers=12, dim=768, num_heads=12, num_kv_heads=12,
        head_dim=64, ffn_dim=2048, max_length=1024, rope_theta=500_000.0, attention="bidirectional",
        alignment="same_position", mask_id=16_383, eos_ids=(16_382,), pad_id=16_382,
    )  # fmt: skip
    model = config.build()
    params: Any = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    params["embed"] *= 50.0  # unit variance, so that layers do not drown the tokens
    attention = params["layers"]["attention"]
    attention["q"] *= 4.0  # few keys are attended to, not all alike
    params["head"] *= 10.0 / 0.02 / config.dim**0.5
    params["head"] = params["head"].at[config.mask_id].set(0.0)  # no one writes the mask token
    return model, params


def _timed(params, function, state, *, wide: bool) -> float:
    """Median seconds of a compiled function."""
    import jax

    found = []
    for _ in range(4 if wide else 12):
        start = time.perf_counter()
        jax.block_until_ready(function(params, state, wide=wide))
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def _median(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def markdown(report: dict[str, Any], config: Duel) -> str:
    """The results as tables."""
    versions = report["versions"]
    lines = [
        f"{report['device']}, {config.threads} threads, jax {versions['jax']}, torch "
        f"{versions['torch']}, {report['date']}, commit {report['commit']}; load "
        f"{report['load_before'][0]:.1f} before, {report['load_after'][0]:.1f} after. LLaDA body "
        f"of 12 layers of 768, float32, batch {config.batch}, {config.prompt} prompt tokens and "
        f"{config.new_tokens} new ones in blocks of {config.block}; the same tokens on both sides; "
        f"medians of {config.repeat} runs in turn.",
        "",
        "| commit | forward passes | dllm_jax, tokens/s | eager PyTorch, tokens/s | ratio |",
        "|---|---|---|---|---|",
    ]
    names = {"threshold": f"threshold {config.threshold:g}", "quota": "one token a step"}
    for mode in config.modes:
        row = report[mode]
        ours, theirs = (_spread(row, name) for name in ("ours", "theirs"))
        lines.append(
            f"| {names[mode]} | {row['forwards']} | {ours} | {theirs} | {row['ratio']:.2f}x |"
        )
    for mode in config.modes:
        lines += ["", f"| seconds, {names[mode]} | dllm_jax | eager PyTorch |", "|---|---|---|"]
        ours, theirs = (report[mode][name]["parts"] for name in ("ours", "theirs"))
        lines += [f"| {part} | {ours[part]:.2f} | {theirs[part]:.2f} |" for part in PARTS]
    lines += ["", "| product | XLA, GFLOP/s | torch, GFLOP/s |", "|---|---|---|"]
    lines += [
        f"| {r['rows']} x {r['inner']} x {r['columns']} | {r['ours']:.0f} | {r['theirs']:.0f} |"
        for r in report["gemm"]
    ]
    return "\n".join(lines) + "\n"


def _spread(row: dict[str, Any], name: str) -> str:
    """Tokens a second, with the slowest and the fastest run."""
    seconds = row[name]["seconds"]
    low, high = (row["tokens"] / pick(seconds) for pick in (max, min))
    return f"{row[name]['tokens_per_second']:.1f} ({low:.1f} to {high:.1f})"


def _cpu() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    return f"{named[0] if named else platform.processor()}{' (AVX-512)' * ('avx512f' in flags)}"


if __name__ == "__main__":
    main(tyro.cli(Duel, description=__doc__))
