"""An answer while it is written: on a terminal a canvas that denoises, elsewhere plain lines.

    Frame (host copies of a decoding state)  ->  segments (text and its kind)  ->  a view

Three views with one face, `show(frame)` and `close()`: `LiveView` redraws a terminal, `LineView`
prints a line a step, `TextView` prints text once it is final.
"""

import re
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

Kind = Literal["text", "new", "mask", "draft"]
Decode = Callable[[Sequence[int]], str]


@runtime_checkable
class Out(Protocol):
    """Where text goes: stdout, a file."""

    def write(self, text: str, /) -> object: ...
    def flush(self) -> object: ...


_SHADE = " ░░░"  # a masked position: about the size of a word
_STYLE = {"text": "", "new": "bold green", "mask": "dim", "draft": "dim italic"}
_PLAIN = {"text": "{}{}", "new": "{}[{}]", "mask": "{}{}", "draft": "{}({})"}
_HALF = "\N{REPLACEMENT CHARACTER}"  # half of a character: the rest comes with the next token


class Frame(NamedTuple):
    """One step of a batch, on the host."""

    tokens: np.ndarray  # int32[B, L]: prompt, answer, and mask_id where the canvas is not written
    prompt: np.ndarray  # int32[B]: tokens of the prompt
    written: np.ndarray  # int32[B]: tokens that are final and gapless, prompt included
    ends: np.ndarray  # int32[B]: where the canvas ends
    drafts: np.ndarray  # int32[B, W]: guesses at what follows `written`
    stop: np.ndarray  # int32[B]: 0 while the row is running
    nfe: np.ndarray  # int32[B]: forward passes so far
    queries: np.ndarray  # int32[B]: entries processed in them
    mask_id: int
    eos_ids: tuple[int, ...]

    def answer(self, row: int) -> np.ndarray:
        """The final, gapless ids of a row."""
        return self.tokens[row, self.prompt[row] : self.written[row]]

    def canvas(self, row: int) -> np.ndarray:
        """The ids of a row's answer up to the end of its canvas, mask_id where nothing is written.

        What lies behind an end-of-turn token is not part of it.
        """
        running = not self.stop[row]
        ids = self.tokens[row, self.prompt[row] : self.ends[row] if running else self.written[row]]
        ends = np.flatnonzero(np.isin(ids, self.eos_ids))
        return ids[: ends[0] + 1] if len(ends) else ids


class Segment(NamedTuple):
    """A run of text of one kind."""

    text: str
    kind: Kind


def segments(decode: Decode, frame: Frame, row: int, before: Frame | None) -> list[Segment]:
    """The text of a row, cut where the kind changes; "new" is what `before` did not have."""
    ids = frame.canvas(row)
    old = np.zeros(len(ids), bool)
    if before is not None:
        earlier = before.canvas(row)[: len(ids)]
        old[: len(earlier)] = (earlier == ids[: len(earlier)]) & (earlier != before.mask_id)
    kinds: list[Kind] = ["text" if o else "new" for o in old]
    kinds = ["mask" if i == frame.mask_id else k for i, k in zip(ids, kinds, strict=True)]
    found: list[Segment] = []
    at = 0
    while at < len(ids):
        end = at
        while end < len(ids) and (kinds[end] == "mask") == (kinds[at] == "mask"):
            end += 1
        if kinds[at] == "mask":
            found.append(Segment(_SHADE * (end - at), "mask"))
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
    """A context manager that closes itself."""

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
        raise NotImplementedError

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
                self._scroll(len(self._wrap(Text(stable))) - 1, lines)
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
    tokens = int((frame.written - frame.prompt).sum())
    rate = tokens / max(int(frame.nfe.sum()), 1)
    return f"pass {int(frame.nfe.max())}, {tokens} tokens, {rate:.2f} tokens per forward"


class LineView(View):
    """One line a step, for logs: new tokens in [], drafts in (), masked positions shaded."""

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
    return _PLAIN[part.kind].format(" " * (len(part.text) - len(word)), word)


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
