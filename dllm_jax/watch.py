"""An answer while it is written: on a terminal a canvas that denoises, elsewhere plain lines.

    Frame (host copies of a decoding state)  ->  segments (text and its kind)  ->  a view

Three views with one face, `show(frame)` and `close()`: `LiveView` redraws a terminal, `LineView`
prints a line a step, `TextView` prints text once it is final.
"""

import itertools
import re
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from dllm_jax.decode.state import DecodeState
from dllm_jax.recipes import Recipe, Verified

# Final text; written, but not final yet; written in this step; replaced in it; masked; masked
# again in this step; random (uniform noise); guessed (speculation).
Kind = Literal["text", "loose", "new", "edit", "mask", "remask", "noise", "draft"]
Decode = Callable[[Sequence[int]], str]


@runtime_checkable
class Out(Protocol):
    """Where text goes: stdout, a file."""

    def write(self, text: str, /) -> object: ...
    def flush(self) -> object: ...


_SHADE = " ░░░"  # a masked position: about the size of a word
_STYLE = {
    "text": "", "loose": "", "new": "bold green", "edit": "bold yellow", "mask": "dim",
    "remask": "yellow", "noise": "dim", "draft": "dim italic",
}  # fmt: skip
_MARKS = {"new": "[]", "edit": "{}", "draft": "()"}  # around a kind where there are no colours
_HALF = "\N{REPLACEMENT CHARACTER}"  # half of a character: the rest comes with the next token


class Frame(NamedTuple):
    """One step of a batch, on the host."""

    tokens: np.ndarray  # int32[B, L]: prompt, answer, and noise where the canvas is not written
    open: np.ndarray  # bool[B, L]: where it is not
    prompt: np.ndarray  # int32[B]: tokens of the prompt
    written: np.ndarray  # int32[B]: tokens that are final and gapless, prompt included
    ends: np.ndarray  # int32[B]: where the canvas ends that the model sees
    drafts: np.ndarray  # int32[B, W]: guesses at what follows `written`
    stop: np.ndarray  # int32[B]: 0 while the row is running
    nfe: np.ndarray  # int32[B]: forward passes so far
    queries: np.ndarray  # int32[B]: entries processed in them
    mask_id: int
    eos_ids: tuple[int, ...]

    def answer(self, row: int) -> np.ndarray:
        """The final, gapless ids of a row."""
        return self.tokens[row, self.prompt[row] : self.written[row]]

    def extent(self, row: int) -> slice:
        """The positions of a row's answer up to the end of its canvas.

        What lies behind an end-of-turn token is not part of it.
        """
        start = int(self.prompt[row])
        end = int(self.written[row] if self.stop[row] else self.ends[row])
        there = ~self.open[row, start:end]
        (ends,) = np.nonzero(np.isin(self.tokens[row, start:end], self.eos_ids) & there)
        return slice(start, start + int(ends[0]) + 1 if len(ends) else end)

    def kinds(self, row: int, before: "Frame | None") -> list[Kind]:
        """The kind of each position of the extent; what is new is what `before` did not have."""
        here = self.extent(row)
        tokens, is_open = self.tokens[row, here], self.open[row, here]
        final = np.arange(here.start, here.stop) < self.written[row]
        found = np.where(final, "text", "loose").astype(object)
        was_open = np.ones_like(is_open) if before is None else before.open[row, here]
        if before is not None:
            found[before.tokens[row, here] != tokens] = "edit"
        found[was_open] = "new"
        found[is_open] = np.where(tokens[is_open] == self.mask_id, "mask", "noise")
        found[is_open & ~was_open] = "remask"
        return found.tolist()


def frame(state: DecodeState, recipe: Recipe, eos_ids: tuple[int, ...]) -> Frame:
    """A state as it is shown; waits for its pass."""
    names = ("tokens", "open", "prompt", "written", "drafts", "stop", "nfe", "queries")
    host = jax.device_get({name: getattr(state, name) for name in (*names, "reach", "limit")})
    reach, limit = host.pop("reach"), host.pop("limit")
    if isinstance(recipe, Verified):
        ends = host["written"]
    else:
        ends = limit if recipe.cache in ("none", "prefix", "dual") else np.minimum(reach, limit)
    return Frame(**host, ends=ends, mask_id=state.mask_id, eos_ids=eos_ids)


class Segment(NamedTuple):
    """A run of text of one kind."""

    text: str
    kind: Kind


def segments(decode: Decode, frame: Frame, row: int, before: Frame | None) -> list[Segment]:
    """The text of a row, cut where the kind changes; "new" is what `before` did not have."""
    ids, kinds = frame.tokens[row, frame.extent(row)], frame.kinds(row, before)
    hidden = [kind in ("mask", "remask") for kind in kinds]
    found: list[Segment] = []
    at = 0
    while at < len(ids):
        end = at
        while end < len(ids) and hidden[end] == hidden[at]:
            end += 1
        if hidden[at]:
            runs = itertools.groupby(kinds[at:end])
            found += [Segment(_SHADE * len(list(run)), kind) for kind, run in runs]
        else:
            found += _cut(decode, ids[at:end].tolist(), kinds[at:end])
        at = end
    if frame.drafts.shape[1] and not frame.stop[row]:
        found.append(Segment(clean(decode(frame.drafts[row].tolist()).rstrip(_HALF)), "draft"))
    return [segment for segment in found if segment.text]


