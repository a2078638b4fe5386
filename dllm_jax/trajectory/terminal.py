"""A trajectory's row at one step, drawn on a terminal."""

from typing import Any, get_args

from rich.console import Group
from rich.text import Text

from dllm_jax.trajectory.data import Colour, Decode, Row, Trajectory
from dllm_jax.trajectory.words import Words
from dllm_jax.watch import clean

# The ends and the middle of each scale; the ink is legible on all of them.
_SCALES = {
    "step": ((0xB4, 0xC6, 0xFC), (0x8F, 0xE3, 0xCB), (0xFC, 0xE0, 0x7F)),
    "confidence": ((0xFD, 0xBA, 0x8C), (0xFD, 0xF3, 0xC7), (0xA8, 0xD4, 0xFF)),
}
_INK = "#111111"
_MASK = "░░"


def draw(
    trajectory: Trajectory, decode: Decode, step: int | None, row: int, colour: Colour
) -> Group:
    """What `Trajectory.show` prints: the title, the canvas, a legend with figures."""
    if colour not in get_args(Colour):
        raise ValueError(f"colour={colour!r} is none of {', '.join(get_args(Colour))}")
    if not 0 <= row < len(trajectory.rows):
        raise ValueError(f"row={row} is not one of 0 to {len(trajectory.rows) - 1}")
    chosen = trajectory.rows[row]
    at = chosen.at(step)
    title = f"{trajectory.title} · pass {at} of {chosen.steps}"
    if len(trajectory.rows) > 1:
        title += f" · row {row + 1} of {len(trajectory.rows)}"
    return Group(
        Text(title, "bold"),
        _canvas(trajectory, chosen, Words(decode), at, colour),
        _legend(chosen, colour),
        Text(_figures(chosen.figures(at)), "dim"),
    )


def _canvas(trajectory: Trajectory, row: Row, words: Words, step: int, colour: Colour) -> Text:
    canvas = row.canvas(step)
    stopped = bool(row.stop[step])
    end = len(canvas.tokens) if trajectory.whole_canvas else int(row.reach[step])
    if stopped:
        end = int(row.written[step])
    text = Text()
    shown = words.row(canvas.tokens[row.prompt : end], ~canvas.open[row.prompt : end])
    for at, word in enumerate(shown, row.prompt):
        new = 0 < step == int(canvas.step[at])
        if canvas.open[at]:
            masked = canvas.tokens[at] == trajectory.mask_id
            word = _MASK if masked else words.text(int(canvas.tokens[at]))
            style = "yellow" if new and canvas.remasks[at] else "dim"
        elif not row.free[at]:
            style = ""
        else:
            share = canvas.probability[at]
            if colour == "step":
                share = (canvas.step[at] - 1) / max(row.steps - 1, 1)
            style = f"{_INK} on {_mix(colour, float(share))}"
            style += " bold underline" * new + " italic" * bool(canvas.edits[at])
        text.append(clean(word).replace("\n", "↵\n"), style)
    if row.drafts.shape[1] and not stopped:
        drafts = row.drafts[step]
        text.append(clean("".join(words.row(drafts, drafts >= 0))), "dim italic")
    return text


def _mix(colour: Colour, share: float) -> str:
    """A colour of a scale, `share` of the way."""
    low, middle, high = _SCALES[colour]
    if share > 0.5:
        low, middle, share = middle, high, share - 0.5
    parts = (round(a + (b - a) * 2 * share) for a, b in zip(low, middle, strict=True))
    return "#" + "".join(f"{part:02x}" for part in parts)


def _legend(row: Row, colour: Colour) -> Text:
    ends = ("pass 1", f"pass {row.steps}") if colour == "step" else ("0%", "100%")
    text = Text(f"{ends[0]} ", "dim")
    for part in range(16):
        text.append(" ", f"on {_mix(colour, part / 15)}")
    text.append(f" {ends[1]}   ", "dim").append("new", "bold underline").append("  ")
    return text.append("edited", "italic").append(f"  {_MASK} masked", "dim")


def _figures(figures: dict[str, Any]) -> str:
    return (
        f"{figures['tokens']} tokens in {figures['passes']} passes,"
        f" {figures['tokens_per_forward']:.2f} tokens per forward,"
        f" {figures['edits']} edits, {figures['remasks']} re-masked,"
        f" mean probability {figures['confidence']:.2f}, {figures['stop'].replace('_', ' ')}"
    )
