"""Training steps of configs/sudoku.py and configs/text.py, against eager PyTorch, on the CPU.

    python -m venv /tmp/tv && /tmp/tv/bin/pip install torch numpy safetensors
    export GLIBC_TUNABLES=glibc.malloc.hugetlb=1
    python scripts/bench/training_cpu.py --out scripts/bench/results/training-cpu \\
        --torch-python /tmp/tv/bin/python

Two processes, this one and that of training_torch.py, take turns on the same model, weights, batch,
objective, optimiser and threads, warm, a few steps a turn: masked diffusion of 81 tokens, weights
flat on the masks, and an autoregressive model of 256. As the recipes are (64 wide, Muon), and three
times as wide with three times the rows; by their Muon, and by AdamW. In float32; and with products
of bfloat16, in JAX `jax_default_matmul_precision`, in PyTorch `torch.autocast`. First the losses of
both must agree on the same weights and noise. Tokens are random: nothing here depends on them. Then
the model FLOPs of a step against the machine's rate of float32 products, measured before and after.
Writes <out>.json and <out>.md; about ten minutes on two cores. Before it, for both sides,
GLIBC_TUNABLES as above: memory in huge pages, which the report names.
"""

import dataclasses
import itertools
import json
import os
import runpy
import statistics
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from safetensors.numpy import save_file

from dllm_jax import pretraining, training
from dllm_jax.bench.ceilings import rate
from dllm_jax.bench.report import provenance
from dllm_jax.training.throughput import step_flops

HERE = Path(__file__).parent
NAMES = {"sudoku": "masked diffusion", "text": "autoregressive"}
BATCHES, FIRST_ID, WORDS = 4, 3, 10  # random tokens: so many ids behind the special ones


@dataclasses.dataclass(frozen=True, kw_only=True)
class Duel:
    """What to run."""

    out: Path
    """Where the results go, without a suffix."""
    torch_python: Path
    """A Python that has torch, numpy and safetensors."""
    configs: tuple[str, ...] = tuple(NAMES)
    """Which of the two."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Of products."""
    scales: tuple[int, ...] = (1, 3)
    """How many times as wide as the recipe, and how many times its rows a step."""
    optimisers: tuple[Literal["muon", "adamw"], ...] = ("muon", "adamw")
    """The recipes' own is Muon."""
    threads: int = 2
    turns: int = 8
    """Of each side, at least."""
    steps: int = 3
    """Of a turn."""
    seconds: float = 15.0
    """Turns go on for so long: short steps need many, where other programs come and go."""


