"""Repair: a sentence with wrong tokens in it, and enough redundancy to tell which they are."""

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

_MODULUS = 7  # a prime above 2: see `Repair`
_WORD = 4


@dataclass(frozen=True, kw_only=True)
class Repair:
    """A sentence with replaced tokens, `=`, and the sentence as it was.

    A word is four digits: a, b, a + b and a - b modulo 7. Any two of them tell the others, so two
    words differ in at least three, and a word with one wrong digit is near one word only. A
    sentence has at most one wrong digit in a word: there is one answer.

    The answer's place is known, so there are both layouts.
    """

    name = "repair"
    vocabulary = Vocabulary("0123456=")

    words: int = 12
    rate: float = 0.15
    """The share of wrong tokens, rounded to whole ones: at most one in a word, 0.25."""
    layout: str = "prompt"

    def __post_init__(self) -> None:
        one_of("layout", self.layout, ("prompt", "canvas"))
        within("words", self.words, 1)
        if not (0 <= self.rate <= 1 / _WORD):
            raise ValueError(f"rate={self.rate} must be between 0 and {1 / _WORD}, one in a word")

    @property
    def length(self) -> int:
        return _WORD * self.words + 1 + self.answer_length

    @property
    def answer_length(self) -> int:
        return _WORD * self.words + (self.layout == "prompt")

    @property
    def errors(self) -> int:
        """Wrong tokens of a sentence."""
        return round(self.rate * _WORD * self.words)

    def example(self, split: str, index: int, seed: int = 0) -> Row:
        question, answer = drawn(self._made, split, index, seed)
        if self.layout == "prompt":
            return written(self.vocabulary, question, answer)
        free = np.arange(self.length) >= len(question)
        return placed(self.vocabulary, question + answer, free)

    def check(self, row: Row, tokens: Sequence[int] | np.ndarray) -> bool:
        answer = answer_of(self.vocabulary, row, tokens)
        asked = self.vocabulary.decode(row.tokens).split("=")[0]
        if answer is None or len(answer) != len(asked) or not answer.isdecimal():
            return False
        words = (_words(answer), _words(asked))
        return bool((words[0] == _whole(words[0][:, :2])).all()) and bool(
            ((words[0] != words[1]).sum(1) <= 1).all()
        )

    def show(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The two sentences under each other, and marks where they differ."""
        parts = self.vocabulary.decode(tokens).split(EOS)[0].split("=")
        marks = "".join(" ^"[a != b] for a, b in zip(parts[0], parts[-1], strict=False))
        return "\n".join([*parts, marks])

    def _made(self, draw: np.random.Generator) -> tuple[str, tuple[str, str]]:
        right = _whole(draw.integers(0, _MODULUS, (self.words, 2)))
        wrong = right.copy()
        hit = draw.permutation(self.words)[: self.errors]
        at = (hit, draw.integers(0, _WORD, len(hit)))
        wrong[at] = (wrong[at] + draw.integers(1, _MODULUS, len(hit))) % _MODULUS
        asked, answer = ("".join(map(str, words.flat)) for words in (wrong, right))
        return answer, (asked + "=", answer)  # by the answer: no split has a sentence of another


def _words(text: str) -> np.ndarray:
    """int[words, 4]."""
    return np.array([int(symbol) for symbol in text]).reshape(-1, _WORD)


def _whole(pairs: np.ndarray) -> np.ndarray:
    """int[words, 4], the words of pairs [words, 2]."""
    a, b = pairs.T
    return np.stack([a, b, (a + b) % _MODULUS, (a - b) % _MODULUS], 1)
