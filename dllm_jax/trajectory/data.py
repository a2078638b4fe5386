"""A trajectory as plain data: the canvas before the first pass, and what each pass changed of it.

The rows of a batch are apart, and step n of a row is the state after its n-th recorded pass, so a
canvas can be rebuilt at any step. The JSON form has the names of the fields here.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from rich.console import Console

from dllm_jax.decode.state import STOP_REASONS

FORMAT, VERSION = "dllm_jax.trajectory", 1

KINDS = ("commit", "edit", "remask", "noise")
"""What may happen to a position: it is written; its token is replaced by another; it is opened
again; or it stays open and its noise changes (uniform noise, accepted tokens included)."""

COMMIT, EDIT, REMASK, NOISE = range(len(KINDS))

Decode = Callable[[Sequence[int]], str]
Colour = Literal["step", "confidence"]


class Canvas(NamedTuple):
    """A row at one step."""

    tokens: np.ndarray  # int32[L]
    open: np.ndarray  # bool[L]: not written, or opened again
    step: np.ndarray  # int32[L]: of the last change; 0: none so far
    probability: np.ndarray  # float32[L]: of the token, in the pass that wrote it; 0 where none did
    edits: np.ndarray  # int32[L]: how often a written token was replaced
    remasks: np.ndarray  # int32[L]: how often the position was opened again


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """One row of a batch: S steps, E events in their order, L positions up to the canvas's end."""

    tokens: np.ndarray  # int32[L]: before the first pass
    free: np.ndarray  # bool[L]: positions that are to be written; the others are given
    prompt: int  # where the answer begins
    # At each step, 0 (before the first pass) included:
    nfe: np.ndarray  # int32[S + 1]: forward passes so far
    queries: np.ndarray  # int32[S + 1]: entries processed in them
    start: np.ndarray  # int32[S + 1]: where the blocks that are denoised begin
    reach: np.ndarray  # int32[S + 1]: and where they end
    written: np.ndarray  # int32[S + 1]: tokens that are final and gapless, prompt included
    stop: np.ndarray  # int32[S + 1]: index into `STOP_REASONS`
    drafts: np.ndarray  # int32[S + 1, W]: guesses at the tokens behind `written` (speculation)
    # Of each event:
    step: np.ndarray  # int32[E]: from 1 to S
    position: np.ndarray  # int32[E]
    token: np.ndarray  # int32[E]: what is there now
    probability: np.ndarray  # float32[E]: of a commit's or edit's token; else 0
    kind: np.ndarray  # int32[E]: index into `KINDS`

    @property
    def steps(self) -> int:
        return len(self.nfe) - 1

    def canvas(self, step: int | None = None) -> Canvas:
        """The row after a step, the last one by default; 0 is before the first pass."""
        count = int(np.searchsorted(self.step, self.at(step), side="right"))
        where, kind = self.position[:count], self.kind[:count]
        length = len(self.tokens)
        last = np.full(length, -1)
        last[where] = np.arange(count)  # of equal positions, the latest
        changed, event = last >= 0, last[last >= 0]
        canvas = Canvas(
            tokens=self.tokens.copy(),
            open=self.free.copy(),
            step=np.zeros(length, np.int32),
            probability=np.zeros(length, np.float32),
            edits=np.bincount(where[kind == EDIT], minlength=length).astype(np.int32),
            remasks=np.bincount(where[kind == REMASK], minlength=length).astype(np.int32),
        )
        canvas.tokens[changed] = self.token[event]
        canvas.open[changed] = self.kind[event] >= REMASK
        canvas.step[changed] = self.step[event]
        canvas.probability[changed] = self.probability[event]
        return canvas

    def answer(self, step: int | None = None) -> np.ndarray:
        """int32[N]: the final, gapless ids behind the prompt."""
        return self.canvas(step).tokens[self.prompt : self.written[self.at(step)]]

    def committed(self) -> np.ndarray:
        """int32[L]: the step that first wrote each position; 0: given, or never written."""
        first = np.zeros(len(self.tokens), np.int32)
        wrote = self.kind == COMMIT
        first[self.position[wrote][::-1]] = self.step[wrote][::-1]  # the earliest comes last
        return first

    def figures(self, step: int | None = None) -> dict[str, Any]:
        """What the row cost and how sure it was, up to a step.

        tokens (written ones; once the row has stopped, those of its answer), passes,
        tokens_per_forward, overhead, edits, remasks, confidence (mean probability) and stop.
        """
        at, canvas = self.at(step), self.canvas(step)
        counted = self.free & ~canvas.open
        if self.stop[at]:
            counted[self.written[at] :] = False
        tokens, passes = int(counted.sum()), int(self.nfe[at])
        return {
            "tokens": tokens,
            "passes": passes,
            "tokens_per_forward": tokens / max(passes, 1),
            "overhead": int(self.queries[at]) / max(tokens, 1),
            "edits": int(canvas.edits.sum()),
            "remasks": int(canvas.remasks.sum()),
            "confidence": float(canvas.probability[counted].mean()) if tokens else 0.0,
            "stop": STOP_REASONS[int(self.stop[at])],
        }

    def at(self, step: int | None) -> int:
        """A step as an index: None is the last one.

        Raises:
          ValueError: there is no such step.
        """
        if step is None:
            return self.steps
        if not 0 <= step <= self.steps:
            raise ValueError(f"step={step} is not one of 0 to {self.steps}")
        return step


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Trajectory:
    """The rows of a batch, and what they have in common."""

    title: str  # the model and the recipe, for people
    recipe: Mapping[str, Any] | None  # for `recipes.from_dict`; None: it has parts of one's own
    mask_id: int  # what stands where nothing is written yet (masked noise)
    eos_ids: tuple[int, ...]
    whole_canvas: bool  # the model sees all of the canvas; else it ends at `reach`
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data (JSON), for `from_dict`."""
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        shared |= {"eos_ids": list(self.eos_ids), "rows": [_row_to_dict(row) for row in self.rows]}
        return {"format": FORMAT, "version": VERSION, "kinds": list(KINDS), **shared}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Trajectory":
        """The trajectory of `to_dict`'s data.

        Raises:
          ValueError: it is something else, of another version, or damaged.
        """
        if data.get("format") != FORMAT:
            raise ValueError(f"format {data.get('format')!r} is not {FORMAT!r}")
        if data.get("version") != VERSION:
            raise ValueError(
                f"a trajectory of version {data.get('version')!r}; this dllm_jax reads {VERSION}"
            )
        try:
            fields: dict[str, Any] = {f.name: data[f.name] for f in dataclasses.fields(cls)}
            fields["rows"] = tuple(_row_from_dict(row) for row in fields["rows"])
            fields["eos_ids"] = tuple(fields["eos_ids"])
            return cls(**fields)
        except (KeyError, TypeError) as error:
            raise ValueError(f"the trajectory is damaged: {error!r}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON form."""
        Path(path).write_text(json.dumps(self.to_dict()), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Trajectory":
        """Reads what `save` wrote.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: it holds something else, or is damaged.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls.from_dict(data if isinstance(data, dict) else {})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def html(self, decode: Decode, path: str | os.PathLike[str]) -> None:
        """Writes a page that shows every step; it needs no other file and no network.

        Args:
          decode: ids to text. One that gives special tokens too names them on the page
            (`partial(tokenizer.decode, skip_special=False)`); else their ids are shown.
        """
        from dllm_jax.trajectory.page import page

        Path(path).write_text(page(self, decode), encoding="utf-8")

    def show(
        self,
        decode: Decode,
        step: int | None = None,
        *,
        row: int = 0,
        colour: Colour = "step",
        console: Console | None = None,
    ) -> None:
        """Prints a row at a step (the last one by default), coloured by step or confidence.

        Raises:
          ValueError: there is no such row or step.
        """
        from dllm_jax.trajectory.terminal import draw

        (console or Console(highlight=False)).print(draw(self, decode, step, row, colour))


def _row_to_dict(row: Row) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in dataclasses.fields(row):
        value = getattr(row, field.name)
        if not isinstance(value, np.ndarray):
            found[field.name] = value
        elif value.dtype == np.float32:
            # The shortest decimals that are read as the same float32.
            found[field.name] = [float(str(number)) for number in value]
        else:
            found[field.name] = value.astype(np.int32).tolist()
    return found


def _row_from_dict(data: Mapping[str, Any]) -> Row:
    dtypes = {"free": np.bool_, "probability": np.float32}
    fields: dict[str, Any] = {"prompt": data["prompt"]}
    for field in dataclasses.fields(Row):
        if field.name != "prompt":
            dtype = dtypes.get(field.name, np.int32)
            fields[field.name] = np.array(data[field.name], dtype=dtype)
    fields["drafts"] = fields["drafts"].reshape(len(fields["nfe"]), -1)
    return Row(**fields)
