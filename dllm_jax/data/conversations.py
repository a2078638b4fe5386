"""Conversations on disk: a part is one `.npz` file of a few dozen of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dllm_jax import files
from dllm_jax.data.rows import Row


def write_part(path: Path, rows: Sequence[Sequence[int]], prompts: Sequence[int]) -> None:
    """Writes conversations as one file, whole or not at all.

    Args:
      rows: ids of each conversation.
      prompts: how many of a row's first ids are the prompt; the rest is the answer.
    """
    lengths = np.array([len(row) for row in rows], np.int32)
    flat = (
        np.concatenate([np.asarray(row, np.int32) for row in rows])
        if rows
        else np.zeros(0, np.int32)
    )
    with files.whole(path) as draft, draft.open("wb") as file:
        np.savez_compressed(
            file, tokens=flat, lengths=lengths, prompts=np.asarray(prompts, np.int32)
        )


class Conversations:
    """The conversations of a split, as a random-access source for `grain`."""

    def __init__(self, folder: str | Path, split: str, limit: int | None = None):
        """Reads the parts `<split>-*.npz` of a folder; `limit` keeps the first so many rows.

        Raises:
          FileNotFoundError: the folder has no part of that split.
        """
        paths = sorted(Path(folder).glob(f"{split}-*.npz"))
        if not paths:
            raise FileNotFoundError(
                f"no {split}-*.npz in {folder}; write some with scripts/distill.py --split {split}"
            )
        self.folder, self.split = str(folder), split
        self.rows: list[Row] = []
        for path in paths:
            with np.load(path) as part:
                rows = np.split(part["tokens"], np.cumsum(part["lengths"]))[:-1]
                self.rows += [Row(r, int(p)) for r, p in zip(rows, part["prompts"], strict=True)]
        self.rows = self.rows[:limit]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def __repr__(self) -> str:
        return f"Conversations({self.folder!r}, {self.split!r}, {len(self)} rows)"

    @property
    def sizes(self) -> np.ndarray:
        """int64[N]: the tokens of each."""
        return np.array([len(row.tokens) for row in self.rows], np.int64)

    @property
    def prompts(self) -> np.ndarray:
        """int64[N]: of each, the tokens of its prompt."""
        return np.array([row.prompt for row in self.rows], np.int64)

    @property
    def answer_tokens(self) -> int:
        """Tokens of all answers, each counted once."""
        return int((self.sizes - self.prompts).sum())
