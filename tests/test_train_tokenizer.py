"""Vocabularies of one's own: they give text back, the same every time, with a mask."""

import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_jax import data
from dllm_jax.data import read, train_tokenizer
from dllm_jax.data.documents import Document, held_out
from dllm_jax.tokenizer import Tokenizer

TEXTS = [f"the {noun} sees the {other}.\n" for noun in ("cat", "dog") for other in ("bird", "ñu")]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Tokenizer]:
    sizes = {"bpe": 275, "byte": 300, "char": 300}
    return {
        kind: train_tokenizer(TEXTS, size, tmp_path_factory.mktemp(kind), kind=kind)
        for kind, size in sizes.items()
    }


@pytest.mark.parametrize("kind", ["bpe", "byte"])
@given(text=st.text())
def test_any_text_comes_back(made, kind, text):
    assert made[kind].decode(made[kind].encode(text, special=False), skip_special=False) == text


@given(text=st.text("".join(sorted(set("".join(TEXTS))))))
def test_characters_are_one_id_each(made, text):
    ids = made["char"].encode(text, special=False)
    assert len(ids) == len(text)
    assert made["char"].decode(ids) == text


def test_bytes_are_one_id_each(made):
    assert made["byte"].vocab_size == 3 + 256
    assert len(made["byte"].encode("ñ \U0001f600", special=False)) == 2 + 1 + 4


def test_merges_shorten_what_was_seen(made):
    assert made["bpe"].vocab_size == 275
    assert len(made["bpe"].encode(TEXTS[0], special=False)) < len(TEXTS[0]) / 2


@pytest.mark.parametrize("kind", ["bpe", "byte", "char"])
def test_special_tokens_are_known_and_loaded(made, kind, tmp_path):
    tokenizer = made[kind]
    assert (tokenizer.pad_id, tokenizer.mask_id, tokenizer.eos_ids) == (0, 1, (2,))
    assert tokenizer.template is None
    assert tokenizer.encode("<|mask|><|eos|>") == [1, 2]
    assert not {1, 2} & set(tokenizer.encode("<|mask|><|eos|>", special=False))
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert (again.pad_id, again.mask_id, again.eos_ids) == (0, 1, (2,))
    assert again.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])
    assert tokenizer.encode_all(TEXTS, special=False) == [
        tokenizer.encode(text, special=False) for text in TEXTS
    ]


def test_unknown_characters_share_one_id(tmp_path):
    tokenizer = train_tokenizer(["aaabbc"], 6, tmp_path, kind="char")
    assert tokenizer.vocab_size == 6  # pad, mask, eos, unk, and the two most frequent
    unknown = tokenizer.backend.token_to_id("<|unk|>")
    assert tokenizer.encode("abczz", special=False) == [4, 5, unknown, unknown, unknown]


@pytest.mark.parametrize("kind", ["bpe", "byte", "char"])
def test_conversations_have_a_template(tmp_path, kind):
    talk = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo\nassistant user"},
    ]
    tokenizer = train_tokenizer([talk], 300, tmp_path, kind=kind, chat=True)
    ids = tokenizer.chat(talk, add_generation_prompt=False)
    text = tokenizer.decode(ids, skip_special=False)
    assert text == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo\nassistant user<|im_end|>\n"
    )
    assert tokenizer.backend.token_to_id("<|im_end|>") in tokenizer.eos_ids


def test_the_same_files_whenever(tmp_path):
    (tmp_path / "some.txt").write_text("\n\n".join(TEXTS))
    program = (
        "import sys; from dllm_jax.data import read, train_tokenizer\n"
        "documents = read(sys.argv[1], unit='paragraph')\n"
        "for kind in ('bpe', 'char'):\n"
        "    train_tokenizer(documents, 290, sys.argv[2] + kind, kind=kind)"
    )
    arguments = [sys.executable, "-c", program, tmp_path / "some.txt", f"{tmp_path}/there-"]
    subprocess.run(arguments, check=True, timeout=120)
    for kind in ("bpe", "char"):
        documents = read(tmp_path / "some.txt", unit="paragraph")
        train_tokenizer(documents, 290, tmp_path / f"here-{kind}", kind=kind)
        here, there = (
            {path.name: path.read_bytes() for path in (tmp_path / f"{side}-{kind}").iterdir()}
            for side in ("here", "there")
        )
        assert here == there
        assert sorted(here) == ["tokenizer.json", "tokenizer_config.json", "trained.json"]


