"""From a stream of decoding states to a trajectory."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dllm_jax.decode.generate import Prompt, stream
from dllm_jax.decode.state import DecodeState, Result, result
from dllm_jax.recipes import Denoise, Recipe, Verified, to_dict
from dllm_jax.trajectory.data import COMMIT, EDIT, NOISE, REMASK, Row, Trajectory
from dllm_jax.typing import Key, Params


def record(
    model: Any,
    params: Params,
    prompt: Prompt | Sequence | jax.Array,
    *,
    recipe: Recipe,
    max_new_tokens: int = 128,
    key: Key | None = None,
    title: str | None = None,
) -> tuple[Result, Trajectory]:
    """As `generate`, and keeps what each pass did. Slower: every state goes to the host.

    Args:
      title: of the trajectory; by default the model's family and the parts of the recipe.

    Raises:
      TypeError, ValueError: as `generate`.
    """
    config = model.config
    recorder = Recorder(
        recipe, eos_ids=config.eos_ids, title=title or f"{config.family} · {_parts(recipe)}"
    )
    state = None
    for state in stream(
        model, params, prompt, recipe=recipe, max_new_tokens=max_new_tokens, key=key
    ):
        recorder.add(state)
    assert state is not None  # a stream has at least one
    return result(state, max_new_tokens), recorder.trajectory()


class Recorder:
    """Takes the states of a stream one by one, so that somebody else may look at them too.

    A row's step is a state in which it has had another forward pass.
    """

    def __init__(self, recipe: Recipe, *, eos_ids: tuple[int, ...] = (), title: str = ""):
        self._recipe, self._eos_ids, self._title = recipe, eos_ids, title
        self._logs: list[_Log] = []
        self._mask_id = 0

    def add(self, state: DecodeState) -> None:
        """Notes what has changed since the last state."""
        batch = _Seen(*jax.device_get([getattr(state, name) for name in _Seen._fields]))
        for number in range(len(batch.nfe)):
            seen = _Seen(*(array[number] for array in batch))
            if isinstance(self._recipe, Verified):  # there is neither a canvas nor a block ahead
                tokens = np.where(seen.open, state.mask_id, seen.tokens)
                seen = seen._replace(tokens=tokens, start=seen.written, reach=seen.written)
            if number == len(self._logs):
                self._logs.append(_Log(seen, state.mask_id))
            self._logs[number].add(seen)
        self._mask_id = state.mask_id

    def trajectory(self) -> Trajectory:
        """What was recorded so far."""
        try:
            recipe = to_dict(self._recipe)
        except ValueError:
            recipe = None
        whole = isinstance(self._recipe, Denoise) and self._recipe.cache in _WHOLE
        return Trajectory(
            title=self._title, recipe=recipe, mask_id=self._mask_id,
            eos_ids=tuple(self._eos_ids), whole_canvas=whole,
            rows=tuple(log.row() for log in self._logs),
        )  # fmt: skip


_WHOLE = ("none", "prefix", "dual")  # caches of recipes whose passes see the whole canvas


class _Seen(NamedTuple):
    """What is read of a state: of a batch, or of one row."""

    tokens: Any
    open: Any
    logprobs: Any
    free: Any
    prompt: Any
    end: Any
    nfe: Any
    queries: Any
    start: Any
    reach: Any
    written: Any
    stop: Any
    drafts: Any


_COLUMNS = ("nfe", "queries", "start", "reach", "written", "stop", "drafts")


class _Log:
    """One row so far."""

    def __init__(self, seen: _Seen, mask_id: int):
        end = int(seen.end)
        self._free, self._prompt = seen.free[:end], int(seen.prompt)
        self._open = self._free
        # The first state may have a pass behind it. What it wrote was a mask; uniform noise that
        # it drew anew is not known any more.
        written = self._free & ~seen.open[:end]
        self._before = self._tokens = np.where(written, mask_id, seen.tokens[:end])
        first = seen
        if seen.nfe:
            at = seen.prompt
            first = seen._replace(nfe=0, queries=0, start=at, reach=at, written=at, stop=0)
            first = first._replace(drafts=np.zeros_like(seen.drafts))
        self._columns = {name: [getattr(first, name)] for name in _COLUMNS}
        self._events: list[np.ndarray] = []  # [5, events of a step]
        self._probabilities: list[np.ndarray] = []

    def add(self, seen: _Seen) -> None:
        if seen.nfe <= self._columns["nfe"][-1]:
            return
        step = len(self._columns["nfe"])
        for name, column in self._columns.items():
            column.append(getattr(seen, name))
        tokens, is_open = seen.tokens[: len(self._free)], seen.open[: len(self._free)]
        was_open, differs = self._open, tokens != self._tokens
        kind = np.full(len(tokens), -1)
        kind[differs & was_open & is_open] = NOISE
        kind[differs & ~was_open & ~is_open] = EDIT
        kind[~was_open & is_open] = REMASK
        kind[was_open & ~is_open] = COMMIT
        (at,) = np.nonzero(kind >= 0)
        self._events.append(np.stack([np.full(len(at), step), at, tokens[at], kind[at]]))
        chance = np.exp(seen.logprobs[at].astype(np.float32))
        self._probabilities.append(np.where(kind[at] <= EDIT, chance, 0).astype(np.float32))
        self._tokens, self._open = tokens, is_open

    def row(self) -> Row:
        step, position, token, kind = (
            np.concatenate(self._events, axis=1) if self._events else np.zeros((4, 0))
        ).astype(np.int32)
        columns = {name: np.array(column, np.int32) for name, column in self._columns.items()}
        return Row(
            tokens=self._before.astype(np.int32), free=self._free, prompt=self._prompt,
            step=step, position=position, token=token, kind=kind,
            probability=np.concatenate([np.zeros(0, np.float32), *self._probabilities]),
            **columns,
        )  # fmt: skip


def _parts(recipe: Recipe) -> str:
    """The parts of a recipe, for a title."""
    if isinstance(recipe, Verified):
        return f"drafts of {recipe.width}" if recipe.width else "ar"
    parts = [getattr(recipe, field.name) for field in dataclasses.fields(recipe)]
    names = [type(part).__name__ for part in parts if not isinstance(part, str | bool | None)]
    return ", ".join(dict.fromkeys(name for name in names if name != "Sampling"))
