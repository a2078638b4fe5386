"""The text of tokens one by one, for pictures in which every token has a place of its own."""

from collections.abc import Sequence

import numpy as np

from dllm_jax.trajectory.data import Decode, Row

_HALF = "\N{REPLACEMENT CHARACTER}"  # bytes that are no whole character


class Words:
    """Texts of single tokens, and of neighbours that make up characters only together."""

    def __init__(self, decode: Decode):
        self._decode = decode
        self.texts: dict[int, str] = {}
        self.joined: dict[tuple[int, ...], str] = {}

    def text(self, token: int) -> str:
        """Of one token; its id where it has none: a special token, or one of our own."""
        if token not in self.texts:
            self.texts[token] = self._decode([token]) or f"⟨{token}⟩"
        return self.texts[token]

    def is_half(self, token: int) -> bool:
        """Whether a token ends, or begins, inside a character."""
        return _HALF in self.text(token)

    def row(self, tokens: Sequence[int] | np.ndarray, there: np.ndarray) -> list[str]:
        """Of each token that is `there` [L]; the text of halves goes to the first of them."""
        ids = [int(token) for token in tokens]
        found = [self.text(token) if here else "" for token, here in zip(ids, there, strict=True)]
        for start, end in self._halves(ids, there):
            text = self._together(tuple(ids[start:end]))
            if text is not None:
                found[start:end] = [text, *[""] * (end - start - 1)]
        return found

    def read(self, row: Row) -> None:
        """Learns the texts of a trajectory's row, at all of its steps."""
        for token in {*row.tokens.tolist(), *row.token.tolist(), *row.drafts.ravel().tolist()}:
            self.text(token)
        if not any(self.is_half(token) for token in {*row.tokens.tolist(), *row.token.tolist()}):
            return
        for step in range(row.steps + 1):
            canvas = row.canvas(step)
            self.row(canvas.tokens, ~canvas.open)

    def _halves(self, ids: list[int], there: np.ndarray) -> list[tuple[int, int]]:
        """Runs of two or more halves, as (start, end)."""
        runs, start = [], 0
        for at in range(len(ids) + 1):
            if at == len(ids) or not there[at] or not self.is_half(ids[at]):
                if at - start > 1:
                    runs.append((start, at))
                start = at + 1
        return runs

    def _together(self, run: tuple[int, ...]) -> str | None:
        if run not in self.joined:
            text = self._decode(list(run))
            if _HALF in text:
                return None
            self.joined[run] = text
        return self.joined[run]
