"""Documents from files: texts, JSON lines, Parquet, ArrayRecord, Hugging Face datasets.

    documents = read("corpus/*.jsonl.gz", "notes/*.txt")
    for document in documents: ...
    print(documents.report)  # files, documents, and what was left out, by kind, with places

Every form is streamed: one document is in memory at a time (of Parquet a batch of rows).
"""

import glob
import gzip
import importlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dllm_jax.data.documents import Document, Report, checked_chat, checked_text

FORMS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".array_record": "arrayrecord",
    ".arrayrecord": "arrayrecord",
    ".riegeli": "arrayrecord",
}
"""How a file is read, by the end of its name; ".gz" behind a text form is opened on the way."""

HUB = "hf:"
"""Begins a Hugging Face dataset: "hf:NAME", or "hf:NAME:CONFIG@SPLIT#REVISION" or some of it."""


def read(
    *paths: str | os.PathLike[str],
    form: str | None = None,
    unit: str = "file",
    key: str = "text",
    encoding: str = "utf-8",
    strict: bool = False,
) -> "Files":
    """The documents of files, in the order of the paths; a glob's or folder's by name.

    Args:
      paths: files, globs ("data/**/*.jsonl"), folders (every file of a known form below them that
        is not hidden; the report names those of other forms), folders that `datasets` saved to
        disk, or a dataset that `datasets` loads: "hf:NAME:CONFIG@SPLIT#REVISION", or some of it (a
        revision of the hub, as a commit: without one a name stands for what is there on the day).
      form: "text", "jsonl", "parquet" or "arrayrecord"; by the end of each name by default.
      unit: what of a text file is one document: all of it, a paragraph (between blank lines), or
        a line.
      key: the field that holds the text. Where a record has none, "messages" is a conversation,
        and so are "prompt" and "completion".
      encoding: of texts and JSON lines. A byte order mark at the start is no text.
      strict: raise `BrokenDocument` at the first document or file of a folder that cannot be
        used, instead of counting it in the report.

    Raises:
      FileNotFoundError: a path or glob names nothing.
      ValueError: a file's form is not known by its name.
      ImportError: a form needs a package that is not installed; the message names it.
    """
    if not paths:
        raise ValueError("name at least one file, folder or glob to read")
    if form is not None and form not in _OPENERS:
        raise ValueError(f"form={form!r} is not known: {', '.join(sorted(_OPENERS))}")
    found = [source for path in paths for source in _sources(os.fspath(path), form)]
    known = [(path, name) for path, name in found if name is not None]
    unknown = [path for path, name in found if name is None]
    return Files(known, unknown, unit=unit, key=key, encoding=encoding, strict=strict)


class BrokenFile(Exception):
    """What a file holds is not of its form: no other try will read it."""


class Files:
    """Documents of files; each pass over them reads anew and makes a new `report`.

    What is broken in a file is counted there. One that cannot be read now, but perhaps later (no
    permission, a lost connection), ends the pass with an `OSError`.
    """

    def __init__(
        self, sources: list[tuple[str, str]], unknown: list[str], *, unit: str, key: str,
        encoding: str, strict: bool,
    ):  # fmt: skip
        """See `read`; `sources` are (path, form), `unknown` the files whose form is not known."""
        if unit not in ("file", "paragraph", "line"):
            raise ValueError(f"unit={unit!r} is not known: file, paragraph, line")
        try:
            "".encode(encoding)
        except LookupError:
            raise ValueError(f"encoding={encoding!r} is not known, as utf-8 or latin-1") from None
        self.sources, self.unknown = sources, unknown
        self.unit, self.key, self.encoding = unit, key, encoding
        self.strict, self.report = strict, Report(strict=strict)

    def __iter__(self) -> Iterator[Document]:
        self.report = report = Report(strict=self.strict)
        for path in self.unknown:
            report.trouble("a file whose name does not tell how to read it", path)
        for path, form in self.sources:
            report.files += 1
            try:
                for found, place in _OPENERS[form](path, self):
                    if isinstance(found, str):
                        report.trouble(found, place)
                    else:
                        report.documents += 1
                        yield found
            except (BrokenFile, gzip.BadGzipFile, EOFError, zlib.error, UnicodeError) as error:
                kind = f"the rest of the file cannot be read ({type(error).__name__})"
                report.trouble(kind, f"{path}: {error}")
            except OSError as error:
                raise OSError(
                    f"{path} cannot be read now ({type(error).__name__}: {error}): nothing says"
                    " that it is broken, so it is not left out; try again"
                ) from error

    def identity(self) -> dict[str, Any]:
        """Names, sizes and times of change of the files, and how they are read."""
        files = [[path, form, *_stamp(path)] for path, form in self.sources]
        options = {"unit": self.unit, "key": self.key, "encoding": self.encoding}
        return {"kind": "files", "files": files, **options}

    def __repr__(self) -> str:
        return f"Files({len(self.sources)} sources, unit={self.unit!r})"


