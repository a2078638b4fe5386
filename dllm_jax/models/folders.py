"""A folder of ours: what its config.json says, what its parameters must be, and how it appears."""

import contextlib
import dataclasses
import os
import shutil
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath

from dllm_jax import sources
from dllm_jax.models import registry
from dllm_jax.models.tensors import leaves
from dllm_jax.nn.tree import param_shapes
from dllm_jax.sources import Damaged


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a folder of ours says of itself."""

    config: Any
    files: dict[str, int]  # of params/: bytes by name


def read_facts(folder: epath.Path) -> Facts:
    """What the config.json of a folder of ours says.

    Raises:
      FileNotFoundError: there is none.
      Damaged: it is not one of ours, or does not fit this version.
    """
    file = folder / "config.json"
    facts = sources.read_json(file)
    sources.check_format(facts, sources.FORMAT, file)
    return Facts(_from_json(facts, file), facts.get("files", {}))


def facts_of(folder: epath.Path, config: Any) -> dict[str, Any]:
    """The config.json of a folder whose parameters are written."""
    return {
        "format": sources.FORMAT,
        "version": sources.VERSION,
        **_to_json(config),
        "files": {
            str(file.relative_to(folder)): file.stat().length
            for file in files_in(folder / "params")
        },
    }


def check_tree(tree: Any, config: Any, where: str) -> None:
    """Names and shapes against the config's; one error for the first difference."""
    wanted = {path: leaf.shape for path, leaf in leaves(param_shapes(config))}
    given = {path: tuple(leaf.shape) for path, leaf in leaves(tree)}
    for path in sorted(wanted.keys() - given.keys()):
        raise Damaged(f"{where}: tensor {path!r} is missing; its config asks for it")
    for path in sorted(given.keys() - wanted.keys()):
        raise Damaged(f"{where}: tensor {path!r} is not part of the model its config describes")
    for path, shape in wanted.items():
        if given[path] != shape:
            raise Damaged(
                f"{where}: tensor {path!r} has shape {given[path]}, but the config says {shape}"
            )


def check_gives_way(folder: epath.Path) -> None:
    """Raises FileExistsError where a folder holds something that is no model: none replaces it."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    file = folder / "config.json"
    try:
        said = sources.read_json(file) if file.exists() else {}
    except ValueError:
        said = {}
    if not said.keys() & {"format", "model_type", "architectures"}:
        raise FileExistsError(
            f"{folder} is there and holds no model, so none is written over it: choose another"
            " folder, or move what it holds"
        )


@contextlib.contextmanager
def whole(folder: epath.Path, overwrite: bool) -> Iterator[epath.Path]:
    """A folder to write in that takes its name when all is written.

    Object stores rename nothing: there the folder is written in place, and config.json, which comes
    last, says that it is whole.
    """
    taken = FileExistsError(f"{folder} exists; choose another folder, or give overwrite=True")
    if not overwrite and folder.exists() and any(folder.iterdir()):
        raise taken
    if overwrite:
        check_gives_way(folder)
    if "://" in str(folder):
        yield folder
        return
    mark = os.getpid() if jax.process_count() == 1 else "pod"
    new, old = (folder.parent / f".{folder.name}.{mark}.{word}" for word in ("new", "old"))
    first = jax.process_index() == 0
    try:
        if first:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
        yield new
        if first:
            if overwrite and folder.exists():
                folder.rename(old)
            try:
                new.rename(folder)
            except OSError as error:  # another process was faster
                raise taken from error
            shutil.rmtree(old, ignore_errors=True)
    finally:
        if first:
            shutil.rmtree(new, ignore_errors=True)


def files_in(folder: epath.Path) -> Iterator[epath.Path]:
    """Every file below a folder, sorted by folder and name."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            yield from files_in(entry)
        else:
            yield entry


def _to_json(config: Any) -> dict[str, Any]:
    """The fields of config.json that say what a model is."""
    names = {kind: name for name, kind in registry.CONFIGS.items()}
    return {"architecture": names[type(config)], "config": dataclasses.asdict(config)}


def _from_json(facts: Mapping[str, Any], file: epath.Path) -> Any:
    """The inverse of `_to_json`. A folder without an architecture is a transformer's.

    Raises:
      Damaged: an architecture that is not known, or fields that do not fit it.
    """
    name = facts.get("architecture", "transformer")
    if name not in registry.CONFIGS:
        raise Damaged(
            f"{file} has architecture {name!r}; this dllm_jax knows"
            f" {', '.join(registry.CONFIGS)}: upgrade it, or convert the model again"
        )
    return _build(registry.CONFIGS[name], facts.get("config", {}), file)


def _build(kind: type, fields: Mapping[str, Any], file: epath.Path) -> Any:
    """A dataclass from JSON: lists become tuples, objects the dataclasses of their fields."""
    hints = typing.get_type_hints(kind)

    def value(name: str, given: Any) -> Any:
        if isinstance(given, list):
            return tuple(value(name, item) for item in given)
        nested = [t for t in _types(hints.get(name)) if dataclasses.is_dataclass(t)]
        return _build(nested[0], given, file) if isinstance(given, dict) and nested else given

    return sources.build(kind, {name: value(name, given) for name, given in fields.items()}, file)


def _types(hint: Any) -> list[Any]:
    """A type and those that it is made of: all of `tuple[A | None, ...]`."""
    return [hint, *(t for inner in typing.get_args(hint) for t in _types(inner))]
