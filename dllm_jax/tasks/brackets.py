"""Balanced brackets with holes of unknown length."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dllm_jax.data.rows import Row
from dllm_jax.tasks.task import Vocabulary, answer_of, drawn, within, written

_PAIRS = ("()", "[]", "{}", "<>")


@dataclass(frozen=True, kw_only=True)
class Brackets:
    """`([?)?=` is answered by the whole, balanced: `([]{})` or `([])`, any that is no longer than
    `longest`.

    A hole `?` is some brackets, or none. Its length is nowhere said. What is asked is a balanced
    text, a word of the Dyck language of `kinds` pairs, of which `holes` stretches of 1 to `hole`
    brackets were taken out.
    """

    name = "brackets"
    layout = "prompt"

    kinds: int = 3
    longest: int = 32
    """The most brackets of a text, an even number."""
    holes: int = 2
    hole: int = 6
    """The most brackets of a hole."""

    def __post_init__(self) -> None:
        within("kinds", self.kinds, 1, len(_PAIRS))
        within("holes", self.holes, 1)
        within("hole", self.hole, 1)
        within("longest", self.longest, self.least)
        if self.longest % 2:
            raise ValueError(f"longest={self.longest} must be even: brackets come in pairs")

    @property
    def least(self) -> int:
        """The fewest brackets of a text: those of the holes, and some between them; even."""
        room = self.holes * (self.hole + 1) + 1
        return room + room % 2

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary("".join(_PAIRS[: self.kinds]) + "?=")

    @property
    def length(self) -> int:
        return self.longest + 1 + self.answer_length  # a hole is no longer than what it hides

    @property
    def answer_length(self) -> int:
        return self.longest + 1

    def example(self, split: str, index: int, seed: int = 0) -> Row:
        return written(self.vocabulary, *drawn(self._made, split, index, seed))

    def check(self, row: Row, tokens: Sequence[int] | np.ndarray) -> bool:
        answer = answer_of(self.vocabulary, row, tokens)
        if answer is None or len(answer) > self.longest:
            return False
        kept = self.vocabulary.decode(row.tokens[: row.prompt - 1]).split("?")
        return fits(kept, answer) and balanced(answer)

    def show(self, tokens: Sequence[int] | np.ndarray) -> str:
        return self.vocabulary.decode(tokens)

    def _made(self, draw: np.random.Generator) -> tuple[str, tuple[str, str]]:
        pairs = int(draw.integers(self.least // 2, self.longest // 2, endpoint=True))
        text = self._balanced(pairs, draw)
        sizes = draw.integers(1, self.hole, self.holes, endpoint=True)
        # Each hole is before another of the brackets that stay, or at the end: holes do not touch.
        stay = len(text) - int(sizes.sum())
        places = np.sort(draw.choice(stay + 1, self.holes, replace=False))
        starts = places + np.cumsum(sizes) - sizes
        question, at = "", 0
        for start, size in zip(starts, sizes, strict=True):
            question += text[at:start] + "?"
            at = start + size
        question += text[at:] + "="
        return question, (question, text)

    def _balanced(self, pairs: int, draw: np.random.Generator) -> str:
        """A text of so many pairs: it opens or closes evenly, as far as both are possible."""
        text, stack, left = [], [], pairs
        while left or stack:
            if left and (not stack or draw.random() < 0.5):
                pair = _PAIRS[draw.integers(self.kinds)]
                stack.append(pair[1])
                text.append(pair[0])
                left -= 1
            else:
                text.append(stack.pop())
        return "".join(text)


def balanced(text: str) -> bool:
    """Whether a text is brackets only, each closed by its own kind in order."""
    closes = {pair[0]: pair[1] for pair in _PAIRS}
    stack = []
    for symbol in text:
        if symbol in closes:
            stack.append(closes[symbol])
        elif not stack or stack.pop() != symbol:
            return False
    return not stack


def fits(kept: Sequence[str], text: str) -> bool:
    """Whether a text is what was kept, from its begin to its end, with anything between."""
    return re.fullmatch(".*?".join(map(re.escape, kept)), text) is not None
