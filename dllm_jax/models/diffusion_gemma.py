"""DiffusionGemma, text alone: names and fields of the published models.

The published decoder owns all the weights; the encoder's are ties to them, except the scalar at the
end of each layer. The vision tower and its projection are skipped, so a folder written from here is
a text model.
"""

from collections.abc import Mapping
from typing import Any

from dllm_jax.models.published import eos_ids, needed, refuse, special_ids
from dllm_jax.models.tensors import TensorMap
from dllm_jax.nn.gemma import GemmaConfig

_TYPES = {"sliding_attention": "sliding", "full_attention": "full"}
_PERIOD = 6  # every sixth layer is full where config.json does not say
_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {
        "rope_type": "proportional",
        "rope_theta": 1_000_000.0,
        "partial_rotary_factor": 0.25,
    },
}


def config_from_published(fields: Mapping[str, Any]) -> GemmaConfig:
    """The config of a published config.json with model_type diffusion_gemma.

    Raises:
      ValueError: a field is missing, or asks for something that the model does not do.
    """
    text = needed(fields, "text_config")
    refuse(fields, "tie_word_embeddings", True)
    refuse(text, "attention_bias", False)
    refuse(text, "hidden_activation", "gelu_pytorch_tanh")
    if text.get("use_bidirectional_attention") == "all":
        raise ValueError(
            "config.json has use_bidirectional_attention='all'; only causal text is supported"
        )
    layers = needed(text, "num_hidden_layers")
    types = text.get("layer_types") or [
        "full_attention" if (i + 1) % _PERIOD == 0 else "sliding_attention" for i in range(layers)
    ]
    types = [*types[:-1], "full_attention"]  # the published code makes the last one so
    if len(types) != layers or not set(types) <= set(_TYPES):
        raise ValueError(f"config.json has layer_types={types} for {layers} layers")
    heads = {kind: _heads(text, types, kind) for kind in _TYPES}
    rope = {kind: _rope(text, kind) for kind in _TYPES}
    eos = eos_ids(fields) or eos_ids(text)
    return GemmaConfig(
        vocab_size=needed(text, "vocab_size"),
        dim=needed(text, "hidden_size"),
        num_heads=needed(text, "num_attention_heads"),
        ffn_dim=needed(text, "intermediate_size"),
        num_experts=needed(text, "num_experts"),
        experts_per_token=needed(text, "top_k_experts"),
        expert_dim=needed(text, "moe_intermediate_size"),
        layer_types=tuple(_TYPES[kind] for kind in types),
        num_kv_heads=heads["sliding_attention"][0],
        head_dim=heads["sliding_attention"][1],
        rope_theta=float(rope["sliding_attention"]["rope_theta"]),
        window=needed(text, "sliding_window"),
        full_num_kv_heads=heads["full_attention"][0],
        full_head_dim=heads["full_attention"][1],
        full_rope_theta=float(rope["full_attention"]["rope_theta"]),
        full_rotary_share=float(rope["full_attention"].get("partial_rotary_factor", 1.0)),
        canvas_length=fields.get("canvas_length") or 256,
        soft_cap=float(text.get("final_logit_softcapping", 30.0)),
        norm_eps=float(text.get("rms_norm_eps", 1e-6)),
        max_length=text.get("max_position_embeddings", 131_072),
        eos_ids=eos,
        pad_id=text.get("pad_token_id") or 0,
    )


def _heads(text: Mapping[str, Any], types: list[str], kind: str) -> tuple[int, int]:
    """K/V heads and head size of one kind of layer, which its layers must share."""
    base = needed(text, "num_key_value_heads"), needed(text, "head_dim")
    own = text.get("per_layer_config")
    if own is None:  # an older form: two fields for all full layers
        if kind == "sliding_attention":
            return base
        return text.get("num_global_key_value_heads") or base[0], text.get("global_head_dim", 512)
    own = {int(layer): changes for layer, changes in own.items()}
    found = {
        (changes.get("num_key_value_heads", base[0]), changes.get("head_dim", base[1]))
        for changes in (own.get(layer, {}) for layer, type_ in enumerate(types) if type_ == kind)
    }
    if len(found) > 1:
        raise ValueError(f"config.json has per_layer_config with {kind} layers of several shapes")
    return found.pop() if found else base


