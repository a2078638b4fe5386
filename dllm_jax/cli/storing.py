"""The data command: a store of tokens, and a table of what is in it and what was left out."""

import json
from collections.abc import Iterator
from typing import Any

from dllm_jax.cli import terminal
from dllm_jax.cli.background import background
from dllm_jax.cli.training_options import Data
from dllm_jax.data import Documents, corpus, read, tokenise, train_tokenizer


def storing(command: Data) -> None:
    """Writes a store, or finds it there, and prints its table."""
    before = _changed(command)
    with terminal.status(f"reading {command.corpus or ' '.join(command.files)}"):
        (facts,) = background(lambda: [_stored(command)])
    if command.json:
        print(json.dumps(facts, indent=1))
    else:
        print("\n".join(table(facts)))
    there = before is not None and before == _changed(command)
    terminal.note(f"{command.out} {'was there already' if there else 'is written'}")


def _changed(command: Data) -> int | None:
    """When the store was written; None where there is none."""
    file = command.out.expanduser() / "store.json"
    return file.stat().st_mtime_ns if file.exists() else None


def _stored(command: Data) -> dict[str, Any]:
    documents = _documents(command)
    tokenizer = command.tokenizer
    if command.train_tokenizer is not None:
        tokenizer = str(command.out.with_name(f"{command.out.name}-tokenizer"))
        train_tokenizer(
            documents, command.train_tokenizer, tokenizer, kind=command.kind,
            chat=command.chat, heldout=command.heldout, overwrite=command.overwrite,
        )  # fmt: skip
    assert tokenizer is not None  # `check` saw to it
    return tokenise(
        documents, tokenizer, command.out,
        heldout=command.heldout, learn=command.learn, overwrite=command.overwrite,
    )  # fmt: skip


def _documents(command: Data) -> Documents:
    if command.corpus is not None:
        return corpus(command.corpus)
    return read(
        *command.files, form=command.form, unit=command.unit, key=command.key,
        encoding=command.encoding, strict=command.strict,
    )  # fmt: skip


def table(facts: dict[str, Any]) -> Iterator[str]:
    """What store.json tells, in lines."""
    report, tokenizer = facts["report"], facts["tokenizer"]
    yield _row("read", f"{report['documents']:,} documents of {report['files']:,} files")
    yield _row("left out", f"{sum(t['count'] for t in report['troubles'].values()):,}")
    for kind, trouble in report["troubles"].items():
        more = ", ..." if trouble["count"] > len(trouble["places"]) else ""
        yield f"  {trouble['count']:>8,}  {kind}: {', '.join(trouble['places'])}{more}"
    yield _row("tokenizer", f"{tokenizer['vocab_size']:,} ids, {tokenizer['from'] or 'of its own'}")
    for name, split in facts["splits"].items():
        told = f"{split['documents']:,} documents, {split['tokens']:,} tokens"
        if split["learnt"] != split["tokens"]:
            told += f", {split['learnt']:,} of them learnt"
        if split["learnt"]:
            told += f", {split['characters'] / split['learnt']:.3g} characters a learnt token"
        if split["unknown"]:
            told += f", {split['unknown']:,} unknown"
        yield _row(name, told)


def _row(name: str, value: str) -> str:
    return f"{name:<12}{value}"
