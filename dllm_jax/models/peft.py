"""Low-rank adapters in the form of PEFT (Hu et al. 2021): merged into the weights, or beside them.

An adapter's folder has adapter_config.json and adapter_model.safetensors, where the module
`model.layers.0.self_attn.q_proj` of the published model has two matrices:

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight  [r, in]
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight  [out, r]
"""

import dataclasses
import os
from typing import Any

import jax
import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors.numpy import load_file

from dllm_jax import sources
from dllm_jax.models.weights import Weights
from dllm_jax.nn.adapters import AdapterConfig
from dllm_jax.nn.tree import param_shapes
from dllm_jax.typing import Params

# Variants that change the arithmetic, and the setting in which they change nothing.
_PLAIN = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}


def is_peft(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an adapter in the form of PEFT."""
    return (epath.Path(folder) / "adapter_config.json").exists()


def with_peft(weights: Weights, folder: str | os.PathLike[str]) -> Weights:
    """The weights with an adapter merged in: W + scale * B A, in float32 until they are cast.

    Raises:
      FileNotFoundError: adapter_model.safetensors is missing.
      ValueError: a file is damaged, the adapter is of a kind that is not read here, or it belongs
        to another model.
    """
    scale, pairs = _open(weights, folder)

    def read(name: str) -> np.ndarray:
        weight, pair = weights.read(name), pairs.get(name.removesuffix(".weight"))
        if pair is None or not name.endswith(".weight"):
            return weight
        a, b = (matrix.astype(np.float32) for matrix in pair)
        return weight.astype(np.float32) + np.float32(scale) * (b @ a)

    return dataclasses.replace(weights, read=read)


def read_peft(weights: Weights, folder: str | os.PathLike[str]) -> tuple[AdapterConfig, Params]:
    """An adapter to stand beside the weights: its config, and `params["adapter"]` (float32 arrays).

    Projections that it does not change get zeros.

    Raises:
      FileNotFoundError, ValueError: as `with_peft`; or the adapter changes something that no
        adapter of ours can: experts, or a tensor that packs several projections.
    """
    scale, pairs = _open(weights, folder)
    rank = len(next(iter(pairs.values()))[0])
    adapter = AdapterConfig(rank=rank, alpha=scale * rank**0.5, gated=False)
    config = dataclasses.replace(weights.config, adapter=adapter)
    shapes = param_shapes(config)["adapter"]
    arrays = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    for row in weights.maps:
        for index, name in row.entries(config):
            module = name.removesuffix(".weight")
            if module not in pairs:
                continue
            a, b = pairs.pop(module)
            if len(row.paths) > 1 or row.paths[0].rpartition("/")[2] not in arrays:
                raise ValueError(
                    f"{folder}: the adapter changes {name}, which it can only do merged into it"
                )
            own = arrays[row.paths[0].rpartition("/")[2]]
            own["in"][index], own["out"][index] = row.halves(config, a, b)
    return adapter, arrays


def _open(
    weights: Weights, folder: str | os.PathLike[str]
) -> tuple[float, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """The scale, lora_alpha / r or (use_rslora) / sqrt(r), and the matrices A and B by module."""
    path = epath.Path(folder)
    fields = sources.read_json(path / "adapter_config.json")
    for name, only in _PLAIN.items():
        value = fields.get(name, only)
        if value != only and (value or only):  # null, false and empty all say nothing
            raise ValueError(f"{path}: {name}={value!r} is not supported; only {only!r} is")
    if not fields.get("r") or fields.get("lora_alpha") is None:
        raise ValueError(f"{path}/adapter_config.json has no r or no lora_alpha")
    rank = fields["r"]
    scale = fields["lora_alpha"] / (rank**0.5 if fields.get("use_rslora") else rank)
    pairs = _pairs(path, rank)
    for module, (a, b) in pairs.items():
        weight = weights.shapes.get(f"{module}.weight")
        if weight != (b.shape[0], a.shape[1]):
            found = "has no such tensor" if weight is None else f"has shape {weight}"
            raise ValueError(
                f"{path}: the adapter changes {module}.weight [{b.shape[0]}, {a.shape[1]}], but the"
                f" model {found}; the adapter was made for another base model"
            )
    return scale, pairs


def _pairs(path: epath.Path, rank: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The matrices A [r, in] and B [out, r] of each module."""
    file = path / "adapter_model.safetensors"
    if not file.exists():
        raise FileNotFoundError(
            f"{path} has no adapter_model.safetensors; an adapter_model.bin is read by PEFT, which"
            " can save it again with safe_serialization=True"
        )
    try:
        tensors: dict[str, Any] = load_file(os.fspath(file))
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or damaged ({error}); get it again") from error
    halves: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        module, _, half = name.removeprefix("base_model.model.").rpartition(".lora_")
        if half not in ("A.weight", "B.weight") or not name.startswith("base_model.model."):
            raise ValueError(f"{file}: tensor {name!r} is not a low-rank matrix of a module")
        halves.setdefault(module, {})[half[0]] = tensor
    for module, half in halves.items():
        if set(half) != {"A", "B"} or half["A"].shape[0] != rank or half["B"].shape[1] != rank:
            raise ValueError(f"{file}: {module} does not have its two matrices of rank {rank}")
    return {module: (half["A"], half["B"]) for module, half in halves.items()}
