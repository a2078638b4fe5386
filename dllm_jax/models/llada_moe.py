"""LLaDA-MoE (7B-A1B): LLaDA's objective on a body with experts, under the names of OLMoE.

Zhu et al. 2025, "LLaDA-MoE". Published with the model_type of LLaDA, and told apart by its
`architectures`. Each head's query and key are normed; the router's weights are the probabilities of
a softmax over all experts, not normalised again.
"""

from collections.abc import Mapping
from typing import Any

from dllm_jax.models import llama
from dllm_jax.models.published import (
    eos_ids,
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
from dllm_jax.nn.transformer import TransformerConfig
from dllm_jax.ops.moe import MoEConfig

ARCHITECTURE = "LLaDAMoEModelLM"
MASK_ID = 156895

tensor_maps = llama.tensor_maps
ignored = llama.ignored


def config_from_published(fields: Mapping[str, Any]) -> TransformerConfig:
    """The config of a published config.json of LLaDA-MoE.

    Raises:
      ValueError: a field is missing, or asks for something that the model does not do.
    """
    refuse(fields, "hidden_act", "silu")
    refuse(fields, "attention_bias", False)
    refuse_windows(fields)
    # The published code has these fields and does nothing, or nothing else, by them.
    refuse(fields, "moe_router_score_function", "softmax")
    refuse(fields, "routed_scaling_factor", 1)
    refuse(fields, "router_num_group", 1)
    if fields.get("clip_qkv") is not None:
        raise ValueError(f"config.json has clip_qkv={fields['clip_qkv']!r}; it is not supported")
    heads, dim = needed(fields, "num_attention_heads"), needed(fields, "hidden_size")
    layers, head_dim = needed(fields, "num_hidden_layers"), dim // heads
    first_dense = _dense_layers(fields.get("moe_layer_freq"), layers)
    mask = fields.get("mask_token_id")
    return TransformerConfig(
        family="llada_moe",
        vocab_size=needed(fields, "vocab_size"),
        num_layers=layers,
        dim=dim,
        num_heads=heads,
        num_kv_heads=fields.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        ffn_dim=fields.get("dense_intermediate_size") or 8192,
        **rope({"rope_theta": 50_000.0, **fields}, 8192),
        rotary_dim=rotary_dim(head_dim, float(fields.get("partial_rotary_factor") or 1)),
        norm_eps=float(fields.get("rms_norm_eps", 1e-5)),
        tied_head=bool(fields.get("tie_word_embeddings", False)),
        qk_norm=bool(fields.get("qk_layernorm", True)),
        moe=MoEConfig(
            num_experts=needed(fields, "num_experts"),
            experts_per_token=needed(fields, "num_experts_per_tok"),
            ffn_dim=needed(fields, "expert_intermediate_size"),
            shared_ffn_dim=fields.get("shared_expert_intermediate_size") or 0,
            first_dense=first_dense,
            expert_bias=bool(fields.get("moe_router_enable_expert_bias", False)),
            biased_weights=bool(fields.get("moe_router_enable_expert_bias", False)),
        ),
        attention="bidirectional",
        alignment="same_position",
        mask_id=MASK_ID if mask is None else mask,
        eos_ids=eos_ids(fields),
        pad_id=pad_id(fields),
    )


def config_to_published(config: TransformerConfig) -> dict[str, Any]:
    """The inverse of `config_from_published`: a config.json that the authors' code reads."""
    moe = config.moe
    if moe is None:
        raise ValueError("LLaDA-MoE is a mixture of experts, and the config has none (moe=None)")
    sparse = config.num_layers - moe.first_dense
    return {
        "model_type": "llada",
        "architectures": [ARCHITECTURE],
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "dense_intermediate_size": config.ffn_dim,
        **rope_to_published(config),
        "partial_rotary_factor": rotary_factor(config),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "qk_layernorm": config.qk_norm,
        "hidden_act": "silu",
        "attention_bias": False,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "expert_intermediate_size": moe.ffn_dim,
        "shared_expert_intermediate_size": moe.shared_ffn_dim or None,
        "moe_layer_freq": [0] * moe.first_dense + [1] * sparse,
        "moe_router_enable_expert_bias": moe.expert_bias,
        "moe_router_score_function": "softmax",
        "norm_topk_prob": None,
        "routed_scaling_factor": 1,
        "router_num_group": None,
        "router_topk_group": None,
        **special_ids(config),
    }


def _dense_layers(frequency: list[int] | None, layers: int) -> int:
    """How many layers are dense, by `moe_layer_freq`: 0 or 1 for each, none by default."""
    if frequency is None:
        return 0
    first = frequency.index(1) if 1 in frequency else len(frequency)
    if frequency != [0] * first + [1] * (layers - first):
        raise ValueError(
            f"config.json has moe_layer_freq={frequency}; dense layers (0) must come before those"
            f" with experts (1), one number for each of {layers} layers"
        )
    return first
