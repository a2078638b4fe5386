"""The Llama line: Llama and the Qwens, and the diffusion models that have one of their bodies.

RMSNorm, RoPE in the half-rotation form, grouped heads, SwiGLU. Qwen2 adds biases to q, k and v;
Qwen3 norms each head's query and key; Qwen3-MoE has experts. Dream (Ye et al. 2025) and Fast-dLLM
v2 (Wu et al. 2025) are Qwen2 bodies, SDAR (Cheng et al. 2025) is a Qwen3 or Qwen3-MoE body. They
differ in who sees whom, and in which output predicts which token.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dllm_jax.models.published import (
    eos_ids,
    layer_maps,
    needed,
    pad_id,
    refuse,
    refuse_windows,
    rope,
    rope_to_published,
    special_ids,
)
from dllm_jax.models.tensors import TensorMap
from dllm_jax.nn.transformer import TransformerConfig
from dllm_jax.ops.moe import MoEConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """What sets one model_type of the line apart from the others."""

    architecture: str
    bias: bool = False  # of q, k and v
    qk_norm: bool = False
    head_dim: int | None = None  # where config.json names none; None: hidden_size / heads
    moe: bool = False
    attention: str = "causal"
    alignment: str = "shifted"
    block_key: str | None = None  # the field of config.json that holds the block size
    block_size: int = 1  # where it does not
    mask_id: int | None = None  # where config.json names none


_SDAR = Kind(
    architecture="SDARForCausalLM",
    qk_norm=True,
    head_dim=128,
    attention="block_causal",
    alignment="same_position",
    block_key="block_size",
    block_size=4,
    mask_id=151669,
)
KINDS = {
    "llama": Kind(architecture="LlamaForCausalLM"),
    "qwen2": Kind(architecture="Qwen2ForCausalLM", bias=True),
    "qwen3": Kind(architecture="Qwen3ForCausalLM", qk_norm=True, head_dim=128),
    "qwen3_moe": Kind(architecture="Qwen3MoeForCausalLM", qk_norm=True, moe=True),
    "Dream": Kind(architecture="DreamModel", bias=True, attention="bidirectional", mask_id=151666),
    "Fast_dLLM_Qwen": Kind(
        architecture="Fast_dLLM_QwenForCausalLM",
        bias=True,
        attention="block_causal",
        block_key="bd_size",
        block_size=32,
        mask_id=151665,
    ),
    "sdar": _SDAR,
    "sdar_moe": dataclasses.replace(_SDAR, architecture="SDARMoeForCausalLM", moe=True),
}
"""By the `model_type` of config.json."""


def config_from_published(fields: Mapping[str, Any]) -> TransformerConfig:
    """The config of a published config.json whose model_type is one of `KINDS`.

    Raises:
      ValueError: a field is missing, or asks for something that the model does not do.
    """
    family = needed(fields, "model_type")
    kind = KINDS[family]
    refuse(fields, "hidden_act", "silu")
    refuse(fields, "mlp_bias", False)
    refuse(fields, "partial_rotary_factor", 1.0)
    refuse_windows(fields)
    refuse(fields, "use_mrope", False)
    if not kind.bias:
        refuse(fields, "attention_bias", False)
    heads, dim = needed(fields, "num_attention_heads"), needed(fields, "hidden_size")
    mask = fields.get("mask_token_id")
    return TransformerConfig(
        family=family,
        vocab_size=needed(fields, "vocab_size"),
        num_layers=needed(fields, "num_hidden_layers"),
        dim=dim,
        num_heads=heads,
        num_kv_heads=fields.get("num_key_value_heads") or heads,
        head_dim=fields.get("head_dim") or kind.head_dim or dim // heads,
        ffn_dim=needed(fields, "intermediate_size"),
        **rope(fields, 2048),
        norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
        tied_head=bool(fields.get("tie_word_embeddings", False)),
        qkv_bias=kind.bias,
        qk_norm=kind.qk_norm,
        moe=_experts(fields) if kind.moe else None,
        attention=kind.attention,
        block_size=(kind.block_key and fields.get(kind.block_key)) or kind.block_size,
        alignment=kind.alignment,
        mask_id=kind.mask_id if mask is None else mask,
        eos_ids=eos_ids(fields),
        pad_id=pad_id(fields),
    )


def _experts(fields: Mapping[str, Any]) -> MoEConfig:
    refuse(fields, "decoder_sparse_step", 1)
    refuse(fields, "mlp_only_layers", [])
    return MoEConfig(
        num_experts=needed(fields, "num_experts"),
        experts_per_token=needed(fields, "num_experts_per_tok"),
        ffn_dim=needed(fields, "moe_intermediate_size"),
        normalise=bool(fields.get("norm_topk_prob", False)),
    )


def config_to_published(config: TransformerConfig) -> dict[str, Any]:
    """The inverse of `config_from_published`: a config.json that the authors' code reads."""
    kind = KINDS[config.family]
    fields = {
        "model_type": config.family,
        "architectures": [kind.architecture],
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        **rope_to_published(config),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "hidden_act": "silu",
        **special_ids(config),
    }
    if not kind.bias:
        fields["attention_bias"] = False
    if kind.block_key:
        fields[kind.block_key] = config.block_size
    if config.moe:
        fields |= {
            "num_experts": config.moe.num_experts,
            "num_experts_per_tok": config.moe.experts_per_token,
            "moe_intermediate_size": config.moe.ffn_dim,
            "norm_topk_prob": config.moe.normalise,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return fields


def tensor_maps(config: TransformerConfig) -> tuple[TensorMap, ...]:
    """The published names, which all of them share."""
    layer = "model.layers.{layer}."
    top = [
        TensorMap("model.embed_tokens.weight", "embed", "V D -> V D"),
        TensorMap("model.norm.weight", "final_norm", "D -> D"),
    ]
    if not config.tied_head:
        top.append(TensorMap("lm_head.weight", "head", "V D -> V D"))
    rows = [
        TensorMap(layer + "input_layernorm.weight", "layers/attention/norm", "D -> D"),
        TensorMap(layer + "self_attn.q_proj.weight", "layers/attention/q", "(N H) D -> D N H"),
        TensorMap(layer + "self_attn.k_proj.weight", "layers/attention/k", "(K H) D -> D K H"),
        TensorMap(layer + "self_attn.v_proj.weight", "layers/attention/v", "(K H) D -> D K H"),
        TensorMap(layer + "self_attn.o_proj.weight", "layers/attention/o", "D (N H) -> N H D"),
        TensorMap(layer + "post_attention_layernorm.weight", "layers/mlp/norm", "D -> D"),
    ]
    if config.qkv_bias:
        rows += [
            TensorMap(layer + "self_attn.q_proj.bias", "layers/attention/q_bias", "(N H) -> N H"),
            TensorMap(layer + "self_attn.k_proj.bias", "layers/attention/k_bias", "(K H) -> K H"),
            TensorMap(layer + "self_attn.v_proj.bias", "layers/attention/v_bias", "(K H) -> K H"),
        ]
    if config.qk_norm:
        rows += [
            TensorMap(layer + "self_attn.q_norm.weight", "layers/attention/q_norm", "H -> H"),
            TensorMap(layer + "self_attn.k_norm.weight", "layers/attention/k_norm", "H -> H"),
        ]
    # The bias and the shared expert are LLaDA-MoE's, which has these names too.
    bias, shared = layer + "mlp.expert_bias", layer + "shared_expert."
    return (*top, *layer_maps(config, rows, layer + "mlp.", bias=bias, shared=shared))


def ignored(config: TransformerConfig) -> tuple[str, ...]:
    """Patterns of published tensors that say nothing: constants, and the copy of a tied head."""
    constants = (r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)
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
        family=kind,
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
        maps += (TensorMap("output.weight", "head", "V D -> V D"),)
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


def _float32(value: float) -> float:
    """A number stored in float32, as it was written: 1e-05, not 9.999999747378752e-06."""
    return float(f"{value:.7g}")
