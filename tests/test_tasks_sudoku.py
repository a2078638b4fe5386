"""Sudoku: the rules, puzzles with one solution, symmetries, splits without twins, the cache."""

import itertools
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_jax import tasks
from dllm_jax.tasks import grids, sudoku

SIZES = tuple(grids.BOXES)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """One folder for the module's tests, so that a pool is made once."""
    folder = tmp_path_factory.getbasetemp() / "sudoku-cache"
    monkeypatch.setenv("DLLM_JAX_CACHE", str(folder))
    return folder


def seen(size: int, cell: int) -> set[int]:
    """The cells that a cell sees, by arithmetic: not as the solver has them."""
    high, wide = grids.BOXES[size]
    row, column = divmod(cell, size)
    return {
        i
        for i in range(size * size)
        if i != cell
        and (
            i // size == row
            or i % size == column
            or (i // size // high, i % size // wide) == (row // high, column // wide)
        )
    }


def brute(size: int, puzzle) -> list[tuple[int, ...]]:
    """All solutions, cell after cell, without any deduction."""
    cells, found = [int(x) for x in puzzle], []
    see = [seen(size, i) for i in range(size * size)]

    def fill(at: int) -> None:
        if at == len(cells):
            found.append(tuple(cells))
            return
        was = cells[at]
        for digit in [was] if was else range(1, size + 1):
            if all(cells[i] != digit for i in see[at]):
                cells[at] = digit
                fill(at + 1)
        cells[at] = was

    fill(0)
    return found


@given(st.integers(0, 2**32), st.integers(0, 8))
def test_the_solver_finds_what_brute_force_finds(seed, clues):
    draw = np.random.default_rng(seed)
    grid = grids.random_grid(4, draw)
    puzzle = np.where(draw.permutation(16) < clues, grid, 0)
    if draw.random() < 0.3:
        puzzle[draw.integers(16)] = draw.integers(1, 5)  # mostly a contradiction
    found = [tuple(int(x) for x in s) for s in grids.solutions(4, puzzle, most=1000)]
    assert sorted(found) == sorted(brute(4, puzzle))


def test_all_grids_of_size_4_are_found():
    assert len(grids.solutions(4, np.zeros(16, int), most=1000)) == 288


@pytest.mark.parametrize("size", SIZES)
def test_a_grid_is_judged_by_rows_columns_and_boxes(size):
    draw = np.random.default_rng(size)
    grid = grids.random_grid(size, draw)
    assert grids.is_solution(size, grid)
    assert all(grid[i] != grid[j] for i in range(size**2) for j in seen(size, i))
    for cell in range(size**2):
        wrong = grid.copy()
        wrong[cell] = grid[cell] % size + 1
        assert not grids.is_solution(size, wrong)
    rows = grid.reshape(size, size)
    assert not grids.is_solution(size, grid[:-1])
    # Rows and columns stay right, boxes do not: a cyclic square; then two rows of different bands.
    cyclic = (np.arange(size)[:, None] + np.arange(size)) % size + 1
    assert not grids.is_solution(size, cyclic.reshape(-1))
    swapped = rows.copy()
    swapped[[0, -1]] = swapped[[-1, 0]]
    assert not grids.is_solution(size, swapped.reshape(-1))


@pytest.mark.parametrize("size", SIZES)
def test_a_dug_puzzle_has_one_solution(size):
    for number in range(8):
        puzzle = sudoku.dug(size, None, "train", number, seed=0)
        assert len(brute(size, puzzle.clues) if size < 9 else grids.solutions(9, puzzle.clues)) == 1
        np.testing.assert_array_equal(grids.solutions(size, puzzle.clues)[0], puzzle.solution)
        least, most = {4: (4, 9), 6: (11, 18), 9: (29, 37)}[size]
        assert least <= (puzzle.clues > 0).sum() <= most


def test_the_digger_stops_at_the_clues_asked_for_or_where_nothing_follows():
    draw = np.random.default_rng(0)
    grid = grids.random_grid(9, draw)
    assert (grids.dig(9, grid, 40, draw) > 0).sum() == 40
    least = grids.dig(9, grid, 0, draw)
    assert 17 <= (least > 0).sum() <= 30
    for cell in np.flatnonzero(least):  # each clue is needed
        without = least.copy()
        without[cell] = 0
        assert len(grids.solutions(9, without)) == 2


def test_singles_or_search():
    # One of 17 clues that singles solve, one that they do not (each has one solution).
    easy = "000000010400000000020000000000050407008000300001090000300400200050100000000806000"
    hard = "800000000003600000070090200050007000000045700000100030001000068008500010090000400"
    for text, search in ((easy, False), (hard, True)):
        puzzle = [int(x) for x in text]
        assert len(grids.solutions(9, puzzle)) == 1
        assert grids.needs_search(9, puzzle) == search


@pytest.mark.parametrize("size", SIZES)
@given(seed=st.integers(0, 2**32))
def test_a_variant_is_a_puzzle_with_one_solution_too(size, seed):
    base = sudoku.dug(size, None, "train", 3, seed=0)
    clues, solution = sudoku.variant(size, base, np.random.default_rng(seed))
    assert grids.is_solution(size, solution)
    assert ((clues == 0) | (clues == solution)).all()
    found = grids.solutions(size, clues)
    assert len(found) == 1
    np.testing.assert_array_equal(found[0], solution)
    assert sudoku.signature(size, clues) == sudoku.signature(size, base.clues)
    assert grids.needs_search(size, clues) == grids.needs_search(size, base.clues)


def test_variants_are_all_symmetries():
    # Of this 4x4 grid, whose own symmetries are known by listing them: all images come.
    base = sudoku.dug(4, None, "train", 0, seed=0)
    draw = np.random.default_rng(0)
    images = {sudoku.variant(4, base, draw).solution.tobytes() for _ in range(3000)}
    bands = [p for p in itertools.permutations(range(4)) if {p[0] // 2, p[1] // 2} in ({0}, {1})]
    lines = [list(p) for p in bands]
    assert len(lines) == 8
    square = base.solution.reshape(4, 4)
    listed = {
        np.array([0, *relabel], np.int8)[grid[rows][:, columns]].tobytes()
        for grid in (square, square.T)
        for rows in lines
        for columns in lines
        for relabel in itertools.permutations(range(1, 5))
    }
    assert images == listed


def forms(puzzle: np.ndarray) -> set[bytes]:
    """A 4x4 puzzle in all its variants, digits relabelled by first appearance."""
    lines = [[0, 1, 2, 3], [1, 0, 2, 3], [0, 1, 3, 2], [1, 0, 3, 2]]
    lines += [line[2:] + line[:2] for line in lines]
    found = set()
    for grid in (puzzle.reshape(4, 4), puzzle.reshape(4, 4).T):
        for rows, columns in itertools.product(lines, lines):
            cells, names = grid[rows][:, columns].reshape(-1).tolist(), {0: 0}
            found.add(bytes(names.setdefault(x, len(names)) for x in cells))
    return found


def test_no_split_holds_a_variant_of_another_splits_puzzle():
    task = tasks.named("sudoku", size=4, pool=32)

    def classes(split: str, count: int, seed: int) -> set[bytes]:
        return {min(forms(task.puzzle(split, i, seed).clues)) for i in range(count)}

    found = [classes("train", 80, 5), classes("heldout", 40, 0), classes("test", 40, 1)]
    assert all(len(one) > 10 for one in found)
    assert not any(one & other for one, other in itertools.combinations(found, 2))


@pytest.mark.parametrize("layout", ["canvas", "prompt"])
@pytest.mark.parametrize("size", SIZES)
def test_any_damage_is_found(size, layout):
    task = tasks.named("sudoku", size=size, pool=3, layout=layout)
    vocabulary, cells = task.vocabulary, size * size
    for index in range(3):
        row = task.example("train", index)
        assert len(row.tokens) == task.length
        assert task.check(row, row.tokens)
        assert row.prompt == (cells if layout == "prompt" else 0)
        for at in range(len(row.tokens)):  # the question, the answer and its end
            damaged = row.tokens.copy()
            damaged[at] = 4 + (row.tokens[at] - 3) % size
            assert not task.check(row, damaged)
        for wrong in (vocabulary.mask_id, vocabulary.pad_id, -1, vocabulary.size):
            damaged = row.tokens.copy()
            damaged[-2] = wrong
            assert not task.check(row, damaged)
        assert not task.check(row, row.tokens[:-1])


def test_another_solution_of_the_same_rules_is_judged_by_the_clues():
    task = tasks.named("sudoku", size=4, pool=2, layout="prompt")
    row = task.example("train", 0)
    answer = row.tokens[row.prompt :].copy()
    answer[:-1] = 4 + (answer[:-1] - 3) % 4  # digits renamed: a solution, of other clues
    assert grids.is_solution(4, answer[:-1] - 3)
    assert not task.check(row, np.concatenate([row.tokens[: row.prompt], answer]))


def test_a_canvas_gives_the_clues():
    task = tasks.named("sudoku", size=6, pool=2)
    for split in ("train", "test"):
        row, puzzle = task.example(split, 1), task.puzzle(split, 1)
        np.testing.assert_array_equal(row.given, puzzle.clues > 0)
        np.testing.assert_array_equal(row.tokens - 3, puzzle.solution)


def test_a_pool_comes_from_the_cache_and_a_crash_leaves_no_half(cache, monkeypatch):
    monkeypatch.setenv("DLLM_JAX_CACHE", str(cache / "other"))
    task = tasks.named("sudoku", size=4, pool=40, clues=6)
    read = lambda: [task.example("train", i).tokens.tolist() for i in range(20)]  # noqa: E731
    sudoku._block.cache_clear()
    sudoku._pool.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", lambda file, **arrays: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            read()
    assert not list((cache / "other").rglob("*.npz"))
    made = read()
    files = [path.name for path in sorted((cache / "other").rglob("*.npz"))]
    assert files == ["train-0-00000.npz", "train-0-00001.npz", "train-0-00002.npz"]
    sudoku._block.cache_clear()
    sudoku._pool.cache_clear()
    monkeypatch.setattr(sudoku, "dug", None)  # not made again
    assert read() == made
    assert os.listdir(cache / "other" / "sudoku") == [f"4-6-v1x{sudoku.BLOCK}"]


def test_fields_are_checked():
    with pytest.raises(ValueError, match="size=5 is none of 4, 6, 9"):
        tasks.named("sudoku", size=5)
    with pytest.raises(ValueError, match="layout='row'"):
        tasks.named("sudoku", layout="row")
    with pytest.raises(ValueError, match="pool=0 must be a whole number, at least 1"):
        tasks.named("sudoku", pool=0)
    with pytest.raises(ValueError, match=r"clues=16 must .* at most 15"):
        tasks.named("sudoku", size=4, clues=16)


def test_a_grid_for_people():
    task = tasks.named("sudoku", size=4, pool=2, layout="prompt")
    lines = task.show(task.example("train", 0).tokens).split("\n")
    assert [len(line) for line in lines] == [17] * 4
    assert "." in lines[0] + lines[1]
    row = task.example("train", 0)
    short = task.show(row.tokens[:-4]).split("\n")  # an answer that is not all there
    assert short[:3] == lines[:3]
    assert len(short) == 4