def _rope(text: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    rope = (text.get("rope_parameters") or _ROPE)[kind]
    refuse(rope, "rope_type", _ROPE[kind]["rope_type"])
    refuse(rope, "factor", 1.0)
    if kind == "sliding_attention":
        refuse(rope, "partial_rotary_factor", 1.0)
    return rope


def config_to_published(config: GemmaConfig) -> dict[str, Any]:
    """The inverse of `config_from_published`: a config.json that transformers reads."""
    names = {ours: theirs for theirs, ours in _TYPES.items()}
    full = {"num_key_value_heads": config.full_num_kv_heads, "head_dim": config.full_head_dim}
    sliding_rope = {**_ROPE["sliding_attention"], "rope_theta": config.rope_theta}
    full_rope = {
        **_ROPE["full_attention"],
        "rope_theta": config.full_rope_theta,
        "partial_rotary_factor": config.full_rotary_share,
    }
    text = {
        "model_type": "diffusion_gemma_text",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        "num_experts": config.num_experts,
        "top_k_experts": config.experts_per_token,
        "moe_intermediate_size": config.expert_dim,
        "layer_types": [names[kind] for kind in config.layer_types],
        "per_layer_config": {str(layer): full for layer in config.numbers("full")},
        "rope_parameters": {"sliding_attention": sliding_rope, "full_attention": full_rope},
        "sliding_window": config.window,
        "final_logit_softcapping": config.soft_cap,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_length,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "use_bidirectional_attention": None,
        "tie_word_embeddings": True,
        **special_ids(config),
    }
    return {
        "model_type": config.family,
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "canvas_length": config.canvas_length,
        "tie_word_embeddings": True,
        **special_ids(config),
        "text_config": text,
    }


def tensor_maps(config: GemmaConfig) -> tuple[TensorMap, ...]:
    """The published names."""
    top = "model.decoder."
    maps = [
        TensorMap(top + "embed_tokens.weight", "embed", "V D -> V D"),
        TensorMap(top + "norm.weight", "final_norm", "D -> D"),
        TensorMap(top + "self_conditioning.pre_norm.weight", "conditioning/norm", "D -> D"),
    ]
    for name, layout in _MLP.items():
        theirs = f"{top}self_conditioning.{name}_proj.weight"
        maps.append(TensorMap(theirs, f"conditioning/{name}", layout))
    for kind in config.kinds:
        maps += _layer_maps(config, kind)
    return tuple(maps)


_MLP = {"gate": "F D -> D F", "up": "F D -> D F", "down": "D F -> F D"}
_NORMS = {
    "input_layernorm": "attention/norm",
    "post_attention_layernorm": "attention/post_norm",
    "pre_feedforward_layernorm": "mlp/norm",
    "post_feedforward_layernorm_1": "mlp/post_norm",
    "pre_feedforward_layernorm_2": "moe/norm",
    "post_feedforward_layernorm_2": "moe/post_norm",
    "post_feedforward_layernorm": "post_norm",
}


def _layer_maps(config: GemmaConfig, kind: str) -> list[TensorMap]:
    """The rows of one kind of layer, which lie in a stack of their own."""
    layer, ours, numbers = "model.decoder.layers.{layer}.", f"layers/{kind}/", config.numbers(kind)
    kv, size = ("K", "H") if kind == "sliding" else ("k", "h")

    def row(name: str, path: str, layout: str) -> TensorMap:
        return TensorMap(layer + name, ours + path, layout, layers=numbers)

    project = f"({kv} {size}) D -> D {kv} {size}"
    rows = [row(f"{name}.weight", path, "D -> D") for name, path in _NORMS.items()]
    rows += [row(f"mlp.{name}_proj.weight", f"mlp/{name}", how) for name, how in _MLP.items()]
    rows += [
        row("self_attn.q_proj.weight", "attention/q", f"(N {size}) D -> D N {size}"),
        row("self_attn.k_proj.weight", "attention/k", project),
        row("self_attn.o_proj.weight", "attention/o", f"D (N {size}) -> N {size} D"),
        row("self_attn.q_norm.weight", "attention/q_norm", f"{size} -> {size}"),
        row("self_attn.k_norm.weight", "attention/k_norm", f"{size} -> {size}"),
        row("router.scale", "moe/router_norm", "D -> D"),
        row("router.proj.weight", "moe/router", "E D -> D E"),
        row("router.per_expert_scale", "moe/expert_scale", "E -> E"),
        row("experts.down_proj", "moe/down", "E D f -> E f D"),
        row("layer_scalar", "canvas_scale", "1 ->"),
        TensorMap(
            layer + "experts.gate_up_proj",
            (ours + "moe/gate", ours + "moe/up"),
            ("E f D -> E D f",) * 2,
            layers=numbers,
            axis=1,
        ),
        TensorMap(
            "model.encoder.language_model.layers.{layer}.layer_scalar",
            ours + "clean_scale",
            "1 ->",
            layers=numbers,
        ),
    ]
    if kind == "sliding":
        rows.append(row("self_attn.v_proj.weight", "attention/v", project))
    return rows


def ignored(config: GemmaConfig) -> tuple[str, ...]:
    """Patterns of published tensors that say nothing here: pictures, and copies of tied weights."""
    return (
        r"model\.encoder\.(vision_tower|embed_vision)\..*",
        r"model\.encoder\.language_model\.(?!layers\.\d+\.layer_scalar$).*",
        r"lm_head\.weight",
    )
