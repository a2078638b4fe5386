"""The Llama line: Llama, Qwen2 and Qwen3, as published folders and as GGUF files.

RMSNorm, RoPE in the half-rotation form, grouped heads, SwiGLU. Qwen2 adds biases to q, k and v;
Qwen3 norms each head's query and key.
"""

from collections.abc import Mapping
from typing import Any

from dllm_jax.models.tensors import TensorMap
from dllm_jax.nn.transformer import TransformerConfig


def config_from_published(fields: Mapping[str, Any]) -> TransformerConfig:
    """The config of a published config.json with model_type llama, qwen2 or qwen3.

    Raises:
      ValueError: a field is missing, or asks for something that the model does not do.
    """
    kind = fields.get("model_type")
    _refuse(fields, "hidden_act", "silu")
    _refuse(fields, "mlp_bias", False)
    _refuse(fields, "use_sliding_window", False)
    if kind != "qwen2":
        _refuse(fields, "attention_bias", False)
    rope = dict(fields.get("rope_parameters") or fields.get("rope_scaling") or {})
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling != "default":
        raise ValueError(f"config.json asks for RoPE scaling {scaling!r}, which is not supported")
    heads, dim = needed(fields, "num_attention_heads"), needed(fields, "hidden_size")
    head_dim = fields.get("head_dim") or (128 if kind == "qwen3" else dim // heads)
    pad = fields.get("pad_token_id")
    eos = eos_ids(fields)
    return TransformerConfig(
        vocab_size=needed(fields, "vocab_size"),
        num_layers=needed(fields, "num_hidden_layers"),
        dim=dim,
        num_heads=heads,
        num_kv_heads=fields.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        ffn_dim=needed(fields, "intermediate_size"),
        max_length=fields.get("max_position_embeddings", 2048),
        rope_theta=float(rope.get("rope_theta", fields.get("rope_theta", 10_000.0))),
        norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
        tied_head=bool(fields.get("tie_word_embeddings", False)),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        eos_ids=eos,
        pad_id=pad if pad is not None else (eos[0] if eos else 0),
    )


def tensor_maps(config: TransformerConfig) -> tuple[TensorMap, ...]:
    """The published names, which the three share."""
    layer = "model.layers.{layer}."
    maps = (
        TensorMap("model.embed_tokens.weight", "embed", "V D -> V D"),
        TensorMap("model.norm.weight", "final_norm", "D -> D"),
        TensorMap(layer + "input_layernorm.weight", "layers/attention/norm", "D -> D"),
        TensorMap(layer + "self_attn.q_proj.weight", "layers/attention/q", "(N H) D -> D N H"),
        TensorMap(layer + "self_attn.k_proj.weight", "layers/attention/k", "(K H) D -> D K H"),
        TensorMap(layer + "self_attn.v_proj.weight", "layers/attention/v", "(K H) D -> D K H"),
        TensorMap(layer + "self_attn.o_proj.weight", "layers/attention/o", "D (N H) -> N H D"),
        TensorMap(layer + "post_attention_layernorm.weight", "layers/mlp/norm", "D -> D"),
        TensorMap(layer + "mlp.gate_proj.weight", "layers/mlp/gate", "F D -> D F"),
        TensorMap(layer + "mlp.up_proj.weight", "layers/mlp/up", "F D -> D F"),
        TensorMap(layer + "mlp.down_proj.weight", "layers/mlp/down", "D F -> F D"),
    )
    if not config.tied_head:
        maps += (TensorMap("lm_head.weight", "head", "V D -> D V"),)
    if config.qkv_bias:
        maps += (
            TensorMap(layer + "self_attn.q_proj.bias", "layers/attention/q_bias", "(N H) -> N H"),
            TensorMap(layer + "self_attn.k_proj.bias", "layers/attention/k_bias", "(K H) -> K H"),
            TensorMap(layer + "self_attn.v_proj.bias", "layers/attention/v_bias", "(K H) -> K H"),
        )
    if config.qk_norm:
        maps += (
            TensorMap(layer + "self_attn.q_norm.weight", "layers/attention/q_norm", "H -> H"),
            TensorMap(layer + "self_attn.k_norm.weight", "layers/attention/k_norm", "H -> H"),
        )
    return maps


def ignored(config: TransformerConfig) -> tuple[str, ...]:
    """Patterns of published tensors that say nothing: constants, and the copy of a tied head."""
    constants = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
    return (*constants, r"lm_head\.weight") if config.tied_head else constants


def config_from_gguf(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], eos: tuple[int, ...]
) -> TransformerConfig:
    """The config of a GGUF file with architecture llama, qwen2 or qwen3.

    Args:
      metadata: the scalars of the file's header.
      shapes: its tensors' shapes; a file without output.weight has a tied head.
      eos: the ids that end an answer.

    Raises:
      ValueError: a field is missing, or asks for something that the model does not do.
    """
    kind = metadata["general.architecture"]

    def field(name: str, default: Any = None) -> Any:
        value = metadata.get(f"{kind}.{name}", default)
        if value is None:
            raise ValueError(f"the GGUF header has no {kind}.{name}: convert the model again")
        return value

    if field("rope.scaling.type", "none") != "none" or "rope_freqs.weight" in shapes:
        raise ValueError("the GGUF file scales its RoPE frequencies, which is not supported")
    if field("expert_count", 0):
        raise ValueError("the GGUF file is a mixture of experts, which is not supported")
    heads, dim = field("attention.head_count"), field("embedding_length")
    head_dim = field("attention.key_length", dim // heads)
    if field("rope.dimension_count", head_dim) != head_dim:
        raise ValueError("the GGUF file rotates a part of each head, which is not supported")
    pad = metadata.get("tokenizer.ggml.padding_token_id")
    return TransformerConfig(
        vocab_size=field("vocab_size", shapes.get("token_embd.weight", (None,))[0]),
        num_layers=field("block_count"),
        dim=dim,
        num_heads=heads,
        num_kv_heads=field("attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn_dim=field("feed_forward_length"),
        max_length=field("context_length"),
        rope_theta=float(field("rope.freq_base", 10_000.0)),
        norm_eps=_float32(field("attention.layer_norm_rms_epsilon")),
        tied_head="output.weight" not in shapes,
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        eos_ids=eos,
        pad_id=pad if pad is not None else (eos[0] if eos else 0),
    )


def gguf_tensor_maps(config: TransformerConfig, architecture: str) -> tuple[TensorMap, ...]:
    """The names in a GGUF file.

    llama.cpp rotates neighbouring rows of a Llama head, where the published weights rotate its two
    halves, so its converter stores the rows of q and k as (head, plane, half). Qwen's rows are left
    alone.
    """
    rows = "(N h 2)", "(K h 2)"
    turned = "D N (2 h)", "D K (2 h)"
    if architecture != "llama":
        rows, turned = ("(N H)", "(K H)"), ("D N H", "D K H")
    layer = "blk.{layer}."
    maps = (
        TensorMap("token_embd.weight", "embed", "V D -> V D"),
        TensorMap("output_norm.weight", "final_norm", "D -> D"),
        TensorMap(layer + "attn_norm.weight", "layers/attention/norm", "D -> D"),
        TensorMap(layer + "attn_q.weight", "layers/attention/q", f"{rows[0]} D -> {turned[0]}"),
        TensorMap(layer + "attn_k.weight", "layers/attention/k", f"{rows[1]} D -> {turned[1]}"),
        TensorMap(layer + "attn_v.weight", "layers/attention/v", "(K H) D -> D K H"),
        TensorMap(layer + "attn_output.weight", "layers/attention/o", "D (N H) -> N H D"),
        TensorMap(layer + "ffn_norm.weight", "layers/mlp/norm", "D -> D"),
        TensorMap(layer + "ffn_gate.weight", "layers/mlp/gate", "F D -> D F"),
        TensorMap(layer + "ffn_up.weight", "layers/mlp/up", "F D -> D F"),
        TensorMap(layer + "ffn_down.weight", "layers/mlp/down", "D F -> F D"),
    )
    if not config.tied_head:
        maps += (TensorMap("output.weight", "head", "V D -> D V"),)
    if config.qkv_bias:
        maps += (
            TensorMap(layer + "attn_q.bias", "layers/attention/q_bias", "(N H) -> N H"),
            TensorMap(layer + "attn_k.bias", "layers/attention/k_bias", "(K H) -> K H"),
            TensorMap(layer + "attn_v.bias", "layers/attention/v_bias", "(K H) -> K H"),
        )
    if config.qk_norm:
        maps += (
            TensorMap(layer + "attn_q_norm.weight", "layers/attention/q_norm", "H -> H"),
            TensorMap(layer + "attn_k_norm.weight", "layers/attention/k_norm", "H -> H"),
        )
    return maps


def needed(fields: Mapping[str, Any], name: str) -> Any:
    """A field of config.json that has no default."""
    if fields.get(name) is None:
        raise ValueError(f"config.json has no {name}: it is not a complete published config")
    return fields[name]


def eos_ids(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """config.json's `eos_token_id`, which is a number, a list, or absent."""
    value = fields.get("eos_token_id")
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _refuse(fields: Mapping[str, Any], name: str, only: Any) -> None:
    value = fields.get(name)
    if value is not None and value != only:
        raise ValueError(f"config.json has {name}={value!r}; only {only!r} is supported")


def _float32(value: float) -> float:
    """A number stored in float32, as it was written: 1e-05, not 9.999999747378752e-06."""
    return float(f"{value:.7g}")
