"""The way back: a model of ours as the files its authors publish, for other people's tools.

What is read is written again, name for name and bit for bit, with the constants that some families
store beside their weights. What is not read is not written: the parts of a larger model (the vision
tower of DiffusionGemma), and copies of tied weights.
"""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors.numpy import save_file

from dllm_jax import sources
from dllm_jax.models import registry
from dllm_jax.models.tensors import TensorMap, leaves
from dllm_jax.tokenizer import Tokenizer
from dllm_jax.typing import Params

# What a config.json cannot say, and need not: how it is held and run here.
_OURS = ("dtype", "param_dtype", "remat")


def published_config(config: Any) -> dict[str, Any]:
    """The fields of config.json, from which the same config is read again.

    Raises:
      ValueError: the config has an adapter, or something that its family has no field for.
    """
    if getattr(config, "adapter", None) is not None:
        raise ValueError(
            "the model has an adapter beside its weights: no published folder holds one; use save,"
            " load the model with adapter=None, or (an adapter of PEFT) load it merged"
        )
    family = registry.family_of(config)
    fields = family.config_to_published(config)
    again = family.config_from_published(fields)
    for field in dataclasses.fields(config):
        value, read = getattr(config, field.name), getattr(again, field.name)
        if value != read and field.name not in _OURS:
            raise ValueError(
                f"a config.json of the family {config.family!r} cannot say"
                f" {field.name}={value!r}: it would be read as {read!r}"
            )
    return fields


def published_tensors(config: Any, params: Params) -> dict[str, np.ndarray]:
    """The tensors of a published folder, by name, as a whole copy on the host."""
    arrays = dict(leaves(params))
    return {part.name: part.take(config, arrays) for part in _parts(config)}


def write_published(
    folder: epath.Path, config: Any, params: Params, *, max_shard_bytes: int
) -> None:
    """Writes config.json, generation_config.json and the safetensors of a model into a folder.

    The host holds one shard at a time. Each tensor is in the dtype of its parameter.

    Raises:
      ValueError: see `published_config`; or `max_shard_bytes` is not positive.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} must be positive")
    fields = published_config(config)
    arrays = dict(leaves(params))
    shards = _shards(config, arrays, max_shard_bytes)
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        files |= {part.name: file for part in shard}
        tensors = {part.name: part.take(config, arrays) for part in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})  # transformers asks for it
    if len(shards) > 1:
        total = sum(part.bytes(config, arrays) for shard in shards for part in shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        _write_json(folder / "model.safetensors.index.json", index)
    generation = {
        key: value
        for key, value in fields.items()
        if key in ("eos_token_id", "pad_token_id", "mask_token_id") and value is not None
    }
    _write_json(folder / "generation_config.json", generation)
    _write_json(folder / "config.json", fields)


def write_tokenizer(folder: epath.Path, tokenizer: Tokenizer) -> None:
    """Writes a tokenizer's files, and in them the class that reads them elsewhere."""
    tokenizer.save(folder)
    file = folder / "tokenizer_config.json"
    _write_json(file, {**sources.read_json(file), "tokenizer_class": "PreTrainedTokenizerFast"})


class _Constant(NamedTuple):
    """One published tensor that the config says."""

    name: str
    value: np.ndarray

    def take(self, config: Any, arrays: dict[str, Any]) -> np.ndarray:
        return self.value

    def bytes(self, config: Any, arrays: dict[str, Any]) -> int:
        return self.value.nbytes


class _Part(NamedTuple):
    """One published tensor, and where it lies in our stacked arrays."""

    name: str
    row: TensorMap
    index: tuple[int, ...]

    def take(self, config: Any, arrays: dict[str, Any]) -> np.ndarray:
        own = (np.asarray(arrays[path][self.index]) for path in self.row.paths)
        return np.ascontiguousarray(self.row.published(config, *own))

    def bytes(self, config: Any, arrays: dict[str, Any]) -> int:
        dtypes = [jnp.dtype(arrays[path].dtype) for path in self.row.paths]
        shape = self.row.published_shape(config)
        return int(np.prod(shape)) * jnp.result_type(*dtypes).itemsize


def _parts(config: Any) -> Iterator[_Part | _Constant]:
    family = registry.family_of(config)
    for row in family.tensor_maps(config):
        for index, name in row.entries(config):
            yield _Part(name, row, index)
    if hasattr(family, "constants"):
        yield from (_Constant(*item) for item in family.constants(config).items())


def _shards(config: Any, arrays: dict[str, Any], limit: int) -> list[list[_Part | _Constant]]:
    """The tensors in order, as many in a shard as fit; one that is larger has its own."""
    shards: list[list[_Part | _Constant]] = []
    room = 0
    for part in _parts(config):
        size = part.bytes(config, arrays)
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(part)
        room -= size
    return shards


def _write_json(file: epath.Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2), encoding="utf-8")
