"""A store as the data of a run: what a config of training names.

Train(data=StoreData(folder=Path("runs/mine/data"), length=1024), ...)
Train(data=CorpusData(folder=Path("runs/classics"), length=256, vocab_size=4096), ...)
"""

import dataclasses
from pathlib import Path

from dllm_jax import distributed
from dllm_jax.data.corpora import corpus
from dllm_jax.data.packing import Packed
from dllm_jax.data.rows import Source
from dllm_jax.data.store import Store, tokenise
from dllm_jax.data.tokenizers import train_tokenizer
from dllm_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreData:
    """The documents of a store, each a row, or packed."""

    folder: Path
    """Where `tokenise` or `dllm-jax data` wrote it."""
    length: int | None = None
    """Tokens of the rows that documents are packed into; by default each document is a row."""
    whole: bool = False
    """Pack documents without cutting them."""
    documents: bool = False
    """Number the documents of a packed row, for attention that stays in its document."""

    def source(self, split: str) -> Source:
        """The rows of "train" or "heldout".

        Raises:
          FileNotFoundError: there is no store, or no such split.
        """
        store = self.store(split)
        if self.length is None:
            return store
        return Packed(store, self.length, whole=self.whole, documents=self.documents)

    def store(self, split: str) -> Store:
        """What the rows are made of."""
        return Store(self.folder, split)

    def identity(self) -> str:
        """What its rows are, wherever they lie: a run goes on where they have moved to."""
        made = Store(self.folder).facts["fingerprint"]
        return f"{made}, length={self.length}, whole={self.whole}, documents={self.documents}"

    @property
    def tokenizer(self) -> Tokenizer:
        """The one that the tokens are of."""
        return Store(self.folder).tokenizer()


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusData(StoreData):
    """A corpus that a package carries: the first use learns a vocabulary and makes the store."""

    name: str = "classics"
    """Of `CORPORA`."""
    kind: str = "bpe"
    """Of the vocabulary: bpe, char or byte."""
    vocab_size: int = 4096
    """Ids of it at most."""
    heldout: float = 0.02
    """About which share is held out."""

    def source(self, split: str) -> Source:
        """As `StoreData`; of several processes the first makes what is not there yet.

        Raises:
          FileNotFoundError: the corpus's package is not installed; the message has the command.
        """
        self._make()
        return super().source(split)

    @property
    def tokenizer(self) -> Tokenizer:
        """The one that the tokens are of."""
        self._make()
        return super().tokenizer

    def _make(self) -> None:
        documents = corpus(self.name)
        if distributed.is_first():
            place = self.folder.with_name(f"{self.folder.name}-tokenizer")
            train_tokenizer(documents, self.vocab_size, place, kind=self.kind, heldout=self.heldout)
            tokenise(documents, place, self.folder, heldout=self.heldout)
        distributed.wait("corpus")
