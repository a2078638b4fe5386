"""Architectures as data: configs and name maps, against the published code's answers."""

import json
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from dllm_jax.checkpoint import load
from dllm_jax.models import llada, llama, registry
from dllm_jax.models.export import published_config, published_tensors
from dllm_jax.models.tensors import TensorMap, leaves
from dllm_jax.nn.transformer import TransformerConfig
from dllm_jax.nn.tree import param_shapes

LLAMA = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 3,
}
LLADA = {
    "model_type": "llada",
    "d_model": 16,
    "n_heads": 2,
    "n_kv_heads": 2,
    "n_layers": 2,
    "mlp_hidden_size": 24,
    "vocab_size": 40,
    "embedding_size": 40,
    "weight_tying": False,
    "eos_token_id": 3,
    "mask_token_id": 39,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
LLADA_MOE = {
    "model_type": "llada",
    "architectures": ["LLaDAMoEModelLM"],
    "vocab_size": 40,
    "hidden_size": 16,
    "dense_intermediate_size": 24,
    "expert_intermediate_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "eos_token_id": 3,
}
LLADA2 = {
    **LLAMA,
    **EXPERTS,
    "model_type": "llada2_moe",
    "num_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
FAMILIES = {
    "llama": LLAMA,
    "llama tied": {**LLAMA, "tie_word_embeddings": True},
    "qwen2": {**LLAMA, "model_type": "qwen2"},
    "qwen3": {**LLAMA, "model_type": "qwen3", "attention_bias": False},
    "qwen3 moe": {**LLAMA, "model_type": "qwen3_moe", **EXPERTS},
    "dream": {**LLAMA, "model_type": "Dream", "mask_token_id": 39},
    "fast_dllm_v2": {**LLAMA, "model_type": "Fast_dLLM_Qwen", "bd_size": 8},
    "sdar": {**LLAMA, "model_type": "sdar", "block_size": 16},
    "sdar moe": {**LLAMA, "model_type": "sdar_moe", **EXPERTS, "norm_topk_prob": True},
    "llada moe": LLADA_MOE,
    "llada moe, all of it": {
        **LLADA_MOE,
        "moe_layer_freq": [0, 0, 1],
        "shared_expert_intermediate_size": 12,
        "moe_router_enable_expert_bias": True,
        "partial_rotary_factor": 0.5,
        "tie_word_embeddings": True,
    },
    "llada2": LLADA2,
    "llada2, bare": {
        **LLADA2,
        "first_k_dense_replace": 0,
        "num_shared_experts": None,
        "num_experts_per_tok": 1,
        "tie_word_embeddings": True,
        "block_size": 8,
    },
    "llada": LLADA,
    "llada with biases": {**LLADA, "include_qkv_bias": True, "weight_tying": True},
}
each_family = pytest.mark.parametrize("fields", FAMILIES.values(), ids=FAMILIES)


def config_of(fields: dict) -> TransformerConfig:
    return registry.family(fields).config_from_published(fields)


def random_params(config: TransformerConfig, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: rng.standard_normal(s.shape, np.float32).astype(s.dtype), param_shapes(config)
    )


def write_folder(folder: Path, fields: dict, tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(tensors, folder / "model.safetensors")
    return folder


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# Name maps


@each_family
def test_maps_cover_the_tree_once(fields: dict):
    config = config_of(fields)
    maps = registry.family(fields).tensor_maps(config)
    paths = sorted(path for row in maps for path in row.paths)
    assert paths == sorted(path for path, _ in leaves(param_shapes(config)))
    names = [name for row in maps for _, name in row.entries(config)]
    assert len(names) == len(set(names))


@each_family
def test_published_and_back_is_the_same(fields: dict, tmp_path: Path):
    config = config_of(fields)
    params = random_params(config)
    tensors = published_tensors(config, params)
    model, again = load(write_folder(tmp_path / "m", fields, tensors))
    assert model.config == config
    assert_same(params, again)
    assert (
        published_config(config).items()
        >= {
            "model_type": fields["model_type"],
            "vocab_size": 40,
        }.items()
    )


@given(data=st.data())
def test_a_layout_is_undone_exactly(data: st.DataObject):
    letters = data.draw(st.permutations(["D", "N", "2", "h"]))
    cut = data.draw(st.integers(1, 3))
    published = f"({' '.join(letters[:cut])}) {' '.join(letters[cut:])}"
    ours = " ".join(data.draw(st.permutations(letters)))
    row, config = TensorMap("x", "x", f"{published} -> {ours}"), config_of(LLAMA)
    tensor = np.arange(16 * 4 * 8).reshape(row.published_shape(config))
    turned = row.ours(config, tensor)
    assert turned.shape == TensorMap("x", "x", f"{ours} -> {ours}").published_shape(config)
    np.testing.assert_array_equal(row.published(config, turned), tensor)


def test_projections_multiply_as_published():
    """x @ q is a torch Linear, split into heads; the way out joins them again."""
    config, rng = config_of(LLAMA), np.random.default_rng(0)
    maps = {row.path: row for row in llama.tensor_maps(config)}
    x = rng.standard_normal((5, config.dim))
    weight = rng.standard_normal((config.num_heads * config.head_dim, config.dim))
    q = np.einsum("bd,dnh->bnh", x, maps["layers/attention/q"].ours(config, weight))
    np.testing.assert_allclose(q, (x @ weight.T).reshape(5, config.num_heads, config.head_dim))
    o = np.einsum("bnh,nhd->bd", q, maps["layers/attention/o"].ours(config, weight.T))
    np.testing.assert_allclose(o, q.reshape(5, -1) @ weight)


# Configs


def test_family_defaults():
    fields = {k: v for k, v in LLAMA.items() if k not in ("head_dim", "num_key_value_heads")}
    assert config_of(fields).head_dim == 4
    assert config_of(fields).num_kv_heads == 4
    assert config_of({**fields, "model_type": "qwen3"}).head_dim == 128
    assert config_of({**fields, "eos_token_id": [3, 5]}).eos_ids == (3, 5)
    newer = {**fields, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert config_of(newer).rope_theta == 5e5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**LLAMA, "rope_scaling": {"rope_type": "longrope"}}, "RoPE scaling 'longrope'"),
        ({**LLAMA, "attention_bias": True}, "attention_bias=True; only False"),
        ({**LLAMA, "hidden_act": "gelu"}, "hidden_act='gelu'; only 'silu'"),
        ({**FAMILIES["dream"], "use_mrope": True}, "use_mrope=True; only False"),
        ({**FAMILIES["sdar moe"], "mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]; only \[\]"),
        ({**FAMILIES["sdar moe"], "decoder_sparse_step": 2}, "decoder_sparse_step=2; only 1"),
        ({**FAMILIES["sdar moe"], "num_experts": None}, r"config\.json has no num_experts"),
        ({**LLADA_MOE, "moe_layer_freq": [1, 0, 1]}, r"moe_layer_freq=\[1, 0, 1\]; dense layers"),
        ({**LLADA_MOE, "moe_layer_freq": [0, 0, 0]}, "first_dense=3 leaves no layer for the exp"),
        ({**LLADA_MOE, "moe_layer_freq": [1, 1]}, "one number for each of 3 layers"),
        ({**LLADA_MOE, "clip_qkv": 8}, "clip_qkv=8; it is not supported"),
        ({**LLADA_MOE, "routed_scaling_factor": 2}, "routed_scaling_factor=2; only 1"),
        ({**LLADA2, "use_bias": True}, "use_bias=True; only False"),
        ({**LLADA2, "n_group": 3}, "num_experts=4 must be a multiple of groups=3"),
        ({**LLAMA, "hidden_size": None}, r"config\.json has no hidden_size"),
        ({**LLADA, "alibi": True}, "alibi=True; LLaDA needs False"),
        ({**LLADA, "block_type": "sequential"}, "block_type='sequential'; LLaDA needs 'llama'"),
        (
            {"model_type": "mamba"},
            "'mamba', which is not known; known are .*Dream, .*llada, .*llama",
        ),
        ({}, "model_type=None, which is not known"),
    ],
)
def test_what_is_not_built_says_so(tmp_path: Path, fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        load(write_folder(tmp_path, fields, {}))


# Published folders


def test_shards_with_an_index(tmp_path: Path):
    config = config_of(LLAMA)
    params = random_params(config)
    tensors = published_tensors(config, params)
    names, files = sorted(tensors), ("model-00001-of-00002", "model-00002-of-00002")
    halves = names[::2], names[1::2]
    for file, half in zip(files, halves, strict=True):
        save_file({name: tensors[name] for name in half}, tmp_path / f"{file}.safetensors")
    index = {
        "weight_map": {
            n: f"{f}.safetensors" for f, half in zip(files, halves, strict=True) for n in half
        }
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert_same(params, load(tmp_path)[1])
    (tmp_path / f"{files[1]}.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks the shard {files[1]}.safetensors"):
        load(tmp_path)


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_dtype_is_as_stored_unless_asked(tmp_path: Path, stored: str):
    config = config_of(LLAMA)
    params = random_params(config)
    tensors = published_tensors(config, params)
    tensors = {name: value.astype(jnp.dtype(stored)) for name, value in tensors.items()}
    folder = write_folder(tmp_path, LLAMA, tensors)
    model, as_stored = load(folder)
    assert model.config.param_dtype == model.config.dtype == stored
    assert_same(as_stored, jax.tree.map(lambda x: x.astype(jnp.dtype(stored)), params))
    model, cast = load(folder, dtype=jnp.bfloat16)
    assert model.config.param_dtype == "bfloat16"
    assert_same(cast, jax.tree.map(lambda x: x.astype(jnp.bfloat16), as_stored))


def test_tensors_that_say_nothing_are_skipped(tmp_path: Path):
    tied = {**LLAMA, "tie_word_embeddings": True}
    config = config_of(tied)
    tensors = published_tensors(config, random_params(config))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    assert "head" not in load(write_folder(tmp_path, tied, tensors))[1]


def spoil(tensors: dict[str, np.ndarray], how: str) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    if how == "missing":
        del tensors[name]
    elif how == "extra":
        tensors["model.layers.3.mlp.up_proj.weight"] = tensors[name].copy()
    elif how == "misshapen":
        tensors[name] = np.ascontiguousarray(tensors[name].T)
    elif how == "integers":
        tensors[name] = tensors[name].astype(np.int8)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"'model\.layers\.1\.mlp\.up_proj\.weight' is missing \(1 in all\)"),
        ("extra", r"'model\.layers\.3\.mlp\.up_proj\.weight' is not part of this architecture"),
        ("misshapen", r"up_proj\.weight' has shape \(16, 24\), but the config says \(24, 16\)"),
        ("integers", r"up_proj\.weight' is stored as I8; only F32, F16, BF16"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, how: str, message: str):
    config = config_of(LLAMA)
    tensors = published_tensors(config, random_params(config))
    spoil(tensors, how)
    with pytest.raises(ValueError, match=message):
        load(write_folder(tmp_path, LLAMA, tensors))


def test_damaged_folders(tmp_path: Path):
    config = config_of(LLAMA)
    tensors = published_tensors(config, random_params(config))
    folder = write_folder(tmp_path, LLAMA, tensors)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 4, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors"):
            load(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no \.safetensors files"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load(folder)


# GGUF


def permuted(tensor: np.ndarray, heads: int) -> np.ndarray:
    """The rows of q and k as llama.cpp's converter (convert_hf_to_gguf.py) stores them."""
    rows = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return rows.swapaxes(1, 2).reshape(tensor.shape)


def gguf_tensors(config: TransformerConfig, params: dict, kind: str) -> dict[str, np.ndarray]:
    """A tree under llama.cpp's names, made from the published form by what llama.cpp does to it."""
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "model.layers": "blk",
    }
    tensors = {}
    for name, tensor in published_tensors(config, params).items():
        if kind == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_heads if "q_proj" in name else config.num_kv_heads
            tensor = np.ascontiguousarray(permuted(tensor, heads))
        for theirs, llamacpp in names.items():
            name = name.replace(theirs, llamacpp)
        tensors[name] = tensor
    return tensors


def write_gguf(path: Path, fields: dict, tensors: dict[str, np.ndarray], kind: str) -> Path:
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_context_length(fields["max_position_embeddings"])
    writer.add_embedding_length(fields["hidden_size"])
    writer.add_feed_forward_length(fields["intermediate_size"])
    writer.add_head_count(fields["num_attention_heads"])
    writer.add_head_count_kv(fields["num_key_value_heads"])
    writer.add_key_length(fields["head_dim"])
    writer.add_rope_freq_base(fields["rope_theta"])
    writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
    writer.add_eos_token_id(fields["eos_token_id"])
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory):
    monkeypatch.setenv("DLLM_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_gguf_equals_published(tmp_path: Path, kind: str, tied: bool):
    fields = {**LLAMA, "model_type": kind, "tie_word_embeddings": tied}
    config = config_of(fields)
    params = random_params(config)
    tensors = gguf_tensors(config, params, kind)
    file = write_gguf(tmp_path / "m.gguf", fields, tensors, kind)
    for _ in ("converted", "restored"):
        model, again = load(file)
        assert model.config == config
        assert_same(params, again)


def test_gguf_is_dequantised(tmp_path: Path):
    fields = {**LLAMA, "hidden_size": 32, "intermediate_size": 32}
    config = config_of(fields)
    params = random_params(config)
    tensors = gguf_tensors(config, params, "llama")
    q8 = gguf.GGMLQuantizationType.Q8_0
    quantised = gguf.quantize(tensors["blk.1.ffn_up.weight"], q8)
    tensors["blk.1.ffn_up.weight"] = gguf.dequantize(quantised, q8)
    file = write_gguf(tmp_path / "m.gguf", fields, tensors, "llama")
    up = load(file)[1]["layers"]["mlp"]["up"][1]
    np.testing.assert_array_equal(up, gguf.dequantize(quantised, q8).T)
    assert 0 < np.abs(up - params["layers"]["mlp"]["up"][1]).max() < 0.05


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"'blk\.1\.ffn_up\.weight' is missing"),
        ("extra", r"'blk\.9\.ffn_up\.weight' is not part of this architecture"),
        ("misshapen", r"'blk\.1\.ffn_up\.weight' has shape \(16, 24\), but the config says"),
        ("scaled", "scales its RoPE frequencies, which is not supported"),
    ],
)
def test_gguf_tensors_that_do_not_fit(tmp_path: Path, how: str, message: str):
    config = config_of(LLAMA)
    tensors = gguf_tensors(config, random_params(config), "llama")
    up = tensors["blk.1.ffn_up.weight"]
    if how == "missing":
        del tensors["blk.1.ffn_up.weight"]
    elif how == "extra":
        tensors["blk.9.ffn_up.weight"] = up
    elif how == "misshapen":
        tensors["blk.1.ffn_up.weight"] = np.ascontiguousarray(up.T)
    else:
        tensors["rope_freqs.weight"] = np.ones(4, np.float32)
    with pytest.raises(ValueError, match=message):
        load(write_gguf(tmp_path / "m.gguf", LLAMA, tensors, "llama"))


