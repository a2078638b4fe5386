"""Curves of runs, drawn from their metrics."""

import dataclasses
import fnmatch
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dllm_jax.training.records import read_metrics

DEFAULT = ("loss+heldout_loss", "accepted+heldout_accepted")
"""Panels: names of figures, with + between those that share one; * stands for anything."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curves:
    """What is drawn, and how."""

    figures: tuple[str, ...] = DEFAULT
    """A panel each; "loss+heldout_loss" draws two in one, and * stands for anything."""
    smooth: int = 1
    """Steps of the running mean that is drawn over a pale line; 1: none."""
    log_x: bool = False
    log_y: bool = False


def plot(
    *runs: str | Path, out: str | Path | None = None, curves: Curves = Curves()
) -> Path | None:
    """Draws the figures of one or several runs, beside each other; None without matplotlib.

    Args:
      runs: their folders.
      out: the PNG; `<run>/loss.png` of the first by default.

    Raises:
      FileNotFoundError: a run has no metrics.
      ValueError: a figure, or a part of a+b, is in none of them.
    """
    rows = {}
    for run in map(Path, runs):
        if not (run / "metrics.jsonl").exists():
            raise FileNotFoundError(f"{run} has no metrics.jsonl: it is not the folder of a run")
        name = run.name if run.name not in rows else str(run)
        rows[name] = read_metrics(run / "metrics.jsonl")
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [found for panel in curves.figures if (found := _series(rows, panel))]
    parts = [part for panel in curves.figures for part in panel.split("+")]
    missing = [part for part in parts if not _series(rows, part)]
    if missing and curves.figures is not DEFAULT:
        there = sorted({name for found in rows.values() for row in found for name in row})
        raise ValueError(f"no run has {', '.join(missing)}; there are {', '.join(there)}")
    count = max(len(panels), 1)
    figure, axes = pyplot.subplots(1, count, figsize=(5 * count, 4), squeeze=False)
    for axis, series in zip(axes[0], panels, strict=False):
        for label, steps, values in series:
            _line(axis, label, steps, values, curves.smooth)
        axis.set_xlabel("step")
        axis.set_xscale("log" if curves.log_x else "linear")
        axis.set_yscale("log" if curves.log_y else "linear")
        axis.legend()
    figure.tight_layout()
    path = Path(out) if out is not None else Path(runs[0]) / "loss.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _series(
    rows: dict[str, list[dict[str, Any]]], panel: str
) -> list[tuple[str, list[int], list[float]]]:
    """The lines of a panel: label, steps and values."""
    found = []
    for run, lines in rows.items():
        names = sorted({name for row in lines for name in row} - {"step"})
        for name in [n for part in panel.split("+") for n in fnmatch.filter(names, part)]:
            points = [(row["step"], row[name]) for row in lines if _is_number(row.get(name))]
            if points:
                label = name if len(rows) == 1 else f"{run}: {name}"
                found.append((label, [step for step, _ in points], [y for _, y in points]))
    return found


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and math.isfinite(x)


def _line(axis: Any, label: str, steps: Sequence[int], values: Sequence[float], smooth: int):
    few = len(values) <= 30
    if smooth <= 1 or few:
        axis.plot(steps, values, label=label, marker="o" if few else "")
        return
    (pale,) = axis.plot(steps, values, alpha=0.25)
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - smooth] if i >= smooth else 0.0)
        means.append(total / min(i + 1, smooth))
    axis.plot(steps, means, label=label, color=pale.get_color())
