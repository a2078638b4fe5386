"""The commands that make models, and what they take: plain data for --help, without JAX.

The string below a class or field is its help text.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from dllm_jax.cli.options import Command, default, word


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(Command):
    """Make texts and conversations into a store of tokens, once, for training.

    dllm-jax data --from "corpus/*.jsonl.gz" --tokenizer smollm2-135m-instruct --out runs/corpus

    dllm-jax data --corpus classics --train-tokenizer 4096 --out runs/classics
    """

    out: Annotated[Path, word("FOLDER")]
    """Where to write; what is there of the same documents and settings is left as it is."""

    files: Annotated[
        tuple[str, ...],
        tyro.conf.arg(name="from", metavar="PATH ...", help_behavior_hint="(default: none)"),
    ] = ()
    """Files, globs or folders: .txt, .md, .jsonl (also .gz), .parquet, .array_record; hf:NAME
    (or hf:NAME:CONFIG@SPLIT#REVISION)."""

    corpus: Annotated[str | None, word("NAME")] = None
    """A corpus that a Python package carries, instead of files: classics."""

    tokenizer: Annotated[str | None, word("MODEL")] = None
    """A named model, a .gguf file, or a folder with tokenizer.json."""

    train_tokenizer: Annotated[int | None, default("IDS", "none is trained")] = None
    """Learn a vocabulary of so many ids from the documents, into <out>-tokenizer."""

    kind: Literal["bpe", "char", "byte"] = "bpe"
    """Of the vocabulary that is learnt."""

    chat: bool = False
    """Give the vocabulary that is learnt tokens and a template for conversations."""

    heldout: float = 0.01
    """About which share is held out, by a hash of the document: the split "heldout"."""

    unit: Literal["file", "paragraph", "line"] = "file"
    """What of a text file is one document."""

    key: Annotated[str, word("FIELD")] = "text"
    """Of a record, the field that holds the text."""

    form: Annotated[str | None, default("text|jsonl|parquet|arrayrecord", "by the name")] = None
    """How files are read."""

    encoding: Annotated[str, word("NAME")] = "utf-8"
    """Of texts and JSON lines."""

    learn: Literal["last", "every"] = "last"
    """Which turns of the assistant are learnt, of conversations."""

    strict: bool = False
    """Stop at the first document that cannot be used, instead of counting it."""

    overwrite: bool = False
    """Replace a store of other documents or settings."""

    json: bool = False
    """Print what store.json holds."""

    def check(self) -> None:
        if bool(self.files) == (self.corpus is not None):
            raise ValueError('name what to read: --from "corpus/*.txt", or --corpus classics')
        if (self.tokenizer is None) == (self.train_tokenizer is None):
            raise ValueError("give --tokenizer MODEL, or learn one with --train-tokenizer 4096")
        if self.tokenizer is not None and (self.chat or self.kind != "bpe"):
            raise ValueError("--kind and --chat are of a vocabulary that --train-tokenizer learns")
        if not 0 <= self.heldout < 1:
            raise ValueError(f"--heldout {self.heldout} is a share in [0, 1), as in 0.01")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(Command):
    """Train a model as a file says. Every field of its config is an option; CONFIG.py --help lists
    them.

    dllm-jax train configs/sudoku.py --steps 2000
    """

    config: Annotated[Positional[str], word("CONFIG.py[:NAME] [--FIELD VALUE ...]")]
    """A Python file that exports `config`, a `pretraining.Train`; or another, by its name."""

    fields: tyro.conf.Suppress[tuple[str, ...]] = ()
    """What follows: see `with_fields`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapt(Command):
    """Turn an autoregressive model into a diffusion one as a file says: by an adapter that mask
    tokens alone feel, by LoRA, or by training all of it.

    dllm-jax adapt configs/adapt_smollm2.py:gpu --steps 3000
    """

    config: Annotated[Positional[str], word("CONFIG.py[:NAME] [--FIELD VALUE ...]")]
    """A Python file that exports `config`, an `adaptation.Adapt`; or another, by its name."""

    fields: tyro.conf.Suppress[tuple[str, ...]] = ()
    """What follows: see `with_fields`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plot(Command):
    """Draw the curves of one or several runs.

    dllm-jax plot runs/a runs/b --figures loss heldout_loss+loss --smooth 50
    """

    runs: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN ...")]
    """Folders of runs."""

    out: Annotated[Path | None, word("FILE.png")] = None
    """Where to draw; <RUN>/loss.png of the first by default."""

    figures: Annotated[tuple[str, ...], default("NAME ...", "loss, held out, and drafts")] = ()
    """Names in the metrics, a panel each; a+b in one, and * stands for anything."""

    smooth: int = 1
    """Draw the running mean of so many points."""

    log_x: bool = False
    """Steps on a logarithmic axis."""

    log_y: bool = False
    """Figures on logarithmic axes."""

    def check(self) -> None:
        if not self.runs:
            raise ValueError("give the folder of a run, as in: dllm-jax plot runs/mine")
        if self.smooth < 1:
            raise ValueError(f"--smooth {self.smooth} must be at least 1")


def with_fields(arguments: list[str]) -> Train | Adapt | None:
    """The command of a line that names a file, whose config says what may follow; else None."""
    kinds = {"train": Train, "adapt": Adapt}
    if len(arguments) < 2 or arguments[0] not in kinds or arguments[1].startswith("-"):
        return None
    fields = tuple(word for word in arguments[2:] if word != "--debug")
    return kinds[arguments[0]](
        config=arguments[1], fields=fields, debug=len(fields) < len(arguments) - 2
    )
