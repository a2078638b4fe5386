"""Models out to their authors' form, PEFT adapters in, and folders of ours of every kind."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import dllm_jax
from dllm_jax.checkpoint import convert, export, load, save
from dllm_jax.models import registry
from dllm_jax.models.export import published_tensors
from dllm_jax.nn.adapters import AdapterConfig
from dllm_jax.nn.transformer import Transformer, TransformerConfig, forward
from dllm_jax.nn.tree import param_shapes
from dllm_jax.ops.moe import MoEConfig
from dllm_jax.sharding import make_mesh
from dllm_jax.tokenizer import Tokenizer

TINY = TransformerConfig(
    vocab_size=40, num_layers=3, dim=16, num_heads=4, num_kv_heads=2, head_dim=4, ffn_dim=24,
    eos_ids=(3, 5), pad_id=3,
)  # fmt: skip
MOE = dataclasses.replace(
    TINY,
    family="llada2_moe",
    rotary_dim=2,
    qk_norm=True,
    attention="block_causal",
    block_size=8,
    alignment="same_position",
    mask_id=39,
    moe=MoEConfig(
        num_experts=4, experts_per_token=2, ffn_dim=8, shared_ffn_dim=16, first_dense=1,
        score="sigmoid", groups=2, top_groups=1, expert_bias=True, normalise=True, scale=2.5,
    ),
)  # fmt: skip


def random_params(config: TransformerConfig) -> dict:
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: jnp.asarray(rng.standard_normal(s.shape, np.float32).astype(s.dtype)),
        param_shapes(config),
    )


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.map(lambda x: x.dtype, a) == jax.tree.map(lambda x: x.dtype, b)


def in_dtype(config: TransformerConfig, dtype: str) -> TransformerConfig:
    return dataclasses.replace(config, dtype=dtype, param_dtype=dtype)


# Export

GOLDENS = (
    "bd3lm", "d2f", "diffusion_gemma", "dream", "fast_dllm_v2", "llada", "llada2", "llada21",
    "llada_moe", "sdar",
)  # fmt: skip


def test_every_golden_with_weights_is_listed(goldens: Path):
    assert {file.parent.name for file in goldens.glob("*/*.safetensors")} == set(GOLDENS)


@pytest.mark.parametrize("name", GOLDENS)
def test_published_to_ours_and_back_is_the_same_file(goldens: Path, tmp_path: Path, name: str):
    """The same tensors: by name, dtype, shape, and every bit."""
    model, params = load(goldens / name)
    export(tmp_path / "back", model, params)
    theirs, ours = (
        load_file(folder / "model.safetensors") for folder in (goldens / name, tmp_path / "back")
    )
    assert ours.keys() == theirs.keys()
    for tensor, value in theirs.items():
        assert (ours[tensor].dtype, ours[tensor].shape) == (value.dtype, value.shape), tensor
        assert ours[tensor].tobytes() == value.tobytes(), tensor
    again, restored = load(tmp_path / "back")
    assert again == model
    assert_same(params, restored)


@pytest.mark.parametrize("config", [TINY, MOE], ids=["llama", "llada2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exported_is_read_again(tmp_path: Path, config: TransformerConfig, dtype: str):
    config = in_dtype(config, dtype)
    params = random_params(config)
    dllm_jax.export(tmp_path / "m", Transformer(config), params)
    names = ["config.json", "generation_config.json", "model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == names
    with safe_open(tmp_path / "m" / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
    model, again = load(tmp_path / "m")
    assert model.config == config
    assert_same(params, again)
    generation = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    mask = {} if config.mask_id is None else {"mask_token_id": 39}
    assert generation == {"eos_token_id": [3, 5], "pad_token_id": 3, **mask}


def test_shards_and_their_index(tmp_path: Path):
    params = random_params(TINY)
    export(tmp_path / "m", Transformer(TINY), params, max_shard_bytes=4000)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [
        f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)
    ]
    assert len(files) > 3
    total = 0
    for file in files:
        tensors = load_file(tmp_path / "m" / file)
        size = sum(x.nbytes for x in tensors.values())
        assert size <= 4000 or len(tensors) == 1
        assert set(tensors) == {name for name, home in index["weight_map"].items() if home == file}
        total += size
    assert index["metadata"] == {"total_size": total}
    assert_same(params, load(tmp_path / "m")[1])


def test_exported_from_a_mesh(tmp_path: Path):
    save(tmp_path / "ours", Transformer(MOE), random_params(MOE))
    model, params = load(tmp_path / "ours", mesh=make_mesh(fsdp=2, tensor=2))
    assert not params["layers"]["mlp"]["up"].sharding.is_fully_replicated
    export(tmp_path / "m", model, params)
    assert_same(random_params(MOE), load(tmp_path / "m")[1])


def test_the_tokenizer_goes_along(tmp_path: Path):
    try:
        tokenizer = Tokenizer.load("smollm2-135m-instruct")
    except FileNotFoundError:
        pytest.skip("the named model is not installed")
    export(tmp_path / "m", Transformer(TINY), random_params(TINY), tokenizer)
    again = Tokenizer.load(tmp_path / "m")
    assert again.encode("Hello, world") == tokenizer.encode("Hello, world")
    settings = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_what_cannot_be_exported(tmp_path: Path):
    adapted = dataclasses.replace(TINY, mask_id=40, adapter=AdapterConfig(rank=2))
    model, params = Transformer(adapted), random_params(adapted)
    with pytest.raises(ValueError, match="an adapter beside its weights: no published folder"):
        export(tmp_path / "m", model, params)
    for change, message in (
        (dict(qk_norm=True), "the family 'llama' cannot say qk_norm=True: it would be read as Fal"),
        (dict(attention="bidirectional"), "cannot say attention='bidirectional'"),
        (dict(family="gpt2"), "family='gpt2' is not known; known are llama"),
    ):
        config = dataclasses.replace(TINY, **change)
        with pytest.raises(ValueError, match=message):
            export(tmp_path / "m", Transformer(config), random_params(config))
    bare = dataclasses.replace(TINY, family="llada_moe")
    with pytest.raises(
        ValueError, match="LLaDA-MoE is a mixture of experts, and the config has no"
    ):
        export(tmp_path / "m", Transformer(bare), random_params(bare))
    with pytest.raises(ValueError, match="given to export: tensor 'embed' has shape"):
        export(
            tmp_path / "m",
            Transformer(dataclasses.replace(TINY, vocab_size=41)),
            random_params(TINY),
        )
    with pytest.raises(ValueError, match="max_shard_bytes=0 must be positive"):
        export(tmp_path / "m", Transformer(TINY), random_params(TINY), max_shard_bytes=0)
    with pytest.raises(ValueError, match="export writes a local folder from one host, not gs://b"):
        export("gs://bucket/m", Transformer(TINY), random_params(TINY))
    assert not list(tmp_path.iterdir())  # nothing half-written is left
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="m exists; choose another folder"):
        export(tmp_path / "m", Transformer(TINY), random_params(TINY))


# Folders of ours


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_mixture_is_saved_and_restored(tmp_path: Path, dtype: str | None):
    save(tmp_path / "m", Transformer(MOE), random_params(MOE))
    facts = json.loads((tmp_path / "m" / "config.json").read_text())
    assert facts["architecture"] == "transformer"
    model, params = load(tmp_path / "m", dtype=dtype)
    assert model.config == in_dtype(MOE, dtype or "float32")
    wanted = param_shapes(model.config)
    assert params["layers"]["mlp"]["router_bias"].dtype == jnp.float32  # in any dtype of the rest
    assert_same(params, jax.tree.map(lambda x, s: x.astype(s.dtype), random_params(MOE), wanted))


def test_a_published_mixture_is_converted_to_another_dtype(tmp_path: Path):
    export(tmp_path / "theirs", Transformer(MOE), random_params(MOE))
    convert(tmp_path / "theirs", tmp_path / "ours", dtype="bfloat16")
    model, params = load(tmp_path / "ours")
    assert model.config == in_dtype(MOE, "bfloat16")
    assert params["layers"]["mlp"]["router"].dtype == jnp.float32
    np.testing.assert_array_equal(
        params["layers"]["mlp"]["router"], random_params(MOE)["layers"]["mlp"]["router"]
    )


def test_weights_in_bfloat16_beside_a_router_in_float32(tmp_path: Path):
    """As LLaDA2 is published: the router does not make the whole model float32."""
    config = in_dtype(MOE, "bfloat16")
    export(tmp_path / "m", Transformer(config), random_params(config))
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert stored["model.layers.1.mlp.gate.expert_bias"].dtype == np.float32
    assert stored["model.layers.1.mlp.up_proj.weight".replace("1", "0")].dtype == jnp.bfloat16
    assert load(tmp_path / "m")[0].config.param_dtype == "bfloat16"


def test_folders_saved_before_there_were_architectures(tmp_path: Path):
    save(tmp_path / "m", Transformer(TINY), random_params(TINY))
    file = tmp_path / "m" / "config.json"
    facts = json.loads(file.read_text())
    del facts["architecture"]
    for name in ("family", "rotary_dim", "moe"):
        del facts["config"][name]
    file.write_text(json.dumps(facts))
    model, params = load(tmp_path / "m")
    assert model.config == TINY
    assert_same(params, random_params(TINY))


def test_architectures_that_are_not_known(tmp_path: Path):
    save(tmp_path / "m", Transformer(MOE), random_params(MOE))
    file = tmp_path / "m" / "config.json"
    facts = json.loads(file.read_text())
    file.write_text(json.dumps({**facts, "architecture": "mamba"}))
    with pytest.raises(ValueError, match="has architecture 'mamba'; this dllm_jax knows transfor"):
        load(tmp_path / "m")
    facts["config"]["moe"]["groups"] = 3
    file.write_text(json.dumps(facts))
    with pytest.raises(
        ValueError, match=r"does not fit this dllm_jax \(num_experts=4 must be a mul"
    ):
        load(tmp_path / "m")


# Adapters of PEFT

LLADA = dataclasses.replace(
    TINY, family="llada", num_kv_heads=4, attention="bidirectional", alignment="same_position",
    mask_id=39,
)  # fmt: skip
DREAM = dataclasses.replace(
    TINY, family="Dream", qkv_bias=True, attention="bidirectional", mask_id=39
)
MODULES = {
    "llada": ["model.transformer.blocks.1.q_proj", "model.transformer.blocks.2.ff_out"],
    "Dream": ["model.layers.0.self_attn.v_proj", "model.layers.2.mlp.up_proj"],
    "llada2_moe": [
        "model.layers.0.attention.query_key_value",
        "model.layers.2.mlp.experts.3.up_proj",
    ],
}


def write_peft(folder: Path, tensors: dict[str, np.ndarray], modules: list[str], **changes) -> Path:
    """An adapter of rank 2 for some modules of a published model."""
    rng = np.random.default_rng(1)
    pairs = {}
    for module in modules:
        out, inner = tensors[f"{module}.weight"].shape
        pairs[f"base_model.model.{module}.lora_A.weight"] = rng.standard_normal(
            (2, inner), np.float32
        )
        pairs[f"base_model.model.{module}.lora_B.weight"] = rng.standard_normal(
            (out, 2), np.float32
        )
    folder.mkdir(exist_ok=True)
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "bias": "none", "modules_to_save": None}
    (folder / "adapter_config.json").write_text(json.dumps({**fields, **changes}))
    save_file(pairs, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("config", [LLADA, DREAM, MOE], ids=lambda c: c.family)
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_is_merged(tmp_path: Path, config: TransformerConfig, rslora: bool):
    export(tmp_path / "base", Transformer(config), random_params(config))
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    modules = MODULES[config.family]
    adapter = write_peft(tmp_path / "lora", tensors, modules, use_rslora=rslora)
    pairs = load_file(adapter / "adapter_model.safetensors")
    for module in modules:
        a, b = (pairs[f"base_model.model.{module}.lora_{half}.weight"] for half in "AB")
        tensors[f"{module}.weight"] += (3 / 2**0.5 if rslora else 3 / 2) * (b @ a)
    model, params = load(tmp_path / "base", adapter=adapter)
    assert model.config == config  # nothing of the adapter is left apart
    merged = published_tensors(config, params)
    for name, wanted in tensors.items():
        np.testing.assert_allclose(merged[name], wanted, rtol=1e-6, atol=1e-6)
        touched = name.removesuffix(".weight") in modules
        assert touched != np.array_equal(
            merged[name], published_tensors(config, random_params(config))[name]
        )


@pytest.mark.parametrize("config", [LLADA, DREAM], ids=lambda c: c.family)
def test_peft_beside_the_weights(tmp_path: Path, config: TransformerConfig):
    """Every projection, and the numbers of the merged model; the base is bit-equal to itself."""
    base = random_params(config)
    export(tmp_path / "base", Transformer(config), base)
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    modules = sorted(
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if tensor.ndim == 2 and re.search(r"\.(0|2)\.", name)
    )
    assert len(modules) == 14
    adapter = write_peft(tmp_path / "lora", tensors, modules)
    tokens = jnp.asarray([[5, 7, 39, 2, 39]])
    merged, params = load(tmp_path / "base", adapter=adapter)
    wanted = forward(merged, params, tokens).hidden
    model, params = load(tmp_path / "base", adapter=adapter, merge=False)
    own = params.pop("adapter")
    assert_same(params, base)
    apart = {**params, "adapter": own}
    np.testing.assert_allclose(forward(model, apart, tokens).hidden, wanted, atol=2e-5)
    plain = forward(Transformer(config), base, tokens).hidden
    assert np.abs(plain - wanted).max() > 0.1

    save(tmp_path / "ours", model, apart)
    again, restored = load(tmp_path / "ours")
    assert again.config == model.config
    assert_same(restored, apart)


def test_peft_that_cannot_stand_beside(tmp_path: Path):
    export(tmp_path / "base", Transformer(MOE), random_params(MOE))
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    adapter = write_peft(tmp_path / "lora", tensors, MODULES["llada2_moe"])
    with pytest.raises(ValueError, match="takes no adapter"):
        load(tmp_path / "base", adapter=adapter, merge=False)


def test_peft_in_bfloat16_is_rounded_once(tmp_path: Path):
    config = in_dtype(DREAM, "bfloat16")
    export(tmp_path / "base", Transformer(config), random_params(config))
    base = load_file(tmp_path / "base" / "model.safetensors")
    adapter = write_peft(tmp_path / "lora", base, MODULES["Dream"])
    _, wide = load(tmp_path / "base", adapter=adapter, dtype="float32")
    _, narrow = load(tmp_path / "base", adapter=adapter)
    assert_same(narrow, jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide))


def test_peft_that_does_not_fit(tmp_path: Path):
    export(tmp_path / "base", Transformer(DREAM), random_params(DREAM))
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    modules = MODULES["Dream"]

    def attempt(message: str, error=ValueError, **changes):
        adapter = write_peft(tmp_path / "lora", tensors, modules, **changes)
        with pytest.raises(error, match=message):
            load(tmp_path / "base", adapter=adapter)

    attempt("use_dora=True is not supported; only False is", use_dora=True)
    attempt("peft_type='IA3' is not supported", peft_type="IA3")
    attempt("rank_pattern={'q_proj': 4} is not supported", rank_pattern={"q_proj": 4})
    attempt(r"has no r or no lora_alpha", r=None)
    attempt("v_proj does not have its two matrices of rank 3", r=3)
    other = {
        **tensors,
        "model.layers.7.mlp.up_proj.weight": tensors["model.layers.2.mlp.up_proj.weight"],
    }
    adapter = write_peft(tmp_path / "lora", other, ["model.layers.7.mlp.up_proj"])
    with pytest.raises(
        ValueError, match=r"changes model\.layers\.7\.mlp\.up_proj.weight \[24, 16\]"
    ):
        load(tmp_path / "base", adapter=adapter)
    save(tmp_path / "ours", Transformer(DREAM), random_params(DREAM))
    with pytest.raises(ValueError, match=r"which belongs to a published folder; .*ours is no"):
        load(tmp_path / "ours", adapter=adapter)
    save_file(
        {"base_model.model.x.lora_magnitude": np.ones(2)}, adapter / "adapter_model.safetensors"
    )
    with pytest.raises(
        ValueError, match=r"'base_model\.model\.x\.lora_magnitude' is not a low-rank mat"
    ):
        load(tmp_path / "base", adapter=adapter)
    (adapter / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is truncated or damaged"):
        load(tmp_path / "base", adapter=adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"has no adapter_model\.safetensors; an adapter_model"
    ):
        load(tmp_path / "base", adapter=adapter)


def test_every_family_has_the_way_back():
    for name, family in registry.FAMILIES.items():
        for function in ("config_from_published", "config_to_published", "tensor_maps", "ignored"):
            assert callable(getattr(family, function)), (name, function)
