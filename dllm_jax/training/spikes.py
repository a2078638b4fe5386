"""The batches of steps that were not applied: kept, to be looked at."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dllm_jax import distributed, files
from dllm_jax.typing import Key


class Spike(RuntimeError):
    """A step was not applied, and the run was told to stop there."""


class Started(NamedTuple):
    """A step that was started, of which nobody has seen yet whether it was applied."""

    number: int
    batch: dict[str, Any]
    position: dict[str, Any]  # of the data, before the batch
    figures: dict[str, jax.Array]


class Watch:
    """Holds steps until it is seen whether they were applied, and keeps the batches of others."""

    def __init__(self, run: Path, key: Key, *, stops: bool):
        """`stops`: behind a step that is not applied none is, and the first one says it all."""
        self._run, self._key, self._stops = run, key, stops
        self.in_a_row = 0  # steps up to the last one looked at that were not applied
        self._steps: list[Started] = []

    def add(self, step: Started) -> None:
        """A step that was started."""
        self._steps.append(step)

    def look(self) -> list[tuple[Started, Path]]:
        """Those that were not applied, and their batches' files; the others are forgotten."""
        steps, self._steps = self._steps, []
        flags = jax.device_get([step.figures["skipped"] for step in steps])
        for skipped in flags:
            self.in_a_row = self.in_a_row + 1 if skipped else 0
        refused = [step for step, skipped in zip(steps, flags, strict=True) if skipped]
        return [
            (step, save_spike(self._run, step.number, step.batch, self._key))
            for step in (refused[:1] if self._stops else refused)
        ]


def save_spike(run: Path, step: int, batch: dict[str, Any], key: Key) -> Path:
    """Writes `<run>/spikes/step-<step>.npz`; all processes take part, the first one writes.

    Args:
      key: of the run; the step's noise is of `fold_in(key, step - 1)`.
    """
    whole: dict[str, Any] = distributed.fetched(batch)
    path = run / "spikes" / f"step-{step}.npz"
    if distributed.is_first():
        noise = np.asarray(jax.random.key_data(jax.random.fold_in(key, step - 1)))
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.whole(path) as draft, draft.open("wb") as file:
            np.savez_compressed(file, **whole, noise=noise)
    return path


def read_spike(path: str | Path) -> tuple[dict[str, np.ndarray], Key]:
    """The batch of a step that was not applied, and its key: what `objective.loss` was given.

    loss, figures = objective.loss(model, params, *read_spike("runs/mine/spikes/step-70.npz"))
    """
    with np.load(path) as file:
        arrays = dict(file)
    return arrays, jax.random.wrap_key_data(arrays.pop("noise"))
