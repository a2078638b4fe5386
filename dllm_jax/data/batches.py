"""Batches for training: shuffled, endless, resumable.

The pipeline is a `grain` iterator, whose position (`get_state`, `set_state`) goes into a checkpoint
with the parameters.
"""

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from dllm_jax.data.rows import Row, Source


def batches(
    source: Source,
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
      given: bool[B, L], where the source's rows have it: other tokens that are given.
      segments: int32[B, L], where they have it: the document of each token; -1 behind the end.
    """

    def made(row: Row) -> dict[str, Any]:
        def padded(x: np.ndarray, fill: int, dtype: Any) -> np.ndarray:
            row = np.full(length, fill, dtype)
            row[: len(x)] = x[:length]
            return row

        found: dict[str, Any] = {
            "tokens": padded(row.tokens, pad_id, np.int32),
            "lengths": np.int32(min(len(row.tokens), length)),
            "prompts": np.int32(min(row.prompt, len(row.tokens), length)),
        }
        if row.given is not None:
            found["given"] = padded(row.given, False, bool)
        if row.segments is not None:
            found["segments"] = padded(row.segments, -1, np.int32)
        return found

    if len(source) < batch:
        raise ValueError(f"{len(source)} rows do not fill a batch of {batch}")
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().map(made).repeat()
    share = range(batch) if rows is None else [int(i) for i in rows]
    dataset = grain.MapDataset.source(_Batches(dataset, batch, share))
    # Rows are in memory, or mapped: threads that read ahead (500 batches by default) only cost.
    here = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(dataset.to_iter_dataset(here))


class _Batches:
    """An endless sequence cut into batches: of each, the rows at the given places, stacked."""

    def __init__(self, dataset: grain.MapDataset, batch: int, places: Sequence[int]):
        self.dataset, self.batch, self.places = dataset, batch, places

    def __len__(self) -> int:
        return len(self.dataset) // self.batch

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        begin = int(index) * self.batch
        rows: list[Any] = [self.dataset[begin + place] for place in self.places]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
