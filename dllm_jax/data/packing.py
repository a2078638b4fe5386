"""Documents packed into rows of one length, so that no position is padding.

    rows = Packed(Store("runs/mine/data"), 1024)  # end to end, cut anywhere: pretraining
    rows = Packed(store, 1024, whole=True, documents=True)  # no document is cut: fine-tuning
    for batch in batches(rows, batch=8, length=1024, pad_id=0, seed=0): ...

A row is a function of its number alone, and every token of the store is in exactly one row, so an
epoch of `batches` sees each once.
"""

from typing import Protocol, runtime_checkable

import numpy as np

from dllm_jax.data.rows import Row


@runtime_checkable
class EndToEnd(Protocol):
    """What can be packed: a `Store`, or arrays of one's own."""

    tokens: np.ndarray  # of all documents, one behind the other
    ends: np.ndarray  # int64[N]: where each document ends in them
    prompts: np.ndarray  # int64[N]: of each document, the first tokens that are given
    given: np.ndarray | None  # of each token, nonzero where it is given; instead of prompts


class Packed:
    """Rows of `length` tokens of a store; a `Source`."""

    def __init__(
        self, store: EndToEnd, length: int, *, whole: bool = False, documents: bool = False
    ):
        """Lays out the rows; no token is read.

        Args:
          length: tokens of a row. Of a stream the last row alone is shorter.
          whole: False lays the documents end to end (each ends with its end token) and cuts every
            `length` tokens. True cuts only documents longer than a row, into pieces of a row, and
            fills rows by best fit, longest first; rows may end short, by `filled` in all. Takes 24
            bytes of memory a document, and about a second for a million.
          documents: number the documents of a row, from 0, in `Row.segments`: for attention that
            stays in its document.

        Raises:
          ValueError: the length is not positive, or the store is empty.
        """
        if length < 1:
            raise ValueError(f"length={length} must be at least 1")
        if not len(store.tokens):
            raise ValueError(f"{store} holds no token to pack")
        self.store, self.length, self.whole, self.documents = store, length, whole, documents
        # A text has nothing that is given, so its rows have no mark of it.
        self.prompted = store.given is not None or bool(np.any(store.prompts))
        if whole:
            self.pieces, self.bounds = _best_fit(np.asarray(store.ends), length)

    def __len__(self) -> int:
        if self.whole:
            return len(self.bounds) - 1
        return -(-len(self.store.tokens) // self.length)

    def __getitem__(self, index: int) -> Row:
        """int32[n] tokens, n <= length; bool[n] `given` of stores with prompts."""
        number = range(len(self))[index]
        pieces = self._row(number)
        store = self.store
        if self.whole:
            tokens = np.concatenate([store.tokens[begin:end] for _, begin, end in pieces.tolist()])
        else:
            begin = number * self.length
            tokens = store.tokens[begin : begin + self.length]
        given = segments = None
        if self.documents:
            sizes = pieces[:, 2] - pieces[:, 1]
            segments = np.repeat(np.arange(len(pieces), dtype=np.int32), sizes)
        if self.prompted:
            given = np.concatenate([self._given(*piece) for piece in pieces.tolist()])
        return Row(tokens.astype(np.int32), 0, given, segments)

    def _row(self, number: int) -> np.ndarray:
        """int64[k, 3]: of each piece its document, and where in the store it begins and ends."""
        if self.whole:
            return self.pieces[self.bounds[number] : self.bounds[number + 1]]
        if not (self.documents or self.prompted):
            return np.zeros((0, 3), np.int64)
        begin = number * self.length
        end = min(begin + self.length, len(self.store.tokens))
        ends = self.store.ends
        first, last = np.searchsorted(ends, np.array([begin, end - 1]), "right")
        stops = np.minimum(ends[first : last + 1], end)
        starts = np.concatenate([[begin], stops[:-1]])
        return np.stack([np.arange(first, last + 1), starts, stops], axis=1)

    def _given(self, document: int, begin: int, end: int) -> np.ndarray:
        """bool[end - begin]: which tokens of a piece are given."""
        store = self.store
        if store.given is not None:
            return store.given[begin:end] != 0
        start = store.ends[document - 1] if document else 0
        return np.arange(begin - start, end - start) < store.prompts[document]

    def __repr__(self) -> str:
        how = "whole" if self.whole else "stream"
        return f"Packed({self.store!r}, {self.length}, {how}, {len(self):,} rows)"

    @property
    def sizes(self) -> np.ndarray:
        """int64[R]: the tokens of each row."""
        if not self.whole:
            begins = np.arange(len(self)) * self.length
            return np.minimum(len(self.store.tokens) - begins, self.length)
        return np.add.reduceat(self.pieces[:, 2] - self.pieces[:, 1], self.bounds[:-1])

    @property
    def filled(self) -> float:
        """The share of positions that hold a token."""
        return len(self.store.tokens) / (len(self) * self.length)


def _best_fit(ends: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The pieces, in the order of their rows (int64[P, 3], as in `_row`), and each row's bounds.

    Longest first, each into the fullest row that has room for it, or a new one. Of equals the one
    that comes first in the store; so the layout is a function of the lengths alone.
    """
    starts = np.concatenate([[0], ends[:-1]])
    counts = -(-(ends - starts) // length)
    document = np.repeat(np.arange(len(ends)), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    begin = starts[document] + (np.arange(len(document)) - first) * length
    end = np.minimum(begin + length, ends[document])
    order = np.argsort(begin - end, kind="stable")
    sizes = (end - begin)[order]
    rows = np.empty(len(order), np.int64)
    with_room: list[list[int]] = [[] for _ in range(length + 1)]  # rows by the room they have
    rooms = 0  # bit r: some row has room for r
    made = 0
    for i, size in enumerate(sizes.tolist()):
        fits = rooms >> size
        if fits:
            room = size + (fits & -fits).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            row, room, made = made, length, made + 1
        rows[i] = row
        if left := room - size:
            with_room[left].append(row)
            rooms |= 1 << left
    by_row = np.argsort(rows, kind="stable")
    pieces = np.stack([document, begin, end], axis=1)[order[by_row]]
    return pieces, np.searchsorted(rows[by_row], np.arange(made + 1))
