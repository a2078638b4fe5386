"""Stores as configs of training name them."""

import dataclasses
import shutil

import pytest

from dllm_jax.data import CORPORA, CorpusData, Packed, Store, StoreData, tokenise, train_tokenizer
from dllm_jax.data.corpora import Bundled
from dllm_jax.training.identity import described


def test_documents_or_packed_rows_of_a_store(tmp_path):
    tokenizer = train_tokenizer([], 300, tmp_path / "tokenizer", kind="byte")
    tokenise([f"text {i}" for i in range(50)], tokenizer, tmp_path / "store", heldout=0.2)
    data = StoreData(folder=tmp_path / "store")
    for split in ("train", "heldout"):
        assert isinstance(data.source(split), Store)
        assert data.source(split).split == split
    packed = dataclasses.replace(data, length=16, whole=True, documents=True).source("train")
    assert isinstance(packed, Packed)
    assert (packed.length, packed.whole) == (16, True)
    assert packed[0].segments is not None
    assert data.tokenizer.encode("ab") == tokenizer.encode("ab")
    with pytest.raises(FileNotFoundError, match="no store"):
        StoreData(folder=tmp_path).source("train")


def test_a_store_is_what_it_holds_wherever_it_lies(tmp_path):
    tokenizer = train_tokenizer([], 300, tmp_path / "tokenizer", kind="byte")
    for name, word in (("one", "text"), ("other", "word")):
        tokenise([f"{word} {i}" for i in range(9)], tokenizer, tmp_path / name)
    data = StoreData(folder=tmp_path / "one", length=16)
    before = described(data)
    shutil.move(data.folder, tmp_path / "moved")
    assert described(dataclasses.replace(data, folder=tmp_path / "moved")) == before
    for changes in ({"folder": tmp_path / "other"}, {"length": 8}, {"documents": True}):
        changed = {"folder": tmp_path / "moved", **changes}
        assert described(dataclasses.replace(data, **changed)) != before


def test_a_corpus_is_made_at_its_first_use(tmp_path, monkeypatch):
    (tmp_path / "bearer").mkdir()
    for i in range(60):
        (tmp_path / "bearer" / f"{i}.txt").write_text(f"Book {i}.\n\nIt ends.")
    monkeypatch.syspath_prepend(tmp_path)
    files = tuple(f"{i}.txt" for i in range(60))
    entry = Bundled(package="bearer", version="1", install="-", folder=".", files=files)
    monkeypatch.setitem(CORPORA, "small", entry)
    data = CorpusData(
        folder=tmp_path / "runs" / "small", length=8, name="small", kind="char", vocab_size=40,
        heldout=0.2,
    )  # fmt: skip
    rows, held = data.source("train"), data.source("heldout")
    told = [data.tokenizer.decode(row.tokens, skip_special=False) for row in rows]
    assert "".join(told).count("It ends.<|eos|>") == len(rows.store)
    assert len(rows.store) + len(held.store) == 60
    written = [path.stat().st_mtime_ns for path in sorted(data.folder.parent.rglob("*"))]
    assert len(data.source("train")) == len(rows)
    assert written == [path.stat().st_mtime_ns for path in sorted(data.folder.parent.rglob("*"))]
    with pytest.raises(ValueError, match="other vocab_size"):
        dataclasses.replace(data, vocab_size=30).source("train")
    with pytest.raises(ValueError, match="no corpus"):
        dataclasses.replace(data, name="none").source("train")
