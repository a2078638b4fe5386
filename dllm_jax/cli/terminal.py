"""The two streams of a terminal: answers on stdout, remarks and progress on stderr."""

import contextlib
import os
import sys

from rich.console import Console
from rich.text import Text

from dllm_jax.watch import Decode, LineView, LiveView, Out, View


def note(text: str) -> None:
    """A remark: one dim line on stderr, behind what stdout has so far."""
    sys.stdout.flush()
    whole = not sys.stderr.isatty()  # a log keeps its lines; a terminal breaks them between words
    _console(stderr=True).print(text, style="dim", markup=False, soft_wrap=whole)


def status(text: str) -> contextlib.AbstractContextManager[object]:
    """A spinner on stderr while something takes long; nothing where there is no terminal."""
    if not is_terminal(sys.stderr):
        return contextlib.nullcontext()
    return _console(stderr=True).status(Text(f"{text} ...", "dim"), spinner_style="dim")


def view(decode: Decode, rows: int, *, keeps: bool) -> View:
    """What shows a batch of `rows` answers under way.

    Args:
      keeps: the view may leave the answer on stdout; else stdout is somebody else's.
    """
    if keeps and is_terminal(sys.stdout):
        return LiveView(_console(stderr=False), decode, rows, keeps=True)
    if is_terminal(sys.stderr):
        return LiveView(_console(stderr=True), decode, rows, keeps=False)
    return LineView(sys.stderr, decode)


def is_terminal(file: Out) -> bool:
    """Whether the cursor can be moved there."""
    return getattr(file, "isatty", bool)() and os.environ.get("TERM") not in ("dumb", "unknown")


def _console(*, stderr: bool) -> Console:
    return Console(stderr=stderr, highlight=False, emoji=False)
