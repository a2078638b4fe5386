"""A published model, opened: its config now, its tensors one at a time.

Safetensors folders (one file, or shards with an index) and GGUF files look the same from here.
Names and shapes are checked against the config before a single tensor is read.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from dllm_jax import sources
from dllm_jax.models import registry
from dllm_jax.models.placing import Index, placed
from dllm_jax.models.tensors import TensorMap, leaves
from dllm_jax.nn.tree import Entry, param_shapes
from dllm_jax.typing import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """An open model in its authors' form."""

    where: str  # the file or folder, for messages
    config: Any  # the architecture's; its param_dtype is as stored
    maps: tuple[TensorMap, ...]
    shapes: Mapping[str, tuple[int, ...]]  # of the tensors that are there
    ignored: tuple[str, ...]  # patterns of names that may be there and say nothing
    read: Callable[[str], np.ndarray]


def open_folder(folder: epath.Path) -> Weights:
    """A published folder: config.json and safetensors.

    Raises:
      FileNotFoundError: config.json or a shard is missing.
      ValueError: an unknown model_type, a damaged file, or tensors that do not fit the config.
    """
    fields = sources.read_json(folder / "config.json")
    family = registry.family(fields)
    eos = list(sources.published_eos(folder))
    config = family.config_from_published({**fields, "eos_token_id": eos})
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    home: dict[str, tuple[epath.Path, int]] = {}
    called = getattr(family, "published_name", str)  # where a family has several names for a tensor
    for file in _shards(folder):
        for stored, (dtype, shape, offset) in _contents(file).items():
            name = called(stored)
            shapes[name], dtypes[name], home[name] = shape, dtype, (file, offset)

    def read(name: str) -> np.ndarray:
        """A view of the file: what is cut out of it is read, the rest is not."""
        file, offset = home[name]
        dtype = _dtype(str(folder), name, dtypes[name])
        return np.memmap(os.fspath(file), dtype, "r", offset, shapes[name])

    if hasattr(family, "constants"):
        there = [name for name in family.constants(config) if name in home]
        try:
            config = family.with_constants(config, {name: read(name) for name in there})
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
    weights = Weights(
        where=str(folder),
        config=config,
        maps=family.tensor_maps(config),
        shapes=shapes,
        ignored=family.ignored(config),
        read=read,
    )
    _check(weights)
    stored = _stored_dtype(weights, dtypes)
    return dataclasses.replace(weights, config=_with_dtype(config, stored))


def open_gguf(reader: gguf.GGUFReader, where: str) -> Weights:
    """A GGUF file; its tensors are dequantised to float32 as they are read.

    Raises:
      ValueError: an unknown architecture, or tensors that do not fit the header.
    """
    metadata = sources.gguf_metadata(reader)
    architecture = metadata.get("general.architecture")
    family = registry.gguf_family(architecture)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    shapes = {name: tuple(reversed(tensor.shape.tolist())) for name, tensor in tensors.items()}
    config = family.config_from_gguf(metadata, shapes, sources.gguf_eos(metadata))

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        try:
            return gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"{where}: tensor {name!r} is quantised as {tensor.tensor_type.name}, which the"
                " gguf package cannot read; take another quantisation of the model"
            ) from error

    weights = Weights(
        where=where,
        config=config,
        maps=family.gguf_tensor_maps(config, architecture),
        shapes=shapes,
        ignored=(),
        read=read,
    )
    _check(weights)
    return weights


def assemble(
    weights: Weights,
    dtype: str,
    shardings: Params | None = None,
    names: tuple[str, ...] | None = None,
) -> Params:
    """Our parameter tree: NumPy arrays, or each array on its devices.

    Args:
      dtype: of the parameters.
      names: the top-level entries to read; all by default.
      shardings: the tree of them. A process then reads what its devices hold, and its host has a
        piece of that at a time (`placing.PIECE` bytes; of GGUF files and of packed or merged
        tensors, the published tensor besides). Without, the host holds the whole model.
    """
    shapes = param_shapes(_with_dtype(weights.config, dtype))
    shapes = {name: sub for name, sub in shapes.items() if names is None or name in names}
    rows = {path: row for row in weights.maps for path in row.paths}
    homes = {} if shardings is None else dict(leaves(shardings))
    arrays: list[Any] = []
    for path, struct in leaves(shapes):
        read = _reader(weights, rows[path], path, struct)
        if shardings is None:
            arrays.append(read(tuple(slice(0, size) for size in struct.shape)))
        else:
            arrays.append(placed(struct.shape, struct.dtype, homes[path], read))
    return jax.tree.unflatten(jax.tree.structure(shapes), arrays)


