"""Conversations on disk, and the batches of a run: shuffled, endless, resumable."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from dllm_jax.data import Conversations, batches, conversations, write_part

PAD = 99


def conversation(number: int) -> list[int]:
    """Tells itself apart: its ids are its own, its length is between 3 and 9."""
    return [100 * number + i for i in range(3 + number % 7)]


def write(folder: Path, count: int, split: str = "train", part: int = 0) -> None:
    """A part of `count` conversations, whose prompts are two tokens."""
    rows = [conversation(part * count + i) for i in range(count)]
    write_part(folder / f"{split}-{part:05d}.npz", rows, [2] * count)


@pytest.fixture
def source(tmp_path) -> Conversations:
    write(tmp_path, 12)
    return Conversations(tmp_path, "train")


def first(iterator, count: int) -> list[dict[str, np.ndarray]]:
    return list(itertools.islice(iterator, count))


def numbers(rows) -> list[int]:
    """Which conversations the rows of some batches are."""
    return [int(tokens[0]) // 100 for batch in rows for tokens in batch["tokens"]]


def same(left, right) -> bool:
    pairs = zip(left, right, strict=True)
    return all((a[name] == b[name]).all() for a, b in pairs for name in a)


def test_what_is_written_is_read(tmp_path):
    for part in (1, 0):
        write(tmp_path, 4, part=part)
    write(tmp_path, 3, split="heldout")
    source = Conversations(tmp_path, "train")
    assert len(source) == 8
    for i in range(8):
        tokens, prompt, *_ = source[i]
        np.testing.assert_array_equal(tokens, conversation(i))
        assert (tokens.dtype, prompt) == (np.int32, 2)
    assert source.answer_tokens == sum(len(conversation(i)) - 2 for i in range(8))
    assert len(Conversations(tmp_path, "train", limit=5)) == 5
    assert len(Conversations(str(tmp_path), "heldout")) == 3
    assert "train" in repr(source)
    assert "8 rows" in repr(source)


def test_a_part_may_be_empty(tmp_path):
    write_part(tmp_path / "train-00000.npz", [], [])
    write(tmp_path, 2, part=1)
    assert len(Conversations(tmp_path, "train")) == 2


def test_a_missing_split_is_named(tmp_path):
    write(tmp_path, 2)
    with pytest.raises(FileNotFoundError, match=r"no heldout-\*.npz in .*--split heldout"):
        Conversations(tmp_path, "heldout")


def test_a_crash_leaves_no_part(tmp_path, monkeypatch):
    def crash(file, **arrays):
        file.write(b"PK half a file")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conversations.np, "savez_compressed", crash)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, 4)
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError):
        Conversations(tmp_path, "train")
    write(tmp_path, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["train-00000.npz"]
    assert len(Conversations(tmp_path, "train")) == 4


def test_rows_are_padded_and_cut(source):
    for batch in first(batches(source, batch=3, length=5, pad_id=PAD, seed=0), 4):
        assert batch["tokens"].shape == (3, 5)
        assert {x.dtype for x in batch.values()} == {np.dtype(np.int32)}
        for row, number in enumerate(numbers([batch])):
            expected = conversation(number)[:5]
            assert batch["lengths"][row] == len(expected)
            np.testing.assert_array_equal(
                batch["tokens"][row], expected + [PAD] * (5 - len(expected))
            )
            assert batch["prompts"][row] == 2
    cut = next(batches(source, batch=3, length=1, pad_id=PAD, seed=0))
    assert (cut["prompts"] == 1).all()  # a prompt is no longer than its row


def test_each_epoch_has_every_row_once_in_an_order_of_its_own(source):
    rows = first(batches(source, batch=4, length=9, pad_id=PAD, seed=0), 9)
    epochs = [numbers(rows[i : i + 3]) for i in (0, 3, 6)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert list(range(12)) not in epochs
    # An epoch that does not fill its last batch goes on in the next one.
    uneven = numbers(first(batches(source, batch=5, length=9, pad_id=PAD, seed=0), 5))
    assert uneven[:24] == epochs[0] + epochs[1]


def test_the_order_is_a_function_of_the_seed(source):
    one, again, other = (
        first(batches(source, batch=4, length=9, pad_id=PAD, seed=seed), 4) for seed in (1, 1, 2)
    )
    assert same(one, again)
    assert numbers(one) != numbers(other)


@pytest.mark.parametrize("seen", [0, 1, 3, 7])
def test_a_saved_position_gives_the_batches_that_follow(source, seen):
    settings = dict(batch=4, length=9, pad_id=PAD, seed=3)
    running = batches(source, **settings)
    first(running, seen)
    position = json.dumps(running.get_state())
    following = first(running, 5)
    for used in (0, 2):  # restored into a fresh iterator, or into one that has moved on
        restored = batches(source, **settings)
        first(restored, used)
        restored.set_state(json.loads(position))
        assert same(first(restored, 5), following)


def test_a_batch_may_be_one_row(source):
    rows = first(batches(source, batch=1, length=9, pad_id=PAD, seed=0), 12)
    assert sorted(numbers(rows)) == list(range(12))


def test_too_few_rows_are_counted(source):
    with pytest.raises(ValueError, match="12 rows do not fill a batch of 13"):
        batches(source, batch=13, length=9, pad_id=PAD, seed=0)
