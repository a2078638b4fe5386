"""The data command: it makes a store once, and tells what is in it and what is not."""

import json

import pytest

from dllm_jax.cli import main
from dllm_jax.data import Store


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(3):
        records = [json.dumps({"text": f"text {number} {i}"}) for i in range(100)]
        (folder / f"{number}.jsonl").write_text("\n".join([*records, "{broken"]))
    return folder


def test_a_store_is_made_once_and_told_of(texts, tmp_path, capsys):
    out = tmp_path / "store"
    line = ["data", "--from", str(texts / "*.jsonl"), "--train-tokenizer", "280", "--out", str(out)]
    assert main([*line, "--heldout", "0.1"]) == 0
    told = capsys.readouterr()
    assert "is written" in told.err
    train, held = Store(out), Store(out, "heldout")
    assert len(train) + len(held) == 300
    assert told.out.splitlines()[:2] == ["read        300 documents of 3 files", "left out    3"]
    places = ", ".join(f"{texts}/{i}.jsonl:101" for i in range(3))
    assert f"         3  not valid JSON: {places}" in told.out
    assert f"tokenizer   280 ids, {out}-tokenizer" in told.out
    assert f"train       {len(train)} documents, {train.about['tokens']:,} tokens, " in told.out
    assert train.tokenizer().mask_id == 1
    written = [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))]
    assert main([*line, "--heldout", "0.1", "--json"]) == 0
    told = capsys.readouterr()
    assert "was there already" in told.err
    assert written == [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))]
    assert json.loads(told.out) == train.facts
    assert main([*line, "--heldout", "0.1", "--overwrite"]) == 0  # of the same, so it stays
    assert "was there already" in capsys.readouterr().err
    assert main([*line, "--heldout", "0.1", "--strict"]) == 2
    assert f"{texts}/0.jsonl:101: not valid JSON; without strict" in capsys.readouterr().err
    (out / "heldout.bin").write_bytes(b"")
    assert main([*line, "--heldout", "0.1"]) == 0
    assert "is written" in capsys.readouterr().err
    assert len(Store(out, "heldout")) == len(held)
    assert main([*line, "--heldout", "0.2"]) == 2
    assert (
        f"{out}-tokenizer holds a tokenizer of other heldout: name another folder"
        in capsys.readouterr().err
    )
    other = [*line[:3], "--tokenizer", str(out / "tokenizer"), "--out", str(tmp_path / "other")]
    assert main([*other, "--strict"]) == 2
    assert f"{texts}/0.jsonl:101: not valid JSON" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    assert main([*line, "--heldout", "0.2", "--overwrite"]) == 0
    assert len(Store(out, "heldout")) > len(held)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name what to read"),
        (["--from", "x.txt", "--corpus", "classics"], "name what to read"),
        (["--from", "x.txt"], "give --tokenizer MODEL"),
        (["--from", "x.txt", "--tokenizer", "m", "--chat"], "--kind and --chat are of a vocab"),
        (["--from", "x.txt", "--tokenizer", "m", "--heldout", "1"], "a share in [0, 1)"),
        (["--from", "x.txt", "--train-tokenizer", "300"], "no file, folder or glob 'x.txt'"),
        (["--corpus", "brown", "--train-tokenizer", "300"], "no corpus 'brown', but classics"),
    ],
)
def test_mistakes_are_told_in_a_line(tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "--out", str(tmp_path / "out"), *words]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_a_missing_package_is_told_in_a_line(tmp_path, capsys, monkeypatch):
    import sys

    (tmp_path / "some.parquet").touch()
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    line = [
        "data",
        "--from",
        str(tmp_path),
        "--train-tokenizer",
        "300",
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(line) == 2
    assert "needs pyarrow: pip install" in capsys.readouterr().err
