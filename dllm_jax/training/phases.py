"""Phases of a run: blocks of one size after the other, under one schedule, on one order of rows."""

import dataclasses
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import optax

from dllm_jax import distributed
from dllm_jax.data import Source
from dllm_jax.losses import Objective
from dllm_jax.losses.objective import check_whole_blocks
from dllm_jax.training.loop import Fit, fit
from dllm_jax.training.records import interrupts
from dllm_jax.training.step import TrainState
from dllm_jax.typing import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a run with blocks of its own size."""

    until: int
    """The step that ends it."""
    block_size: int
    """0: the whole text is one block, and attention bidirectional."""


def check_phases(phases: tuple[Phase, ...]) -> None:
    """Raises ValueError where one does not end after the one before it, or has no such blocks."""
    ends = [phase.until for phase in phases]
    if ends != sorted(set(ends)) or min(ends, default=1) < 1:
        raise ValueError(f"phases end at {ends}: each must end after the one before it, from 1 on")
    sizes = [phase.block_size for phase in phases]
    if min(sizes, default=0) < 0:
        raise ValueError(f"phases have blocks of {sizes}: 0 is the whole text")


def listed(phases: tuple[Phase, ...], steps: int) -> list[tuple[int, int | None]]:
    """(the step that ends it, its block size) of each that a run of so many steps comes to.

    The last one holds until the end. Without phases one whose size is None: as the settings say.
    """
    if not phases:
        return [(steps, None)]
    ends = [min(phase.until, steps) for phase in phases[:-1]]
    found, before = [], 0
    for until, phase in zip([*ends, steps], phases, strict=True):
        if until > before:  # else the run ends before it begins
            found.append((until, phase.block_size))
        before = until
    return found


def in_words(phases: tuple[Phase, ...]) -> str:
    """The block sizes and where they change; where the last phase ends changes nothing."""
    if not phases:
        return "none"
    *before, last = phases
    parts = [f"blocks of {phase.block_size} until step {phase.until}" for phase in before]
    return ", then ".join([*parts, f"blocks of {last.block_size}"])


def block_size_of(objective: Any) -> int | None:
    """Of its noise; None where it has none."""
    return getattr(getattr(objective, "noise", None), "block_size", None)


def of_size(model: Any, objective: Any, size: int | None) -> tuple[Any, Any]:
    """The model and the objective of a phase.

    Raises:
      ValueError: the objective's noise has no blocks.
    """
    if size is None:
        return model, objective
    if block_size_of(objective) is None:
        raise ValueError(
            f"phases change the block size of an objective's noise, and "
            f"{type(objective).__name__} has none"
        )
    noise = dataclasses.replace(objective.noise, block_size=size)
    if model.config.attention != "causal":
        attention = "block_causal" if size else "bidirectional"
        changes = {"attention": attention, "block_size": max(size, 1)}
        model = dataclasses.replace(model.config, **changes).build()
    return model, dataclasses.replace(objective, noise=noise)


def fit_phases(
    run: Path,
    config: Fit,
    phases: tuple[Phase, ...],
    model: Any,
    params: Params,
    state: TrainState,
    objective: Objective,
    tx: optax.GradientTransformation,
    source: Source,
    heldout: Source | None,
    *,
    evaluations: Mapping[str, Any],
    about: Mapping[str, Any],
) -> tuple[TrainState, Any]:
    """As `fit`, phase after phase.

    Args:
      phases: of the noise's block size, and of attention where it is not causal.
      evaluations: as `Evaluation`, with the phase's model before its arguments.

    Returns:
      The last state, and the model of the phase that it is of.

    Raises:
      ValueError: as `fit`; or rows of several documents are not whole blocks of a phase.
    """
    started, own, begins = time.monotonic(), model, 0
    about = {**about, "phases": in_words(phases)}
    parts = [(end, *of_size(model, objective, n)) for end, n in listed(phases, config.steps)]
    if len(source) and source[0].segments is not None:
        for _, _, aim in parts:  # now, not when a phase comes
            check_whole_blocks(config.length, block_size_of(aim) or 0)
    with interrupts() as interrupted:  # a signal in the last step of a phase ends the run too
        for until, own, aim in parts:
            minutes = config.minutes
            if minutes is not None:
                minutes -= (time.monotonic() - started) / 60
            state = fit(
                run, dataclasses.replace(config, steps=until, minutes=minutes), own, params, state,
                aim, tx, source, heldout, about=about, begins=begins,
                evaluations={name: partial(ask, own) for name, ask in evaluations.items()},
            )  # fmt: skip
            if int(state.step) < until or distributed.any_process(interrupted()):
                break
            begins = until
    return state, own