Found = Iterator[tuple[Document | str, str]]
"""A document or a kind of trouble, each with its place."""


def _sources(path: str, form: str | None) -> list[tuple[str, str | None]]:
    """Files with their forms: None is of files in a folder whose form is not known."""
    if path.startswith(HUB):
        return [(path, "datasets")]
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        if _saved(path):
            return [(path, "datasets")]
        below = ((p, p.relative_to(path).parts) for p in Path(path).rglob("*"))
        shown = (p for p, parts in below if not any(part.startswith(".") for part in parts))
        inside = sorted(str(p) for p in shown if p.is_file())
        found = [(p, form or _form(p)) for p in inside]
        if not any(name for _, name in found):
            raise FileNotFoundError(f"{path} holds no file of a known form ({', '.join(FORMS)})")
        return found
    if os.path.exists(path):
        name = form or _form(path)
        if name is None:
            raise ValueError(
                f"{path}: its name does not tell how to read it ({', '.join(FORMS)}, texts also"
                f" with .gz): give form= one of {', '.join(sorted(_OPENERS))}"
            )
        return [(path, name)]
    matches = sorted(glob.glob(path, recursive=True))
    if not matches:
        hint = f"; a dataset of the hub is named {HUB}{path}" if path.count("/") == 1 else ""
        raise FileNotFoundError(f"no file, folder or glob {path!r} (in {os.getcwd()}){hint}")
    found = (source for match in matches for source in _sources(match, form))
    return list({os.path.normpath(path): (path, form) for path, form in found}.values())


def _form(path: str) -> str | None:
    name = path.lower()
    zipped = name.endswith(".gz")
    form = FORMS.get(os.path.splitext(name.removesuffix(".gz"))[1])
    return None if zipped and form not in ("text", "jsonl") else form


def _stamp(path: str) -> tuple[int, int]:
    """Size and time of change; of a folder, of what is in it; of a name in the hub, nothing."""
    if path.startswith(HUB):
        return (0, 0)
    files = [p for p in Path(path).rglob("*") if p.is_file()] if os.path.isdir(path) else [path]
    status = [os.stat(file) for file in files]
    return sum(s.st_size for s in status), max((s.st_mtime_ns for s in status), default=0)


def _texts(path: str, how: Files) -> Found:
    """Of a text file: all of it, paragraphs or lines. Lines end with \\n in what is handed on.

    A file without words is an empty document.
    """
    parts: list[str] = []
    begin, broken = 0, 0

    def made() -> tuple[Document | str, str]:
        place = f"{path}:{broken or begin or 1}"
        if broken:
            return f"not {how.encoding}", place
        return checked_text("\n".join(parts), place), place

    for number, line in _lines(path, how.encoding, newline=None):
        separates = not line.strip()
        if how.unit == "line" or (how.unit == "paragraph" and separates):
            if parts:
                yield made()
            parts, broken = [], 0
            if separates:
                continue
        if not parts:
            begin = number
        parts.append(line)
        if not broken and _UNDECODED.search(line):
            broken = number
    if parts or not begin:
        yield made()


def _json_lines(path: str, how: Files) -> Found:
    """One JSON object a line."""
    for number, line in _lines(path, how.encoding, newline="\n"):
        place = f"{path}:{number}"
        if _UNDECODED.search(line):
            yield f"not {how.encoding}", place
        elif not line.strip():
            yield "blank line", place
        else:
            yield _from_json(line, place, how.key), place


def _from_json(text: str | bytes, place: str, key: str) -> Document | str:
    try:
        record = json.loads(text)
    except UnicodeDecodeError:
        return "not utf-8"
    except (ValueError, RecursionError):
        return "not valid JSON"
    if not isinstance(record, dict):
        return "JSON, but no object (a record is {...} on a line of its own)"
    return _from_record(record, place, key)


def _from_record(record: Mapping[str, Any], place: str, key: str) -> Document | str:
    if record.get(key) is not None:
        return checked_text(record[key], place)
    if record.get("messages") is not None:
        return checked_chat(record["messages"], place)
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):  # each a list of messages
        return checked_chat([*prompt, *completion], place)
    if prompt is not None and completion is not None:
        turns = (("user", prompt), ("assistant", completion))
        return checked_chat([{"role": role, "content": text} for role, text in turns], place)
    return f"no {key!r}, no 'messages', no 'prompt' with 'completion'"


