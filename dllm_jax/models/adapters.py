"""The files of an adapter: adapter.safetensors (bfloat16) and adapter.json.

Arrays that are stacked by layer are stored from the adapter's first layer on; in memory they have
every layer, with zeros below. Names are flattened: "q/in".
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from dllm_jax import files, sources
from dllm_jax.models.tensors import leaves
from dllm_jax.nn.adapters import AdapterConfig
from dllm_jax.nn.transformer import TransformerConfig
from dllm_jax.nn.tree import param_axes, param_shapes
from dllm_jax.typing import Params

_FORMAT, _VERSION = "dllm_jax adapter", 1


def save_adapter(
    folder: str | os.PathLike[str],
    config: TransformerConfig,
    adapter_params: Params,
    meta: Mapping[str, Any],
) -> None:
    """Writes an adapter; other files of the folder (a model card) stay.

    Args:
      config: of the adapted model; its `adapter` and `mask_id` are kept.
      adapter_params: `params["adapter"]`, zero below the adapter's first layer.
      meta: whatever JSON can hold about how it was made.

    Raises:
      ValueError: the config has no adapter, or the parameters are not its own.
    """
    if config.adapter is None:
        raise ValueError("config.adapter is None: give the config of the adapted model")
    first, tensors = config.adapter.first_layer, {}
    given = dict(leaves(adapter_params))
    for name, leaf, stacked in _entries(config):
        if name not in given or given[name].shape != leaf.shape:
            found = given[name].shape if name in given else "missing"
            raise ValueError(f"adapter tensor {name!r} is {found}; the config says {leaf.shape}")
        value = np.asarray(given[name])
        if stacked:
            if np.any(value[:first]):
                raise ValueError(f"adapter tensor {name!r} is not zero below first_layer={first}")
            value = value[first:]
        tensors[name] = np.ascontiguousarray(value).astype(jnp.bfloat16)
    facts = {
        "format": _FORMAT,
        "version": _VERSION,
        "adapter": dataclasses.asdict(config.adapter),
        "mask_id": config.mask_id,
        "meta": dict(meta),
    }
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    with (
        files.whole(path / "adapter.json") as told,
        files.whole(path / "adapter.safetensors") as held,
    ):
        save_file(tensors, held)  # which takes its name first
        told.write_text(json.dumps(facts, indent=1), encoding="utf-8")


def read_adapter(
    folder: str | os.PathLike[str], config: TransformerConfig
) -> tuple[TransformerConfig, Params]:
    """The config with the adapter and its mask id, and its parameters as NumPy arrays.

    Raises:
      FileNotFoundError: adapter.json or adapter.safetensors is missing.
      ValueError: a file is damaged, or the adapter belongs to another model.
    """
    path = epath.Path(folder)
    facts = sources.read_json(path / "adapter.json")
    sources.check_format(facts, _FORMAT, path / "adapter.json", _VERSION)
    adapter = sources.build(AdapterConfig, facts.get("adapter", {}), path / "adapter.json")
    config = dataclasses.replace(config, adapter=adapter, mask_id=facts.get("mask_id"))
    file = path / "adapter.safetensors"
    if not file.exists():
        raise FileNotFoundError(f"{path} has adapter.json but no adapter.safetensors; get it again")
    try:
        tensors = load_file(os.fspath(file))
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or damaged ({error}); get it again") from error
    arrays = []
    for name, leaf, stacked in _entries(config):
        if name not in tensors:
            raise ValueError(f"{file}: adapter tensor {name!r} is missing; get it again")
        stored, below = tensors.pop(name), adapter.first_layer if stacked else 0
        wanted = (leaf.shape[0] - below, *leaf.shape[1:])
        if stored.shape != wanted:
            raise ValueError(
                f"{file}: adapter tensor {name!r} has shape {stored.shape}, but the model needs"
                f" {wanted}; the adapter was made for another base model"
            )
        full = np.zeros(leaf.shape, leaf.dtype)
        full[below:] = stored
        arrays.append(full)
    if tensors:
        raise ValueError(f"{file}: adapter tensor {min(tensors)!r} is not part of this adapter")
    shapes = param_shapes(config)["adapter"]
    return config, jax.tree.unflatten(jax.tree.structure(shapes), arrays)


def _entries(config: TransformerConfig) -> list[tuple[str, jax.ShapeDtypeStruct, bool]]:
    """(name, shape and dtype, whether it is stacked by layer) of each tensor of the adapter."""
    axes = jax.tree.leaves(param_axes(config)["adapter"], is_leaf=lambda x: isinstance(x, tuple))
    shapes = leaves(param_shapes(config)["adapter"])
    return [
        (name, leaf, bool(names) and names[0] == "layers")
        for (name, leaf), names in zip(shapes, axes, strict=True)
    ]
