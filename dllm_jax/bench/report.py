"""The rows as files: JSON for programs, a table for people, and a roofline."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import jax

from dllm_jax.bench.ceilings import Ceilings
from dllm_jax.bench.suite import OURS, Row


def header(ceilings: Ceilings, absent: dict[str, str], title: str) -> dict[str, Any]:
    """What was measured where: all of the report but its rows.

    Args:
      absent: sides that are not timed on this device at all, and why.
      title: what the reader should know first.
    """
    return {
        "title": title,
        **provenance(),
        "copy_bytes_per_second": ceilings.bandwidth,
        "flops_per_second": ceilings.rates,
        "absent": absent,
        "rows": [],
    }


def provenance() -> dict[str, Any]:
    """What every report says of itself: device, versions, date and commit."""
    device = jax.devices()[0]
    return {
        "device": _device_name(device),
        "platform": device.platform,
        "versions": {name: _version(name) for name in ("jax", "jaxlib", "libtpu", "torch")},
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
    }


def _device_name(device: Any) -> str:
    if device.platform != "cpu":
        return device.device_kind
    return f"CPU, {os.cpu_count()} cores"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Of the tree that the package is in, if it is in one; `+` where that has changes."""
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        found = subprocess.run(git, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def write(report: dict[str, Any], prefix: Path) -> None:
    """<prefix>.json and <prefix>.md, whole at any moment."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    texts = {".json": json.dumps(report, indent=1) + "\n", ".md": markdown(report)}
    for suffix, text in texts.items():
        part = prefix.with_name(prefix.name + suffix + ".part")
        part.write_text(text)
        part.replace(prefix.with_name(prefix.name + suffix))


def markdown(report: dict[str, Any]) -> str:
    """The table."""
    rates = ", ".join(
        f"{rate / 1e12:,.3g} TFLOP/s {dtype}" for dtype, rate in report["flops_per_second"].items()
    )
    versions = ", ".join(f"{name} {v}" for name, v in report["versions"].items() if v)
    lines = [
        f"# {report['title']}",
        "",
        f"{report['device']}; {versions}; commit {report['commit']}; {report['date']}.",
        f"Measured first, and the ceilings below: a copy moves "
        f"{report['copy_bytes_per_second'] / 1e9:,.4g} GB/s (read and written); products of large "
        f"matrices reach {rates}.",
        "",
        "Time: median of a call, of many in one program. Share: the least time that the ceilings "
        "allow for the bytes and operations of the closed form, over that time. Others: their time "
        "over ours (above 1: ours is faster), on arrays laid out as they like them; each result "
        "was compared with ours before it was timed. A share above 100%: the device was busier, or "
        "did worse, when the ceilings were measured.",
    ]
    for kind in dict.fromkeys(row["kind"] for row in report["rows"]):
        lines += ["", f"## {kind[0].upper()}{kind[1:]}", ""]
        lines += _table([row for row in report["rows"] if row["kind"] == kind])
    lines += ["", "## Not timed", ""]
    lines += [f"- {side}: {reason}" for side, reason in report["absent"].items()]
    lines += [
        f"- {row['kind']}, {row['model']}, {shape(row)}: {row['side']}: {row['status']}: "
        f"{row['reason']}"
        for row in report["rows"]
        if row["status"] != "timed"
    ]
    return "\n".join(lines) + "\n"


def _table(rows: list[Row]) -> list[str]:
    """A line a shape."""
    cases: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row["model"], shape(row)), {})[row["side"]] = row
    others = list(dict.fromkeys(row["side"] for row in rows if row["side"] != OURS))
    head = ["model", "shape", "ours, ms", "spread", "share", *others]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for (model, words), sides in cases.items():
        ours = sides.get(OURS, {})
        if ours.get("status") != "timed":
            continue
        seconds = ours["seconds"]
        spread = f"{1e3 * seconds['low']:.3g} to {1e3 * seconds['high']:.3g}"
        cells = [model, words, f"{1e3 * seconds['median']:.3g}", spread, f"{ours['share']:.0%}"]
        for name in others:
            row = sides.get(name)
            if row is None or row["status"] != "timed":
                cells.append("" if row is None else row["status"])
            else:
                cells.append(f"{row['seconds']['median'] / seconds['median']:.2f}x")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


_AMOUNTS = ("rows", "batch", "entries", "slots", "length", "block")


def shape(row: Row) -> str:
    """What a row's case is, in words."""
    parts = [f"{name} {row[name]:,}" for name in _AMOUNTS if row.get(name)]
    return ", ".join(parts + ["ragged"] * bool(row.get("ragged")))


def plot(report: dict[str, Any], prefix: Path) -> str | None:
    """<prefix>.png, the roofline; or how to get what it takes to draw it."""
    if importlib.util.find_spec("matplotlib") is None:
        return "the roofline was not drawn: pip install 'dllm-jax[plot]'"
    timed = [row for row in report["rows"] if row["status"] == "timed"]
    if not timed:
        return "the roofline was not drawn: nothing was timed"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log")
    reach = [row["flops"] / row["bytes"] for row in timed]
    low, high = min(reach) / 2, max(reach) * 2
    for dtype in dict.fromkeys(row["dtype"] for row in timed):
        rate, bandwidth = report["flops_per_second"][dtype], report["copy_bytes_per_second"]
        knee = min(max(rate / bandwidth, low), high)
        corners = [low, knee, high]
        roof = [min(rate, x * bandwidth) / 1e12 for x in corners]
        axes.plot(corners, roof, color="0.3", label=f"ceilings, {dtype}")
    for number, side in enumerate(dict.fromkeys(row["side"] for row in timed)):
        own = [row for row in timed if row["side"] == side]
        axes.scatter(
            [row["flops"] / row["bytes"] for row in own],
            [row["flops"] / row["seconds"]["median"] / 1e12 for row in own],
            s=36 if side == OURS else 16, marker="o" if side == OURS else "x",
            color=f"C{number % 10}", label=side, zorder=3 if side == OURS else 2,
        )  # fmt: skip
    axes.set_xlabel("operations a byte, by the closed form")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"{report['device']}, {report['date']}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(prefix.with_name(prefix.name + ".png"), dpi=110)
    return None
