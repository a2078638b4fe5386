"""From files to the batches that training reads.

documents = read("corpus/*.jsonl.gz")  # or corpus("classics"), or a list of texts
tokenise(documents, "smollm2-135m-instruct", "runs/mine/data", heldout=0.01)  # once
source = Packed(Store("runs/mine/data"), 1024)  # or the store itself, or any sequence of `Row`s
for batch in batches(source, batch=8, length=1024, pad_id=0, seed=0): ...
"""

from dllm_jax.data.batches import batches
from dllm_jax.data.conversations import Conversations, write_part
from dllm_jax.data.corpora import CORPORA, Corpus, corpus
from dllm_jax.data.documents import BrokenDocument, Document, Documents, Report
from dllm_jax.data.packing import Packed
from dllm_jax.data.readers import Files, read
from dllm_jax.data.rows import SPLITS, Row, Source
from dllm_jax.data.store import Store, tokenise
from dllm_jax.data.stored import CorpusData, StoreData
from dllm_jax.data.tokenizers import train_tokenizer

__all__ = [
    "CORPORA",
    "SPLITS",
    "BrokenDocument",
    "Conversations",
    "Corpus",
    "CorpusData",
    "Document",
    "Documents",
    "Files",
    "Packed",
    "Report",
    "Row",
    "Source",
    "Store",
    "StoreData",
    "batches",
    "corpus",
    "read",
    "tokenise",
    "train_tokenizer",
    "write_part",
]
