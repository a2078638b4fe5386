"""A trajectory as one HTML page, which needs no other file and no network."""

import html
import json
import re
from importlib.resources import files

from dllm_jax.trajectory.data import Decode, Trajectory
from dllm_jax.trajectory.words import Words


def page(trajectory: Trajectory, decode: Decode) -> str:
    """The page; see `Trajectory.html`."""
    words = Words(decode)
    for row in trajectory.rows:
        words.read(row)
    facts = {
        "trajectory": trajectory.to_dict(),
        "texts": words.texts,
        "joined": {",".join(map(str, run)): text for run, text in words.joined.items()},
    }
    parts = {"title": html.escape(trajectory.title), "data": _script(facts)}
    template = files("dllm_jax").joinpath("assets", "trajectory.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(title|data)\}\}", lambda found: parts[found[1]], template)


def _script(facts: object) -> str:
    """JSON that no parser of HTML takes for markup, whatever the texts are."""
    text = json.dumps(facts, separators=(",", ":"))
    return text.translate({ord(char): f"\\u{ord(char):04x}" for char in "<>&"})