def test_a_vocabulary_is_learnt_once(tmp_path, monkeypatch):
    first = train_tokenizer(TEXTS, 280, tmp_path / "own", chat=True)
    with monkeypatch.context() as patch:
        patch.setattr(data.tokenizers, "_bpe", None)  # nothing is learnt again
        again = train_tokenizer(TEXTS, 280, tmp_path / "own", chat=True)
        assert again.backend.to_str() == first.backend.to_str()
        with pytest.raises(ValueError, match="holds a tokenizer of other vocab_size and chat:"):
            train_tokenizer(TEXTS, 270, tmp_path / "own")
    (tmp_path / "own" / "trained.json").unlink()  # somebody else's, or one that was cut short
    with pytest.raises(ValueError, match="holds a tokenizer of other make"):
        train_tokenizer(TEXTS, 280, tmp_path / "own", chat=True)
    other = train_tokenizer(TEXTS, 270, tmp_path / "own", overwrite=True)
    assert (other.vocab_size, other.template) == (270, None)


@pytest.mark.parametrize("name", ["save", "tokenizer_config.json", "trained.json", "rename"])
def test_one_that_was_killed_blocks_nothing(tmp_path, monkeypatch, name):
    def crash(*_, **__):
        raise KeyboardInterrupt

    write = Path.write_text

    def write_text(path, *args, **options):
        return crash() if path.name == name else write(path, *args, **options)

    train_tokenizer(TEXTS, 270, tmp_path / "old", kind="char")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", write_text)
        if name == "rename":
            patch.setattr(Path, "rename", crash)
        if name == "save":  # it is cut short
            trained = data.tokenizers._of_pieces(["<|pad|>"], ["t"], None)
            trained = mock.Mock(wraps=trained)
            trained.save.side_effect = lambda path: crash(Path(path).write_bytes(b"{"))
            patch.setattr(data.tokenizers, "_of_pieces", lambda *_, **__: trained)
        for folder in ("new", "old"):
            with pytest.raises(KeyboardInterrupt):
                train_tokenizer(TEXTS, 280, tmp_path / folder, kind="char", overwrite=True)
            if (folder, name) != ("old", "save"):  # which has its old one
                with pytest.raises(FileNotFoundError):
                    Tokenizer.load(tmp_path / folder)
    new = train_tokenizer(TEXTS, 280, tmp_path / "new", kind="char")
    old = train_tokenizer(TEXTS, 280, tmp_path / "old", kind="char", overwrite=name == "save")
    assert old.backend.to_str() == new.backend.to_str()
    for folder in ("new", "old"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == [
            "tokenizer.json", "tokenizer_config.json", "trained.json"
        ]  # fmt: skip


def test_nothing_is_learnt_from_what_is_held_out(tmp_path):
    texts = [chr(0x400 + i) * 3 for i in range(100)]
    held = {text[0] for text in texts if held_out(Document(text), 0.3)}
    assert 10 < len(held) < 50
    tokenizer = train_tokenizer(texts, 200, tmp_path, kind="char", heldout=0.3)
    assert {text[0] for text in texts if text[0] in tokenizer.backend.get_vocab()} == {
        text[0] for text in texts
    } - held


def test_mistakes_are_told(tmp_path):
    with pytest.raises(ValueError, match=r"vocab_size=200 is too small for kind='bpe', .* 259"):
        train_tokenizer(TEXTS, 200, tmp_path)
    with pytest.raises(ValueError, match="kind='word' is not known"):
        train_tokenizer(TEXTS, 200, tmp_path, kind="word")
    with pytest.raises(ValueError, match="no text to learn"):
        train_tokenizer([""], 300, tmp_path)
