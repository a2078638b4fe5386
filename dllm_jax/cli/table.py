"""The recipes as text: all of them, or one with its options."""

import inspect
import json
import textwrap
from typing import Any

from dllm_jax import recipes
from dllm_jax.cli.choice import Choice

_COLUMNS = ("recipe", "noise", "attention", "predicts i at", "published for")


def every(*, as_json: bool) -> str:
    """The table: noise, attention, families and options of each recipe."""
    if as_json:
        return json.dumps([_facts(name) for name in recipes.TABLE], indent=1)
    rows = [_COLUMNS]
    for name, row in recipes.TABLE.items():
        rows.append((name, row.noise, row.attention, row.logits, ", ".join(row.families)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join(cells).rstrip())
        if row is not rows[0]:
            options = " ".join(_option(*item) for item in recipes.options_of(row[0]).items())
            lines += textwrap.wrap(options, 96, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def one(name: str, choice: Choice, *, as_json: bool) -> str:
    """What a recipe is, its options with their defaults, and its parts with their numbers."""
    parts = recipes.to_dict(choice.recipe)
    if as_json:
        return json.dumps(parts, indent=1)
    row = recipes.TABLE[name]
    about = (
        ("noise", row.noise),
        ("attention", row.attention),
        ("position i", f"predicted at {row.logits}"),
        ("families", ", ".join(row.families)),
    )
    options = (f"  {_option(*item)}" for item in recipes.options_of(name).items())
    return "\n".join([
        inspect.getdoc(row.make) or name,
        "",
        *(f"{label:<12}{value}" for label, value in about),
        "",
        "options (--set option=value)",
        *options,
        "",
        f"parts of {choice.name}",
        *_tree(parts),
    ])  # fmt: skip


def _facts(name: str) -> dict[str, Any]:
    row = recipes.TABLE[name]
    return {
        "name": name,
        "noise": row.noise,
        "attention": row.attention,
        "logits": row.logits,
        "families": list(row.families),
        "options": recipes.options_of(name),
        "recipe": recipes.to_dict(recipes.named(name)),
    }


def _option(name: str, default: Any) -> str:
    spelled = default if isinstance(default, str) else json.dumps(default)
    return f"{name}={'none' if default is None else spelled}"


def _tree(parts: dict[str, Any]) -> list[str]:
    """The parts that are there, a line each."""
    there = {name: value for name, value in parts.items() if name != "part" and value is not None}
    return [f"  {name:<14}{_spelled(value)}" for name, value in there.items()]


def _spelled(value: Any) -> str:
    """A part as Python would write it."""
    if not isinstance(value, dict):
        return repr(value)
    fields = (f"{k}={_spelled(v)}" for k, v in value.items() if k != "part")
    return f"{value['part']}({', '.join(fields)})"
