"""LLaDA 8B (Base, Instruct, 1.5): a Llama body that sees in both directions and predicts in place.

Nie et al. 2025, "Large Language Diffusion Models". The names are OLMo's; `blocks.{i}.ff_out` is the
feed-forward's way down and `transformer.ff_out` the output head.
"""

from collections.abc import Mapping
from typing import Any

from dllm_jax.models.published import eos_ids, needed, pad_id, special_ids
from dllm_jax.models.tensors import TensorMap
from dllm_jax.nn.transformer import TransformerConfig

MASK_ID = 126336
END_OF_TEXT = 126081
END_OF_TURN = 126348  # ends an answer of the Instruct models too; their config.json does not say so

# The config class carries OLMo's choices; these are the published models', all that is built here.
_FIXED = {
    "activation_type": "silu",
    "block_type": "llama",
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "rope": True,
    "alibi": False,
    "attention_layer_norm": False,
    "include_bias": False,
    "bias_for_layer_norm": False,
    "input_emb_norm": False,
    "scale_logits": False,
    "block_group_size": 1,
}
# What the config class needs in words where its own default is another choice.
_STATED = {
    "mlp_ratio": 4,
    "rope_full_precision": True,
    "attention_layer_norm_with_affine": True,
    "flash_attention": False,
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
    "multi_query_attention": None,
    "init_device": "cpu",
    "use_cache": False,
}


def config_from_published(fields: Mapping[str, Any]) -> TransformerConfig:
    """The config of a published config.json with model_type llada.

    Raises:
      ValueError: a field is missing, or asks for something that the model does not do.
    """
    for name, only in _FIXED.items():
        if fields.get(name, only) not in (only, None):
            raise ValueError(f"config.json has {name}={fields[name]!r}; LLaDA needs {only!r}")
    dim, heads = needed(fields, "d_model"), needed(fields, "n_heads")
    kv_heads = 1 if fields.get("multi_query_attention") else fields.get("n_kv_heads") or heads
    mask = fields.get("mask_token_id")
    eos = eos_ids(fields)
    vocab = fields.get("embedding_size") or needed(fields, "vocab_size")
    if END_OF_TEXT in eos:
        eos = tuple(dict.fromkeys((*eos, END_OF_TURN)))
    return TransformerConfig(
        family="llada",
        vocab_size=vocab,
        num_layers=needed(fields, "n_layers"),
        dim=dim,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim // heads,
        ffn_dim=fields.get("mlp_hidden_size") or fields.get("mlp_ratio", 4) * dim,
        max_length=fields.get("max_sequence_length", 1024),
        rope_theta=float(fields.get("rope_theta", 10_000.0)),
        norm_eps=float(fields.get("rms_norm_eps", 1e-5)),
        tied_head=bool(fields.get("weight_tying", True)),
        qkv_bias=bool(fields.get("include_qkv_bias", False)),
        attention="bidirectional",
        alignment="same_position",
        mask_id=MASK_ID if mask is None else mask,
        eos_ids=eos,
        pad_id=pad_id(fields),
    )


def config_to_published(config: TransformerConfig) -> dict[str, Any]:
    """The inverse of `config_from_published`: a config.json that the authors' code reads."""
    return {
        "model_type": "llada",
        "architectures": ["LLaDAModelLM"],
        "vocab_size": config.vocab_size,
        "embedding_size": config.vocab_size,
        "n_layers": config.num_layers,
        "d_model": config.dim,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "mlp_hidden_size": config.ffn_dim,
        "max_sequence_length": config.max_length,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "weight_tying": config.tied_head,
        "include_qkv_bias": config.qkv_bias,
        **_FIXED,
        **_STATED,
        **special_ids(config),
    }


def tensor_maps(config: TransformerConfig) -> tuple[TensorMap, ...]:
    """The published names."""
    body = "model.transformer."
    layer = body + "blocks.{layer}."
    maps = (
        TensorMap(body + "wte.weight", "embed", "V D -> V D"),
        TensorMap(body + "ln_f.weight", "final_norm", "D -> D"),
        TensorMap(layer + "attn_norm.weight", "layers/attention/norm", "D -> D"),
        TensorMap(layer + "q_proj.weight", "layers/attention/q", "(N H) D -> D N H"),
        TensorMap(layer + "k_proj.weight", "layers/attention/k", "(K H) D -> D K H"),
        TensorMap(layer + "v_proj.weight", "layers/attention/v", "(K H) D -> D K H"),
        TensorMap(layer + "attn_out.weight", "layers/attention/o", "D (N H) -> N H D"),
        TensorMap(layer + "ff_norm.weight", "layers/mlp/norm", "D -> D"),
        TensorMap(layer + "ff_proj.weight", "layers/mlp/gate", "F D -> D F"),
        TensorMap(layer + "up_proj.weight", "layers/mlp/up", "F D -> D F"),
        TensorMap(layer + "ff_out.weight", "layers/mlp/down", "D F -> F D"),
    )
    if not config.tied_head:
        maps += (TensorMap(body + "ff_out.weight", "head", "V D -> V D"),)
    if config.qkv_bias:
        maps += (
            TensorMap(layer + "q_proj.bias", "layers/attention/q_bias", "(N H) -> N H"),
            TensorMap(layer + "k_proj.bias", "layers/attention/k_bias", "(K H) -> K H"),
            TensorMap(layer + "v_proj.bias", "layers/attention/v_bias", "(K H) -> K H"),
        )
    return maps


def ignored(config: TransformerConfig) -> tuple[str, ...]:
    """Patterns of published tensors that say nothing: the copy of a tied head."""
    return (r"model\.transformer\.ff_out\.weight",) if config.tied_head else ()
