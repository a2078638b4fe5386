"""Documents as tokens on disk, made once and mapped into memory.

    tokenise(read("corpus/*.jsonl"), "smollm2-135m-instruct", "runs/mine/data", heldout=0.01)
    source = Store("runs/mine/data", "train")  # a source of documents

A folder holds `store.json` (what it is, of what, and what was left out), `tokenizer/`, and of each
split `<split>.bin` (its documents end to end, uint16 or uint32), `<split>.npy` (int64[2, N]: where
each document ends, and its tokens of prompt) and, where every turn of an assistant is learnt,
`<split>.given` (a byte a token: 1 where it is given).
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import filelock
import numpy as np
from etils import epath

from dllm_jax import sources
from dllm_jax.data.documents import Document, Documents, Report, held_out, listed
from dllm_jax.data.rows import SPLITS, Row
from dllm_jax.tokenizer import Tokenizer

FORMAT = "dllm_jax.store"
VERSION = 1

_AT_ONCE, _CHARACTERS = 512, 1 << 22  # documents that are encoded together, at most


def tokenise(
    documents: Documents | Sequence[Any],
    tokenizer: Tokenizer | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    heldout: float = 0.0,
    learn: str = "last",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes documents as tokens, whole or not at all; what is there already is left as it is.

    A store of the same documents and settings that lacks a file, or has one cut short, is made
    anew.

    A text is taken literally ("<|im_end|>" in it is letters) and ends with the tokenizer's first
    end token, where it has one. A conversation is laid out by the tokenizer's template, and ends
    behind its last end token. Of processes that want the same store at once one writes, the others
    wait (a hidden .lock stays beside the folder) and find it there.

    Args:
      documents: of `read`, `corpus`, or a list of texts or conversations.
      tokenizer: one that is loaded, or where `Tokenizer.load` finds it.
      heldout: about which share goes into the split "heldout", by a hash of the contents.
      learn: of conversations, the "last" turn of the assistant (all before it is the prompt) or
        "every" one (all between them is given).
      overwrite: replace a store of other documents or settings, or one that cannot be read.

    Returns:
      What store.json holds: "splits", "report", "tokenizer", "fingerprint", ...

    Raises:
      BrokenDocument: the documents are strict, and something was left out, now or when the store
        was made.
      OSError: a file cannot be read now, and perhaps later; no store is left of what could be.
      ValueError: `heldout` is not in [0, 1), the folder holds another store or something else, or
        no document is left for training.
    """
    if not 0 <= heldout < 1:
        raise ValueError(f"heldout={heldout} is a share in [0, 1), as in 0.01")
    if learn not in ("last", "every"):
        raise ValueError(f"learn={learn!r} is not known: 'last' or 'every' turn of the assistant")
    documents, path = listed(documents), Path(folder).expanduser()
    came_from = None if isinstance(tokenizer, Tokenizer) else os.fspath(tokenizer)
    known = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.load(tokenizer)
    settings = {
        "version": VERSION,
        "documents": documents.identity(),
        "tokenizer": tokenizer_sha256(known),
        "heldout": heldout,
        "learn": learn,
    }
    fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    there = partial(_there, path, fingerprint, settings, documents.report, overwrite)
    if facts := there():
        return facts
    with filelock.FileLock(path.parent / f".{path.name}.lock"):
        if facts := there():  # somebody else wrote it meanwhile
            return facts
        with _whole(path) as unfinished:
            splits = _written(documents, known, unfinished, heldout, learn)
            if not splits["train"]["documents"]:
                raise ValueError(f"no document is left to train on: {_summary(documents.report)}")
            known.save(unfinished / "tokenizer")
            facts = {
                "format": FORMAT,
                "version": VERSION,
                "fingerprint": fingerprint,
                "settings": settings,
                "tokenizer": {
                    "from": came_from, "sha256": settings["tokenizer"],
                    "vocab_size": known.vocab_size,
                },
                "dtype": str(_dtype(known)),
                "given": (unfinished / "train.given").exists(),
                "splits": splits,
                "report": documents.report.to_dict(),
            }  # fmt: skip
            (unfinished / "store.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return facts


class Store:
    """The documents of a split, by number: a `Source`; nothing is read before it is asked for."""

    def __init__(self, folder: str | os.PathLike[str], split: str = "train"):
        """Opens a folder that `tokenise` wrote, on a disk of this machine or one that it mounts.

        Raises:
          FileNotFoundError: there is no store, no such split, or no document in it.
          dllm_jax.sources.Damaged: a file is missing, cut short, or of another version.
        """
        self.folder, self.split = Path(folder).expanduser(), split
        self.facts = _facts(self.folder)
        if split not in self.facts["splits"]:
            raise FileNotFoundError(
                f"{self.folder} has no split {split!r}, but {', '.join(self.facts['splits'])};"
                " one is held out by tokenise(..., heldout=0.01)"
            )
        self.about = self.facts["splits"][split]
        dtype = np.dtype(self.facts["dtype"])
        count, size = self.about["documents"], self.about["tokens"]
        if not count:
            raise FileNotFoundError(
                f"the split {split!r} of {self.folder} has no document: hold out a larger"
                " share, as in tokenise(..., heldout=0.1)"
            )
        self.tokens = self._mapped(f"{split}.bin", dtype, size)  # [size], end to end
        self.given = None  # uint8[size]: 1 where a token is given
        if self.facts["given"]:
            self.given = self._mapped(f"{split}.given", np.dtype(np.uint8), size)
        table = self.folder / f"{split}.npy"
        try:
            index = np.load(table, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise sources.Damaged(
                f"{table} cannot be read ({error}): make the store anew"
            ) from None
        if index.shape != (2, count) or index[0, -1] != size:
            raise sources.Damaged(
                f"{table} tells of other documents than store.json: make the store anew"
            )
        self.ends, self.prompts = np.asarray(index)  # int64[N] each

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Row:
        number = range(len(self))[index]
        begin = int(self.ends[number - 1]) if number else 0
        end = int(self.ends[number])
        given = None if self.given is None else self.given[begin:end].astype(bool)
        tokens = self.tokens[begin:end].astype(np.int32)
        return Row(tokens, int(self.prompts[number]), given)

    def __repr__(self) -> str:
        size = f"{len(self):,} documents, {self.about['tokens']:,} tokens"
        return f"Store({str(self.folder)!r}, {self.split!r}, {size})"

    def __reduce__(self) -> tuple[type["Store"], tuple[Path, str]]:
        return Store, (self.folder, self.split)  # a map of a file is opened again, never copied

    @property
    def sizes(self) -> np.ndarray:
        """int64[N]: the tokens of each document."""
        return np.diff(self.ends, prepend=0)

    @property
    def characters_per_token(self) -> float:
        """Of what is learnt: nats a token / (this * log 2) are bits a character."""
        return self.about["characters"] / max(self.about["learnt"], 1)

    @property
    def bytes_per_token(self) -> float:
        """Of what is learnt: nats a token / (this * log 2) are bits a byte."""
        return self.about["bytes"] / max(self.about["learnt"], 1)

    def tokenizer(self) -> Tokenizer:
        """The one that the tokens are of, from the store's own copy."""
        return Tokenizer.load(self.folder / "tokenizer")

    def _mapped(self, name: str, dtype: np.dtype, size: int) -> np.ndarray:
        file = self.folder / name
        found = file.stat().st_size if file.exists() else None
        if found != size * dtype.itemsize:
            what = "is missing" if found is None else f"has {found:,} bytes"
            raise sources.Damaged(
                f"{file} {what}, and store.json tells of {size * dtype.itemsize:,}: copy the store"
                " again, or make it anew"
            )
        # As plain arrays, for slices of a `memmap` are slow to make.
        return np.asarray(np.memmap(file, dtype, "r", shape=(size,)))


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """Tells vocabularies, templates and end tokens apart."""
    facts = [tokenizer.backend.to_str(), tokenizer.template or "", list(tokenizer.eos_ids)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


class _Encoded(NamedTuple):
    tokens: list[int]
    prompt: int
    learnt: list[tuple[int, int]]  # spans that are not given
    texts: list[str]  # what of the document they are


def _written(
    documents: Documents, tokenizer: Tokenizer, folder: Path, heldout: float, learn: str
) -> dict[str, dict[str, int]]:
    """Writes the splits, and counts them."""
    names = SPLITS if heldout else SPLITS[:1]
    with contextlib.ExitStack() as stack:
        splits = {
            name: stack.enter_context(_Split(folder, name, _dtype(tokenizer), learn == "every"))
            for name in names
        }
        unknown = tokenizer.backend.token_to_id(tokenizer.special.get("unk_token", ""))
        lost = bytes(tokenizer.lost_bytes)
        for some in _groups(documents):
            for document, found in zip(some, _encoded(some, tokenizer, learn), strict=True):
                if isinstance(found, str):
                    documents.report.documents -= 1
                    documents.report.trouble(found, document.place)
                else:
                    name = SPLITS[held_out(document, heldout)]
                    splits[name].add(found, unknown, lost)
    return {name: split.counts for name, split in splits.items()}


class _Split(contextlib.AbstractContextManager):
    """The files of one split while they grow."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, given: bool):
        self.folder, self.name, self.dtype = folder, name, dtype
        self.tokens: IO[bytes] = (folder / f"{name}.bin").open("wb")
        self.given = (folder / f"{name}.given").open("wb") if given else None
        self.index = [(folder / f"{name}.{column}").open("w+b") for column in ("ends", "prompts")]
        fields = ("documents", "tokens", "learnt", "characters", "bytes", "unknown")
        self.counts = dict.fromkeys(fields, 0)

    def add(self, found: _Encoded, unknown: int | None, lost: bytes) -> None:
        ids = np.asarray(found.tokens, self.dtype)
        self.tokens.write(ids.tobytes())
        if self.given is not None:
            given = np.ones(len(ids), np.uint8)
            for begin, end in found.learnt:
                given[begin:end] = 0
            self.given.write(given.tobytes())
        counts = self.counts
        counts["documents"] += 1
        counts["tokens"] += len(ids)
        counts["learnt"] += sum(end - begin for begin, end in found.learnt)
        counts["characters"] += sum(map(len, found.texts))
        for text in map(str.encode, found.texts):
            counts["bytes"] += len(text)
            counts["unknown"] += len(text) - len(text.translate(None, lost)) if lost else 0
        if unknown is not None:
            counts["unknown"] += int((ids == unknown).sum())
        for column, value in zip(self.index, (counts["tokens"], found.prompt), strict=True):
            column.write(value.to_bytes(8, "little"))

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.tokens.close()
        if self.given is not None:
            self.given.close()
        if kind is None:  # a header in front makes an array of the columns
            shape = (len(self.index), self.counts["documents"])
            header = {"descr": "<i8", "fortran_order": False, "shape": shape}
            with (self.folder / f"{self.name}.npy").open("wb") as file:
                np.lib.format.write_array_header_1_0(file, header)
                for column in self.index:
                    column.seek(0)
                    shutil.copyfileobj(column, file)
        for column in self.index:
            column.close()
            Path(column.name).unlink()


def _groups(documents: Documents) -> Iterator[list[Document]]:
    """Documents that are encoded together: enough for all cores, not too much for the memory."""
    some, size = [], 0
    for document in documents:
        some.append(document)
        size += sum(map(len, document.texts()))
        if len(some) == _AT_ONCE or size >= _CHARACTERS:
            yield some
            some, size = [], 0
    if some:
        yield some


def _encoded(
    documents: Sequence[Document], tokenizer: Tokenizer, learn: str
) -> Iterator[_Encoded | str]:
    """Each document as tokens, or the kind of trouble."""
    texts = [document.text for document in documents if document.messages is None]
    encoded = iter(tokenizer.encode_all(texts, special=False))
    end = list(tokenizer.eos_ids[:1])
    for document in documents:
        if document.messages is not None:
            yield _chat(document, tokenizer, learn)
            continue
        ids = next(encoded)
        if ids:
            ids = ids + end
            yield _Encoded(ids, 0, [(0, len(ids))], [document.text])
        else:
            yield "no token (the vocabulary lacks every character)"


def _chat(document: Document, tokenizer: Tokenizer, learn: str) -> _Encoded | str:
    messages = list(document.messages or ())
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if learn == "last":
        turns = turns[-1:]
    messages = messages[: turns[-1] + 1]  # what follows the last answer is nobody's to learn
    contents = [message["content"] for message in messages]
    if any(word in content for word in _control(tokenizer) for content in contents):
        return "a message holds a mask or an end token"
    ids, done, spans, texts = [], "", [], []
    try:
        whole = tokenizer.render(messages, add_generation_prompt=False)
        for turn in turns:
            before = tokenizer.render(messages[:turn])
            upto = tokenizer.render(messages[: turn + 1], add_generation_prompt=False)
            begin = len(ids := _grown(ids, done, before, tokenizer))
            ids = _grown(ids, before, upto, tokenizer)
            trimmed = _trimmed(ids, begin, tokenizer)
            if len(trimmed) < len(ids):
                ids, upto = trimmed, upto.rstrip()
            if not (whole.startswith(upto) and upto.startswith(before) and before.startswith(done)):
                return "the template lays a turn out otherwise once others follow"
            answer = [token for token in ids[begin:] if token not in tokenizer.eos_ids]
            if tokenizer.decode(answer, skip_special=False).strip():
                spans.append((begin, len(ids)))
                texts.append(contents[turn])
            done = upto
    except ValueError as error:
        if tokenizer.template is None:
            raise
        return str(error)
    if not spans:
        return "an empty turn of the assistant"
    ids = ids[: spans[-1][1]]
    if ids[-1] not in tokenizer.eos_ids:  # a template without an end token
        ids = ids + list(tokenizer.eos_ids[:1])
        spans[-1] = (spans[-1][0], len(ids))
    return _Encoded(ids, spans[0][0], spans, texts)


def _grown(ids: list[int], begin: str, text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a text whose beginning has these: a token that would lie across its end is cut there.

    So it is in decoding, where the beginning is given.
    """
    whole = tokenizer.encode_rendered(text)
    if whole[: len(ids)] == ids or not text.startswith(begin):
        return whole
    return ids + tokenizer.encode_rendered(text[len(begin) :])


def _control(tokenizer: Tokenizer) -> list[str]:
    """Spellings of the tokens that no message may hold: a text of chats is read with them."""
    ids = [*tokenizer.eos_ids, *([] if tokenizer.mask_id is None else [tokenizer.mask_id])]
    return [word for word in map(tokenizer.backend.id_to_token, ids) if word]


def _trimmed(ids: list[int], begin: int, tokenizer: Tokenizer) -> list[int]:
    """A turn up to its end token; what a template puts behind it (a line end) is not the answer."""
    ends = [i for i, token in enumerate(ids[begin:], begin) if token in tokenizer.eos_ids]
    if ends and not tokenizer.decode(ids[ends[-1] + 1 :]).strip():
        return ids[: ends[-1] + 1]
    return ids


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


@contextlib.contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes its name when all is written."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _facts(folder: Path) -> dict[str, Any]:
    file = epath.Path(folder / "store.json")
    if not file.exists():
        raise FileNotFoundError(
            f"{folder} is no store of tokens; make one: dllm-jax data --from FILES"
            f" --tokenizer MODEL --out {folder}"
        )
    facts = sources.read_json(file)
    sources.check_format(facts, FORMAT, file, VERSION)
    return facts


def _there(
    path: Path, fingerprint: str, settings: dict[str, Any], report: Report, overwrite: bool
) -> dict[str, Any] | None:
    """What store.json tells, where the folder holds this store; an error where it holds another."""
    if (path / "store.json").exists():
        there = _fingerprinted(path, overwrite)
        if there.get("fingerprint") == fingerprint:
            with contextlib.suppress(sources.Damaged, FileNotFoundError):
                return _kept(path, report)
        elif not overwrite:
            earlier = there.get("settings", {})
            changed = [name for name in settings if earlier.get(name) != settings[name]]
            raise ValueError(
                f"{path} holds a store of other {' and '.join(changed)}: name another folder, or"
                " overwrite it (overwrite=True, --overwrite)"
            )
    elif path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} exists and is no store: name a folder that is free")
    return None


def _fingerprinted(folder: Path, overwrite: bool) -> dict[str, Any]:
    """What store.json tells, of any version; nothing where it is damaged and gives way."""
    try:
        return sources.read_json(epath.Path(folder / "store.json"))
    except sources.Damaged as error:
        if overwrite:
            return {}
        raise sources.Damaged(f"{error}, or overwrite it (overwrite=True, --overwrite)") from None


def _kept(folder: Path, report: Report) -> dict[str, Any]:
    """The facts of a store that stays, once all of it opens.

    Raises:
      FileNotFoundError, dllm_jax.sources.Damaged: it is not whole.
      BrokenDocument: something was left out of it, and the report is strict.
    """
    facts = _facts(folder)
    for split, about in facts["splits"].items():
        if about["documents"]:
            Store(folder, split)
    if not (folder / "tokenizer" / "tokenizer.json").exists():
        raise FileNotFoundError(f"{folder} has no tokenizer")
    troubles = facts["report"]["troubles"]
    if report.strict and troubles:
        kind, trouble = next(iter(troubles.items()))
        report.trouble(kind, trouble["places"][0])
    return facts


def _summary(report: Report) -> str:
    kinds = [f"{entry.count} x {kind}" for kind, entry in report.troubles.items()]
    return f"{report.files} files, {report.documents} documents, {'; '.join(kinds) or 'no trouble'}"
