"""Files that are there whole or not at all."""

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from etils import epath

P = TypeVar("P", Path, epath.Path)


@contextlib.contextmanager
def whole(path: P) -> Iterator[P]:
    """A draft beside `path` to write; it takes that name, and the place of what had it, at the end.

    After an error nothing of it stays, and `path` is as it was.
    """
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:16]}")  # hosts share disks, and pids
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write(path: P, text: str) -> None:
    """Writes a text file whole."""
    with whole(path) as draft:
        draft.write_text(text, encoding="utf-8")
