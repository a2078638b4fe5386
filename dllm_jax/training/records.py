"""What a run writes for people: its metrics, its samples, the bar, and what a signal asks of it.

Of many processes the first writes; on the others these do nothing.
"""

import contextlib
import json
import math
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dllm_jax import distributed, files


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Turns SIGTERM and SIGINT into a question: the loop ends its step, saves, and leaves.

    One within another is the same question, asked of both. Python tells signals to the main
    thread alone: on another one nothing is asked.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    outer = signal.getsignal(signal.SIGTERM)
    asked = outer if isinstance(outer, _Asked) else _Asked()
    names = (signal.SIGTERM, signal.SIGINT)
    before = {name: signal.signal(name, asked) for name in names}
    try:
        yield lambda: asked.yes
    finally:
        for name, handler in before.items():  # None: one that was not set from Python
            signal.signal(name, signal.SIG_DFL if handler is None else handler)


class _Asked:
    """A handler that only notes."""

    yes = False

    def __call__(self, *_: Any) -> None:
        self.yes = True


@contextlib.contextmanager
def metrics(path: Path, done: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Appends JSON lines; lines of steps that the checkpoint does not know are dropped first."""
    if not distributed.is_first():
        yield lambda row: None
        return
    if path.exists():
        kept = [row for row in read_metrics(path) if row["step"] <= done]
        files.write(path, "".join(_line(row) for row in kept))  # a kill here loses no line
    with path.open("a", buffering=1) as file:
        yield lambda row: print(_line(row), end="", file=file)


def _line(row: dict[str, Any]) -> str:
    """A row as JSON, which has no word for what is not finite: null."""
    told = {
        name: None if isinstance(x, float) and not math.isfinite(x) else x
        for name, x in row.items()
    }
    return json.dumps(told) + "\n"


def known(figures: dict[str, float]) -> dict[str, float]:
    """The figures without those that are NaN, of which there was nothing to count.

    A loss, or the norm of a gradient, is kept: there NaN says that a step went wrong.
    """
    kept = ("loss", "grad_norm")
    return {name: x for name, x in figures.items() if not math.isnan(x) or name.endswith(kept)}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, NaN where a figure was not finite.

    A last line that a crash cut short is left out; another line that is none too, with a warning.
    """
    rows, lines = [], path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if number < len(lines):
                warnings.warn(f"{path}: line {number} is damaged, and left out", stacklevel=2)
            continue
        rows.append({name: math.nan if x is None else x for name, x in row.items()})
    return rows


@contextlib.contextmanager
def progress(steps: int, done: int) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """A bar with the loss and the speed beside it."""
    if not distributed.is_first():
        yield lambda done, figures: None
        return
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    skipped = 0.0
    with progress.Progress(*columns) as bar:
        task = bar.add_task("training", total=steps, completed=done)

        def show(done: int, figures: dict[str, float]) -> None:
            nonlocal skipped
            words = [f"loss {figures['loss']:.3f}"]
            if "accepted" in figures:
                words.append(f"accepted {figures['accepted']:.2f}")
            if "tokens_per_second" in figures:
                words.append(f"{figures['tokens_per_second']:,.0f} tokens/s")
            if "mfu" in figures:
                words.append(f"mfu {figures['mfu']:.0%}")
            skipped += figures.get("skipped", 0.0)
            if skipped:
                words.append(f"skipped {skipped:.0f}")
            bar.update(task, completed=done, description="  ".join(words))

        yield show