def test_damaged_gguf(tmp_path: Path):
    config = config_of(LLAMA)
    tensors = gguf_tensors(config, random_params(config), "llama")
    file = write_gguf(tmp_path / "m.gguf", LLAMA, tensors, "llama")
    whole = file.read_bytes()
    for size in (0, 3, 40, 400, len(whole) // 2, len(whole) - 64):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"m\.gguf is not a readable GGUF file .* truncated"):
            load(file)


def test_unknown_gguf_architecture(tmp_path: Path):
    file = write_gguf(tmp_path / "m.gguf", LLAMA, {}, "rwkv6")
    with pytest.raises(ValueError, match="architecture 'rwkv6', which is not known; known are ll"):
        load(file)


def test_gguf_number_as_written():
    """GGUF keeps 1e-5 in float32; the config has the number that was meant."""
    config = config_of(LLAMA)
    metadata = {
        "general.architecture": "llama",
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "llama.vocab_size": 40,
        "llama.block_count": 3,
        "llama.context_length": 128,
        "llama.embedding_length": 16,
        "llama.feed_forward_length": 24,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 8,
    }
    shapes = {"output.weight": (40, 16)}
    assert llama.config_from_gguf(metadata, shapes, (3,)) == config
    del metadata["llama.block_count"]
    with pytest.raises(ValueError, match=r"the GGUF header has no llama\.block_count"):
        llama.config_from_gguf(metadata, shapes, (3,))


def test_llada_head_is_not_the_way_down():
    names = {row.name: row.path for row in llada.tensor_maps(config_of(LLADA))}
    assert names["model.transformer.ff_out.weight"] == "head"
    assert names["model.transformer.blocks.{layer}.ff_out.weight"] == "layers/mlp/down"
