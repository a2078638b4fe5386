"""What the families share in reading a published config.json, and in naming layers of experts."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from dllm_jax.models.tensors import TensorMap
from dllm_jax.nn.transformer import TransformerConfig

# Fields


def needed(fields: Mapping[str, Any], name: str) -> Any:
    """A field of config.json that has no default."""
    if fields.get(name) is None:
        raise ValueError(f"config.json has no {name}: it is not a complete published config")
    return fields[name]


def refuse(fields: Mapping[str, Any], name: str, only: Any) -> None:
    """Raises ValueError where a field asks for anything but `only`; absent and null are fine."""
    value = fields.get(name)
    if value is not None and value != only:
        raise ValueError(f"config.json has {name}={value!r}; only {only!r} is supported")


def eos_ids(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """config.json's `eos_token_id`, which is a number, a list, or absent."""
    value = fields.get("eos_token_id")
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def pad_id(fields: Mapping[str, Any]) -> int:
    """config.json's `pad_token_id`; else a token that ends an answer, else 0."""
    value = fields.get("pad_token_id")
    return next(iter((*eos_ids(fields), 0))) if value is None else value


def unscaled_rope(fields: Mapping[str, Any]) -> float:
    """The base of the rotary frequencies; ValueError where they are scaled."""
    rope = dict(fields.get("rope_parameters") or fields.get("rope_scaling") or {})
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling != "default":
        raise ValueError(f"config.json asks for RoPE scaling {scaling!r}, which is not supported")
    return float(rope.get("rope_theta", fields.get("rope_theta", 10_000.0)))


def rotary_dim(head_dim: int, factor: float) -> int:
    """`TransformerConfig.rotary_dim` of a head of which `factor` is turned."""
    turned = int(head_dim * factor)
    return 0 if turned == head_dim else turned


def rotary_factor(config: TransformerConfig) -> float:
    """The inverse of `rotary_dim`."""
    return (config.rotary_dim or config.head_dim) / config.head_dim


def special_ids(config: Any) -> dict[str, Any]:
    """The fields of config.json that name tokens, and the dtype of the weights."""
    eos = list(config.eos_ids)
    fields = {
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": config.pad_id,
        "torch_dtype": config.param_dtype,
    }
    return fields if config.mask_id is None else {**fields, "mask_token_id": config.mask_id}


# Names


def layer_maps(
    config: TransformerConfig,
    rows: Iterable[TensorMap],
    mlp: str,
    *,
    bias: str = "",
    shared: str = "",
) -> tuple[TensorMap, ...]:
    """The rows of all layers, in the one stack or the two that the tree has.

    Args:
      rows: of what every layer has, under "layers/".
      mlp: what the names of a feed-forward begin with, "model.layers.{layer}.mlp.".
      bias: the name of the router's bias, where there is one.
      shared: what the names of the shared expert begin with, where there is one.
    """
    moe = config.moe
    if moe is None:
        return (*rows, *_swiglu(mlp, "", "F"))
    experts = [
        TensorMap(mlp + "gate.weight", "layers/mlp/router", "E D -> D E"),
        *_swiglu(mlp + "experts.{expert}.", "", "f"),
    ]
    if moe.expert_bias:
        experts.append(TensorMap(bias, "layers/mlp/router_bias", "E -> E"))
    if moe.shared_ffn_dim:
        experts += _swiglu(shared, "shared_", "s")
    if not moe.first_dense:
        return (*rows, *experts)
    dense, others = range(moe.first_dense), range(moe.first_dense, config.num_layers)
    return (
        *(_moved(row, "dense_", dense) for row in (*rows, *_swiglu(mlp, "", "F"))),
        *(_moved(row, "", others) for row in (*rows, *experts)),
    )


def _swiglu(theirs: str, ours: str, ffn: str) -> list[TensorMap]:
    ours = "layers/mlp/" + ours
    return [
        TensorMap(theirs + "gate_proj.weight", ours + "gate", f"{ffn} D -> D {ffn}"),
        TensorMap(theirs + "up_proj.weight", ours + "up", f"{ffn} D -> D {ffn}"),
        TensorMap(theirs + "down_proj.weight", ours + "down", f"D {ffn} -> {ffn} D"),
    ]


def _moved(row: TensorMap, prefix: str, layers: range) -> TensorMap:
    paths = tuple(prefix + path for path in row.paths)
    return dataclasses.replace(row, path=paths, layers=tuple(layers))
