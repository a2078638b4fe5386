"""A tokenizer of one's own, for a new corpus: byte-level BPE, characters, or bytes.

tokenizer = train_tokenizer(read("corpus/*.txt"), 4096, "runs/mine/tokenizer")
tokenizer.mask_id, tokenizer.pad_id, tokenizer.eos_ids
"""

import collections
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from dllm_jax.data.documents import Documents, held_out, listed
from dllm_jax.tokenizer import Tokenizer

PAD, MASK, EOS, UNK = "<|pad|>", "<|mask|>", "<|eos|>", "<|unk|>"
"""The special tokens; their ids are the first, in this order (UNK of "char" only)."""

TURNS = ("<|im_start|>", "<|im_end|>")
"""What begins and ends a turn of a conversation (ChatML)."""

TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(
    documents: Documents | Sequence[Any],
    vocab_size: int,
    folder: str | os.PathLike[str],
    *,
    kind: str = "bpe",
    chat: bool = False,
    heldout: float = 0.0,
    overwrite: bool = False,
) -> Tokenizer:
    """Learns a vocabulary and writes it, whole or not at all, as a folder for `Tokenizer.load`.

    The same documents and options give the same vocabulary, byte for byte; where the folder has it
    already, it is read.

    Args:
      documents: of `read`, `corpus`, or a list of texts or conversations.
      vocab_size: ids at most, special tokens included. "bpe" needs 256 besides those, "byte" has
        exactly 256 besides, and "char" keeps the most frequent characters; others are unknown.
      folder: where to write; made if need be.
      kind: "bpe" (byte-level: every text has ids, and comes back exactly), "char" (one id a
        character), "byte" (one id a byte of UTF-8).
      chat: tokens and a template for conversations (ChatML) too.
      heldout: the share that `tokenise` will hold out; nothing is learnt from it here either.
      overwrite: replace a vocabulary of other documents or options.

    Raises:
      ValueError: the vocabulary is too small for its kind, the documents hold no text, or the
        folder holds another tokenizer.
    """
    documents = listed(documents)
    special = [PAD, MASK, EOS, *([UNK] if kind == "char" else []), *(TURNS if chat else ())]
    least = len(special) + (256 if kind in ("bpe", "byte") else 1)
    if vocab_size < least:
        raise ValueError(
            f"vocab_size={vocab_size} is too small for kind={kind!r}, which needs {least}"
            f" ({len(special)} of them special tokens)"
        )
    path = Path(folder).expanduser()
    settings = {
        "documents": documents.identity(), "vocab_size": vocab_size, "kind": kind, "chat": chat,
        "heldout": heldout,
    }  # fmt: skip
    if not _there(path, settings, overwrite):
        with filelock.FileLock(path.parent / f".{path.name}.lock"):
            if not _there(path, settings, overwrite):  # nobody else wrote it meanwhile
                _learn(documents, path, settings, special)
    return Tokenizer.load(path)


_TRAINED = "trained.json"  # of what and how


def _learn(documents: Documents, path: Path, settings: dict[str, Any], special: list[str]) -> None:
    """Writes the vocabulary of documents."""
    kind, chat, vocab_size = (settings[name] for name in ("kind", "chat", "vocab_size"))
    texts = _texts(documents, settings["heldout"])
    if kind == "bpe":
        backend = _bpe(texts, vocab_size, special)
    elif kind == "byte":
        backend = _of_pieces(special, sorted(pre_tokenizers.ByteLevel.alphabet()), unk=None)
        _byte_level(backend)
    elif kind == "char":
        counts: collections.Counter[str] = collections.Counter()
        for text in texts:
            counts.update(text)
        ranked = sorted(counts, key=lambda character: (-counts[character], character))
        backend = _of_pieces(special, sorted(ranked[: vocab_size - len(special)]), unk=UNK)
        backend.decoder = decoders.Fuse()
    else:
        raise ValueError(f"kind={kind!r} is not known: bpe, char, byte")
    if kind != "byte" and not documents.report.documents:
        raise ValueError("the documents hold no text to learn a vocabulary from")
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    path.mkdir(parents=True, exist_ok=True)
    partial = path / "tokenizer.json.partial"
    backend.save(str(partial))
    (path / "tokenizer.json").unlink(missing_ok=True)  # it is none until all of it is there
    ends = [EOS, TURNS[1]] if chat else [EOS]
    config = {
        "pad_token": PAD, "mask_token": MASK, "eos_token": EOS,
        **({"unk_token": UNK} if kind == "char" else {}),
        "eos_ids": [backend.token_to_id(token) for token in ends],
        "pad_id": backend.token_to_id(PAD),
    }  # fmt: skip
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    template = path / "chat_template.jinja"
    template.unlink(missing_ok=True)
    if chat:
        template.write_text(TEMPLATE, encoding="utf-8")
    (path / _TRAINED).write_text(json.dumps(settings, indent=1), encoding="utf-8")
    partial.rename(path / "tokenizer.json")


def _there(folder: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    """Whether the folder has this vocabulary already; an error where it has another."""
    if not (folder / "tokenizer.json").exists():
        return False
    try:
        earlier = json.loads((folder / _TRAINED).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # somebody else's, or cut short
        earlier = {}
    if earlier == json.loads(json.dumps(settings)):
        return True
    if not overwrite:
        changed = [name for name in settings if name in earlier and earlier[name] != settings[name]]
        raise ValueError(
            f"{folder} holds a tokenizer of other {' and '.join(changed) or 'make'}: name another"
            " folder, or overwrite it (overwrite=True, --overwrite)"
        )
    return False


def _texts(documents: Documents, heldout: float) -> Iterator[str]:
    for document in documents:
        if not held_out(document, heldout):
            yield from document.texts()


def _bpe(texts: Iterator[str], vocab_size: int, special: list[str]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    _byte_level(backend)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _of_pieces(special: list[str], pieces: list[str], unk: str | None) -> tokenizers.Tokenizer:
    """A vocabulary without merges: one id a character of the (byte-level) text."""
    vocabulary = {piece: number for number, piece in enumerate([*special, *pieces])}
    model = models.BPE(vocab=vocabulary, merges=[], **({} if unk is None else {"unk_token": unk}))
    return tokenizers.Tokenizer(model)


def _byte_level(backend: tokenizers.Tokenizer) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
