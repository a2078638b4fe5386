"""Phases of a run: blocks of one size after the other, under one schedule, on one order of rows.

A phase may choose its interval of noise when it begins (`Phase.tune`).
"""

import dataclasses
import json
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

from dllm_jax import distributed, files
from dllm_jax.data import Source
from dllm_jax.losses import Objective, least_variance
from dllm_jax.losses.clipping import check_interval
from dllm_jax.losses.objective import check_whole_blocks
from dllm_jax.nn.transformer import TransformerConfig
from dllm_jax.sharding import scope
from dllm_jax.training.loop import Fit, fit, looked_at
from dllm_jax.training.records import interrupts
from dllm_jax.training.step import TrainState, trained
from dllm_jax.typing import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a run with blocks of its own size."""

    until: int
    """The step that ends it."""
    block_size: int
    """0: the whole text is one block, and attention bidirectional."""
    tune: int = 0
    """So many held-out batches, on which the phase's interval of noise is chosen when it begins:
    the one whose loss varies least (`losses.least_variance`, BD3-LM). 0: as the noise says."""


def check_phases(phases: tuple[Phase, ...]) -> None:
    """Raises ValueError where one does not end after the one before it, or has no such blocks."""
    ends = [phase.until for phase in phases]
    if ends != sorted(set(ends)) or min(ends, default=1) < 1:
        raise ValueError(f"phases end at {ends}: each must end after the one before it, from 1 on")
    sizes = [phase.block_size for phase in phases]
    if min(sizes, default=0) < 0:
        raise ValueError(f"phases have blocks of {sizes}: 0 is the whole text")
    for phase in phases:
        if phase.tune < 0 or phase.tune == 1:
            raise ValueError(f"tune={phase.tune}: one batch has no variance; give more, or 0")


class Part(NamedTuple):
    """Steps with blocks of one size."""

    until: int  # the step that ends it
    block_size: int | None = None  # None: as the settings say
    tune: int = 0


def listed(phases: tuple[Phase, ...], steps: int) -> list[Part]:
    """The phases that a run of so many steps comes to; the last one holds until the end."""
    if not phases:
        return [Part(steps)]
    ends = [min(phase.until, steps) for phase in phases[:-1]]
    found, before = [], 0
    for until, phase in zip([*ends, steps], phases, strict=True):
        if until > before:  # else the run ends before it begins
            found.append(Part(until, phase.block_size, phase.tune))
        before = until
    return found


def in_words(phases: tuple[Phase, ...]) -> str:
    """The block sizes and where they change; where the last phase ends changes nothing."""
    if not phases:
        return "none"
    *before, last = phases
    tuned = lambda phase: f" tuned on {phase.tune} batches" if phase.tune else ""  # noqa: E731
    blocks = lambda phase: f"blocks of {phase.block_size}{tuned(phase)}"  # noqa: E731
    parts = [f"{blocks(phase)} until step {phase.until}" for phase in before]
    return ", then ".join([*parts, blocks(last)])


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
        changes: dict[str, Any] = {"block_size": max(size, 1)}
        if isinstance(model.config, TransformerConfig):
            changes["attention"] = attention
        elif attention != model.config.attention or not hasattr(model.config, "block_size"):
            raise ValueError(
                f"block_size={size}: the attention of a {type(model).__name__} is"
                f" {model.config.attention}"
            )
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
    settings: Mapping[str, Any] | None = None,
) -> tuple[TrainState, Any]:
    """As `fit`, phase after phase.

    Args:
      phases: of the noise's block size, and of attention where it is not causal.
      evaluations: as `Evaluation`, with the phase's model before its arguments.

    Returns:
      The last state, and the model of the phase that it is of.

    Raises:
      ValueError: as `fit`; or rows of several documents are not whole blocks of a phase; or one is
        tuned whose noise has no interval, or without held-out rows.
    """
    started, own, begins = time.monotonic(), model, 0
    about = {**about, "phases": in_words(phases)}
    settings = {**(settings or {}), "steps": config.steps}  # of all phases
    listing = listed(phases, config.steps)
    parts = [(part, *of_size(model, objective, part.block_size)) for part in listing]
    if len(source) and source[0].segments is not None:
        for _, _, aim in parts:  # now, not when a phase comes
            check_whole_blocks(config.length, block_size_of(aim) or 0)
    for part, _, aim in parts:
        if not part.tune:
            continue
        if heldout is None:
            raise ValueError(f"tune={part.tune}: there are no held-out rows to choose by")
        if len(heldout) < 2 * config.batch:
            raise ValueError(
                f"tune={part.tune}: an interval is chosen by at least two batches of {config.batch}"
                f" held-out rows, and there are {len(heldout)}"
            )
        check_interval(aim)
    with interrupts() as interrupted:  # a signal in the last step of a phase ends the run too
        for part, own, aim in parts:
            if part.tune:
                assert heldout is not None
                aim = _tuned(run, begins, part.tune, config, own, params, state, aim, heldout)
            minutes = config.minutes
            if minutes is not None:
                minutes -= (time.monotonic() - started) / 60
            state = fit(
                run, dataclasses.replace(config, steps=part.until, minutes=minutes), own, params,
                state, aim, tx, source, heldout, about=about, begins=begins, settings=settings,
                evaluations={name: partial(ask, own) for name, ask in evaluations.items()},
            )  # fmt: skip
            if int(state.step) < part.until or distributed.any_process(interrupted()):
                break
            begins = part.until
    return state, own


def _tuned(
    run: Path,
    begins: int,
    count: int,
    config: Fit,
    model: Any,
    params: Params,
    state: TrainState,
    objective: Any,
    heldout: Source,
) -> Any:
    """The objective in the interval of noise that is best when a phase begins.

    It is in `<run>/interval-<step>.json`, from which a run goes on.
    """
    path = run / f"interval-{begins}.json"
    there = distributed.any_process(path.exists())  # all read it, or all take part in finding it
    if not there and int(state.step) <= begins:
        whole = {**params, **trained(state)}
        rows = looked_at(
            model, whole, heldout, config.batch, config.length, seed=config.seed,
            limit=count * config.batch,
        )  # fmt: skip
        with scope(whole):
            best, variances = least_variance(
                model, whole, rows, objective=objective, key=jax.random.key(config.seed)
            )
        noise = check_interval(best)
        found = {
            "interval": [noise.beta, noise.omega],
            "variances": [[*ends, value] for ends, value in variances.items()],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, json.dumps(found, indent=1) + "\n")
    if not path.exists():
        raise ValueError(f"{path} is lost: what it held cannot be found again; put it back")
    low, high = json.loads(path.read_text())["interval"]
    noise = dataclasses.replace(objective.noise, beta=low, omega=high)
    return dataclasses.replace(objective, noise=noise)
