"""Case after case, side after side, while there is time."""

import time
from collections.abc import Container, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from dllm_jax.bench.ceilings import Ceilings
from dllm_jax.bench.clock import Program, timed
from dllm_jax.bench.sides import TooLarge, room

Row = dict[str, Any]

EACH = 1.0  # seconds of timing of a side, at most, besides one run
OURS = "ours"

# Relative to the largest number of the result: products of few bits, in another order.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}


def run(
    cases: Iterable[Any],
    ceilings: Ceilings,
    *,
    implementations: tuple[str | None, ...],
    until: float,
    without: Container[str] = (),
    each: float = EACH,
) -> Iterator[Row]:
    """A row for each side of each case: its time, or why there is none.

    A row's `status` is "timed", or with a `reason` "wrong" (its result is not ours), "refused" (it
    raised), "too large", or "no time".

    Args:
      implementations: ours to time; None is that which the device gets without asking, and what the
        others are compared with.
      until: no side begins after `time.monotonic()` is there.
      without: sides that are left out.
      each: seconds of timing of a side, about.
    """
    for case in cases:
        head = {"kind": case.kind, "model": case.model, **case.shape, "dtype": case.dtype}
        if time.monotonic() > until:
            yield {**head, "side": OURS, "status": "no time", "reason": "the minutes were over"}
            continue
        if case.holds > room():
            reason = f"holds {case.holds / 2**30:.1f} GiB, {max(room(), 0) / 2**30:.1f} are free"
            yield {**head, "side": OURS, "status": "too large", "reason": reason}
            continue
        sides = case.sides(implementations)
        sides = {name: make for name, make in sides.items() if name not in without}
        yield from _sides(case, head, sides, ceilings, until, each)


def _sides(case, head, sides, ceilings, until, each) -> Iterator[Row]:
    truth: dict[str, np.ndarray] | None = None
    rows: list[Row] = []
    ready: list[tuple[Row, Program]] = []
    for name, make in sides.items():
        row = {**head, "side": name}
        rows.append(row)
        if time.monotonic() > until:
            row |= {"status": "no time", "reason": "the minutes were over"}
            continue
        try:
            side = make()
            found = side.result()
            truth = found if truth is None else truth
            row["error"] = difference(found, truth)
            if not row["error"] <= _tolerance(case.dtype):  # nor where it is NaN
                reason = f"differs from the first by {row['error']:.1e} of the largest number"
                row |= {"status": "wrong", "reason": reason}
                continue
            ready.append((row, side.program()))
        except TooLarge as error:
            row |= {"status": "too large", "reason": str(error)}
        except Exception as error:  # whatever another library raises is its answer
            row |= {"status": "refused", "reason": _first_words(error)}
    work = case.work
    least = ceilings.seconds(work, case.dtype)
    for (row, _), times in zip(ready, timed([program for _, program in ready], each), strict=True):
        row |= {
            "status": "timed", "seconds": times._asdict(), "bytes": work.bytes,
            "flops": work.flops, "least_seconds": least, "share": least / times.median,
        }  # fmt: skip
    yield from rows


def difference(found: dict[str, np.ndarray], truth: dict[str, np.ndarray]) -> float:
    """The largest one over the largest number, of the results that both have."""
    worst = 0.0
    for name in truth.keys() & found.keys():
        ours, theirs = (np.asarray(x[name], np.float32) for x in (truth, found))
        if ours.shape != theirs.shape:
            return float("inf")
        worst = max(worst, float(np.abs(ours - theirs).max() / max(np.abs(ours).max(), 1e-30)))
        if np.isnan(theirs).any():
            return float("nan")
    return worst


def _tolerance(dtype: str) -> float:
    """Products in float32 have few bits on accelerators, too, by default."""
    return _TOLERANCE["bfloat16" if jax.default_backend() != "cpu" else dtype]


def _first_words(error: Exception) -> str:
    words = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {words[:200]}"
