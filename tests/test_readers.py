"""Files in every form as documents: what is read, and that nothing goes missing untold."""

import errno
import gzip
import json
from pathlib import Path

import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from dllm_jax.data import BrokenDocument, Document, Report, read

TALK = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello you"}]


def texts(documents) -> list[str]:
    return [document.text for document in documents]


def troubles(report: Report) -> dict[str, tuple[int, list[str]]]:
    """By kind: how many, and where, without the folder."""
    return {
        kind: (entry.count, [place.rpartition("/")[2] for place in entry.places])
        for kind, entry in report.troubles.items()
    }


def lines(*records) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


@pytest.fixture
def verse(tmp_path) -> Path:
    path = tmp_path / "verse.txt"
    path.write_bytes("one\r\ntwo é\r\n\r\n \nthree\n".encode())
    return path


@pytest.mark.parametrize(
    ("unit", "expected", "places"),
    [
        ("file", ["one\ntwo é\n\n \nthree"], [1]),
        ("paragraph", ["one\ntwo é", "three"], [1, 5]),
        ("line", ["one", "two é", "three"], [1, 2, 5]),
    ],
)
def test_a_text_is_a_document_or_a_paragraph_or_a_line_is(verse, unit, expected, places):
    documents = read(verse, unit=unit)
    found = list(documents)
    assert texts(found) == expected
    assert [document.place for document in found] == [f"{verse}:{place}" for place in places]
    assert documents.report == Report(files=1, documents=len(expected))
    assert texts(documents) == expected  # again, with a report of its own
    assert documents.report.documents == len(expected)


@pytest.mark.parametrize("unit", ["file", "paragraph", "line"])
@pytest.mark.parametrize("content", ["", "\n \n\n"])
def test_a_text_without_words_is_an_empty_document(tmp_path, unit, content):
    (tmp_path / "empty.txt").write_text(content)
    documents = read(tmp_path / "empty.txt", unit=unit)
    assert texts(documents) == []
    assert troubles(documents.report) == {"empty document": (1, ["empty.txt:1"])}


def test_wrong_bytes_cost_the_unit_that_they_are_in(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"good\n\nbad caf\xe9\nstill bad\n\ngood again\n")
    for unit, kept, place in (
        ("file", [], 3),
        ("paragraph", ["good", "good again"], 3),
        ("line", ["good", "still bad", "good again"], 3),
    ):
        documents = read(path, unit=unit)
        assert texts(documents) == kept
        assert troubles(documents.report) == {"not utf-8": (1, [f"latin.txt:{place}"])}
    assert texts(read(path, encoding="latin-1")) == ["good\n\nbad café\nstill bad\n\ngood again"]


def test_other_encodings_and_byte_order_marks(tmp_path):
    (tmp_path / "mark.txt").write_bytes("word".encode("utf-8-sig"))
    assert texts(read(tmp_path / "mark.txt")) == ["word"]
    (tmp_path / "wide.txt").write_bytes("line é\n".encode("utf-16"))
    documents = read(tmp_path / "wide.txt")
    assert texts(documents) == []
    assert list(troubles(documents.report)) == ["not utf-8"]
    assert texts(read(tmp_path / "wide.txt", encoding="utf-16")) == ["line é"]
    (tmp_path / "cut.txt").write_bytes("line\n".encode("utf-16")[:-1])
    documents = read(tmp_path / "cut.txt", encoding="utf-16")
    assert texts(documents) == []
    assert documents.report.left_out == 1
    (tmp_path / "bare.txt").write_bytes("line\nother\n".encode("utf-16-le"))
    for name, unit in (("bare", "file"), ("bare", "line"), ("lines", "line")):
        (tmp_path / "lines.txt").write_bytes("line\nother\n".encode("utf-16"))
        documents = read(tmp_path / f"{name}.txt", unit=unit)
        assert texts(documents) == []  # NUL is a character of utf-8
        assert "NUL characters (another encoding, as utf-16?)" in troubles(documents.report)
    with pytest.raises(ValueError, match=r"utf-99.* is not known"):
        read(tmp_path / "mark.txt", encoding="utf-99")


