"""Documents on their way into a store: one text or conversation each, and what was wrong in others.

Broken lines, wrong encodings and empty documents are counted by kind with the first few places;
nothing is dropped that the report does not tell of.
"""

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any, NamedTuple, Protocol, runtime_checkable

PLACES = 3
"""How many places of each kind of trouble a report keeps."""

Message = dict[str, Any]
"""One turn: {"role": "user", "content": "..."}; templates may know more keys."""


class Document(NamedTuple):
    """A text, or a conversation."""

    text: str = ""
    messages: tuple[Message, ...] | None = None  # a conversation; `text` is empty then
    place: str = ""  # "file:line", for reports

    def texts(self) -> list[str]:
        """What somebody wrote: the text, or the contents of the turns."""
        if self.messages is None:
            return [self.text]
        return [message["content"] for message in self.messages]


class BrokenDocument(ValueError):
    """What `strict=True` raises at the first document that cannot be used."""


@dataclasses.dataclass
class Trouble:
    """One kind of trouble."""

    count: int = 0
    places: list[str] = dataclasses.field(default_factory=list)  # the first `PLACES`


@dataclasses.dataclass
class Report:
    """What was read, and what was left out and why."""

    files: int = 0
    documents: int = 0  # that were handed on
    troubles: dict[str, Trouble] = dataclasses.field(default_factory=dict)
    strict: bool = False

    def trouble(self, kind: str, place: str) -> None:
        """Counts something that is left out; with `strict`, raises `BrokenDocument` instead."""
        if self.strict:
            raise BrokenDocument(
                f"{place}: {kind}; without strict it would be counted and left out"
            )
        entry = self.troubles.setdefault(kind, Trouble())
        entry.count += 1
        if len(entry.places) < PLACES:
            entry.places.append(place)

    @property
    def left_out(self) -> int:
        """Everything that was read and not handed on."""
        return sum(entry.count for entry in self.troubles.values())

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        troubles = {kind: dataclasses.asdict(entry) for kind, entry in self.troubles.items()}
        return {"files": self.files, "documents": self.documents, "troubles": troubles}


@runtime_checkable
class Documents(Protocol):
    """Documents that can be gone through more than once, always in the same order."""

    report: Report  # of the last or present pass; a new pass begins a new one

    def __iter__(self) -> Iterator[Document]: ...

    def identity(self) -> dict[str, Any]:
        """What the documents are a function of, as JSON has it: names, sizes, times, options."""
        ...


class Listed:
    """Documents that are in memory: texts, or conversations as lists of messages."""

    def __init__(self, items: Sequence[Any], strict: bool = False):
        """Takes a list, not a generator, for it is gone through more than once.

        Raises:
          TypeError: the items are no sequence, or one is neither a text nor a list of messages.
        """
        if isinstance(items, str) or not isinstance(items, Sequence):
            raise TypeError(
                f"documents are a list of texts or of conversations, not a {type(items).__name__};"
                " files are read by dllm_jax.data.read(paths)"
            )
        self.items, self.strict, self.report = items, strict, Report(strict=strict)

    def __iter__(self) -> Iterator[Document]:
        self.report = Report(strict=self.strict)
        for number, item in enumerate(self.items):
            place = f"item {number}"
            if isinstance(item, Document):
                place, chat = item.place or place, item.messages is not None
                found = (
                    checked_chat(item.messages, place) if chat else checked_text(item.text, place)
                )
            elif isinstance(item, str):
                found = checked_text(item, place)
            elif isinstance(item, Sequence):
                found = checked_chat(item, place)
            else:
                raise TypeError(f"{place} is a {type(item).__name__}: neither text nor messages")
            if isinstance(found, str):
                self.report.trouble(found, place)
            else:
                self.report.documents += 1
                yield found

    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for document in Listed(self.items):
            digest.update(key(document))
        return {"kind": "listed", "count": len(self.items), "sha256": digest.hexdigest()}


def listed(items: Documents | Sequence[Any]) -> Documents:
    """Documents as they are; a list of texts or conversations as documents."""
    return items if isinstance(items, Documents) else Listed(items)


def key(document: Document) -> bytes:
    """16 bytes that tell contents apart: of the text, or of the messages."""
    content = document.text
    if document.messages is not None:
        content = json.dumps(document.messages, sort_keys=True, default=_spelt)
    return hashlib.blake2b(content.encode(), digest_size=16).digest()


def held_out(document: Document, share: float) -> bool:
    """Whether a document belongs to the held-out split, of about `share` of all.

    A function of the contents alone: it stays there whatever is added, and equal documents are on
    the same side.
    """
    return int.from_bytes(key(document)[:8], "big") < share * 2.0**64


def checked_text(text: Any, place: str) -> Document | str:
    """A document, or the kind of trouble."""
    if not isinstance(text, str):
        return "the text is not a string"
    if not text.strip():
        return "empty document"
    return _broken(text) or Document(text=text, place=place)


def checked_chat(messages: Any, place: str) -> Document | str:
    """A conversation with something to learn, or the kind of trouble."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        return "the messages are not a list"
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return "a message has no role"
        if not isinstance(message.get("content"), str):
            return "a message has no content, or one that is not a string"
        if broken := _broken(message["content"]):
            return broken
    answers = [message for message in messages if message["role"] == "assistant"]
    if not any(message["content"].strip() for message in answers):
        return "no turn of an assistant to learn"
    document = Document(messages=tuple(messages), place=place)
    try:
        key(document)
    except (TypeError, ValueError, RecursionError):  # a set, an image, itself
        return "a message holds what JSON cannot write"
    return document


def _spelt(value: Any) -> str:
    """What Parquet has beside the kinds of JSON, as text that is the same in every process."""
    if isinstance(value, (datetime.date, datetime.time, datetime.timedelta, Decimal, bytes)):
        return str(value)
    raise TypeError(f"a {type(value).__name__} is not of JSON")


def _broken(text: str) -> str | None:
    """What no text has, or None."""
    if "\0" in text:
        return "NUL characters (another encoding, as utf-16?)"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "broken characters (half of a surrogate pair)"
    return None
