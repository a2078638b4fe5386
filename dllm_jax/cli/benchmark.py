"""The bench command: rows as they come, files that are whole at any moment."""

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

from dllm_jax.bench import ceilings, grid, report, rivals, suite
from dllm_jax.cli import terminal
from dllm_jax.cli.background import background
from dllm_jax.cli.options import Bench


def benchmark(command: Bench) -> None:
    """Times what there is time for, and writes it down."""
    prefix = command.out.expanduser()
    found: dict[str, Any] = {}
    try:
        with contextlib.closing(background(lambda: _steps(command))) as steps:
            for step in steps:
                if not found:
                    found = step
                else:
                    found["rows"].append(step)
                    terminal.note(_line(step))
                report.write(found, prefix)
    finally:  # an interruption keeps what there is
        if found:
            terminal.note(report.plot(found, prefix) or f"wrote {prefix}.png")
            terminal.note(f"wrote {prefix}.json and {prefix}.md")


def _steps(command: Bench) -> Iterator[dict[str, Any]]:
    """The report's header, and then its rows."""
    until = time.monotonic() + 60 * command.minutes
    # Before JAX takes the memory of a GPU, most of which PyTorch would miss.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    cpu = _platform() == "cpu"
    dtype = command.dtype or ("float32" if cpu else "bfloat16")
    measured = ceilings.measured((dtype,) if cpu else ("bfloat16", "float32"))
    yield report.header(measured, rivals.absent(), command.title)
    also = command.also if command.also is not None else () if cpu else ("xla",)
    cases = grid.cases(command.parts, dtype, quick=command.quick)
    yield from suite.run(
        cases, measured, implementations=(None, *also), until=until, without=command.without,
    )  # fmt: skip


def _platform() -> str:
    import jax

    return jax.default_backend()


def _line(row: dict[str, Any]) -> str:
    what = f"{row['kind']}, {row['model']}, {report.shape(row)}: {row['side']}"
    if row["status"] != "timed":
        return f"{what}: {row['status']}: {row['reason']}"
    return f"{what}: {1e3 * row['seconds']['median']:.3g} ms, {row['share']:.0%} of the ceiling"
