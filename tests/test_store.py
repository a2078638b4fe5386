"""Documents as tokens on disk: written once, opened as rows, refused when they are not whole."""

import concurrent.futures
import datetime
import decimal
import json
import os
import pickle
import shutil

import numpy as np
import pytest

from dllm_jax.data import (
    BrokenDocument,
    Source,
    Store,
    StoreData,
    batches,
    read,
    readers,
    store,
    tokenise,
)
from dllm_jax.data import train_tokenizer as train
from dllm_jax.data.documents import Document, key
from dllm_jax.pretraining import sources
from dllm_jax.sources import Damaged
from dllm_jax.tokenizer import Tokenizer

TEXTS = [f"text number {i}, with é" + "!" * (i % 5) for i in range(40)]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


TALK = [turn("user", "Hi"), turn("assistant", "A"), turn("user", "On"), turn("assistant", "Bcd")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """Bytes, with tokens and a template for conversations."""
    return train([], 300, tmp_path_factory.mktemp("bytes"), kind="byte", chat=True)


def whole(rows, tokenizer) -> list[str]:
    return [tokenizer.decode(row.tokens, skip_special=False) for row in rows]


def test_what_is_written_is_read(tmp_path, tokenizer):
    facts = tokenise(TEXTS, tokenizer, tmp_path / "s")
    rows = Store(tmp_path / "s")
    assert isinstance(rows, Source)
    assert whole(rows, tokenizer) == [text + "<|eos|>" for text in TEXTS]
    assert {(row.tokens.dtype, row.prompt, row.given) for row in rows} == {
        (np.dtype(np.int32), 0, None)
    }
    assert rows.tokens.dtype == np.uint16
    assert isinstance(rows.tokens.base, np.memmap)
    assert rows[-1].tokens.tolist() == rows[39].tokens.tolist()
    with pytest.raises(IndexError):
        rows[40]
    size = sum(len(text.encode()) for text in TEXTS)
    assert facts["splits"] == {
        "train": {
            "documents": 40, "tokens": size + 40, "learnt": size + 40, "bytes": size,
            "characters": sum(map(len, TEXTS)), "unknown": 0,
        }
    }  # fmt: skip
    assert rows.bytes_per_token == size / (size + 40)
    assert rows.characters_per_token == (size - 40) / (size + 40)
    assert rows.tokenizer().backend.to_str() == tokenizer.backend.to_str()
    assert facts == json.loads((tmp_path / "s" / "store.json").read_text()) == rows.facts
    batch = next(batches(rows, batch=4, length=30, pad_id=0, seed=0))
    assert sorted(batch) == ["lengths", "prompts", "tokens"]
    assert "40 documents" in repr(rows)
    again = pickle.loads(pickle.dumps(rows))
    assert whole(again, tokenizer) == whole(rows, tokenizer)
    assert len(pickle.dumps(rows)) < 1000


def test_ids_beyond_16_bits(tmp_path, tokenizer):
    wide = Tokenizer.load(tmp_path_of(tokenizer, tmp_path))
    wide.backend.add_tokens([f"<more{i}>" for i in range(70_000)])
    tokenise([f"a<more{i}>" for i in (0, 69_999)], wide, tmp_path / "s")
    rows = Store(tmp_path / "s")
    assert rows.tokens.dtype == np.uint32
    assert [int(row.tokens[1]) for row in rows] == [
        wide.backend.token_to_id(f"<more{i}>") for i in (0, 69_999)
    ]


def tmp_path_of(tokenizer: Tokenizer, folder):
    tokenizer.save(folder / "tokenizer")
    return folder / "tokenizer"


def test_splits_are_disjoint_and_stable(tmp_path, tokenizer):
    texts = [f"document {i}" for i in range(2000)]
    tokenise(texts, tokenizer, tmp_path / "a", heldout=0.1)
    held, kept = (set(whole(Store(tmp_path / "a", s), tokenizer)) for s in ("heldout", "train"))
    assert held | kept == {text + "<|eos|>" for text in texts}
    assert not held & kept
    assert 150 < len(held) < 250
    # More documents, other order, some twice: none changes sides.
    more = [f"another {i}" for i in range(500)] + texts[::-1] + texts[:100]
    tokenise(more, tokenizer, tmp_path / "b", heldout=0.1)
    later, kept = (set(whole(Store(tmp_path / "b", s), tokenizer)) for s in ("heldout", "train"))
    assert held == {text for text in later if text.startswith("document")}
    assert not later & kept
    # A larger share holds out more, and nothing less.
    tokenise(texts, tokenizer, tmp_path / "c", heldout=0.2)
    assert held < set(whole(Store(tmp_path / "c", "heldout"), tokenizer))


def test_the_last_turn_is_learnt(tmp_path, tokenizer):
    tokenise([TALK, TALK[:2], [*TALK, turn("user", "and?")]], tokenizer, tmp_path / "s")
    rows = list(Store(tmp_path / "s"))
    told = [tokenizer.decode(row.tokens[: row.prompt], skip_special=False) for row in rows]
    learnt = [tokenizer.decode(row.tokens[row.prompt :], skip_special=False) for row in rows]
    opening = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    further = "A<|im_end|>\n<|im_start|>user\nOn<|im_end|>\n<|im_start|>assistant\n"
    assert told == [opening + further, opening, opening + further]
    assert learnt == ["Bcd<|im_end|>", "A<|im_end|>", "Bcd<|im_end|>"]
    about = Store(tmp_path / "s").about
    assert (about["learnt"], about["characters"]) == (4 + 2 + 4, 3 + 1 + 3)


def test_every_turn_is_learnt(tmp_path, tokenizer):
    tokenise([TALK, TALK[:2], "a text"], tokenizer, tmp_path / "s", learn="every")
    rows = list(Store(tmp_path / "s"))
    for row, expected in zip(rows, (["A", "Bcd"], ["A"], []), strict=True):
        given = np.asarray(row.given)
        parts = np.split(row.tokens, np.flatnonzero(np.diff(given.astype(int))) + 1)
        kinds = np.split(given, np.flatnonzero(np.diff(given.astype(int))) + 1)
        learnt = [
            tokenizer.decode(part, skip_special=False)
            for part, kind in zip(parts, kinds, strict=True)
            if not kind[0]
        ]
        assert learnt == ([f"{turn}<|im_end|>" for turn in expected] or ["a text<|eos|>"])
        assert given[: row.prompt].all()
        assert not given[row.prompt]
    batch = next(batches(Store(tmp_path / "s"), batch=3, length=90, pad_id=0, seed=0))
    assert batch["given"].dtype == bool


def test_what_the_template_does_not_take_is_counted(tmp_path, tokenizer):
    import dataclasses

    forgetful = dataclasses.replace(
        tokenizer,
        template="{% if messages|length > 3 %}{{ raise_exception('too long') }}{% endif %}"
        "{{ messages|length }}{{ messages[-1].content }}",
    )
    facts = tokenise([TALK, TALK[:2], "text"], forgetful, tmp_path / "s")
    assert facts["report"]["documents"] == 1
    assert facts["report"]["troubles"] == {
        "the chat template refuses these messages: too long": {"count": 1, "places": ["item 0"]},
        "the template lays a turn out otherwise once others follow": {
            "count": 1, "places": ["item 1"],
        },
    }  # fmt: skip
    base = dataclasses.replace(tokenizer, template=None)
    with pytest.raises(ValueError, match="no chat template"):
        tokenise([TALK], base, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def learnt(rows, tokenizer) -> list[str]:
    """What of each row is to be learnt."""
    found = []
    for row in rows:
        given = np.arange(len(row.tokens)) < row.prompt
        given = given if row.given is None else given | np.asarray(row.given)
        found.append(tokenizer.decode(np.asarray(row.tokens)[~given], skip_special=False))
    return found


@pytest.mark.parametrize("learn", ["last", "every"])
def test_an_empty_answer_is_not_learnt(tmp_path, tokenizer, learn):
    end = [turn("user", "more"), turn("assistant", " \n")]
    middle = [turn("user", "?"), turn("assistant", ""), *TALK[:2]]
    facts = tokenise([TALK[:2] + end, middle], tokenizer, tmp_path / "s", learn=learn)
    expected = {"last": ["A<|im_end|>"], "every": 2 * ["A<|im_end|>"]}[learn]
    assert learnt(Store(tmp_path / "s"), tokenizer) == expected
    troubles = {"an empty turn of the assistant": {"count": 1, "places": ["item 0"]}}
    assert facts["report"]["troubles"] == (troubles if learn == "last" else {})


@pytest.mark.parametrize("word", ["<|im_end|>", "<|mask|>"])
@pytest.mark.parametrize("place", [0, 1])
def test_no_message_holds_a_control_token(tmp_path, tokenizer, word, place):
    forged = [dict(message) for message in TALK]
    forged[place]["content"] += f" {word} "
    later = [*TALK[:2], turn("user", word)]  # nobody's to learn
    facts = tokenise([TALK, forged, later, f"a text with {word}"], tokenizer, tmp_path / "s")
    assert facts["report"]["troubles"] == {
        "a message holds a mask or an end token": {"count": 1, "places": ["item 1"]}
    }
    rows = list(Store(tmp_path / "s"))
    assert len(rows) == 3
    mask = tokenizer.mask_id
    assert all(mask not in row.tokens for row in rows)


@pytest.mark.parametrize("learn", ["last", "every"])
def test_no_token_lies_across_the_start_of_an_answer(tmp_path, learn):
    merging = train([f"a{3 * chr(10)}b"] * 20, 320, tmp_path / "bpe", chat=True)
    breaks = ["\n" * count for count in range(4)]
    talks = [
        [turn("user", "a"), turn("assistant", some + "b"), turn("user", "c"),
         turn("assistant", some + "d")]
        for some in breaks
    ]  # fmt: skip
    across = merging.chat(talks[2][:2], add_generation_prompt=False)
    prompt = merging.chat(talks[2][:1])
    assert across[: len(prompt)] != prompt  # it would
    facts = tokenise(talks, merging, tmp_path / "s", learn=learn)
    assert not facts["report"]["troubles"]
    rows = list(Store(tmp_path / "s"))
    answers = [[some + "b<|im_end|>", some + "d<|im_end|>"] for some in breaks]
    expected = ["".join(both if learn == "every" else both[1:]) for both in answers]
    assert learnt(rows, merging) == expected
    for row, talk in zip(rows, talks, strict=True):
        if learn == "every":
            assert row.tokens[: row.prompt].tolist() == merging.chat(talk[:1])
        whole = merging.decode(row.tokens, skip_special=False)
        assert merging.render(talk, add_generation_prompt=False).startswith(whole)


def test_a_conversation_that_cannot_be_encoded_is_counted(tmp_path, tokenizer):
    half = "broken characters (half of a surrogate pair)"
    items = [
        TALK, [turn("\ud83d", "x"), *TALK], Document(text="\ud800"), Document(text="text"),
        Document(messages=({"role": "user"},), place="here"),
    ]  # fmt: skip
    facts = tokenise(items, tokenizer, tmp_path / "s")
    assert facts["report"]["documents"] == 2
    assert facts["report"]["troubles"] == {
        half: {"count": 2, "places": ["item 2", "item 1"]},
        "a message has no content, or one that is not a string": {"count": 1, "places": ["here"]},
    }


def test_messages_with_values_that_json_lacks(tmp_path, tokenizer):
    import dataclasses

    date = datetime.datetime(2024, 2, 3, 4, 5)
    dated = [{**message, "at": date, "cost": decimal.Decimal("0.1")} for message in TALK]
    itself: dict = turn("assistant", "A")
    itself["itself"] = itself
    odd = [[{**TALK[1], "tags": {1}}], [{**TALK[1], 3: "c"}], [{**TALK[1], (1, 2): "d"}], [itself]]
    facts = tokenise([dated, *odd], tokenizer, tmp_path / "s", heldout=1e-9)
    assert facts["report"]["troubles"] == {
        "a message holds what JSON cannot write": {
            "count": 4, "places": ["item 1", "item 2", "item 3"]
        }
    }  # fmt: skip
    assert len(Store(tmp_path / "s")) == 1
    later = [{**message, "at": date + datetime.timedelta(1)} for message in dated]
    assert key(Document(messages=tuple(dated))) != key(Document(messages=tuple(later)))
    shown = dataclasses.replace(
        tokenizer, template="{% for m in messages %}{{ m|tojson }}{% endfor %}"
    )
    facts = tokenise([dated, TALK[:2]], shown, tmp_path / "t")
    (kind,) = facts["report"]["troubles"]
    assert kind.startswith("the chat template refuses these messages: Object of type datetime")


def test_a_template_without_an_end_gets_one(tmp_path, tokenizer):
    import dataclasses

    plain = dataclasses.replace(
        tokenizer, template="{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}",
    )  # fmt: skip
    tokenise([TALK], plain, tmp_path / "s", learn="every")
    (row,) = Store(tmp_path / "s")
    assert whole([row], tokenizer) == ["u:Hi\na:A\nu:On\na:Bcd\n<|eos|>"]
    learnt = row.tokens[~np.asarray(row.given)]
    assert tokenizer.decode(learnt, skip_special=False) == "A\nBcd\n<|eos|>"


def test_text_is_literal(tmp_path, tokenizer):
    tokenise(["say <|eos|> <|mask|>"], tokenizer, tmp_path / "s")
    (row,) = Store(tmp_path / "s")
    assert sorted(np.flatnonzero(row.tokens < 5)) == [len(row.tokens) - 1]


def test_characters_that_are_unknown_are_counted(tmp_path):
    letters = train(["ab"], 10, tmp_path / "tokenizer", kind="char")
    facts = tokenise(["abcad", "b"], letters, tmp_path / "s")
    assert facts["splits"]["train"]["unknown"] == 2


def test_bytes_that_a_vocabulary_drops_are_counted(tmp_path, tokenizer):
    """SmolLM2's has no token for some control characters, and none for what it does not know."""
    found = Tokenizer.load("smollm2-135m-instruct")
    assert not tokenizer.lost_bytes
    for code in range(256):
        text = chr(code)  # of one byte, or of two
        lost = sum(byte in found.lost_bytes for byte in text.encode())
        assert (found.decode(found.encode(text)) != text) == bool(lost)
    facts = tokenise(["a\x04b\x04", "hello é", "\x04"], found, tmp_path / "s")
    assert facts["splits"]["train"]["unknown"] == 2
    assert facts["report"]["troubles"].keys() == {"no token (the vocabulary lacks every character)"}


def test_files_are_tokenised_once(tmp_path, tokenizer, monkeypatch):
    file = tmp_path / "some.jsonl"
    file.write_text('{"text": "one"}\n{broken\n{"text": "two"}\n')
    where = tmp_path_of(tokenizer, tmp_path)
    first = tokenise(read(file), where, tmp_path / "s", heldout=0.01)
    assert first["report"] == {
        "files": 1, "documents": 2,
        "troubles": {"not valid JSON": {"count": 1, "places": [f"{file}:2"]}},
    }  # fmt: skip
    assert first["tokenizer"]["from"] == str(where)
    with monkeypatch.context() as patch:
        patch.setattr(store, "_written", None)  # nothing is written again
        assert tokenise(read(file), where, tmp_path / "s", heldout=0.01) == first
    with pytest.raises(ValueError, match=r"holds a store of other heldout and learn: name another"):
        tokenise(read(file), where, tmp_path / "s", learn="every")
    os.utime(file, (1, 1))
    with pytest.raises(ValueError, match="holds a store of other documents:"):
        tokenise(read(file), where, tmp_path / "s", heldout=0.01)
    file.write_text('{"text": "three"}\n')
    tokenise(read(file), where, tmp_path / "s", heldout=0.01, overwrite=True)
    assert whole(Store(tmp_path / "s"), tokenizer) == ["three<|eos|>"]
    file.write_text('{"text": "four"}\n{broken\n')
    with pytest.raises(BrokenDocument):
        tokenise(read(file, strict=True), tokenizer, tmp_path / "t")
    assert not (tmp_path / "t").exists()
    tokenise(read(file), tokenizer, tmp_path / "t")
    with pytest.raises(BrokenDocument, match=r"some\.jsonl:2: not valid JSON; without strict"):
        tokenise(read(file, strict=True), tokenizer, tmp_path / "t")  # it is there already


def test_one_of_several_writes(tmp_path, monkeypatch):
    """Runs that begin beside each other each make the corpus that is not there yet."""
    wrote, written = [], store._written
    monkeypatch.setattr(store, "_written", lambda *given: wrote.append(1) or written(*given))

    def make(_) -> dict:
        train(TEXTS, 300, tmp_path / "words", kind="byte")
        return tokenise(TEXTS, tmp_path / "words", tmp_path / "s", heldout=0.1)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(make, range(4))
    assert len(wrote) == 1
    assert all(facts == first for facts in others)
    assert len(Store(tmp_path / "s")) == first["splits"]["train"]["documents"]


def test_a_crash_leaves_no_store(tmp_path, tokenizer, monkeypatch):
    tokenise(["old"], tokenizer, tmp_path / "s")

    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "save", crash)  # when all tokens are written
        for name in ("s", "new"):
            with pytest.raises(KeyboardInterrupt):
                tokenise(TEXTS, tokenizer, tmp_path / name, overwrite=True)
    seen = lambda: sorted(path.name for path in tmp_path.iterdir())  # noqa: E731
    assert seen() == [".new.lock", ".s.lock", "s"]
    assert whole(Store(tmp_path / "s"), tokenizer) == ["old<|eos|>"]
    (tmp_path / "new.partial").mkdir()  # of a process that was killed
    (tmp_path / "new.partial" / "rest").touch()
    tokenise(TEXTS, tokenizer, tmp_path / "new")
    assert seen() == [".new.lock", ".s.lock", "new", "s"]
    assert not (tmp_path / "new" / "rest").exists()


def test_nothing_of_the_users_is_replaced(tmp_path, tokenizer):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="exists and is no store"):
            tokenise(TEXTS, tokenizer, tmp_path / "mine", overwrite=overwrite)
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_mistakes_are_told(tmp_path, tokenizer):
    for wrong, message in (
        ({"heldout": 1.0}, r"a share in \[0, 1\)"),
        ({"learn": "first"}, "'last' or 'every'"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenise(TEXTS, tokenizer, tmp_path / "s", **wrong)
    with pytest.raises(ValueError, match=r"no document is left to train on: .* 1 x empty document"):
        tokenise([""], tokenizer, tmp_path / "s")
    with pytest.raises(TypeError, match=r"files are read by dllm_jax.data.read"):
        tokenise("corpus.txt", tokenizer, tmp_path / "s")
    with pytest.raises(TypeError, match="neither text nor messages"):
        tokenise([3], tokenizer, tmp_path / "s")
    with pytest.raises(FileNotFoundError, match="is no store of tokens; make one: dllm-jax data"):
        Store(tmp_path / "s")


def test_a_store_that_is_not_whole_is_refused(tmp_path, tokenizer):
    tokenise(TEXTS, tokenizer, tmp_path / "s", learn="every")
    with pytest.raises(FileNotFoundError, match="no split 'heldout', but train"):
        Store(tmp_path / "s", "heldout")
    for name, message in (
        ("train.bin", r"train.bin has 2\d\d bytes, and store.json tells of"),
        ("train.given", "train.given has"),
        ("train.npy", "train.npy cannot be read"),
        ("store.json", "not valid JSON"),
    ):
        shutil.copytree(tmp_path / "s", tmp_path / "bad", dirs_exist_ok=True)
        content = (tmp_path / "s" / name).read_bytes()
        (tmp_path / "bad" / name).write_bytes(content[:200])
        with pytest.raises(Damaged, match=message):
            Store(tmp_path / "bad")
        (tmp_path / "bad" / name).unlink()
        with pytest.raises((Damaged, FileNotFoundError)):
            Store(tmp_path / "bad")
    shutil.copytree(tmp_path / "s", tmp_path / "bad", dirs_exist_ok=True)
    other = np.zeros((2, 7), np.int64)
    np.save(tmp_path / "bad" / "train.npy", other)
    with pytest.raises(Damaged, match="tells of other documents"):
        Store(tmp_path / "bad")
    facts = json.loads((tmp_path / "s" / "store.json").read_text())
    (tmp_path / "bad" / "store.json").write_text(json.dumps({**facts, "version": 99}))
    with pytest.raises(Damaged, match="version 99"):
        Store(tmp_path / "bad")


@pytest.mark.parametrize(
    "name", ["train.bin", "train.given", "train.npy", "heldout.bin", "tokenizer/tokenizer.json"]
)
def test_a_store_that_is_not_whole_is_made_anew(tmp_path, tokenizer, name):
    def make():
        return tokenise(TEXTS, tokenizer, tmp_path / "s", heldout=0.5, learn="every")

    facts, file = make(), tmp_path / "s" / name
    content = file.read_bytes()
    if file.parent.name == "s":
        file.write_bytes(content[:-1])
        assert make() == facts
        assert file.read_bytes() == content
    file.unlink()
    assert make() == facts
    assert file.read_bytes() == content


def test_a_file_that_cannot_be_read_now_leaves_no_store(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "a.txt").write_text("one\ntwo")
    documents = read(tmp_path / "a.txt", unit="line")

    def refused(*_, **__):
        yield 1, "one"
        raise PermissionError("not yours")

    with monkeypatch.context() as patch:
        patch.setattr(readers, "_lines", refused)
        with pytest.raises(OSError, match=r"a.txt cannot be read now \(PermissionError: not yours"):
            tokenise(documents, tokenizer, tmp_path / "s")
    assert not (tmp_path / "s").exists()
    facts = tokenise(documents, tokenizer, tmp_path / "s")
    assert facts["splits"]["train"]["documents"] == 2
    assert facts["report"]["troubles"] == {}


def test_a_store_whose_facts_are_damaged_gives_way(tmp_path, tokenizer):
    facts = tokenise(TEXTS, tokenizer, tmp_path / "s")
    (tmp_path / "s" / "store.json").write_text("{")
    with pytest.raises(Damaged, match=r"not valid JSON .* or overwrite it \(overwrite=True"):
        tokenise(TEXTS, tokenizer, tmp_path / "s")
    assert tokenise(TEXTS, tokenizer, tmp_path / "s", overwrite=True) == facts
    assert Store(tmp_path / "s").facts == facts


def test_a_split_without_documents_is_none(tmp_path, tokenizer):
    facts = tokenise(TEXTS[:2], tokenizer, tmp_path / "s", heldout=1e-9)
    assert facts["splits"]["heldout"]["documents"] == 0
    with pytest.raises(
        FileNotFoundError, match=r"'heldout' of .* has no document: hold out a larger"
    ):
        Store(tmp_path / "s", "heldout")
    train, heldout = sources(StoreData(folder=tmp_path / "s", length=8))
    assert len(train) > 0
    assert heldout is None
    written = (tmp_path / "s" / "store.json").stat().st_mtime_ns
    assert tokenise(TEXTS[:2], tokenizer, tmp_path / "s", heldout=1e-9) == facts
    assert written == (tmp_path / "s" / "store.json").stat().st_mtime_ns  # it is whole