def _parquet(path: str, how: Files) -> Found:
    reader = _package("pyarrow.parquet", "data")
    try:
        file = reader.ParquetFile(path)
        names = [name for name in (how.key, *_FIELDS) if name in file.schema_arrow.names]
        row = 0
        for batch in file.iter_batches(batch_size=256, columns=names or None):
            for record in _records(batch):
                row += 1
                place = f"{path}:{row}"
                if record is None:
                    yield "not utf-8", place
                else:
                    yield _from_record(record, place, how.key), place
    except (_package("pyarrow", "data").ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno):
            raise  # of the system: what pyarrow says of a damaged file has no number
        raise BrokenFile(f"not readable as Parquet ({error})") from error


def _records(batch: Any) -> list[dict[str, Any] | None]:
    """The rows of a Parquet batch; None: one with a string that is not UTF-8."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if len(batch) == 1:
            return [None]
        return [record for i in range(len(batch)) for record in _records(batch.slice(i, 1))]


def _array_record(path: str, how: Files) -> Found:
    """Records that begin with "{" are JSON objects, others texts in UTF-8."""
    reader = importlib.import_module("array_record.python.array_record_module").ArrayRecordReader
    try:
        file = reader(path)
        count = file.num_records()
        for begin in range(0, count, 256):
            records = file.read(list(range(begin, min(begin + 256, count))))
            for number, record in enumerate(records, begin + 1):
                place = f"{path}:{number}"
                if record.lstrip()[:1] == b"{":
                    yield _from_json(record, place, how.key), place
                    continue
                try:
                    yield checked_text(record.decode(), place), place
                except UnicodeDecodeError:
                    yield "not utf-8", place
        file.close()
    except RuntimeError as error:  # of a damaged file, also when it is closed
        if re.match(r"\w+\(\) failed: ", str(error)):  # a call to the system did
            raise OSError(str(error)) from error
        raise BrokenFile(f"not readable as ArrayRecord ({error})") from error


def _dataset(path: str, how: Files) -> Found:
    """A dataset of the hub, or a folder that `save_to_disk` wrote."""
    library = _package("datasets", "data")
    rest, _, revision = path.removeprefix(HUB).partition("#")
    rest, _, split = rest.partition("@")
    name, _, config = rest.partition(":")
    folder = os.path.expanduser(name)
    try:
        if _saved(folder):
            found = library.load_from_disk(folder)
        else:
            found = library.load_dataset(
                name, config or None, revision=revision or None, streaming=True
            )
    except OSError as error:  # nothing of it can be read: that is no trouble of one document
        raise RuntimeError(f"{path} cannot be loaded by `datasets`: {error}") from error
    except ValueError as error:  # as of a dataset with several configs
        raise ValueError(f"{path}: {error} (here: {HUB}{name}:CONFIG)") from error
    if split and not hasattr(found, "keys"):
        raise ValueError(f"{name} has no splits: drop @{split}")
    if hasattr(found, "keys"):  # several splits
        if not split and len(found) == 1:
            (split,) = found
        if split not in found:
            given = f"no split {split!r}" if split else "several splits"
            raise ValueError(
                f"{name} has {given}: name one of {', '.join(found)}, as in {HUB}{name}@train"
            )
        found = found[split]
    for number, record in enumerate(found, 1):
        place = f"{path}:{number}"
        yield _from_record(record, place, how.key), place


_OPENERS: dict[str, Callable[[str, Files], Found]] = {
    "text": _texts,
    "jsonl": _json_lines,
    "parquet": _parquet,
    "arrayrecord": _array_record,
    "datasets": _dataset,
}
_FIELDS = ("messages", "prompt", "completion")
_UNDECODED = re.compile("[\udc80-\udcff]")  # bytes that `surrogateescape` could not decode


def _lines(path: str, encoding: str, newline: str | None) -> Iterator[tuple[int, str]]:
    """Lines without their ends, by number from 1; undecodable bytes are lone surrogates."""
    opener = gzip.open if path.lower().endswith(".gz") else open
    name = "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding
    with opener(path, "rt", encoding=name, errors="surrogateescape", newline=newline) as file:
        for number, line in enumerate(file, 1):
            yield number, line.removesuffix("\n")


def _saved(folder: str) -> bool:
    return any(
        os.path.exists(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json")
    )


def _package(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(
            f"this form needs {package}: pip install 'dllm-jax[{extra}]', or pip install {package}"
        ) from error