def main(config: Duel) -> None:
    """Runs everything and writes the files."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: config.threads])  # XLA's threads
    report: dict[str, Any] = {
        "settings": {k: str(v) for k, v in dataclasses.asdict(config).items()},
        **provenance(),
        "threads": config.threads,
        "malloc": os.environ.get("GLIBC_TUNABLES", ""),
        "load_before": os.getloadavg(),
        "rows": [
            duel(Case(*case), config)
            for case in itertools.product(
                config.configs, config.scales, config.optimisers, config.dtypes
            )
        ],
        "load_after": os.getloadavg(),
    }
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    table = markdown(report)
    config.out.with_suffix(".md").write_text(table)
    print(table)


class Case(NamedTuple):
    """What both sides train."""

    config: str
    scale: int
    optimiser: str
    dtype: str

    def train(self) -> pretraining.Train:
        """As `dllm-jax train` has it."""
        train = runpy.run_path(str(HERE.parents[1] / "configs" / f"{self.config}.py"))["config"]
        model, fit, scale = train.model, train.fit, self.scale
        wide = {
            name: getattr(model, name) * scale
            for name in ("dim", "ffn_dim", "num_heads", "num_kv_heads")
        }
        return dataclasses.replace(
            train,
            model=dataclasses.replace(model, **wide),
            fit=dataclasses.replace(fit, batch=fit.batch * scale),
            optimiser=dataclasses.replace(train.optimiser, kind=self.optimiser),
        )


def duel(case: Case, config: Duel) -> dict[str, Any]:
    """Both sides in turn."""
    dtype = case.dtype
    jax.config.update("jax_default_matmul_precision", None if dtype == "float32" else dtype)
    ours = Ours(case.train())
    with tempfile.TemporaryDirectory() as folder:
        ours.write(Path(folder))
        with Theirs(config, Path(folder), dtype) as theirs:
            losses = ours.loss(), theirs.ask("loss")
            if abs(losses[0] - losses[1]) > {"float32": 1e-4, "bfloat16": 1e-2}[dtype]:
                raise SystemExit(f"{case}: the losses of the same weights differ: {losses}")
            sides = {"ours": ours.steps, "theirs": partial(theirs.ask, "steps")}
            for side in sides.values():
                side(count=2)  # compiles, and warms the optimisers
            seconds: dict[str, list[float]] = {side: [] for side in sides}
            rates = [rate("float32")]
            turns, began = 0, time.monotonic()
            while turns < config.turns or time.monotonic() - began < config.seconds:
                turns += 1
                for side, steps in sides.items():
                    seconds[side] += steps(count=config.steps)["seconds"]
            rates.append(rate("float32"))
            about = theirs.ask("about")
    found: dict[str, Any] = {
        **case._asdict(), "losses": losses, **about, "tokens": ours.size, "shape": ours.shape,
        "parameters": sum(x.size for x in jax.tree.leaves(ours.params)),
    }  # fmt: skip
    for side, spent in seconds.items():
        found[side] = {
            "seconds": spent, "median": statistics.median(spent), "least": min(spent)
        }  # fmt: skip
    for figure in ("median", "least"):
        found[f"ratio_{figure}"] = found["theirs"][figure] / found["ours"][figure]
    found["flops"], found["rates"] = ours.flops, rates
    # Of a machine that others use, the best of each is what says most.
    for side in sides:
        found[side]["mfu"] = ours.flops / found[side]["least"] / max(rates)
    return found


class Ours:
    """dllm_jax in this process: what `dllm-jax train` runs on a config, from its first weights."""

    def __init__(self, train: pretraining.Train):
        config = pretraining.trained_as(train, train.model)
        self.train, self.model = train, config.build()
        self.objective = cast(Any, train.objective)
        self.params: Any = self.model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))[
            "params"
        ]
        tx = train.optimiser.build(train.fit.steps, config)
        self.state = training.create(self.params, tuple(self.params), tx)
        self.step = training.make_train_step(self.model, train.objective, tx, spike=train.fit.spike)
        batch, length = train.fit.batch, train.fit.length
        random = np.random.default_rng(0)
        last = min(FIRST_ID + WORDS, config.vocab_size)
        tokens = random.integers(FIRST_ID, last, (BATCHES, batch, length)).astype(np.int32)
        rows = {"prompts": np.zeros(batch, np.int32), "lengths": np.full(batch, length, np.int32)}
        self.batches = [{"tokens": own, **rows} for own in tokens]
        self.size, self.shape, self.done = batch * length, (batch, length), 0
        self.flops = step_flops(config, self.params, train.objective, batch, length)
        self.masked = hasattr(train.objective, "noise")
        self.drawn = self.objective.draw(self.model, self.batches[0], jax.random.key(1))

    def write(self, folder: Path) -> None:
        """What the other side needs."""
        arrays = {
            ".".join(entry.key for entry in path): np.asarray(x)
            for path, x in jax.tree.leaves_with_path(self.params)
        }
        arrays["tokens"] = np.stack([batch["tokens"] for batch in self.batches])
        noisy, learnt = arrays["tokens"][0], np.ones_like(arrays["tokens"][0])
        if self.masked:
            drawn = self.drawn.rows.noisy
            noisy, learnt = drawn.tokens[:, 0], (drawn.weights[:, 0] > 0).astype(np.int32)
        arrays |= {"noisy": np.asarray(noisy), "learnt": np.asarray(learnt)}
        save_file(arrays, folder / "arrays.safetensors")
        about = {
            **{k: v for k, v in dataclasses.asdict(self.model.config).items() if k != "adapter"},
            "optimiser": dataclasses.asdict(self.train.optimiser),
            "length": self.train.fit.length, "masked": self.masked,
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(about))

    def loss(self) -> float:
        score = jax.jit(partial(self.objective.score, self.model))
        return float(score(self.params, self.drawn)[0])

    def steps(self, count: int) -> dict[str, Any]:
        """Seconds of each training step, and the last loss."""
        found = []
        for _ in range(count):
            start = time.perf_counter()
            batch = self.batches[self.done % BATCHES]
            self.state, figures = self.step(self.state, self.params, batch, jax.random.key(0))
            loss = float(figures["loss"])
            jax.block_until_ready(self.state)
            self.done += 1
            found.append(time.perf_counter() - start)
        return {"seconds": found, "loss": loss}


class Theirs:
    """training_torch.py in a process of its own."""

    def __init__(self, config: Duel, folder: Path, dtype: str):
        command = [config.torch_python, HERE / "training_torch.py", folder, config.threads, dtype]
        self.process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "Theirs":
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.communicate()

    def ask(self, do: str, **request: Any) -> Any:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def markdown(report: dict[str, Any]) -> str:
    """The results as a table."""
    rows, versions = report["rows"], report["versions"]
    best = max(max(row["rates"]) for row in rows)
    lines = [
        f"{report['device']}, {report['threads']} threads, jax {versions['jax']}, torch "
        f"{rows[0]['torch']}, {report['date']}, commit {report['commit']}; load "
        f"{report['load_before'][0]:.1f} before, {report['load_after'][0]:.1f} after (2: the two "
        "cores are taken). Trained tokens a second of the same steps on both sides, in turn; "
        f"median, and the fastest step; memory: `{report['malloc'] or 'as it comes'}` on both "
        "sides. MFU: model FLOPs of the fastest step against float32 products of large matrices, "
        f"at best {best / 1e9:.0f} GFLOP/s.",
        "",
        "| model | parameters | rows x tokens | optimiser | products | dllm_jax, tokens/s "
        "| eager PyTorch, tokens/s | ratio, median | ratio, fastest | MFU | PyTorch's |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        rates = {
            (side, figure): f"{row['tokens'] / row[side][figure]:,.0f}"
            for side in ("ours", "theirs")
            for figure in ("median", "least")
        }
        speeds = (
            f"{rates[side, 'median']} ({rates[side, 'least']})" for side in ("ours", "theirs")
        )
        lines.append(
            f"| {NAMES[row['config']]} | {row['parameters']:,} "
            f"| {' x '.join(map(str, row['shape']))} | {row['optimiser']} | {row['dtype']} "
            f"| {' | '.join(speeds)} "
            f"| {row['ratio_median']:.2f}x | {row['ratio_least']:.2f}x | {row['ours']['mfu']:.0%} "
            f"| {row['theirs']['mfu']:.0%} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Duel, description=__doc__))
