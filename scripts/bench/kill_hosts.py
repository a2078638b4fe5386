"""Kills processes of a training run of many: does it end on the curve of a run nobody touched?

    python scripts/bench/kill_hosts.py --run runs/hosts

A tiny model is trained from one seed on one process, undisturbed. Then again by processes of their
own (gloo), of which one is killed at a time, mostly in the middle of a save; each next stage has
another number of them, and finds the newest checkpoint whole, flipped in one bit, or cut short.
Once with the devices of all stages the same in number, shared out among the processes (the sums
have one order), and once with one device a process. Writes <out>.md, and <out>.json.
"""

import dataclasses
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import tyro

from dllm_jax import data, distributed, sharding, testing, training
from dllm_jax.corruption import MaskedBlocks
from dllm_jax.losses import DualStream
from dllm_jax.nn.tree import param_axes, param_shapes

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 600  # seconds for a stage to come as far as it should, on a busy machine


@dataclasses.dataclass(frozen=True)
class Stage:
    """Some processes, and how they end."""

    processes: int
    end: str  # KILL, TERM: the signal to one of them, at the stage's last step; END: they finish
    before: str = ""  # what is done to the newest checkpoint: flip, cut


STAGES = (
    Stage(2, "KILL"),
    Stage(4, "KILL"),
    Stage(2, "TERM"),
    Stage(4, "KILL", before="flip"),
    Stage(2, "KILL", before="cut"),
    Stage(1, "TERM"),
    Stage(4, "END"),
)
FEW = (Stage(2, "KILL"), Stage(4, "KILL"), Stage(1, "END"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kill:
    """What to run."""

    run: Path
    """Folder of the runs; what an earlier benchmark left there is removed."""
    steps: int = 140
    save_every: int = 5
    devices: int = 4
    """Devices of all processes together, in the first comparison."""
    seed: int = 0
    out: Path = Path(__file__).parent / "results" / "kill-hosts"
    train: bool = False
    """Only train, in `run` itself: what the processes do."""


def main(config: Kill, many: tuple[Stage, ...] = STAGES) -> dict:
    """Runs all, compares, and writes the files; returns the report."""
    shutil.rmtree(config.run, ignore_errors=True)
    compared = []
    for name, total, stages in (
        (f"{config.devices} in all", config.devices, many),
        ("one a process", None, FEW),
    ):
        folders = [config.run / f"{name.split()[0]}-{kind}" for kind in ("alone", "killed")]
        finish(config, folders[0], total or 1)
        happened = disturb(config, folders[1], stages, total)
        curves = [figures(folder) for folder in folders]
        rows = list(zip(*curves, strict=True))
        compared.append({
            "devices": name,
            "stages": happened,
            "identical": curves[0] == curves[1],
            "loss": max(abs(a["loss"] - b["loss"]) for a, b in rows if "loss" in a),
            "first_loss": curves[0][0]["loss"],
            "last_loss": [row["loss"] for row in curves[0] if "loss" in row][-1],
        })  # fmt: skip
    report = {
        "settings": {name: getattr(config, name) for name in ("steps", "save_every", "seed")},
        "compared": compared,
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "date": time.strftime("%Y-%m-%d"),
    }
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    config.out.with_suffix(".md").write_text(page(report))
    print(page(report))
    return report


def start(config: Kill, folder: Path, processes: int, devices: int) -> subprocess.Popen[str]:
    """Processes that train in a folder, and go on where the last ones stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    own = [sys.executable, __file__, "--train", "--run", str(folder)]
    for name in ("steps", "save_every", "seed"):
        own += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    launcher = str(ROOT / "scripts" / "launch" / "local.py")
    command = [sys.executable, launcher, str(processes), "--devices", str(devices), "--", *own]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(config.run / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with (folder / "log.txt").open("a") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True)


def finish(config: Kill, folder: Path, devices: int) -> None:
    """Trains to the end on one process."""
    if code := start(config, folder, 1, devices).wait():
        raise RuntimeError(f"training ended with code {code}; see {folder / 'log.txt'}")


def disturb(config: Kill, folder: Path, stages, total: int | None) -> list[dict]:
    """Goes through the stages; returns what happened in each."""
    random, happened = np.random.default_rng(config.seed), []
    for number, stage in enumerate(stages):
        damaged = damage(folder, stage.before) if stage.before else None
        found, seen = saved_steps(folder), log_size(folder)
        shutil.rmtree(folder / "pids", ignore_errors=True)
        devices = total // stage.processes if total else 1
        launched = start(config, folder, stage.processes, devices)
        victim = int(random.integers(stage.processes))
        goal = config.steps * (number + 1) // (len(stages) + 1)
        try:
            if stage.end != "END":
                await_step(launched, folder, goal, in_a_save=stage.end == "KILL")
                pid = int((folder / "pids" / str(victim)).read_text())
                os.kill(pid, getattr(signal, f"SIG{stage.end}"))
            code = launched.wait(PATIENCE)
        finally:
            launched.kill()
        said = (folder / "log.txt").read_text()[seen:].replace(str(folder), "RUN")
        if code != {"KILL": 137, "TERM": 0, "END": 0}[stage.end]:
            raise RuntimeError(f"stage {number} ended with code {code}: {said[-3000:]}")
        happened.append({
            "processes": stage.processes,
            "devices": stage.processes * devices,
            "checkpoints_before": found,
            "damaged": damaged,
            "told": [line for line in said.splitlines() if "damage" in line or "skipped" in line],
            "signal": stage.end if stage.end != "END" else "",
            "to": victim,
            "step": last_step(folder),
            "in_a_save": unfinished(folder),
            "exit_code": code,
        })  # fmt: skip
    return happened


def await_step(launched: subprocess.Popen, folder: Path, goal: int, in_a_save: bool) -> None:
    """Until the metrics have a step (and a save is going on)."""
    deadline = time.monotonic() + PATIENCE
    while last_step(folder) < goal or (in_a_save and not unfinished(folder)):
        if launched.poll() is not None or time.monotonic() > deadline:
            launched.kill()
            raise RuntimeError(f"no step {goal} in time; see {folder / 'log.txt'}")
        time.sleep(0.003)


def damage(folder: Path, how: str) -> str:
    """Flips one bit of the newest checkpoint's arrays, or cuts the file in two; says which."""
    newest = folder / "checkpoints" / str(saved_steps(folder)[-1])
    file = max(newest.rglob("ocdbt.process_*/d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 1
    else:
        content = content[: len(content) // 2]
    file.write_bytes(bytes(content))
    return f"{how}: {newest.name}"


def last_step(folder: Path) -> int:
    """The newest step in the metrics, 0 without one."""
    path = folder / "metrics.jsonl"
    rows = training.read_metrics(path) if path.exists() else []
    return max([row["step"] for row in rows], default=0)


def saved_steps(folder: Path) -> list[int]:
    """The steps of complete checkpoints, rising."""
    names = [path.name for path in (folder / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdigit())


def unfinished(folder: Path) -> bool:
    """Whether a checkpoint is being written, or was when its process died."""
    return any((folder / "checkpoints").glob("*tmp*"))


def log_size(folder: Path) -> int:
    return len((folder / "log.txt").read_text()) if (folder / "log.txt").exists() else 0


def figures(folder: Path) -> list[dict[str, float]]:
    """The rows of the metrics without their times."""
    rows = training.read_metrics(folder / "metrics.jsonl")
    return [
        {name: value for name, value in row.items() if name not in training.TIMES} for row in rows
    ]


def train(config: Kill) -> None:
    """Trains a tiny model to count, in `config.run`, with the processes that were started."""
    distributed.initialize(heartbeat=30)
    me = jax.process_index()
    (config.run / "pids").mkdir(exist_ok=True)
    (config.run / "pids" / str(me)).write_text(str(os.getpid()))
    fsdp = min(2, jax.device_count())
    mesh = sharding.make_mesh(data=-1, fsdp=fsdp)
    model, params = tiny(config.seed)
    if mesh.size > 1:
        shapes, axes = param_shapes(model.config), param_axes(model.config)
        params = distributed.place(params, sharding.shardings(axes, mesh, shapes=shapes))
    for split, first in (("train", 0), ("heldout", 64)):
        path = config.run / f"{split}-00000.npz"
        if me == 0 and not path.exists():
            data.write_part(path, [counting(first + i) for i in range(64)], [4] * 64)
    distributed.wait("the data is there")
    tx = training.Optimiser(learning_rate=1e-2).build(config.steps)
    fit = training.Fit(
        steps=config.steps, batch=8, length=16, seed=config.seed, save_every=config.save_every,
        evaluate_every=max(config.steps // 4, 1),
    )  # fmt: skip
    state = training.fit(
        config.run,
        fit,
        model,
        params,
        training.create(params, ("adapter", "head", "layers"), tx),
        DualStream(noise=MaskedBlocks(block_size=3, blocks=4)),
        tx,
        data.Conversations(config.run, "train"),
        data.Conversations(config.run, "heldout"),
    )
    print(f"process {me} stopped at step {int(state.step)}", flush=True)


def tiny(seed: int):
    """The model, made by one program, which the processes share in their cache."""
    models = []

    def init():
        model, params = testing.tiny(seed=seed, sharpness=1.0)
        models.append(model)
        return params

    params = jax.jit(init)()
    return models[0], params


def counting(number: int) -> list[int]:
    """Sixteen ids, each one more than the last, around a circle of thirty."""
    return [2 + (7 * number + i) % 30 for i in range(16)]


def page(report: dict) -> str:
    """The results as Markdown."""
    text = [
        "# Hosts killed in the middle of a training run",
        "",
        "`scripts/bench/kill_hosts.py`, jax {jax}, Python {python}; ".format(**report["versions"])
        + "{steps} steps, a checkpoint every {save_every}; ".format(**report["settings"])
        + f"real processes on one CPU machine, joined by gloo; {report['date']}.",
    ]
    for part in report["compared"]:
        text += [
            "",
            f"## Devices: {part['devices']}",
            "",
            "| processes | devices | checkpoints found | damaged before | signal, to process | "
            "at step | a save was cut short | exit code |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in part["stages"]:
            sent = f"SIG{row['signal']}, {row['to']}" if row["signal"] else "none"
            steps = ", ".join(map(str, row["checkpoints_before"])) or "none"
            cut = "yes" if row["in_a_save"] else "no"
            text.append(
                f"| {row['processes']} | {row['devices']} | {steps} | {row['damaged'] or ''} | "
                f"{sent} | {row['step']} | {cut} | {row['exit_code']} |"
            )
        told = [line for row in part["stages"] for line in row["told"]]
        if told:
            text += ["", "Told about the damage:", "", "```", *told, "```"]
        verdict = "identical, bit for bit" if part["identical"] else "not bit-equal"
        text += ["", (
            f"Against one process that nobody touched: {verdict}; largest difference of the loss "
            f"{part['loss']:.3g} (loss {part['first_loss']:.3f} to {part['last_loss']:.3f})."
        )]  # fmt: skip
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    config = tyro.cli(Kill, description=__doc__)
    train(config) if config.train else main(config)
