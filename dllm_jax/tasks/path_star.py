"""Path-star: in a graph of paths from one node, find the one that leads to the goal.

Bachmann and Nagarajan (2403.06963): who learns it from left to right by teacher forcing guesses the
first step, and reads the others off the answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

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

_NAMES = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
_NAMES += "".join(map(chr, range(0x100, 0x180)))  # letters with accents: 190 names in all


@dataclass(frozen=True, kw_only=True)
class PathStar:
    """`AB,CD,...;AF=` is answered by the path `ABEF`: edges in random order; start and goal; path.

    The start has `degree` paths of `path` nodes each, itself the first. Nodes have random names of
    one token. The answer's place is known, so there are both layouts.
    """

    name = "path_star"

    degree: int = 5
    path: int = 5
    """Nodes of a path, start and goal included."""
    names: int = 50
    """How many the nodes may have."""
    layout: str = "prompt"

    def __post_init__(self) -> None:
        one_of("layout", self.layout, ("prompt", "canvas"))
        within("degree", self.degree, 1)
        within("path", self.path, 2)
        within("names", self.names, self.degree * (self.path - 1) + 1, len(_NAMES))

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(",;=" + _NAMES[: self.names])

    @property
    def length(self) -> int:
        return 3 * self.degree * (self.path - 1) + 3 + self.answer_length

    @property
    def answer_length(self) -> int:
        return self.path + (self.layout == "prompt")

    def example(self, split: str, index: int, seed: int = 0) -> Row:
        question, answer = drawn(self._made, split, index, seed)
        if self.layout == "prompt":
            return written(self.vocabulary, question, answer)
        free = np.arange(self.length) >= len(question)
        return placed(self.vocabulary, question + answer, free)

    def check(self, row: Row, tokens: Sequence[int] | np.ndarray) -> bool:
        answer = answer_of(self.vocabulary, row, tokens)
        if answer is None:
            return False
        question = self.vocabulary.decode(row.tokens).split("=")[0]
        edges, ends = question.split(";")
        known = set(edges.split(","))
        steps = [answer[i : i + 2] for i in range(len(answer) - 1)]
        return answer[:1] + answer[-1:] == ends and all(step in known for step in steps)

    def show(self, tokens: Sequence[int] | np.ndarray) -> str:
        return self.vocabulary.decode(tokens).split(EOS)[0]

    def _made(self, draw: np.random.Generator) -> tuple[str, tuple[str, str]]:
        step = self.path - 1
        nodes = [_NAMES[i] for i in draw.permutation(self.names)[: self.degree * step + 1]]
        start, rest = nodes[0], nodes[1:]
        paths = [start + "".join(rest[i : i + step]) for i in range(0, len(rest), step)]
        edges = [path[i : i + 2] for path in paths for i in range(step)]
        ends = start + paths[0][-1]
        shuffled = ",".join(edges[i] for i in draw.permutation(len(edges)))
        return f"{sorted(edges)};{ends}", (f"{shuffled};{ends}=", paths[0])
