"""Packed rows: every token once, every segment a document, every row a function of its number."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st

from dllm_jax.data import Packed, Source, Store, batches, tokenise, train_tokenizer


class Kept:
    """A store in memory: document d is the ids 1000 d, 1000 d + 1, ..."""

    def __init__(self, sizes, prompts=None, given=None):
        self.tokens = np.concatenate([1000 * d + np.arange(n) for d, n in enumerate(sizes)])
        self.ends = np.cumsum(np.asarray(sizes, np.int64))
        self.prompts = np.asarray(prompts if prompts is not None else [0] * len(sizes), np.int64)
        self.given = given


SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@drawn(SIZES, st.integers(1, 25))
def test_a_stream_is_cut_every_so_many_tokens(sizes, length):
    store = Kept(sizes)
    rows = Packed(store, length, documents=True)
    found = list(rows)
    assert len(found) == len(rows) == -(-sum(sizes) // length)
    assert all(len(row.tokens) == length for row in found[:-1])
    np.testing.assert_array_equal(np.concatenate([row.tokens for row in found]), store.tokens)
    np.testing.assert_array_equal(rows.sizes, [len(row.tokens) for row in found])
    check_segments(found)
    plain = Packed(store, length)
    for row, other in zip(plain, found, strict=True):
        np.testing.assert_array_equal(row.tokens, other.tokens)
        assert row.segments is row.given is None


@drawn(SIZES, st.integers(1, 25))
def test_whole_documents_are_not_cut(sizes, length):
    store = Kept(sizes)
    rows = Packed(store, length, whole=True, documents=True)
    found = list(rows)
    assert all(1 <= len(row.tokens) <= length for row in found)
    tokens = np.concatenate([row.tokens for row in found])
    np.testing.assert_array_equal(np.sort(tokens), store.tokens)  # each exactly once
    check_segments(found)
    for d, size in enumerate(sizes):
        holding = [np.sum(row.tokens // 1000 == d) for row in found]
        pieces = sorted(n for n in holding if n)
        full, rest = divmod(size, length)
        if size <= length:
            assert pieces == [size]
        else:
            assert pieces == sorted([length] * full + [rest] * bool(rest))
    np.testing.assert_array_equal(rows.sizes, [len(row.tokens) for row in found])
    assert rows.filled == pytest.approx(sum(sizes) / (len(found) * length))
    # Best fit never leaves two rows that could be one.
    free = sorted(length - len(row.tokens) for row in found)
    used = sorted(len(row.tokens) for row in found)
    assert len(found) < 2 or not (used[0] <= free[-1] and used[0] != length - free[-1])


def check_segments(rows):
    """Numbers from 0, a new one with each document, none shared by two."""
    for row in rows:
        owner = row.tokens // 1000
        begins = np.concatenate([[True], owner[1:] != owner[:-1]])
        np.testing.assert_array_equal(row.segments, np.cumsum(begins) - 1)
        assert row.segments.dtype == np.int32


@pytest.mark.parametrize("whole", [False, True])
@drawn(SIZES, st.integers(1, 25), st.randoms(use_true_random=False))
def test_prompts_are_given_wherever_they_land(whole, sizes, length, random):
    prompts = [random.randrange(n) for n in sizes]
    prompts[0] = min(1, sizes[0])
    rows = Packed(Kept(sizes, prompts), length, whole=whole)
    for row in rows:
        expected = row.tokens % 1000 < np.asarray(prompts)[row.tokens // 1000]
        np.testing.assert_array_equal(row.given, expected)
        assert row.prompt == 0
    marks = np.array([random.random() < 0.5 for _ in range(sum(sizes))], np.uint8)
    store = Kept(sizes, prompts, marks)
    by_token = dict(zip(store.tokens.tolist(), marks.astype(bool).tolist(), strict=True))
    for row in Packed(store, length, whole=whole):
        assert row.given.tolist() == [by_token[t] for t in row.tokens.tolist()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    texts = ["".join(chr(97 + (i + j) % 26) for j in range(1 + 37 * i % 61)) for i in range(90)]
    tokenizer = train_tokenizer([], 259, folder / "tokenizer", kind="byte")
    tokenise(texts, tokenizer, folder / "store")
    return folder / "store"


@pytest.mark.parametrize("whole", [False, True])
def test_an_epoch_has_every_token_once(folder, whole):
    store = Store(folder)
    rows = Packed(store, 32, whole=whole, documents=True)
    assert isinstance(rows, Source)
    data = batches(rows, batch=1, length=32, pad_id=0, seed=5)
    epochs = []
    for _ in range(2):
        seen = []
        for batch in itertools.islice(data, len(rows)):
            n = int(batch["lengths"][0])
            seen.append(batch["tokens"][0, :n])
            assert (batch["segments"][0, n:] == -1).all()
            ends = batch["tokens"][0, :n] == 2
            starts = np.concatenate([[0], np.cumsum(ends)[:-1]])
            if whole or n == 32:
                np.testing.assert_array_equal(batch["segments"][0, :n], starts[:n])
        epochs.append(np.concatenate(seen))
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.sort(store.tokens))
    assert not np.array_equal(*epochs)


@pytest.mark.parametrize("whole", [False, True])
def test_a_position_is_restored_and_shares_make_the_whole(folder, whole):
    settings = dict(batch=4, length=32, pad_id=0, seed=1)
    rows = Packed(Store(folder), 32, whole=whole)
    running = batches(rows, **settings)
    for _ in range(len(rows) // 4 + 3):  # into the second epoch
        next(running)
    position = json.dumps(running.get_state())
    following = [next(running) for _ in range(5)]
    again = batches(Packed(Store(folder), 32, whole=whole), **settings)
    again.set_state(json.loads(position))
    halves = [batches(rows, rows=share, **settings) for share in ((0, 1), (2, 3))]
    for half in halves:
        half.set_state(json.loads(position))
    for batch in following:
        np.testing.assert_array_equal(next(again)["tokens"], batch["tokens"])
        joined = np.concatenate([next(half)["tokens"] for half in halves])
        np.testing.assert_array_equal(joined, batch["tokens"])


def test_many_documents_are_laid_out_in_seconds():
    import time

    sizes = np.random.default_rng(0).integers(1, 2000, 200_000)
    store = Kept([1])
    store.tokens = np.broadcast_to(np.int64(0), (int(sizes.sum()),))
    store.ends, store.prompts = np.cumsum(sizes), np.zeros(len(sizes), np.int64)
    begin = time.monotonic()
    rows = Packed(store, 2048, whole=True)
    assert time.monotonic() - begin < 10
    assert rows.filled > 0.99


def test_mistakes_are_told():
    with pytest.raises(ValueError, match="length=0"):
        Packed(Kept([3]), 0)
    with pytest.raises(IndexError):
        Packed(Kept([3]), 2)[2]