def test_json_lines_of_texts_and_conversations(tmp_path):
    path = tmp_path / "some.jsonl.gz"
    path.write_bytes(
        gzip.compress(
            lines(
                {"text": "first", "id": 1},
                {"messages": TALK},
                {"prompt": "2 + 2", "completion": "4"},
                {"prompt": TALK[:1], "completion": TALK[1:]},
            )
        )
    )
    text, talk, sum_, lists = read(path)
    assert text == Document(text="first", place=f"{path}:1")
    assert talk.messages == lists.messages == tuple(TALK)
    assert sum_.texts() == ["2 + 2", "4"]
    assert texts(read(path, key="id", strict=False)) != texts(read(path))


def test_every_broken_line_is_counted_with_its_place(tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_bytes(
        lines({"text": "good"})
        + b'{"text": "cut\n'
        + b"\n"
        + b"[1, 2]\n"
        + b'{"text": "caf\xe9"}\n'
        + lines({"title": "no text"}, {"text": 3}, {"text": " \n"}, {"text": "\ud800"})
        + lines({"messages": TALK[:1]}, {"messages": [{"role": "user"}]}, {"messages": [{}]})
        + lines({"messages": "hello"})
        + 4 * b"{\n"
        + b'{"text": "last, without a line end"}'
    )
    documents = read(path)
    assert texts(documents) == ["good", "last, without a line end"]
    assert troubles(documents.report) == {
        "not valid JSON": (5, ["broken.jsonl:2", "broken.jsonl:14", "broken.jsonl:15"]),
        "blank line": (1, ["broken.jsonl:3"]),
        "JSON, but no object (a record is {...} on a line of its own)": (1, ["broken.jsonl:4"]),
        "not utf-8": (1, ["broken.jsonl:5"]),
        "no 'text', no 'messages', no 'prompt' with 'completion'": (1, ["broken.jsonl:6"]),
        "the text is not a string": (1, ["broken.jsonl:7"]),
        "empty document": (1, ["broken.jsonl:8"]),
        "broken characters (half of a surrogate pair)": (1, ["broken.jsonl:9"]),
        "no turn of an assistant to learn": (1, ["broken.jsonl:10"]),
        "a message has no content, or one that is not a string": (1, ["broken.jsonl:11"]),
        "a message has no role": (1, ["broken.jsonl:12"]),
        "the messages are not a list": (1, ["broken.jsonl:13"]),
    }
    assert documents.report.documents + documents.report.left_out == 18  # the lines
    with pytest.raises(BrokenDocument, match=r"broken.jsonl:2: not valid JSON; without strict"):
        list(read(path, strict=True))


@pytest.mark.parametrize("damage", ["cut", "flipped", "no gzip"])
def test_a_damaged_archive_gives_what_can_be_read(tmp_path, damage):
    import random

    words = [{"text": random.Random(i).randbytes(40).hex()} for i in range(3000)]
    whole = gzip.compress(lines(*words))
    path = tmp_path / "some.jsonl.gz"
    half = len(whole) // 2
    path.write_bytes(
        {"cut": whole[:half], "flipped": whole[:half] + 99 * b"\xff", "no gzip": b"x"}[damage]
    )
    documents = read(path)
    found = texts(documents)
    assert found == [word["text"] for word in words[: len(found)]]
    assert bool(found) == (damage != "no gzip")
    ((kind, entry),) = [
        item for item in documents.report.troubles.items() if item[0].startswith("the rest")
    ]
    assert "cannot be read" in kind
    assert entry.count == 1
    with pytest.raises(BrokenDocument):
        list(read(path, strict=True))


@pytest.mark.parametrize("name", ["b.txt", "b.jsonl.gz", "b.parquet", "b.array_record"])
def test_what_may_be_readable_later_ends_the_pass(tmp_path, name):
    if name == "b.parquet":
        pytest.importorskip("pyarrow")
    (tmp_path / "a.txt").write_text("whole")
    (tmp_path / name).touch()
    documents = read(tmp_path / "a.txt", tmp_path / name)
    (tmp_path / name).unlink()
    with pytest.raises(OSError, match=rf"{name} cannot be read now \(.*No such file"):
        list(documents)
    assert not documents.report.troubles


@pytest.mark.parametrize("error", [OSError(errno.EIO, "a bad disk"), TimeoutError("too late")])
def test_a_disk_that_fails_is_no_broken_parquet(tmp_path, monkeypatch, error):
    parquet = pytest.importorskip("pyarrow.parquet")

    def fail(path):
        raise error

    monkeypatch.setattr(parquet, "ParquetFile", fail)
    (tmp_path / "some.parquet").touch()
    documents = read(tmp_path / "some.parquet")
    with pytest.raises(OSError, match=r"some.parquet cannot be read now .*(a bad disk|too late)"):
        list(documents)
    assert not documents.report.troubles


def test_array_records_are_json_or_text(tmp_path):
    path = tmp_path / "some.array_record"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    records = [json.dumps({"text": "a"}).encode(), "bé".encode(), b"\xff", b"{broken", b""]
    records += [str(i).encode() for i in range(600)]
    for record in records:
        writer.write(record)
    writer.close()
    documents = read(path)
    assert texts(documents) == ["a", "bé", *map(str, range(600))]
    assert troubles(documents.report) == {
        "not utf-8": (1, ["some.array_record:3"]),
        "not valid JSON": (1, ["some.array_record:4"]),
        "empty document": (1, ["some.array_record:5"]),
    }
    path.write_bytes(b"nothing of the kind")
    documents = read(path)
    assert texts(documents) == []
    assert documents.report.left_out == 1


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"text": str(i), "more": i} for i in range(700)] + [{"text": None, "more": 0}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "some.parquet")
    talks = pyarrow.Table.from_pylist([{"messages": TALK}])
    parquet.write_table(talks, tmp_path / "talks.parquet")
    documents = read(tmp_path / "*.parquet")
    *found, talk = documents
    assert texts(found) == [str(i) for i in range(700)]
    assert talk.messages == tuple(TALK)
    assert [places for _, places in troubles(documents.report).values()] == [["some.parquet:701"]]
    documents = read(tmp_path / "some.parquet", key="title")
    assert texts(documents) == []
    assert documents.report.left_out == 701
    whole = (tmp_path / "some.parquet").read_bytes()
    damaged = whole[:20] + 40 * b"\x07" + whole[60:]  # an OSError, of pyarrow's own
    (tmp_path / "some.parquet").write_bytes(damaged)
    documents = read(tmp_path / "some.parquet")
    assert texts(documents) == []
    assert documents.report.left_out == 1
    (tmp_path / "some.parquet").write_bytes(b"PAR1 but not really")
    documents = read(tmp_path / "some.parquet")
    assert texts(documents) == []
    assert documents.report.left_out == 1