def _cut(decode: Decode, ids: list[int], kinds: list[Kind]) -> list[Segment]:
    """A run without masks as segments, decoded from its start: a character may span two tokens."""
    found: list[Segment] = []
    shown = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or kinds[end] != kinds[end - 1]:
            text = decode(ids[:end]).rstrip(_HALF)
            found.append(Segment(clean(text[shown:]), kinds[end - 1]))
            shown = len(text)
    return found


def clean(text: str) -> str:
    """The text without control characters but tab and newline: a model may write escape codes."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text.replace("\r\n", "\n"))


class View:
    """A context manager that closes itself. This one shows nothing."""

    keeps = False  # whether the answer stays where it was shown, so that nobody need print it again
    skips = False  # whether it is enough to see the newest frame

    def __enter__(self) -> "View":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def show(self, frame: Frame) -> None:
        """Shows a step."""

    def close(self) -> None:
        """Takes the view down."""


class LiveView(View):
    """Redraws the canvas in place.

    Args:
      keeps: lines that are final scroll up and stay, so an answer may be longer than the screen;
        else the view vanishes when it is closed.
    """

    skips = True

    def __init__(self, console: Console, decode: Decode, rows: int, *, keeps: bool):
        self.keeps = keeps and rows == 1
        self._console, self._decode = console, decode
        self._before: Frame | None = None
        self._printed = 0  # wrapped lines of the answer that have scrolled up
        self._width = console.width  # that those were wrapped to
        self._live = Live(
            Text("compiling ...", style="dim"), console=console, auto_refresh=False, transient=True
        )

    def __enter__(self) -> "LiveView":
        self._live.start(refresh=True)
        return self

    def show(self, frame: Frame) -> None:
        """Draws a step over the last one."""
        rows = len(frame.stop)
        room = max((self._console.height - 2) // rows - (rows > 1), 1)
        drawn: list[Text] = []
        for row in range(rows):
            parts = segments(self._decode, frame, row, self._before)
            text = Text.assemble(*((part.text, _STYLE[part.kind]) for part in parts))
            lines = self._wrap(text)
            if self.keeps:
                stable = "".join(part.text for part in _leading(parts))
                self._scroll(max(len(self._wrap(Text(stable))) - 1, 0), lines)
                lines = lines[self._printed :]
            if rows > 1:
                drawn.append(Text(f"[{row + 1}]", style="dim"))
            drawn += lines[-room:]
        self._before = frame
        self._live.update(Group(*drawn, Text(_status(frame), style="dim")), refresh=True)

    def close(self) -> None:
        """Takes the view down; with `keeps`, the answer stays. The cursor is back in any case."""
        if not self._live.is_started:
            return
        self._live.stop()
        if self.keeps and self._before is not None:
            answer = clean(self._decode(self._before.answer(0).tolist()))
            self._scroll(sys.maxsize, self._wrap(Text(answer)))

    def _wrap(self, text: Text) -> list[Text]:
        return list(text.wrap(self._console, self._width)) if text else []

    def _scroll(self, stable: int, lines: list[Text]) -> None:
        """Prints the lines up to `stable` above the view, where they stay."""
        for line in lines[self._printed : stable]:
            self._console.print(Text(line.plain), no_wrap=True, overflow="ignore", crop=False)
            self._printed += 1


def _leading(parts: list[Segment]) -> list[Segment]:
    """The segments that will not change any more."""
    for i, part in enumerate(parts):
        if part.kind != "text":
            return parts[:i]
    return parts


def _status(frame: Frame) -> str:
    shown = [frame.open[row, frame.extent(row)] for row in range(len(frame.stop))]
    tokens = sum(int((~is_open).sum()) for is_open in shown)
    rate = tokens / max(int(frame.nfe.sum()), 1)
    return f"pass {int(frame.nfe.max())}, {tokens} tokens, {rate:.2f} tokens per forward"


class LineView(View):
    """One line a step, for logs.

    New tokens are in [], replaced ones in {}, drafts in (), and masked positions shaded.
    """

    def __init__(self, file: Out, decode: Decode, *, width: int = 100):
        self._file, self._decode, self._width = file, decode, width
        self._before: Frame | None = None

    def show(self, frame: Frame) -> None:
        """Prints a line for each row that this step changed."""
        for row in range(len(frame.stop)):
            if self._before is not None and self._before.stop[row]:
                continue
            parts = segments(self._decode, frame, row, self._before)
            line = "".join(map(_plain, parts)).replace("\n", "\\n")
            if len(line) > self._width:
                line = "..." + line[3 - self._width :]
            name = f"[{row + 1}] " if len(frame.stop) > 1 else ""
            print(f"{name}{int(frame.nfe[row]):4d}  {line}", file=self._file, flush=True)
        self._before = frame


def _plain(part: Segment) -> str:
    word = part.text.lstrip(" ")
    left, right = _MARKS.get(part.kind, ("", ""))
    return " " * (len(part.text) - len(word)) + left + word + right


class TextView(View):
    """Writes the text of a single row as it becomes final, and nothing else."""

    keeps = True
    skips = True

    def __init__(self, file: Out, decode: Decode):
        self._file, self._decode = file, decode
        self._shown = 0
        self._half = ""

    def show(self, frame: Frame) -> None:
        """Writes what is new."""
        text = self._decode(frame.answer(0).tolist())
        whole = text.rstrip(_HALF)
        self._half = text[len(whole) :]
        self._file.write(whole[self._shown :])
        self._file.flush()
        self._shown = max(self._shown, len(whole))

    def close(self) -> None:
        """Ends the line."""
        self._file.write(self._half + "\n")
        self._file.flush()
