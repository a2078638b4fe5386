"""One text to learn from, and what a source of them is."""

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

SPLITS = ("train", "heldout")


class Row(NamedTuple):
    """A text of `n` ids, and what of it is to be learnt."""

    tokens: np.ndarray  # int32[n]
    prompt: int = 0  # the first ids, which are given: they are never noised, and cost nothing
    given: np.ndarray | None = None  # bool[n]: others that are given, in any pattern
    segments: np.ndarray | None = None  # int32[n]: the document of each token, in packed rows


@runtime_checkable
class Source(Protocol):
    """Rows by number, for `batches`: the same row for the same number, always.

    Of one source either all rows have `given` (or `segments`), or none has. One that knows the
    tokens of each row without reading it may tell them, `sizes` (int64[N]), and its `prompts`
    (int64[N]; 0 without them): a run then says at its start what its length cuts. One whose rows
    must not be cut tells the tokens of its `longest`.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...
