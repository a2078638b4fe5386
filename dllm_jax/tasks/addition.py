"""Addition of long numbers, whose carries run from right to left."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dllm_jax.data.rows import Row
from dllm_jax.tasks.task import (
    EOS,
    Vocabulary,
    answer_of,
    drawn,
    one_of,
    placed,
    within,
    written,
)


@dataclass(frozen=True, kw_only=True)
class Addition:
    """`58+467=` is answered by `525`.

    The length of each number is drawn evenly from 1 to `digits`, then its digits. Where `carries`
    asks for a chain it is put in, and sums with a longer one are drawn again, which leaves fewer of
    the long numbers. In the layout "canvas" all numbers are filled up with zeros: `058+467=0525`.
    """

    name = "addition"
    vocabulary = Vocabulary("0123456789+=")

    digits: int = 8
    """The most of an operand."""
    carries: int | None = None
    """The longest chain of each sum (`carry_chain`): long ones are rare, and hard. None: any."""
    layout: str = "prompt"

    def __post_init__(self) -> None:
        one_of("layout", self.layout, ("prompt", "canvas"))
        within("digits", self.digits, 1, 100)
        if self.carries is not None:
            within("carries", self.carries, 0, self.digits)

    @property
    def length(self) -> int:
        return 2 * self.digits + 2 + self.answer_length

    @property
    def answer_length(self) -> int:
        return self.digits + 1 + (self.layout == "prompt")

    def example(self, split: str, index: int, seed: int = 0) -> Row:
        a, b = drawn(self._made, split, index, seed)
        if self.layout == "prompt":
            return written(self.vocabulary, f"{a}+{b}=", str(a + b))
        n = self.digits
        text = f"{a:0{n}}+{b:0{n}}={a + b:0{n + 1}}"
        return placed(self.vocabulary, text, np.arange(len(text)) > 2 * n + 1)

    def check(self, row: Row, tokens: Sequence[int] | np.ndarray) -> bool:
        answer = answer_of(self.vocabulary, row, tokens)
        if answer is None:
            return False
        a, b = map(int, self.vocabulary.decode(row.tokens).split("=")[0].split("+"))
        width = 1 if self.layout == "prompt" else self.digits + 1
        return answer == f"{a + b:0{width}}"

    def show(self, tokens: Sequence[int] | np.ndarray) -> str:
        return self.vocabulary.decode(tokens).split(EOS)[0]

    def _made(self, draw: np.random.Generator) -> tuple[str, tuple[int, int]]:
        while True:
            a, b = self._operand(draw), self._operand(draw)
            if self.carries:
                a, b = _chained(a, b, self.carries, draw)
            if self.carries is None or carry_chain(a, b) == self.carries:
                return f"{min(a, b)}+{max(a, b)}", (a, b)

    def _operand(self, draw: np.random.Generator) -> int:
        """Of a length drawn evenly, of those that have room for the chain."""
        size = int(draw.integers(self.carries or 1, self.digits, endpoint=True))
        digits = draw.integers(0, 10, size)
        digits[0] = draw.integers(size > 1, 10)  # a longer number does not begin with 0
        return int("".join(map(str, digits)))


def carry_chain(a: int, b: int) -> int:
    """The most places that one carry runs: it is made where digits sum to 10 or more, and goes on
    where they sum to 9. 0: no carry."""
    longest = running = 0
    while a or b:
        total = a % 10 + b % 10
        running = 1 if total > 9 else running + 1 if running and total == 9 else 0
        longest = max(longest, running)
        a, b = a // 10, b // 10
    return longest


def _chained(a: int, b: int, length: int, draw: np.random.Generator) -> tuple[int, int]:
    """The numbers with a chain of carries put in, at a random place; their lengths may change."""
    left, right = ([int(x) for x in reversed(str(n))] for n in (a, b))
    places = min(len(left), len(right))
    start = int(draw.integers(places - length, endpoint=True)) if places > length else 0
    while len(left) < length or len(right) < length:
        shorter = left if len(left) < length else right
        shorter.append(0)
    for place in range(start, start + length):
        if place == start:
            left[place] = int(draw.integers(1, 10))
            right[place] = int(draw.integers(10 - left[place], 10))
        else:
            left[place] = int(draw.integers(0, 10))
            right[place] = 9 - left[place]
    value = lambda digits: int("".join(map(str, reversed(digits))))  # noqa: E731
    return value(left), value(right)
