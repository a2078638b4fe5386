"""An answer while it is written: what is shown of a step, on a terminal and in a log."""

import io
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from rich.console import Console

from dllm_jax import recipes
from dllm_jax.decode.generate import stream
from dllm_jax.testing import tiny
from dllm_jax.watch import Frame, LineView, LiveView, TextView, clean, segments
from dllm_jax.watch import frame as frame_of
from tests.test_cli import END, byte_tokenizer


def frame(ids: list[int], *, written: int, drafts: tuple[int, ...] = (), stop: int = 0) -> Frame:
    """An answer of one row behind a prompt of two tokens; 258 stands for nothing written."""
    array = np.array
    tokens = np.full((1, 128), 258)
    tokens[0, : 2 + len(ids)] = [1, 2, *ids]
    return Frame(
        tokens=tokens, open=tokens == 258, prompt=array([2]), written=array([2 + written]),
        ends=array([2 + len(ids)]), drafts=array([drafts]), stop=array([stop]), nfe=array([1]),
        queries=array([1]), mask_id=258, eos_ids=(END,),
    )  # fmt: skip


def test_segments():
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("aé")  # é is two tokens
    before = frame([ids[0], 258, 258, 258], written=1)
    half = frame([*ids[:2], 258, ids[0]], written=2)
    whole = frame([*ids, ids[0]], written=4)
    assert [tuple(s) for s in segments(tokenizer.decode, before, 0, None)] == [
        ("a", "new"),
        (" ░░░ ░░░ ░░░", "mask"),
    ]
    kinds = [s.kind for s in segments(tokenizer.decode, half, 0, before)]
    assert kinds == ["text", "mask", "new"]
    assert [tuple(s) for s in segments(tokenizer.decode, whole, 0, half)] == [
        ("a", "text"),
        ("é", "new"),
        ("a", "text"),
    ]
    drafted = frame(ids, written=3, drafts=tuple(ids))
    assert segments(tokenizer.decode, drafted, 0, drafted)[-1] == ("aé", "draft")
    behind_the_end = frame([ids[0], END, 258, ids[0]], written=2)
    assert segments(tokenizer.decode, behind_the_end, 0, None) == [("a", "new")]


def test_segments_of_what_changes():
    tokenizer = byte_tokenizer()
    a, b, c, d = tokenizer.encode("abcd")
    before = frame([a, b, c, d, 258], written=1)
    after = frame([a, d, c, 258, 258], written=1)
    assert segments(tokenizer.decode, after, 0, before) == [
        ("a", "text"), ("d", "edit"), ("c", "loose"), (" ░░░", "remask"), (" ░░░", "mask"),
    ]  # fmt: skip
    noise = after._replace(tokens=np.where(after.open, b, after.tokens))
    assert [s.kind for s in segments(tokenizer.decode, noise, 0, None)] == ["new", "noise"]
    file = io.StringIO()
    with LineView(file, tokenizer.decode) as view:
        view.show(before)
        view.show(after)
    assert file.getvalue().splitlines() == ["   1  [abcd] ░░░", "   1  a{d}c ░░░ ░░░"]


CANVAS = dict(attention="bidirectional", alignment="same_position", adapter=False, mask_id=31)
BLOCKS = dict(CANVAS, attention="block_causal", block_size=8)


@pytest.mark.parametrize(
    ("recipe", "changes", "seen"),
    [
        (recipes.ar(), {}, lambda s: s.written),
        (recipes.llada(block_size=8), CANVAS, lambda s: s.limit),
        (recipes.sdar(block_size=8, threshold=0.3), BLOCKS,
         lambda s: np.minimum((s.start // 8 + 1) * 8, s.limit)),
    ],
    ids=["ar", "llada", "sdar"],
)  # fmt: skip
def test_frames_hold_the_canvas_that_the_model_sees(recipe, changes, seen):
    model, params = tiny(eos_ids=(), **changes)
    rows = [[3, 4, 5], [6, 7, 8, 9, 10]]
    for state in stream(model, params, rows, recipe=recipe, max_new_tokens=13):
        shown = frame_of(state, recipe, ())
        names = ("written", "limit", "start", "stop", "prompt", "open")
        state = SimpleNamespace(**jax.device_get({name: getattr(state, name) for name in names}))
        running = state.stop == 0
        np.testing.assert_array_equal(shown.ends[running], seen(state)[running])
        for row in np.flatnonzero(running).tolist():
            here = shown.extent(row)
            assert (here.start, here.stop) == (state.prompt[row], shown.ends[row])
            masked = np.isin(shown.kinds(row, None), ["mask", "noise"])
            np.testing.assert_array_equal(masked, state.open[row, here])


def test_clean():
    assert clean("a\x1b[2Jb\r\nc\td\x07\x9b") == "a[2Jb\nc\td"


def test_live_view_leaves_the_answer():
    tokenizer = byte_tokenizer()
    text = "The quick brown fox jumps over the lazy dog, twice.\n\nThen it rests."
    ids = tokenizer.encode(text)
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=20, height=8, _environ={})
    with LiveView(console, tokenizer.decode, 1, keeps=True) as view:
        for done in range(1, len(ids) + 1, 3):
            view.show(frame(ids[:done] + [258] * 4, written=done))
        view.show(frame(ids, written=len(ids), stop=1))
    assert view.keeps
    assert "\x1b[32m" in file.getvalue() or ";32m" in file.getvalue()  # what is new stands out
    assert file.getvalue().count("\x1b[?25l") == file.getvalue().count("\x1b[?25h")
    assert screen(file.getvalue()) == [
        "The quick brown fox", "jumps over the lazy", "dog, twice.", "", "Then it rests.",
    ]  # fmt: skip


def screen(output: str) -> list[str]:
    """What a terminal shows after `output`: its lines, colours left out."""
    lines, row = [""], 0
    for code, char in re.findall(r"\x1b\[([\d;?]*[A-Za-z])|([^\x1b])", output, re.DOTALL):
        if char == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif code.endswith("A"):
            row -= int(code[:-1])
        elif code == "2K":
            lines[row] = ""
        elif char and char != "\r":
            lines[row] += char
    while lines and not lines[-1].strip():
        lines.pop()
    return [line.rstrip() for line in lines]


def test_live_view_keeps_only_what_is_final():
    """A recipe that revises may replace what is written but not final."""
    tokenizer = byte_tokenizer()
    ids, other = tokenizer.encode("one two three four"), tokenizer.encode("one two THREE four")
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=8, height=8, _environ={})
    with LiveView(console, tokenizer.decode, 1, keeps=True) as view:
        for written, tokens in ((4, ids), (4, ids), (8, other), (8, other)):
            view.show(frame(tokens, written=written))
        view.show(frame(other, written=len(other), stop=1))
    assert screen(file.getvalue()) == ["one two", "THREE", "four"]


def test_line_view_and_text_view():
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("one\ntwö")
    for kind, expected in (
        (LineView, ["   1  [one\\nt] ░░░", "   1  one\\nt[wö]"]),
        (TextView, ["one", "twö"]),
    ):
        file = io.StringIO()
        with kind(file, tokenizer.decode) as view:
            view.show(frame([*ids[:5], 258], written=5))
            view.show(frame(ids, written=len(ids), stop=1))
        assert file.getvalue().splitlines() == expected
