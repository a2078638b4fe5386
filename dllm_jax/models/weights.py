"""A published model, opened: its config now, its tensors one at a time.

Safetensors folders (one file, or shards with an index) and GGUF files look the same from here.
Names and shapes are checked against the config before a single tensor is read.
"""

import dataclasses
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
    home: dict[str, tuple[Any, str]] = {}
    called = getattr(family, "published_name", str)  # where a family has several names for a tensor
    for file in _shards(folder):
        shard = _open_safetensors(file)
        for stored in shard.keys():
            name, view = called(stored), shard.get_slice(stored)
            shapes[name], dtypes[name] = tuple(view.get_shape()), view.get_dtype()
            home[name] = shard, stored

    def read(name: str) -> np.ndarray:
        shard, stored = home[name]
        return shard.get_tensor(stored)

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
    weights: Weights, dtype: str, place: Callable[[str, np.ndarray], Any] | None = None
) -> Params:
    """Our parameter tree, one array at a time: the host holds the largest stacked array, no more.

    Args:
      dtype: of the parameters.
      place: given each path ("layers/mlp/up") and array, what to keep: the array on its devices,
        say. By default the tree is of NumPy arrays.
    """
    config = _with_dtype(weights.config, dtype)
    rows = {path: row for row in weights.maps for path in row.paths}
    shapes, arrays = param_shapes(config), []
    for path, struct in leaves(shapes):
        row, buffer = rows[path], np.empty(struct.shape, struct.dtype)
        for index, name in row.entries(config):
            buffer[index] = row.ours(config, weights.read(name), path)
        arrays.append(buffer if place is None else place(path, buffer))
    return jax.tree.unflatten(jax.tree.structure(shapes), arrays)


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


def _open_safetensors(file: epath.Path) -> Any:
    try:
        return safe_open(os.fspath(file), framework="np")
    except SafetensorError as error:
        raise ValueError(
            f"{file} is not a readable safetensors file ({error}): it is truncated or damaged;"
            " download it again"
        ) from error


_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _stored_dtype(weights: Weights, dtypes: Mapping[str, str]) -> str:
    """The one dtype that holds every tensor exactly, but those that we keep in one of their own."""
    found, fixed = set(), _fixed(weights.config)
    for row in weights.maps:
        for _, name in row.entries(weights.config):
            if dtypes[name] not in _DTYPES:
                raise ValueError(
                    f"{weights.where}: tensor {name!r} is stored as {dtypes[name]}; only"
                    f" {', '.join(_DTYPES)} are read: take an unquantised copy of the model"
                )
            if not fixed.issuperset(row.paths):
                found.add(jnp.dtype(_DTYPES[dtypes[name]]))
    return jnp.result_type(*found).name


def _fixed(config: Any) -> set[str]:
    """The paths of parameters that have a dtype of their own."""
    entries = jax.tree.leaves_with_path(config.tree(), is_leaf=lambda x: isinstance(x, Entry))
    return {"/".join(key.key for key in keys) for keys, entry in entries if entry.dtype}
