"""How fast a run is: seconds of a step, tokens a second, and the share of the peak rate."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from dllm_jax.losses import Objective
from dllm_jax.roofline.sizes import attentions, parts, touched

TIMES = ("seconds", "tokens_per_second", "mfu")
"""Figures that no two runs share."""


class Meter:
    """Keeps what steps return until somebody looks, and the time that they took.

    The first step of a process, which compiles, is not timed.
    """

    def __init__(self, flops: float | None = None, peak: float | None = None):
        """`flops` of a step, and `peak` of all devices in FLOP/s; None: they are not known."""
        self._share = flops / peak if flops and peak else None
        self._rows: list[dict[str, jax.Array]] = []
        self._timed, self._fresh, self._start = 0, True, 0.0

    def add(self, figures: dict[str, jax.Array]) -> None:
        """The figures of a step that was started."""
        self._rows.append(figures)
        if self._fresh:
            jax.block_until_ready(figures)
            self._fresh, self._start = False, time.perf_counter()
        else:
            self._timed += 1

    @property
    def holds(self) -> bool:
        """Whether there are steps that nobody has looked at."""
        return bool(self._rows)

    def look(self) -> dict[str, float]:
        """The last step's figures; of the steps since the last look the seconds of one, and counts.

        `seconds`, `tokens_per_second` and `mfu` where they can be told; `skipped` is a sum.
        """
        rows = jax.device_get(self._rows)
        now = time.perf_counter()
        found = {name: float(x) for name, x in rows[-1].items()}
        if "skipped" in found:
            found["skipped"] = float(sum(row["skipped"] for row in rows))
        if self._timed:
            seconds = max(now - self._start, 1e-9)
            found["seconds"] = seconds / self._timed
            if "tokens" in found:
                tokens = sum(float(row["tokens"]) for row in rows[-self._timed :])
                found["tokens_per_second"] = tokens / seconds
            if self._share is not None:
                found["mfu"] = self._share / found["seconds"]
        self._rows, self._timed, self._start = [], 0, now
        return found

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What is done within is not counted, once the steps that were started are done."""
        if self._rows:
            jax.block_until_ready(self._rows[-1])
        begun = time.perf_counter()
        yield
        self._start += time.perf_counter() - begun


def step_flops(
    config: Any, names: Iterable[str], objective: Objective, batch: int, length: int
) -> float:
    """Model FLOPs of a training step of `batch` rows of `length`.

    2 N forward and 2 N backward for the N parameters that an entry is multiplied by, 2 N more for
    those that are trained, and the products of attention: of causal attention the lower half, and
    of block-causal attention half a block more. What is computed a second time to save memory is
    not counted.

    Args:
      names: the top-level parameters that are trained.
      objective: says how many entries it computes (`entries`, the batch's by default), and how many
        of them the output head is applied to (`outputs`, all by default).
    """
    entries = scored = float(batch * length)
    if hasattr(objective, "entries"):
        entries = scored = objective.entries(batch, length)
    if hasattr(objective, "outputs"):
        scored = objective.outputs(batch, length)
    share, tied = touched(config, 1), "head" not in config.tree()
    work = 0.0
    for part in parts(config, {}):
        if part.path[0] == "positions" or (part.path[0] == "embed" and not tied):
            continue  # looked up
        held = part.held * (share if part.is_expert else 1)
        computed = scored if part.path[0] in ("head", "embed") else entries
        work += computed * held * (6 if part.path[0] in names else 4)
    block = {"causal": 1, "block_causal": getattr(config, "block_size", 1)}
    seen = min((length + block.get(config.attention, length)) / 2, length)
    pairs = sum(
        kind.layers * kind.heads * kind.size * (min(seen, kind.window) if kind.window else seen)
        for kind in attentions(config, {})
    )
    return work + entries * 12 * pairs
