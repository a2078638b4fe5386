"""Ids and text: a byte-level BPE vocabulary with its chat template, from any form a model comes in.

    tokenizer = Tokenizer.load("smollm2-135m-instruct")
    ids = tokenizer.chat("Why is the sky blue?")
    text = tokenizer.decode(ids)

The work is done by the `tokenizers` package and a jinja2 sandbox; nothing here needs transformers.
"""

import dataclasses
import datetime
import functools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import gguf
import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np
import tokenizers
from etils import epath
from jaxtyping import Array, Integer
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from dllm_jax import sources

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "mask_token")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer:
    """Text to ids and back. Immutable; make one with `Tokenizer.load`."""

    backend: tokenizers.Tokenizer = dataclasses.field(repr=False)
    template: str | None = dataclasses.field(repr=False)  # jinja2 of a chat; None for a base model
    special: Mapping[str, str]  # "bos_token" and its kin, as the template may name them
    eos_ids: tuple[int, ...]  # ids that end an answer
    pad_id: int

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> "Tokenizer":
        """The tokenizer of a named model, a GGUF file, a published folder or a folder of ours.

        Raises:
          FileNotFoundError: no such model, or its folder has no tokenizer.json.
          ValueError: the files are damaged, or of a kind that is not read here.
        """
        found = sources.resolve(source)
        if found.kind != "gguf":
            return _from_folder(found.path)
        converted = sources.cache_entry(found.path)
        if (converted / "tokenizer.json").exists():
            try:
                return _from_folder(converted)
            except (OSError, ValueError):
                pass  # a broken cache entry is nobody's problem: the source is still there
        return cls.from_gguf(sources.open_gguf(found.path))

    @classmethod
    def from_gguf(cls, reader: gguf.GGUFReader) -> "Tokenizer":
        """The tokenizer inside an open GGUF file."""
        return _from_gguf(reader)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of a text.

        Args:
          special: True reads "<|im_end|>" and its like as the tokens they name, and adds the start
            token of models that have one. False takes the text literally: for text from strangers.

        A byte that the vocabulary lacks is left out (SmolLM2 lacks some control characters).
        """
        backend = self.backend if special else self._literal
        return _encoding(backend, text, special)

    def encode_all(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """Ids of each text, as `encode` gives them; on all cores, so it is for many."""
        backend = self.backend if special else self._literal
        found = backend.encode_batch_fast(list(texts), add_special_tokens=special)
        return [encoding.ids for encoding in found]

    @functools.cached_property
    def lost_bytes(self) -> frozenset[int]:
        """Bytes that no token is: a byte-level vocabulary without a token for unknown ones drops
        them from a text. (SmolLM2's lacks 21, most of which no text in UTF-8 has.)"""
        kinds = json.loads(self.backend.to_str())
        if "ByteLevel" not in json.dumps([kinds.get("pre_tokenizer"), kinds.get("decoder")]):
            return frozenset()
        if kinds["model"].get("unk_token") is not None:
            return frozenset()
        known = self.backend.get_vocab()
        return frozenset(byte for byte, letter in _byte_letters().items() if letter not in known)

    def decode(
        self, ids: Iterable[int] | Integer[Array | np.ndarray, " L"], skip_special: bool = True
    ) -> str:
        """Text of any run of ids, cut anywhere: half a UTF-8 character shows as U+FFFD.

        Ids outside the vocabulary (a mask token of our own) have no text.
        """
        numbers = [int(i) for i in ids]
        if any(i < 0 for i in numbers):
            raise ValueError(f"token ids are not negative, got {min(numbers)}; cut padding first")
        return self.backend.decode(numbers, skip_special_tokens=skip_special)

    def chat(
        self,
        messages: str | list[dict[str, Any]],
        *,
        system: str | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Ids of a conversation, laid out by the model's own template.

        Args:
          messages: `{"role": ..., "content": ...}` each; a plain string is one user turn.
          system: a system message to put first.
          add_generation_prompt: end with the opening of the assistant's turn.

        Raises:
          ValueError: the model has no template, or the template refuses the messages; or a text has
            half of a surrogate pair.
        """
        return self.encode_rendered(
            self.render(messages, system=system, add_generation_prompt=add_generation_prompt)
        )

    def render(
        self,
        messages: str | list[dict[str, Any]],
        *,
        system: str | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The text of a conversation, laid out by the template: what `chat` encodes."""
        if self.template is None:
            raise ValueError(
                "this model has no chat template: it is a base model, or its folder lacks"
                " chat_template.jinja; use encode() to continue a text"
            )
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        if system is not None:
            if turns and turns[0].get("role") == "system":
                raise ValueError("the messages begin with a system message already; drop `system`")
            turns = [{"role": "system", "content": system}, *turns]
        try:
            return _compile(self.template).render(
                messages=turns, add_generation_prompt=add_generation_prompt, **self.special
            )
        except (jinja2.TemplateError, TypeError) as error:  # the second of `tojson`, of a date say
            raise ValueError(f"the chat template refuses these messages: {error}") from error

    def encode_rendered(self, text: str) -> list[int]:
        """Ids of (a part of) what `render` gives: control tokens are read, and none is added."""
        return _encoding(self.backend, text, False)

    def token(self, id: int) -> str:
        """The vocabulary's own spelling of an id: "Ġsky" for " sky"."""
        piece = self.backend.id_to_token(int(id)) if id >= 0 else None
        if piece is None:
            raise ValueError(f"id {id} is not in the vocabulary of {self.vocab_size} tokens")
        return piece

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def mask_id(self) -> int | None:
        """The id that stands for a position to be written, where the tokenizer's folder names it.

        Published models name theirs in the model's config; a tokenizer of ours has it here.
        """
        mask = self.special.get("mask_token")
        return None if mask is None else self.backend.token_to_id(mask)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja for `load`."""
        path = epath.Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        settings = {**self.special, "eos_ids": list(self.eos_ids), "pad_id": self.pad_id}
        (path / "tokenizer.json").write_text(self.backend.to_str(), encoding="utf-8")
        (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        if self.template is not None:
            (path / "chat_template.jinja").write_text(self.template, encoding="utf-8")

    @functools.cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        twin = tokenizers.Tokenizer.from_str(self.backend.to_str())
        twin.encode_special_tokens = True
        return twin


def _encoding(backend: tokenizers.Tokenizer, text: str, special: bool) -> list[int]:
    try:
        return backend.encode(text, add_special_tokens=special).ids
    except (TypeError, UnicodeEncodeError) as error:  # whichever `tokenizers` raises
        if not isinstance(text, str):
            raise
        raise ValueError("broken characters (half of a surrogate pair)") from error


def _byte_letters() -> dict[int, str]:
    """The letter that GPT-2's vocabularies write for each byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in shown]
    return {**{x: chr(x) for x in shown}, **{x: chr(256 + i) for i, x in enumerate(others)}}


def _from_folder(folder: epath.Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.exists():
        raise FileNotFoundError(
            f"{folder} has no tokenizer.json; a model published without one gets it from"
            " transformers: AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        )
    try:
        backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # `tokenizers` raises plain Exception
        raise ValueError(f"{file} is not a readable tokenizer ({error}); fetch it again") from error
    # Some are published with a length limit or padding switched on; an id list is exactly its text.
    backend.no_truncation()
    backend.no_padding()
    settings_file = folder / "tokenizer_config.json"
    settings = sources.read_json(settings_file) if settings_file.exists() else {}
    special = {key: _content(settings[key]) for key in _SPECIAL if settings.get(key)}
    eos, pad = (backend.token_to_id(special.get(key, "")) for key in ("eos_token", "pad_token"))
    eos_ids = settings.get("eos_ids")
    if eos_ids is None:
        own = () if eos is None else (eos,)
        eos_ids = dict.fromkeys(own + sources.published_eos(folder))
    eos_ids = tuple(eos_ids)
    pad_id = settings.get("pad_id", pad)
    if pad_id is None:
        pad_id = eos_ids[0] if eos_ids else 0
    return Tokenizer(
        backend=backend,
        template=_folder_template(folder, settings),
        special=special,
        eos_ids=eos_ids,
        pad_id=pad_id,
    )


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _folder_template(folder: epath.Path, settings: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name: [{"name": "default", "template": ...}, ...]
        by_name = {entry["name"]: entry["template"] for entry in template}
        template = by_name.get("default")
    return template


def _from_gguf(reader: gguf.GGUFReader) -> Tokenizer:
    meta = sources.gguf_metadata(reader)

    def strings(key: str) -> list[Any]:
        field = reader.get_field(f"tokenizer.ggml.{key}")
        if field is None:
            raise ValueError(f"the GGUF file has no tokenizer.ggml.{key}: it carries no tokenizer")
        return field.contents()

    kind = meta.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ValueError(
            f"the GGUF file's tokenizer is {kind!r}; only byte-level BPE ('gpt2') is read from"
            " GGUF: use the published folder with tokenizer.json"
        )
    pieces, merges = strings("tokens"), strings("merges")
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    pre = meta.get("tokenizer.ggml.pre")
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[tuple(merge.split(" ")) for merge in merges],
            ignore_merges=pre == "llama-bpe",
        )
    )
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer(pre)
    backend.decoder = decoders.ByteLevel()
    types = strings("token_type")
    control, user = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED
    for piece, kind in zip(pieces, types, strict=True):
        if kind in (control, user):
            added = AddedToken(piece, normalized=False, special=kind == control)
            (backend.add_special_tokens if kind == control else backend.add_tokens)([added])

    ids = {key: meta.get(f"tokenizer.ggml.{name}_token_id") for key, name in _GGUF_SPECIAL.items()}
    special = {key: pieces[i] for key, i in ids.items() if i is not None}
    bos = special.get("bos_token")
    if bos is not None and meta.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, vocabulary[bos])]
        )
    eos_ids = sources.gguf_eos(meta)
    pad = ids["pad_token"]
    if pad is None:
        pad = eos_ids[0] if eos_ids else 0
    return Tokenizer(
        backend=backend,
        template=meta.get("tokenizer.chat_template"),
        special=special,
        eos_ids=eos_ids,
        pad_id=pad,
    )


_GGUF_SPECIAL = {
    "bos_token": "bos",
    "eos_token": "eos",
    "pad_token": "padding",
    "unk_token": "unknown",
}

# How text is cut into words before the merges: the published patterns of each family.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {
    "llama-bpe": _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST,
    "qwen2": _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST,
}


def _pre_tokenizer(pre: str | None) -> pre_tokenizers.PreTokenizer:
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre == "gpt-2":
        return gpt2
    if pre == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    if pre in _PATTERNS:
        words = pre_tokenizers.Split(Regex(_PATTERNS[pre]), behavior="isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([words, bytes_only])
    raise ValueError(
        f"the GGUF file cuts text by {pre!r}; known are gpt-2, smollm, {', '.join(_PATTERNS)}:"
        " use the published folder with tokenizer.json"
    )


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    """The template in a sandbox: it comes with the weights, so it computes text, nothing else."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, **options)

    def now(layout: str) -> str:
        return datetime.datetime.now().strftime(layout)

    names: dict[str, Any] = environment.globals
    names.update(raise_exception=refuse, strftime_now=now)
    environment.filters["tojson"] = to_json
    return environment.from_string(template)
