"""Conversations on disk, and the batches that training reads: shuffled, endless, resumable.

A part is one `.npz` file of a few dozen conversations. The pipeline is a `grain` iterator, whose
position (`get_state`, `set_state`) goes into a checkpoint with the parameters.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

SPLITS = ("train", "heldout")


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
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez_compressed(
            file, tokens=flat, lengths=lengths, prompts=np.asarray(prompts, np.int32)
        )
    partial.rename(path)


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
        self.rows: list[tuple[np.ndarray, int]] = []
        for path in paths:
            with np.load(path) as part:
                rows = np.split(part["tokens"], np.cumsum(part["lengths"]))[:-1]
                self.rows += [(r, int(p)) for r, p in zip(rows, part["prompts"], strict=True)]
        self.rows = self.rows[:limit]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.rows[index]

    def __repr__(self) -> str:
        return f"Conversations({self.folder!r}, {self.split!r}, {len(self)} rows)"

    @property
    def answer_tokens(self) -> int:
        """Tokens of all answers, each counted once."""
        return sum(len(row) - prompt for row, prompt in self.rows)


def batches(
    source: Conversations,
    *,
    batch: int,
    length: int,
    pad_id: int,
    seed: int,
    rows: Sequence[int] | np.ndarray | None = None,
) -> grain.DatasetIterator:
    """Endless shuffled batches of dicts; another order every epoch, the same for the same seed.

    Args:
      rows: of each batch, those to read: a process's share. All of them by default. What a batch
        holds, and the position that a checkpoint keeps, depend on no share.

    Yields:
      tokens: int32[B, L], right-padded, cut at `length`.
      lengths: int32[B], valid tokens.
      prompts: int32[B], tokens of the prompt.
    """

    def row(item):
        tokens, prompt = item
        tokens = tokens[:length]
        return {
            "tokens": np.pad(tokens, (0, length - len(tokens)), constant_values=pad_id),
            "lengths": np.int32(len(tokens)),
            "prompts": np.int32(min(prompt, len(tokens))),
        }

    if len(source) < batch:
        raise ValueError(f"{len(source)} conversations do not fill a batch of {batch}")
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().map(row).repeat()
    share = range(batch) if rows is None else [int(i) for i in rows]
    dataset = grain.MapDataset.source(_Share(dataset, batch, share))
    # The rows are in memory: threads that read ahead (500 batches by default) would only cost.
    here = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(dataset.batch(len(share)).to_iter_dataset(here))


class _Share:
    """Of an endless sequence cut into batches: the rows of each at the given places."""

    def __init__(self, dataset: grain.MapDataset, batch: int, places: Sequence[int]):
        self.dataset, self.batch, self.places = dataset, batch, places

    def __len__(self) -> int:
        return len(self.dataset) // self.batch * len(self.places)

    def __getitem__(self, index: int) -> Any:
        number, place = divmod(int(index), len(self.places))
        return self.dataset[number * self.batch + self.places[place]]
