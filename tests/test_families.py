"""The published families: their code's logits, and their sizes."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.checkpoint import load
from dllm_jax.models import registry
from dllm_jax.nn.head import logits_of
from dllm_jax.nn.transformer import TransformerConfig, forward
from dllm_jax.nn.tree import param_shapes
from pallas_kernels import BlockMask

# A folder of goldens, and each of its logits with the block size they were made under; 0: the
# architecture's own mask.
GOLDENS = {
    "llada": {"logits": 0},
    "dream": {"logits": 0},
    "sdar": {"logits_block4": 0, "logits_causal": 1},
    "fast_dllm_v2": {"logits_block8": 8, "logits_causal": 1},
    "llada_moe": {"logits": 0},
    "llada2": {"logits": 8},
    "llada21": {"logits": 8},
}


@partial(jax.jit, static_argnames=("model", "block"))
def logits(model, params, tokens, block):
    mask = BlockMask.block_causal(tokens.shape[1], block) if block else None
    return logits_of(model, params, forward(model, params, tokens, mask=mask).hidden)


@pytest.mark.parametrize("name", GOLDENS)
def test_logits_match_the_published_code(goldens: Path, name: str):
    folder = goldens / name
    model, params = load(folder)
    outputs = np.load(folder / "outputs.npz")
    for key, block in GOLDENS[name].items():
        tokens = np.load(folder / "inputs.npz")["tokens"].astype(np.int32)
        got = logits(model, params, jnp.asarray(tokens), block)
        np.testing.assert_allclose(got, outputs[key], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("llada", ("llada", "bidirectional", 1, "same_position", 256, (257,), 257)),
        ("dream", ("Dream", "bidirectional", 1, "shifted", 256, (257,), 257)),
        ("sdar", ("sdar", "block_causal", 4, "same_position", 256, (257,), 257)),
        ("fast_dllm_v2", ("Fast_dLLM_Qwen", "block_causal", 32, "shifted", 256, (257,), 258)),
        ("llada_moe", ("llada_moe", "bidirectional", 1, "same_position", 256, (257,), 257)),
        ("llada2", ("llada2_moe", "block_causal", 32, "same_position", 256, (257,), 257)),
    ],
)
def test_how_tokens_are_meant_to_be_read(goldens: Path, name: str, facts: tuple):
    c = load(goldens / name)[0].config
    assert facts == (
        c.family, c.attention, c.block_size, c.alignment, c.mask_id, c.eos_ids, c.pad_id,
    )  # fmt: skip


# Published sizes

QWEN = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}
LLADA = {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "d_model": 4096,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "mlp_hidden_size": 12288,
    "vocab_size": 126464,
    "embedding_size": 126464,
    "max_sequence_length": 4096,
    "rope_theta": 500000.0,
    "weight_tying": False,
    "eos_token_id": 126081,
    "pad_token_id": 126081,
}
LLADA2_MINI = {
    "model_type": "llada2_moe",
    "architectures": ["LLaDA2MoeModelLM"],
    "vocab_size": 157184,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "first_k_dense_replace": 1,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "moe_intermediate_size": 512,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "score_function": "sigmoid",
    "max_position_embeddings": 32768,
    "partial_rotary_factor": 0.5,
    "rope_theta": 600000,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 156892,
    "eos_token_id": 156892,
}
PUBLISHED = {
    "LLaDA 8B": (8.02, LLADA),
    "iLLaDA 8B": (
        7.62,
        {
            **LLADA,
            "n_kv_heads": 8,
            "mlp_hidden_size": 14336,
            "vocab_size": 155136,
            "embedding_size": 155136,
            "weight_tying": True,
            "mask_token_id": 5,
            "eos_token_id": 2,
        },
    ),
    "LLaDA-MoE 7B-A1B": (
        7.36,
        {
            "model_type": "llada",
            "architectures": ["LLaDAMoEModelLM"],
            "vocab_size": 157184,
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "dense_intermediate_size": 8192,
            "expert_intermediate_size": 1024,
            "shared_expert_intermediate_size": None,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "moe_layer_freq": [1] * 16,
            "rope_theta": 50000,
        },
    ),
    "LLaDA2 mini": (16.26, LLADA2_MINI),
    "LLaDA2 flash": (
        102.89,
        {
            **LLADA2_MINI,
            "hidden_size": 4096,
            "intermediate_size": 9216,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "moe_intermediate_size": 1024,
        },
    ),
    "Dream 7B": (
        7.62,
        {
            **QWEN,
            "model_type": "Dream",
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131072,
            "eos_token_id": 151643,
        },
    ),
    "SDAR 8B": (
        8.19,
        {
            **QWEN,
            "model_type": "sdar",
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    ),
    "SDAR 30B-A3B": (
        30.53,
        {
            **QWEN,
            "model_type": "sdar_moe",
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
        },
    ),
}


def config_of(fields: dict) -> TransformerConfig:
    return registry.family(fields).config_from_published(fields)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str):
    """As many parameters as they say, in billions; and a forward pass has the shapes it should."""
    billions, fields = PUBLISHED[name]
    config = dataclasses.replace(config_of(fields), dtype="bfloat16", param_dtype="bfloat16")
    shapes = param_shapes(config)
    assert round(sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e9, 2) == billions
    model = config.build()
    tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    out = jax.eval_shape(lambda params, tokens: forward(model, params, tokens), shapes, tokens)
    assert out.hidden.shape == (1, 64, config.dim)
    assert out.kv.shape == (config.num_layers, 1, config.num_kv_heads, 64, 2 * config.head_dim)


@pytest.mark.parametrize(
    ("name", "mask", "block", "eos"),
    [
        ("LLaDA 8B", 126336, 1, (126081, 126348)),
        ("iLLaDA 8B", 5, 1, (2,)),
        ("LLaDA-MoE 7B-A1B", 156895, 1, ()),
        ("LLaDA2 mini", 156895, 32, (156892,)),
        ("Dream 7B", 151666, 1, (151643,)),
        ("SDAR 8B", 151669, 4, ()),
        ("SDAR 30B-A3B", 151669, 4, ()),
    ],
)
def test_what_a_config_does_not_say(name: str, mask: int, block: int, eos: tuple):
    config = config_of(PUBLISHED[name][1])
    assert (config.mask_id, config.block_size, config.eos_ids) == (mask, block, eos)
    assert config.has_mask


def test_fast_dllm_defaults():
    config = config_of({**PUBLISHED["Dream 7B"][1], "model_type": "Fast_dLLM_Qwen"})
    assert (config.mask_id, config.block_size, config.alignment) == (151665, 32, "shifted")


@pytest.mark.parametrize("model_type", ["llada", "lladamoe", "llada_moe"])
def test_a_model_type_of_two_families(model_type: str):
    fields = {**PUBLISHED["LLaDA-MoE 7B-A1B"][1], "model_type": model_type}
    assert config_of(fields).family == "llada_moe"
    if model_type != "llada":
        del fields["architectures"]
        assert config_of(fields).family == "llada_moe"
    assert config_of(LLADA).family == config_of({**LLADA, "architectures": None}).family == "llada"
