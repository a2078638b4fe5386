"""Sudoku of 4x4, 6x6 and 9x9 cells: puzzles with one solution, as many as one likes.

A training row is one of a pool of dug puzzles under a random symmetry of the rules: another puzzle,
as hard. Puzzles of one split are no symmetric variants of those of another: the split is a hash of
what all variants have in common (`signature`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from etils import epath
from rich.progress import track

from dllm_jax import files, sources
from dllm_jax.data.rows import Row
from dllm_jax.tasks.grids import BOXES, dig, is_solution, random_grid
from dllm_jax.tasks.task import (
    EOS,
    Vocabulary,
    answer_of,
    generator,
    number_of,
    one_of,
    split_of,
    within,
)

BLOCK = 16  # puzzles of a file in the cache
VERSION = 1  # of what is in those files

# Clues of a puzzle: mean and deviation of the normal that is rounded and cut to least .. most.
_CLUES = {4: (6, 1.0, 4, 9), 6: (14, 1.2, 11, 18), 9: (33.8, 1.2, 29, 37)}


class Puzzle(NamedTuple):
    """Digits in rows, 0 where a cell is empty."""

    clues: np.ndarray  # int8[n * n]
    solution: np.ndarray  # int8[n * n]


@dataclass(frozen=True, kw_only=True)
class Sudoku:
    """Fill in a grid so that each row, column and box holds each digit once.

    Puzzles are dug out of random grids: cells are emptied in random order while the solution stays
    the only one. By default the number of clues of a 9x9 puzzle is drawn around 33.8, from 29 to
    37: mean and range of the million puzzles of Park (Kaggle, 2016), the usual set; the deviation
    (1.2) is ours. Those are mostly easy (`grids.needs_search` rates one); sets of 17 clues are not.

    Making a pool takes about 20 ms a puzzle of 9x9, once: it is kept in `sources.cache_folder()`.
    """

    name = "sudoku"

    size: int = 9
    layout: str = "canvas"
    """"canvas": n * n cells, the clues given. "prompt": the puzzle with "." for empty cells, then
    all of the solution."""
    clues: int | None = None
    """Of each puzzle, or a few more where no cell is left to be emptied. None: drawn."""
    pool: int = 4096
    """Dug puzzles of the training split; held-out and test puzzles have no variants."""

    def __post_init__(self) -> None:
        one_of("size", self.size, tuple(BOXES))
        one_of("layout", self.layout, ("prompt", "canvas"))
        within("pool", self.pool, 1)
        if self.clues is not None:
            within("clues", self.clues, 1, self.size**2 - 1)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(".123456789"[: self.size + 1])

    @property
    def length(self) -> int:
        cells = self.size**2
        return cells if self.layout == "canvas" else 2 * cells + 1

    @property
    def answer_length(self) -> int:
        return self.size**2 + (self.layout == "prompt")

    def example(self, split: str, index: int, seed: int = 0) -> Row:
        puzzle = self.puzzle(split, index, seed)
        solution = _ids(puzzle.solution)
        if self.layout == "canvas":
            return Row(solution, 0, puzzle.clues > 0)
        end = np.full(1, Vocabulary.eos_id, np.int32)
        return Row(np.concatenate([_ids(puzzle.clues), solution, end]), self.size**2)

    def puzzle(self, split: str, index: int, seed: int = 0) -> Puzzle:
        """The puzzle of that number."""
        draw = generator(split, index, seed)
        if split != "train":
            block = _block(self.size, self.clues, split, seed, index // BLOCK)
            return Puzzle(*block[:, index % BLOCK])
        bases = _pool(self.size, self.clues, seed, self.pool)
        return variant(self.size, Puzzle(*bases[:, draw.integers(self.pool)]), draw)

    def check(self, row: Row, tokens: Sequence[int] | np.ndarray) -> bool:
        answer = answer_of(self.vocabulary, row, tokens)
        if answer is None:
            return False
        if self.layout == "canvas":
            return is_solution(self.size, _digits(self.vocabulary.decode(tokens)))
        clues = _digits(self.vocabulary.decode(row.tokens[: row.prompt]))
        cells = _digits(answer)
        return is_solution(self.size, cells) and all(
            not clue or clue == cell for clue, cell in zip(clues, cells, strict=True)
        )

    def show(self, tokens: Sequence[int] | np.ndarray) -> str:
        """One row of the grid a line; in the layout "prompt" puzzle and solution side by side."""
        text, n = self.vocabulary.decode(tokens).split(EOS)[0], self.size
        text += " " * (-len(text) % (n * n))  # an answer may be too short
        grids = [text[at : at + n * n] for at in range(0, len(text), n * n)]
        lines = zip(*([g[at : at + n] for at in range(0, n * n, n)] for g in grids), strict=True)
        return "\n".join("   ".join(" ".join(line) for line in beside) for beside in lines)


def variant(size: int, puzzle: Puzzle, draw: np.random.Generator) -> Puzzle:
    """The puzzle under a random symmetry: another one, with one solution too, and as hard.

    Digits are relabelled; bands, stacks, rows within a band and columns within a stack change
    places; rows become columns where boxes are square.
    """
    high, wide = BOXES[size]
    orders = draw.random((4, size)).argsort(1)
    rows = _lines(orders[0], orders[1], size // high, high)
    columns = _lines(orders[2], orders[3], size // wide, wide)
    digits = np.zeros(size + 1, np.int8)
    digits[1:] = 1 + draw.permutation(size)
    grids = np.stack(puzzle).reshape(2, size, size)
    if high == wide and draw.random() < 0.5:
        grids = grids.swapaxes(1, 2)
    grids = digits[grids[:, rows[:, None], columns]]
    return Puzzle(*grids.reshape(2, -1))


def _lines(outer: np.ndarray, inner: np.ndarray, bands: int, high: int) -> np.ndarray:
    """int[n]: an order of lines that keeps bands together, from two permutations of all lines."""
    within = inner.reshape(bands, high).argsort(1)
    return (outer[outer < bands][:, None] * high + within).reshape(-1)


def signature(size: int, clues: np.ndarray) -> str:
    """What a puzzle has in common with all its variants: how clues fall on rows, columns and boxes,
    and on digits, order left out."""
    high, wide = BOXES[size]
    there = clues.reshape(size, size) > 0

    def lines(counts: np.ndarray, high: int) -> list[list[int]]:
        return sorted(sorted(band) for band in counts.reshape(-1, high).tolist())

    ways = [lines(there.sum(1), high), lines(there.sum(0), wide)]
    boxes = there.reshape(size // high, high, size // wide, wide).sum((1, 3))
    digits = np.bincount(clues, minlength=size + 1)[1:]
    both = sorted(ways) if high == wide else ways
    return repr((size, both, sorted(boxes.flat), sorted(digits.tolist())))


@lru_cache(4)
def _pool(size: int, clues: int | None, seed: int, count: int) -> np.ndarray:
    """int8[2, count, n * n]: clues and solutions of the training split's puzzles."""
    blocks = range(-(-count // BLOCK))
    there = _path(size, clues, "train", seed, blocks[-1]).exists()
    parts = [
        _block(size, clues, "train", seed, block)
        for block in track(blocks, "Digging puzzles", transient=True, disable=there or count < 1000)
    ]
    return np.concatenate(parts, 1)[:, :count]


@lru_cache(1024)
def _block(size: int, clues: int | None, split: str, seed: int, block: int) -> np.ndarray:
    """int8[2, BLOCK, n * n]: some dug puzzles of a split, from the cache if they are there."""
    path = _path(size, clues, split, seed, block)
    if path.exists():
        with path.open("rb") as file, np.load(file) as found:
            return np.stack([found["clues"], found["solutions"]])
    numbers = range(block * BLOCK, (block + 1) * BLOCK)
    made = [dug(size, clues, split, number, seed) for number in numbers]
    puzzles, solved = np.stack([p.clues for p in made]), np.stack([p.solution for p in made])
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.whole(path) as draft, draft.open("wb") as file:
        np.savez_compressed(file, clues=puzzles, solutions=solved)
    return np.stack([puzzles, solved])


def _path(size: int, clues: int | None, split: str, seed: int, block: int) -> epath.Path:
    kind = f"{size}-{'drawn' if clues is None else clues}-v{VERSION}x{BLOCK}"
    return sources.cache_folder() / "sudoku" / kind / f"{split}-{seed}-{block:05d}.npz"


def dug(size: int, clues: int | None, split: str, number: int, seed: int) -> Puzzle:
    """A puzzle that is in the split.

    It is dug to one clue less, and of the emptied cells the first is given back, in random order,
    that puts it into the split.
    """
    draw = np.random.default_rng((seed, number_of(split), number, VERSION))
    for _ in range(1000):
        grid = random_grid(size, draw)
        puzzle = dig(size, grid, (clues or _drawn_clues(size, draw)) - 1, draw)
        for cell in draw.permutation(np.flatnonzero(puzzle == 0)):
            tried = puzzle.copy()
            tried[cell] = grid[cell]
            if split_of(signature(size, tried)) == split:
                return Puzzle(tried, grid)
    raise ValueError(f"no puzzle of size {size} with {clues} clues is in the split {split!r}")


def _drawn_clues(size: int, draw: np.random.Generator) -> int:
    mean, deviation, least, most = _CLUES[size]
    return int(np.clip(np.rint(draw.normal(mean, deviation)), least, most))


def _ids(grid: np.ndarray) -> np.ndarray:
    """Those of ".123456789" follow each other: what the vocabulary encodes, without the text."""
    return grid.astype(np.int32) + 3


def _digits(text: str) -> list[int]:
    """0 for all that is no digit."""
    return [int(symbol) if symbol.isdecimal() else 0 for symbol in text]
