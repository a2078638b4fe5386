"""LLaDA2.0 and 2.1 (mini, flash): block diffusion on the body of Ling 2.0, a mixture of experts.

Bie et al. 2025, "LLaDA2.0". Query, key and value are one published tensor; RoPE turns a part of
each head; the router is DeepSeek-V3's; the first layers are dense.
"""

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
    rotary_dim,
    rotary_factor,
    special_ids,
)
from dllm_jax.models.tensors import TensorMap
from dllm_jax.nn.transformer import TransformerConfig
from dllm_jax.ops.moe import MoEConfig

BLOCK_SIZE = 32  # of the published models, whose config.json may not say it
MASK_ID = 156895

# The config class has these switches; this is how the published models set them.
_FIXED = {
    "hidden_act": "silu",
    "use_qkv_bias": False,
    "use_bias": False,
    "norm_head": False,
    "norm_softmax": False,
    "use_sliding_window": False,
    "score_function": "sigmoid",
}


def config_from_published(fields: Mapping[str, Any]) -> TransformerConfig:
    """The config of a published config.json with model_type llada2_moe.

    Raises:
      ValueError: a field is missing, or asks for something that the model does not do.
    """
    for name, only in _FIXED.items():
        refuse(fields, name, only)
    refuse_windows(fields)
    heads, dim = needed(fields, "num_attention_heads"), needed(fields, "hidden_size")
    head_dim = fields.get("head_dim") or dim // heads
    ffn, top = needed(fields, "moe_intermediate_size"), needed(fields, "num_experts_per_tok")
    mask = fields.get("mask_token_id")
    return TransformerConfig(
        family="llada2_moe",
        vocab_size=needed(fields, "vocab_size"),
        num_layers=needed(fields, "num_hidden_layers"),
        dim=dim,
        num_heads=heads,
        num_kv_heads=fields.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        ffn_dim=needed(fields, "intermediate_size"),
        **rope(fields, 16384),
        rotary_dim=rotary_dim(head_dim, float(fields.get("partial_rotary_factor", 0.5))),
        norm_eps=float(fields.get("rms_norm_eps", 1e-5)),
        tied_head=bool(fields.get("tie_word_embeddings", False)),
        qk_norm=True,
        moe=MoEConfig(
            num_experts=needed(fields, "num_experts"),
            experts_per_token=top,
            ffn_dim=ffn,
            shared_ffn_dim=ffn * (fields.get("num_shared_experts") or 0),
            first_dense=fields.get("first_k_dense_replace") or 0,
            score="sigmoid",
            groups=fields.get("n_group", 8),
            top_groups=fields.get("topk_group", 4),
            expert_bias=True,
            normalise=top > 1,
            scale=float(fields.get("routed_scaling_factor", 2.5)),
        ),
        attention="block_causal",
        block_size=fields.get("block_size") or BLOCK_SIZE,
        alignment="same_position",
        mask_id=MASK_ID if mask is None else mask,
        eos_ids=eos_ids(fields),
        pad_id=pad_id(fields),
    )


def config_to_published(config: TransformerConfig) -> dict[str, Any]:
    """The inverse of `config_from_published`: a config.json that the authors' code reads."""
    moe = config.moe
    if moe is None:
        raise ValueError("LLaDA2 is a mixture of experts, and the config has none (moe=None)")
    return {
        "model_type": "llada2_moe",
        "architectures": ["LLaDA2MoeModelLM"],
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        **rope_to_published(config),
        "partial_rotary_factor": rotary_factor(config),
        "rotary_dim": config.rotary_dim or config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "use_qk_norm": True,
        **_FIXED,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.ffn_dim,
        "num_shared_experts": moe.shared_ffn_dim // moe.ffn_dim or None,
        "first_k_dense_replace": moe.first_dense,
        "n_group": moe.groups,
        "topk_group": moe.top_groups,
        "norm_topk_prob": True,
        "moe_router_enable_expert_bias": True,
        "routed_scaling_factor": moe.scale,
        "router_dtype": "fp32",
        "block_size": config.block_size,
        **special_ids(config),
    }


def tensor_maps(config: TransformerConfig) -> tuple[TensorMap, ...]:
    """The published names."""
    layer, own = "model.layers.{layer}.", "layers/attention/"
    top = [
        TensorMap("model.word_embeddings.weight", "embed", "V D -> V D"),
        TensorMap("model.norm.weight", "final_norm", "D -> D"),
    ]
    if not config.tied_head:
        top.append(TensorMap("lm_head.weight", "head", "V D -> V D"))
    rows = [
        TensorMap(layer + "input_layernorm.weight", own + "norm", "D -> D"),
        TensorMap(
            layer + "attention.query_key_value.weight",
            (own + "q", own + "k", own + "v"),
            ("(N H) D -> D N H", "(K H) D -> D K H", "(K H) D -> D K H"),
        ),
        TensorMap(layer + "attention.query_layernorm.weight", own + "q_norm", "H -> H"),
        TensorMap(layer + "attention.key_layernorm.weight", own + "k_norm", "H -> H"),
        TensorMap(layer + "attention.dense.weight", own + "o", "D (N H) -> N H D"),
        TensorMap(layer + "post_attention_layernorm.weight", "layers/mlp/norm", "D -> D"),
    ]
    bias, shared = layer + "mlp.gate.expert_bias", layer + "mlp.shared_experts."
    return (*top, *layer_maps(config, rows, layer + "mlp.", bias=bias, shared=shared))


def ignored(config: TransformerConfig) -> tuple[str, ...]:
    """Patterns of published tensors that say nothing: constants, and the copy of a tied head."""
    constants = (r"model\.(layers\.\d+\.attention\.)?rotary_emb\.inv_freq",)
    return (*constants, r"lm_head\.weight") if config.tied_head else constants