def _reader(weights: Weights, row: TensorMap, path: str, struct) -> Callable[[Index], np.ndarray]:
    """Reads any part of one of our arrays."""
    names = dict(row.entries(weights.config))
    stacked = len(next(iter(names)))  # axes of layers and experts

    def read(index: Index) -> np.ndarray:
        part = np.empty([s.stop - s.start for s in index], struct.dtype)
        for at in np.ndindex(*part.shape[:stacked]):
            name = names[tuple(s.start + i for s, i in zip(index[:stacked], at, strict=True))]
            part[at] = row.ours(weights.config, weights.read(name), path)[index[stacked:]]
        return part

    return read


def _with_dtype(config: Any, dtype: str) -> Any:
    return dataclasses.replace(config, dtype=dtype, param_dtype=dtype)


def _check(weights: Weights) -> None:
    expected = {
        name: row.published_shape(weights.config)
        for row in weights.maps
        for _, name in row.entries(weights.config)
    }
    missing = [name for name in expected if name not in weights.shapes]
    if missing:
        raise ValueError(
            f"{weights.where}: tensor {missing[0]!r} is missing ({len(missing)} in all); the"
            " download is incomplete, or its config describes another model"
        )
    extra = [
        name
        for name in weights.shapes
        if name not in expected and not any(re.fullmatch(p, name) for p in weights.ignored)
    ]
    if extra:
        raise ValueError(
            f"{weights.where}: tensor {extra[0]!r} is not part of this architecture ({len(extra)}"
            " such in all); its config describes another model, or a variant that is not supported"
        )
    for name, shape in expected.items():
        if weights.shapes[name] != shape:
            raise ValueError(
                f"{weights.where}: tensor {name!r} has shape {weights.shapes[name]}, but the config"
                f" says {shape}; the weights and the config belong to different models"
            )


def _shards(folder: epath.Path) -> list[epath.Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(sources.read_json(index).get("weight_map", {}).values()))
        files = [folder / name for name in names]
    elif (folder / "model.safetensors").exists():
        files = [folder / "model.safetensors"]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"{folder} has no .safetensors files: the weights are missing, or in another format;"
            " download them, or save them from their framework as safetensors"
        )
    for file in files:
        if not file.exists():
            raise FileNotFoundError(
                f"{folder} lacks the shard {file.name}, which its index names; download it again"
            )
    return files


def _contents(file: epath.Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Of each tensor of a safetensors file its dtype, its shape, and where its bytes begin."""
    try:
        safe_open(os.fspath(file), framework="np")  # checks the header, and that all of it is there
    except SafetensorError as error:
        raise ValueError(
            f"{file} is not a readable safetensors file ({error}): it is truncated or damaged;"
            " download it again"
        ) from error
    with open(file, "rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    header.pop("__metadata__", None)
    return {
        name: (facts["dtype"], tuple(facts["shape"]), 8 + size + facts["data_offsets"][0])
        for name, facts in header.items()
    }


_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _stored_dtype(weights: Weights, dtypes: Mapping[str, str]) -> str:
    """The one dtype that holds every tensor exactly, but those that we keep in one of their own."""
    found, fixed = set(), _fixed(weights.config)
    for row in weights.maps:
        for _, name in row.entries(weights.config):
            dtype = _dtype(weights.where, name, dtypes[name])
            if not fixed.issuperset(row.paths):
                found.add(dtype)
    return jnp.result_type(*found).name


def _dtype(where: str, name: str, stored: str) -> np.dtype:
    if stored not in _DTYPES:
        raise ValueError(
            f"{where}: tensor {name!r} is stored as {stored}; only {', '.join(_DTYPES)} are read:"
            " take an unquantised copy of the model"
        )
    return jnp.dtype(_DTYPES[stored])


def _fixed(config: Any) -> set[str]:
    """The paths of parameters that have a dtype of their own."""
    entries = jax.tree.leaves_with_path(config.tree(), is_leaf=lambda x: isinstance(x, Entry))
    return {"/".join(key.key for key in keys) for keys, entry in entries if entry.dtype}
