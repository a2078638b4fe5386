"""Recall: a long list of keys with their values, and then some of the keys."""

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

_KEY, _VALUE = "abcdefghijklmnopqrstuvwxyz", "0123456789"


@dataclass(frozen=True, kw_only=True)
class Recall:
    """`abc:0123,xyz:4567,...|xyz,abc=` is answered by `4567,0123`.

    As many pairs as fit into `context` tokens, in random order; no key comes twice. The answer's
    place is known, so there are both layouts.
    """

    name = "recall"
    vocabulary = Vocabulary(_KEY + _VALUE + ":,|=")

    context: int = 512
    """The most tokens of a question."""
    queries: int = 1
    key: int = 3
    """Letters of a key."""
    value: int = 4
    """Digits of a value."""
    layout: str = "prompt"

    def __post_init__(self) -> None:
        one_of("layout", self.layout, ("prompt", "canvas"))
        within("key", self.key, 1, 13)  # numbers of 64 bits
        within("value", self.value, 1)
        within("queries", self.queries, 1)
        least = self.queries * (2 * self.key + self.value + 3)
        within("context", self.context, least)
        if self.pairs > len(_KEY) ** self.key:
            raise ValueError(
                f"key={self.key} letters make fewer keys than the {self.pairs} pairs of"
                f" context={self.context}: give longer keys"
            )

    @property
    def pairs(self) -> int:
        """Keys of a question, each with `:`, a value, and `,` or `|`."""
        return (self.context - self.queries * (self.key + 1)) // (self.key + self.value + 2)

    @property
    def length(self) -> int:
        """Of every row: all are as long."""
        question = self.pairs * (self.key + self.value + 2) + self.queries * (self.key + 1)
        return question + self.answer_length

    @property
    def answer_length(self) -> int:
        return self.queries * (self.value + 1) - (self.layout == "canvas")

    def example(self, split: str, index: int, seed: int = 0) -> Row:
        question, answer = drawn(self._made, split, index, seed)
        if self.layout == "prompt":
            return written(self.vocabulary, question, answer)
        free = np.arange(self.length) >= len(question)
        return placed(self.vocabulary, question + answer, free)

    def check(self, row: Row, tokens: Sequence[int] | np.ndarray) -> bool:
        answer = answer_of(self.vocabulary, row, tokens)
        pairs, asked = self.vocabulary.decode(row.tokens).split("=")[0].split("|")
        values = dict(pair.split(":") for pair in pairs.split(","))
        return answer == ",".join(values[key] for key in asked.split(","))

    def show(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Of a long context the ends alone."""
        text = self.vocabulary.decode(tokens).split(EOS)[0]
        context, _, asked = text.partition("|")
        return (
            (context if len(context) < 80 else f"{context[:38]} ... {context[-37:]}") + "|" + asked
        )

    def _made(self, draw: np.random.Generator) -> tuple[str, tuple[str, str]]:
        numbers = draw.choice(len(_KEY) ** self.key, self.pairs, replace=False)
        letters = numbers[:, None] // len(_KEY) ** np.arange(self.key) % len(_KEY)
        digits = draw.integers(0, 10, (self.pairs, self.value))
        sign = lambda symbol: np.full((self.pairs, 1), ord(symbol))  # noqa: E731
        codes = [ord(_KEY[0]) + letters, sign(":"), ord(_VALUE[0]) + digits, sign(",")]
        context = np.concatenate(codes, 1).astype(np.uint8)
        asked = [bytes(context[i]).decode() for i in draw.choice(self.pairs, self.queries, False)]
        keys = ",".join(pair[: self.key] for pair in asked)
        question = f"{context.tobytes().decode()[:-1]}|{keys}="
        return question, (question, ",".join(pair[self.key + 1 : -1] for pair in asked))
