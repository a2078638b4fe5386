"""What a task is: questions by number, an exact check of answers, and a vocabulary of symbols.

task = named("sudoku", size=9)
source = Examples(task, "train", 100_000)  # a `data.Source`
task.check(source[0], source[0].tokens)  # True
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from dllm_jax.data.rows import Row

T = TypeVar("T")

SPLITS = ("train", "heldout", "test")
"""Of 16 questions 14 are for training, one is held out (for choices), one is for the test."""

PAD, MASK, EOS = "·▒¶"  # how they are shown


@dataclass(frozen=True)
class Vocabulary:
    """Symbols, one character each, and their ids: pad 0, mask 1, eos 2, then the symbols."""

    symbols: str

    pad_id = 0
    mask_id = 1
    eos_id = 2

    def __post_init__(self) -> None:
        if len(set(PAD + MASK + EOS + self.symbols)) != self.size:
            raise ValueError(f"symbols must differ, and from {PAD}{MASK}{EOS}: {self.symbols!r}")

    @property
    def size(self) -> int:
        """Ids, those of pad, mask and eos included."""
        return 3 + len(self.symbols)

    def encode(self, text: str) -> np.ndarray:
        """int32[len(text)].

        Raises:
          ValueError: a character is no symbol.
        """
        try:
            return np.array([self._ids[symbol] for symbol in text], np.int32)
        except KeyError as error:
            raise ValueError(
                f"{error.args[0]!r} is no symbol; there are {self.symbols!r}, {PAD!r} (pad),"
                f" {MASK!r} (mask) and {EOS!r} (end)"
            ) from None

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """One character an id, the inverse of `encode`; of ids that are none of these, �."""
        return "".join([self._shown[i] if 0 <= i < self.size else "�" for i in map(int, ids)])

    @cached_property
    def _shown(self) -> str:
        return PAD + MASK + EOS + self.symbols

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {symbol: i for i, symbol in enumerate(self._shown)}


@runtime_checkable
class Task(Protocol):
    """A family of questions with exact answers. A frozen dataclass: it goes into configs of runs.

    A row is written in one of two layouts:

      "prompt": the question (`Row.prompt` ids), then the answer and the end. Any model can.
      "canvas": question and answer where they belong; `Row.given` says which cells stand. What a
        model that fills in can; all rows are of `length`.
    """

    @property
    def name(self) -> str: ...

    @property
    def layout(self) -> str: ...

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def length(self) -> int:
        """The most tokens of a row."""
        ...

    @property
    def answer_length(self) -> int:
        """The most tokens of an answer, its end included."""
        ...

    def example(self, split: str, index: int, seed: int = 0) -> Row:
        """The question of that number with an answer: a function of the arguments alone.

        No question of one split is one of another, whatever the seeds.
        """
        ...

    def check(self, row: Row, tokens: Sequence[int] | np.ndarray) -> bool:
        """Whether `tokens` answer the row's question, by the rules, whatever the row's answer is.

        Args:
          tokens: int[n], a whole row: the question as it was, and the answer. In the layout
            "prompt" an answer ends with eos; what is behind it does not count.
        """
        ...

    def show(self, tokens: Sequence[int] | np.ndarray) -> str:
        """A row for people."""
        ...


class Examples:
    """The first `count` questions of a split, as a random-access source for `data.batches`."""

    def __init__(self, task: Task, split: str, count: int, seed: int = 0, *, filled: bool = False):
        """No row is kept: each is made when it is read.

        Args:
          filled: answers of the layout "prompt" go on with eos up to `task.answer_length`, which
            is what a model sees whose canvas has a fixed length (LLaDA's fine-tuning).

        Raises:
          ValueError: no such split, or no count.
        """
        number_of(split)
        if count < 1:
            raise ValueError(f"count={count} must be at least 1")
        self.task, self.split, self.count, self.seed = task, split, count, seed
        self.filled = filled and task.layout == "prompt"
        self.longest = task.length

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < self.count:
            raise IndexError(f"row {index} of {self.count}")
        row = self.task.example(self.split, int(index), self.seed)
        if not self.filled:
            return row
        rest = row.prompt + self.task.answer_length - len(row.tokens)
        eos = self.task.vocabulary.eos_id
        return row._replace(tokens=np.pad(row.tokens, (0, rest), constant_values=eos))

    def __repr__(self) -> str:
        return f"Examples({self.task}, {self.split!r}, {self.count}, seed={self.seed})"


def number_of(split: str) -> int:
    """Of a split; ValueError where there is none of that name."""
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; there are {', '.join(SPLITS)}")
    return SPLITS.index(split)


def split_of(question: str) -> str:
    """The split that a question is in: by a hash of it, the same everywhere.

    Tasks hash what all ways to put a question have in common, such as its numbers in order.
    """
    residue = hashlib.blake2b(question.encode(), digest_size=8).digest()[0] % 16
    return SPLITS[max(0, residue - 13)]


def generator(split: str, index: int, seed: int) -> np.random.Generator:
    """What draws a row."""
    if index < 0 or seed < 0:
        raise ValueError(f"index={index} and seed={seed} must not be negative")
    return np.random.default_rng((seed, number_of(split), index))


def drawn(
    make: Callable[[np.random.Generator], tuple[str, T]], split: str, index: int, seed: int
) -> T:
    """The first that falls into the split, of what `make` draws: (what is hashed, value).

    Raises:
      ValueError: the task has too few questions for one to be in each split.
    """
    draw = generator(split, index, seed)
    for _ in range(10_000):
        question, value = make(draw)
        if split_of(question) == split:
            return value
    raise ValueError(f"of 10,000 questions none is in the split {split!r}: give the task more")


def written(vocabulary: Vocabulary, question: str, answer: str) -> Row:
    """A row of the layout "prompt"."""
    return Row(vocabulary.encode(question + answer + EOS), len(question))


def placed(vocabulary: Vocabulary, text: str, free: Sequence[bool] | np.ndarray) -> Row:
    """A row of the layout "canvas"; `free` [n] says which cells are the answer's."""
    return Row(vocabulary.encode(text), 0, ~np.asarray(free, bool))


def answer_of(vocabulary: Vocabulary, row: Row, tokens: Any) -> str | None:
    """What answers a row's question; None where it has no end, or the question was changed.

    In the layout "prompt" the text between question and eos, in "canvas" that of the free cells.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or ((tokens < 0) | (tokens >= vocabulary.size)).any():
        return None
    if row.given is not None:
        if len(tokens) != len(row.tokens) or (tokens != row.tokens)[row.given].any():
            return None
        return vocabulary.decode(tokens[~row.given])
    question, answer = tokens[: row.prompt], tokens[row.prompt :]
    ends = np.flatnonzero(answer == vocabulary.eos_id)
    if not np.array_equal(question, row.tokens[: row.prompt]) or not len(ends):
        return None
    return vocabulary.decode(answer[: ends[0]])


def one_of(field: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raises ValueError unless a task's field has one of the values."""
    if value not in allowed:
        raise ValueError(f"{field}={value!r} is none of {', '.join(map(repr, allowed))}")


def within(field: str, value: Any, least: int, most: int | None = None) -> None:
    """Raises ValueError unless a task's field is a whole number between the two."""
    if not isinstance(value, int) or value < least or (most is not None and value > most):
        top = "" if most is None else f" and at most {most}"
        raise ValueError(f"{field}={value!r} must be a whole number, at least {least}{top}")