def test_a_string_of_parquet_that_is_not_utf_8_costs_its_row(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    words = [str(i).encode() for i in range(600)]
    words[3] = words[299] = b"caf\xe9"
    column = pyarrow.array(words, pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "some.parquet")
    documents = read(tmp_path / "some.parquet")
    assert texts(documents) == [str(i) for i in range(600) if i not in (3, 299)]
    places = ["some.parquet:4", "some.parquet:300"]
    assert troubles(documents.report) == {"not utf-8": (2, places)}


def test_saved_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list([{"text": "a"}, {"text": ""}])
    one.save_to_disk(tmp_path / "one")
    documents = read(tmp_path / "one")
    assert texts(documents) == ["a"]
    assert documents.report.left_out == 1
    splits = datasets.DatasetDict(train=one, test=datasets.Dataset.from_list([{"text": "t"}]))
    splits.save_to_disk(tmp_path / "two")
    assert texts(read(f"hf:{tmp_path / 'two'}@test")) == ["t"]
    with pytest.raises(ValueError, match=r"has several splits: name one of train, test, as in hf:"):
        list(read(tmp_path / "two"))
    with pytest.raises(ValueError, match="no split 'other'"):
        list(read(f"hf:{tmp_path / 'two'}@other"))
    with pytest.raises(ValueError, match="has no splits: drop @train"):
        list(read(f"hf:{tmp_path / 'one'}@train"))
    (tmp_path / "three").mkdir()
    with pytest.raises(RuntimeError, match="three cannot be loaded by `datasets`"):
        list(read(f"hf:{tmp_path / 'three'}"))
    (tmp_path / "three" / "train.jsonl").write_bytes(lines({"text": "by its name"}))
    assert texts(read(f"hf:{tmp_path / 'three'}")) == ["by its name"]


def test_a_config_and_a_revision_of_a_dataset(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    for name in ("first", "second"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines({"text": name}))
    listed = [
        f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("first", "second")
    ]
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{''.join(listed)}---\n")
    assert texts(read(f"hf:{tmp_path}:second")) == ["second"]
    assert texts(read(f"hf:{tmp_path}:first@train")) == ["first"]
    with pytest.raises(ValueError, match=r"(?s)pick one .*'first', 'second'.*here: hf:.*:CONFIG"):
        list(read(f"hf:{tmp_path}"))
    given = []

    def load(*names, **options):
        given.append((*names, options))
        return {"train": [{"text": "a"}]}

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert texts(read("hf:some/name@train#0123abc")) == ["a"]
    assert given == [("some/name", None, {"revision": "0123abc", "streaming": True})]


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    import sys

    (tmp_path / "some.parquet").touch()
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"needs pyarrow: pip install 'dllm-jax\[data\]'"):
        list(read(tmp_path / "some.parquet"))


def test_paths_globs_and_folders(tmp_path, verse):
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(lines({"text": name}))
    (tmp_path / "picture.png").touch()
    assert texts(read(tmp_path / "*.jsonl")) == ["a.jsonl", "b.jsonl"]
    assert texts(read(f"{tmp_path}/**/*.jsonl")) == ["a.jsonl", "b.jsonl", "deep/c.jsonl"]
    for whole in ("**", "**/*"):  # a folder is not read again for every folder above it
        assert texts(read(f"{tmp_path}/{whole}", form="text")) == texts(read(tmp_path, form="text"))
    for hidden in (".checkpoints/a.jsonl", ".b.jsonl"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_bytes(lines({"text": hidden}))
    folder = read(tmp_path)
    assert len(texts(folder)) == 4  # the text too
    unknown = "a file whose name does not tell how to read it"
    assert troubles(folder.report) == {unknown: (1, ["picture.png"])}
    assert folder.report.files == 4
    assert "picture.png" not in str(folder.identity())  # the documents do not depend on it
    with pytest.raises(BrokenDocument, match=r"picture.png: a file whose name"):
        list(read(tmp_path, strict=True))
    assert texts(read(tmp_path / "b.jsonl", tmp_path / "deep")) == ["b.jsonl", "deep/c.jsonl"]
    assert texts(read(tmp_path / "b.jsonl", form="text")) == ['{"text": "b.jsonl"}']
    with pytest.raises(ValueError, match=r"picture.png: its name does not tell how .* give form="):
        read(tmp_path / "picture.png")
    with pytest.raises(FileNotFoundError, match="no file, folder or glob"):
        read(tmp_path / "*.parquet")
    with pytest.raises(FileNotFoundError, match="a dataset of the hub is named hf:some/name"):
        read("some/name")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(FileNotFoundError, match="no file of a known form"):
        read(tmp_path / "nothing")
    for wrong in ({"form": "csv"}, {"unit": "word"}):
        with pytest.raises(ValueError, match="is not known"):
            read(verse, **wrong)
    with pytest.raises(ValueError, match="at least one"):
        read()


def test_the_identity_tells_files_and_options_apart(verse):
    one = read(verse).identity()
    assert one == read(str(verse)).identity()
    assert one != read(verse, unit="line").identity()
    verse.write_text("other")
    assert one != read(verse).identity()


def test_a_reader_holds_one_line_at_a_time(tmp_path):
    import tracemalloc

    path = tmp_path / "long.jsonl"
    with path.open("wb") as file:
        for _ in range(200):
            file.write(lines({"text": "x" * 100_000}))
    tracemalloc.start()
    try:
        assert sum(len(document.text) for document in read(path)) == 20_000_000
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
