"""What the families share in reading a published config.json, and in naming layers of experts."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from dllm_jax.models.tensors import TensorMap
from dllm_jax.nn.transformer import TransformerConfig
from dllm_jax.ops.rope import SCALINGS, RopeScaling

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


def refuse_windows(fields: Mapping[str, Any]) -> None:
    """Raises ValueError where some layer sees a window only: this family's see all, here.

    A switch that reaches no layer, as transformers reads it, is fine.
    """
    layers = fields.get("num_hidden_layers", 0)
    types = fields.get("layer_types")
    if types is None and fields.get("use_sliding_window") and fields.get("sliding_window"):
        first = fields.get("max_window_layers")
        full = min(28 if first is None else first, layers)  # 28 is the default of transformers
        types = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    others = [kind for kind in types or () if kind != "full_attention"]
    if others:
        raise ValueError(
            f"config.json has {others[0]} in {len(others)} of {layers} layers"
            f" (sliding_window={fields.get('sliding_window')}); only full attention is supported"
        )


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


def rope(fields: Mapping[str, Any], length: int) -> dict[str, Any]:
    """What config.json says of positions: a config's `rope_theta`, `rope_scaling`, `max_length`.

    Of YaRN, `max_length` is what the stretched positions reach, where that is more than
    max_position_embeddings: it is published as either.

    Args:
      length: max_position_embeddings where config.json has none.

    Raises:
      ValueError: a scaling, or a field of one, that is not known.
    """
    found = dict(fields.get("rope_parameters") or fields.get("rope_scaling") or {})
    length = fields.get("max_position_embeddings") or length
    theta = float(found.pop("rope_theta", None) or fields.get("rope_theta") or 10_000.0)
    old = found.pop("type", None)
    kind = found.pop("rope_type", None) or old or "default"
    factor, said = found.get("partial_rotary_factor"), fields.get("partial_rotary_factor")
    if factor not in (None, 1.0 if said is None else said):
        raise ValueError(
            f"config.json has partial_rotary_factor={factor} in its rope_parameters, and"
            f" {said} outside of them, where it is read"
        )
    scaling = None if kind == "default" else _scaling(kind, found, fields, length)
    if scaling is not None and scaling.kind == "yarn":
        length = max(length, round(scaling.factor * scaling.original_length))
    return {"rope_theta": theta, "rope_scaling": scaling, "max_length": length}


def _scaling(
    kind: str, found: dict[str, Any], fields: Mapping[str, Any], length: int
) -> RopeScaling:
    if kind not in SCALINGS:
        raise ValueError(
            f"config.json asks for RoPE scaling {kind!r}, which is not supported;"
            f" known are {', '.join(SCALINGS)}"
        )
    given = {name: value for name, value in found.items() if value is not None}
    given.pop("partial_rotary_factor", None)  # `rope` has read it
    original = given.pop("original_max_position_embeddings", None)
    if kind == "dynamic" and original not in (None, length):  # transformers reads the other one
        raise ValueError(
            f"config.json has original_max_position_embeddings={original} and"
            f" max_position_embeddings={length}: a dynamic scaling has one length"
        )
    if kind == "yarn" and original and "factor" not in given:
        given["factor"] = length / original
    numbers: dict[str, Any] = {} if kind == "linear" else {"original_length": original or length}
    names = {"factor": "factor", **_SCALING_FIELDS[kind]}
    given.pop("finetuned", None)  # says how the weights came to be
    for name, value in given.items():
        if name not in names:
            raise ValueError(
                f"config.json has {name}={value!r} in a RoPE scaling {kind!r}, which is not known"
            )
        numbers[names[name]] = value if name == "truncate" else float(value)
    needed(numbers, "factor")
    return RopeScaling(kind=kind, **numbers)


_SCALING_FIELDS = {
    "linear": {},
    "dynamic": {},
    "llama3": {"low_freq_factor": "low_factor", "high_freq_factor": "high_factor"},
    "yarn": {
        name: name
        for name in (
            "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"
        )
    },
}  # fmt: skip
"""The fields of each scaling beside its factor, and ours."""


def rope_to_published(config: TransformerConfig) -> dict[str, Any]:
    """The inverse of `rope`."""
    scaling = config.rope_scaling
    said = {"rope_theta": config.rope_theta, "max_position_embeddings": config.max_length}
    if scaling is None:
        return said
    own = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "dynamic":  # transformers takes this one for the first training's length
        said["max_position_embeddings"] = scaling.original_length
    elif scaling.kind != "linear":
        own["original_max_position_embeddings"] = scaling.original_length
    names = {ours: theirs for theirs, ours in _SCALING_FIELDS[scaling.kind].items()}
    for field in dataclasses.fields(scaling):
        value = getattr(scaling, field.name)
        if field.name in names and (scaling.kind == "llama3" or value != field.default):
            own[names[field.name]] = value
    return {**said, "rope_scaling": own}


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
