"""Kills a training run again and again: does it end on the curve of a run that nobody touched?

    python scripts/bench/kill_training.py --run runs/kill --kills 3 --steps 300

A tiny model is trained twice from one seed, in processes of its own: once undisturbed, and once
killed at random moments (SIGKILL, and one SIGTERM, which lets it save) and started again after
each. Both must leave the same figures, bit for bit. Prints a table and the largest difference;
writes <out>.json and <out>.png.
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

from dllm_jax import data, testing, training
from dllm_jax.corruption import MaskedBlocks
from dllm_jax.losses import DualStream

ROOT = Path(__file__).resolve().parents[2]
RUNS = ("undisturbed", "killed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kill:
    """What to run."""

    run: Path
    """Folder of the two runs; what an earlier benchmark left there is removed."""
    kills: int = 3
    """How often to kill with SIGKILL; one SIGTERM comes on top, at a random place among them."""
    steps: int = 300
    save_every: int = 10
    seed: int = 0
    out: Path = Path(__file__).parent / "results" / "kill-training"
    """Where the results go, without a suffix."""
    train: bool = False
    """Only train, in `run` itself, and go on where it stopped: what the processes do."""


def main(config: Kill) -> dict:
    """Runs both, compares them, and writes the files; returns the report."""
    folders = {name: config.run / name for name in RUNS}
    for folder in folders.values():
        shutil.rmtree(folder, ignore_errors=True)
    finish(config, folders["undisturbed"])
    kills = disturb(config, folders["killed"])
    curves = {name: figures(folder) for name, folder in folders.items()}
    differences = [
        abs(row[name] - other[name])
        for row, other in zip(curves["undisturbed"], curves["killed"], strict=True)
        for name in row.keys() | other.keys()
    ]
    loss = [row["loss"] for row in curves["killed"] if "loss" in row]
    report = {
        "settings": {name: getattr(config, name) for name in ("steps", "save_every", "seed")},
        "kills": kills,
        "largest_difference": max(differences),
        "identical": curves["undisturbed"] == curves["killed"],
        "first_loss": loss[0],
        "last_loss": loss[-1],
        "device": jax.devices()[0].device_kind,
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "date": time.strftime("%Y-%m-%d"),
    }
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    picture(curves, kills, config.out.with_suffix(".png"))
    print(table(report))
    return report


def start(config: Kill, folder: Path) -> subprocess.Popen[bytes]:
    """A process that trains in a folder, and goes on where the last one stopped."""
    settings = dataclasses.replace(config, run=folder, train=True)
    command = [sys.executable, __file__, "--train", "--run", str(folder)]
    for name in ("steps", "save_every", "seed"):
        command += [f"--{name.replace('_', '-')}", str(getattr(settings, name))]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Both runs compile little and share what they compiled, so that a restart takes seconds.
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(config.run / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def finish(config: Kill, folder: Path) -> None:
    """Trains to the end."""
    if code := start(config, folder).wait():
        raise RuntimeError(f"the training process ended with code {code}")


def disturb(config: Kill, folder: Path) -> list[dict]:
    """Kills a run at random moments, starts it again each time, and lets the last one finish."""
    random = np.random.default_rng(config.seed)
    names = random.permutation(["SIGKILL"] * config.kills + ["SIGTERM"]).tolist()
    kills = []
    for number, name in enumerate(names):
        begin = saved_step(folder)
        share = (config.steps - begin) // (len(names) - number + 1)
        goal = begin + int(random.integers(1, max(share, 2)))
        saving = random.random() < 0.5  # aim at a checkpoint that is being written
        process = start(config, folder)
        try:
            while process.poll() is None and (
                last_step(folder) < goal or (saving and not unfinished(folder))
            ):
                time.sleep(0.001)
            if not saving:
                time.sleep(random.uniform(0, 0.1))
            if process.poll() is not None:
                raise RuntimeError("the run ended before it could be killed; give it more steps")
            process.send_signal(getattr(signal, name))
            code = process.wait()
        finally:
            process.kill()
        kills.append({
            "signal": name,
            "exit_code": code,
            "step": last_step(folder),
            "in_a_save": unfinished(folder),
            "resumed_from": saved_step(folder),
        })  # fmt: skip
    finish(config, folder)
    return kills


def last_step(folder: Path) -> int:
    """The newest step in the metrics, 0 without one."""
    path = folder / "metrics.jsonl"
    rows = training.read_metrics(path) if path.exists() else []
    return max([row["step"] for row in rows], default=0)


def saved_step(folder: Path) -> int:
    """The newest step in a complete checkpoint, 0 without one."""
    names = [path.name for path in (folder / "checkpoints").glob("*")]
    return max([int(name) for name in names if name.isdigit()], default=0)


def unfinished(folder: Path) -> bool:
    """Whether a checkpoint is being written, or was when its process died."""
    return any((folder / "checkpoints").glob("*tmp*"))


def figures(folder: Path) -> list[dict[str, float]]:
    """The rows of the metrics without their times."""
    rows = training.read_metrics(folder / "metrics.jsonl")
    return [
        {name: value for name, value in row.items() if name not in training.TIMES} for row in rows
    ]


def train(config: Kill) -> None:
    """Trains a tiny model to count, in `config.run`."""
    model, params = testing.tiny(seed=config.seed, sharpness=1.0)
    config.run.mkdir(parents=True, exist_ok=True)
    for split, first in (("train", 0), ("heldout", 64)):
        path = config.run / f"{split}-00000.npz"
        if not path.exists():
            data.write_part(path, [counting(first + i) for i in range(64)], [4] * 64)
    noise = MaskedBlocks(block_size=3, blocks=4)
    tx = training.Optimiser(learning_rate=1e-2).build(config.steps)
    fit = training.Fit(
        steps=config.steps, batch=8, length=16, seed=config.seed, save_every=config.save_every,
        evaluate_every=max(config.steps // 10, 1),
    )  # fmt: skip
    training.fit(
        config.run,
        fit,
        model,
        params,
        training.create(params, ("adapter", "head"), tx),
        DualStream(noise=noise),
        tx,
        data.Conversations(config.run, "train"),
        data.Conversations(config.run, "heldout"),
    )


def counting(number: int) -> list[int]:
    """Sixteen ids, each one more than the last, around a circle of thirty."""
    return [2 + (7 * number + i) % 30 for i in range(16)]


def table(report: dict) -> str:
    """The results as text."""
    lines = [
        f"{report['device']}, jax {report['versions']['jax']}, {report['date']}; "
        "{steps} steps, a checkpoint every {save_every}.".format(**report["settings"]),
        "",
        "| kill | signal | step at kill | a save was cut short | resumed from step |",
        "|---|---|---|---|---|",
    ]
    for number, kill in enumerate(report["kills"], 1):
        cut = "yes" if kill["in_a_save"] else "no"
        lines.append(
            f"| {number} | {kill['signal']} | {kill['step']} | {cut} | {kill['resumed_from']} |"
        )
    verdict = "identical" if report["identical"] else "DIFFERENT"
    lines += [
        "",
        f"Largest difference between the curves: {report['largest_difference']:g} ({verdict}); "
        f"loss {report['first_loss']:.3f} to {report['last_loss']:.3f}.",
    ]
    return "\n".join(lines)


def picture(curves: dict[str, list[dict]], kills: list[dict], path: Path) -> None:
    """Both curves, and where the second was killed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4))
    for name, width, alpha in (("undisturbed", 4, 0.35), ("killed", 1, 1)):
        points = [(row["step"], row["loss"]) for row in curves[name] if "loss" in row]
        axis.plot(*zip(*points, strict=True), label=name, linewidth=width, alpha=alpha)
    for kill in kills:
        colour = "tab:red" if kill["signal"] == "SIGKILL" else "tab:green"
        axis.axvline(kill["step"], color=colour, linestyle=":", linewidth=1)
        axis.text(
            kill["step"], 0.98, kill["signal"], color=colour, fontsize=8, rotation=90,
            ha="right", va="top", transform=axis.get_xaxis_transform(),
        )  # fmt: skip
    axis.set_xlabel("step")
    axis.set_ylabel("loss, nats per learnt token")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    config = tyro.cli(Kill, description=__doc__)
    train(config) if config.train else main(config)
