"""Sudoku's rules: what is a solution, a solver, and puzzles dug out of random grids.

A grid is int[n * n] in rows, 0 where a cell is empty; in the solver a cell is a set of candidates,
bit d - 1 for digit d.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}
"""Rows and columns of a box, by the size of the grid."""


class Shape(NamedTuple):
    """Which cells see each other."""

    size: int
    units: tuple[tuple[int, ...], ...]  # rows, columns, boxes
    units_of: tuple[tuple[tuple[int, ...], ...], ...]  # of each cell
    peers: tuple[tuple[int, ...], ...]  # of each cell


@cache
def shape(size: int) -> Shape:
    high, wide = BOXES[size]
    cells = np.arange(size * size).reshape(size, size)
    boxes = cells.reshape(size // high, high, size // wide, wide).swapaxes(1, 2)
    lines = [*cells, *cells.T, *boxes.reshape(size, size)]
    units = tuple(tuple(int(c) for c in line) for line in lines)
    of = tuple(tuple(u for u in units if cell in u) for cell in range(size * size))
    peers = tuple(tuple(sorted({c for u in of[i] for c in u} - {i})) for i in range(size * size))
    return Shape(size, units, of, peers)


def is_solution(size: int, grid: Sequence[int] | np.ndarray) -> bool:
    """Whether each row, column and box holds each digit once."""
    digits = set(range(1, size + 1))
    cells = [int(x) for x in grid]
    return len(cells) == size * size and all(
        {cells[c] for c in unit} == digits for unit in shape(size).units
    )


def solutions(size: int, puzzle: Sequence[int] | np.ndarray, most: int = 2) -> list[np.ndarray]:
    """The first `most` solutions: int8[n * n] each."""
    found = []
    candidates = _begin(size, puzzle)
    for solved in _search(shape(size), candidates) if candidates else ():
        found.append(_digits(solved))
        if len(found) == most:
            break
    return found


def needs_search(size: int, puzzle: Sequence[int] | np.ndarray) -> bool:
    """Whether naked and hidden singles alone leave cells open: how hard a puzzle is.

    A naked single is a cell with one candidate left, a hidden single a digit with one place left in
    a row, column or box.
    """
    candidates = _begin(size, puzzle)
    return candidates is None or any(x & (x - 1) for x in candidates)


def random_grid(size: int, draw: np.random.Generator) -> np.ndarray:
    """A complete grid, int8[n * n], by a search in random order; not all come equally often."""
    candidates = [(1 << size) - 1] * size**2
    return _digits(next(_search(shape(size), candidates, draw)))


def dig(size: int, grid: np.ndarray, clues: int, draw: np.random.Generator) -> np.ndarray:
    """Empties cells in random order while the solution stays the only one: int8[n * n].

    Each cell is tried once. More than `clues` are left where no other cell can be emptied.
    """
    puzzle = [int(x) for x in grid]
    left = len(puzzle)
    for cell in draw.permutation(len(puzzle)):
        if left == clues:
            break
        if _follows(size, puzzle, int(cell)):
            puzzle[cell] = 0
            left -= 1
    return np.array(puzzle, np.int8)


def _follows(size: int, puzzle: list[int], cell: int) -> bool:
    """Whether the digit of a cell follows from the others, in a puzzle with one solution."""
    rules, bit = shape(size), 1 << puzzle[cell] - 1
    without = list(puzzle)
    without[cell] = 0
    candidates = _unseen(size, without)
    if candidates[cell] == bit:
        return True  # a naked single
    for unit in rules.units_of[cell]:
        if not any(candidates[c] & bit for c in unit if c != cell):
            return True  # a hidden one
    candidates[cell] &= ~bit  # the other solutions, if there are any
    return not (
        _propagate(rules, candidates, _singles(rules, candidates))
        and next(_search(rules, candidates), None)
    )


def _begin(size: int, puzzle: Sequence[int] | np.ndarray) -> list[int] | None:
    """The candidates that singles leave; None where they contradict each other."""
    candidates = _unseen(size, puzzle)
    if not all(candidates):
        return None
    rules = shape(size)
    return candidates if _propagate(rules, candidates, _singles(rules, candidates)) else None


def _unseen(size: int, puzzle: Sequence[int] | np.ndarray) -> list[int]:
    """The candidates of each cell: the digits that no given peer has."""
    bits = [1 << int(digit) >> 1 for digit in puzzle]
    full = (1 << size) - 1
    candidates = []
    for bit, peers in zip(bits, shape(size).peers, strict=True):
        seen = 0
        for peer in peers:
            seen |= bits[peer]
        candidates.append((bit or full) & ~seen)
    return candidates


def _search(
    rules: Shape, candidates: list[int], draw: np.random.Generator | None = None
) -> Iterator[list[int]]:
    """All solutions of what is left, by trying the cell with the fewest candidates."""
    open_cells = [(x.bit_count(), cell) for cell, x in enumerate(candidates) if x & (x - 1)]
    if not open_cells:
        yield candidates
        return
    fewest, cell = min(open_cells)
    if draw is not None:
        same = [c for count, c in open_cells if count == fewest]
        cell = same[draw.integers(len(same))]
    bits = [1 << i for i in range(rules.size) if candidates[cell] >> i & 1]
    for at in range(fewest) if draw is None else draw.permutation(fewest):
        tried = list(candidates)
        if _propagate(rules, tried, [(cell, ~bits[at])]):
            yield from _search(rules, tried, draw)


def _propagate(rules: Shape, candidates: list[int], todo: list[tuple[int, int]]) -> bool:
    """Removes candidates (cell, bits), in place, and what follows by singles.

    Returns:
      False where that is a contradiction.
    """
    while todo:
        cell, bits = todo.pop()
        gone = candidates[cell] & bits
        if not gone:
            continue
        left = candidates[cell] & ~bits
        if not left:
            return False
        candidates[cell] = left
        if not left & (left - 1):
            todo += [(peer, left) for peer in rules.peers[cell] if candidates[peer] & left]
        for unit in rules.units_of[cell]:
            once = twice = 0
            for c in unit:
                twice |= once & candidates[c]
                once |= candidates[c]
            if gone & ~once:
                return False
            lone = gone & ~twice
            if lone:
                todo += [(c, ~lone) for c in unit if candidates[c] & lone]
    return True


def _singles(rules: Shape, candidates: list[int]) -> list[tuple[int, int]]:
    """What the singles among all candidates remove, (cell, bits) each."""
    todo = []
    for cell, x in enumerate(candidates):
        if not x & (x - 1):
            todo += [(peer, x) for peer in rules.peers[cell] if candidates[peer] & x]
    for unit in rules.units:
        once = twice = 0
        for c in unit:
            twice |= once & candidates[c]
            once |= candidates[c]
        lone = once & ~twice
        todo += [(c, ~(candidates[c] & lone)) for c in unit if candidates[c] & lone]
    return todo


def _digits(candidates: list[int]) -> np.ndarray:
    return np.array([x.bit_length() for x in candidates], np.int8)
