"""BD3-LM: the published code's logits and loss, cached against whole, and its folders."""

import dataclasses
import json
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dllm_jax.cache import append, cut
from dllm_jax.checkpoint import export, load, save
from dllm_jax.models import bd3lm
from dllm_jax.nn import head
from dllm_jax.nn.dit import DiTConfig
from dllm_jax.nn.tree import param_axes, param_shapes
from pallas_kernels import BlockMask

CONFIG = DiTConfig(
    vocab_size=20, num_layers=2, dim=16, num_heads=2, cond_dim=8, max_length=32, block_size=4,
    mask_id=19, eos_ids=(1,),
)  # fmt: skip


def random_params(config, seed=0):
    """Numbers that are all of them felt: a fresh model's modulations are zero."""
    rng = np.random.default_rng(seed)
    draw = lambda s: 0.3 * rng.normal(size=s.shape) + (len(s.shape) == 1)  # noqa: E731
    return jax.tree.map(lambda s: jnp.asarray(draw(s), s.dtype), param_shapes(config))


PARAMS = random_params(CONFIG)
INV_FREQ = "backbone.rotary_emb.inv_freq"


@partial(jax.jit, static_argnums=0, static_argnames=("mask",))
def apply(config, params, tokens, **options):
    return config.build().apply({"params": params}, tokens, **options)


@partial(jax.jit, static_argnums=0)
def logits_of(config, params, hidden):
    return head.logits_of(config.build(), params, hidden)


def dual_stream(config, params, clean, noisy):
    """The scores of `noisy` [B, L], whose blocks see the blocks of `clean` before them."""
    length = clean.shape[1]
    both = jnp.asarray(np.concatenate([clean, noisy], axis=1), jnp.int32)
    at = jnp.broadcast_to(jnp.tile(jnp.arange(length), 2), both.shape)
    size = config.block_size
    mask = BlockMask.dual_stream(length, size, clean_block=size)
    out = apply(config, params, both, mask=mask, positions=at)
    return out, logits_of(config, params, out.hidden[:, length:])


# The published code


@cache
def golden(folder: Path):
    return load(folder)


def test_logits_match_the_published_code(goldens: Path):
    model, params = golden(goldens / "bd3lm")
    given = np.load(goldens / "bd3lm" / "inputs.npz")
    _, got = dual_stream(model.config, params, given["x0"], given["xt"])
    want = np.load(goldens / "bd3lm" / "outputs.npz")["logits"]
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)


def test_a_folder_of_ours(goldens: Path, tmp_path: Path):
    model, params = golden(goldens / "bd3lm")
    save(tmp_path / "ours", model, params)
    same, values = load(tmp_path / "ours")
    assert same.config == model.config
    jax.tree.map(np.testing.assert_array_equal, values, params)


def rewritten(goldens: Path, folder: Path, rename=str, drop=(), **changes) -> Path:
    """The published folder with other tensors."""
    folder.mkdir(exist_ok=True)
    stored = load_file(goldens / "bd3lm" / "model.safetensors") | changes
    kept = {rename(name): tensor for name, tensor in stored.items() if name not in drop}
    save_file(kept, folder / "model.safetensors")
    (folder / "config.json").write_text((goldens / "bd3lm" / "config.json").read_text())
    return folder


@pytest.mark.parametrize("drop", [(), (INV_FREQ, "sampling_eps_min", "sampling_eps_max")])
def test_the_authors_own_names_are_read(goldens: Path, tmp_path: Path, drop: tuple):
    """Theirs lack the "backbone."; exported, they are named as the Hugging Face models are."""
    model, params = golden(goldens / "bd3lm")
    bare = rewritten(goldens, tmp_path / "own", lambda n: n.removeprefix("backbone."), drop)
    same, values = load(bare)
    assert same.config == model.config
    jax.tree.map(np.testing.assert_array_equal, values, params)
    export(tmp_path / "theirs", same, values)
    back, published = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "theirs", goldens / "bd3lm")
    )
    assert back.keys() == published.keys()


def test_noise_levels_are_those_of_the_tensors(goldens: Path, tmp_path: Path):
    """Training moves them, and config.json stays behind."""
    learned = np.array(0.45, np.float32)
    model, params = load(rewritten(goldens, tmp_path / "moved", sampling_eps_min=learned))
    assert (model.config.noise_min, model.config.noise_max) == (float(learned), 0.999)
    export(tmp_path / "back", model, params)
    fields = json.loads((tmp_path / "back" / "config.json").read_text())
    assert fields["sampling_eps_min"] == float(learned)
    assert load_file(tmp_path / "back" / "model.safetensors")["sampling_eps_min"] == learned


def test_frequencies_of_another_model_are_refused(goldens: Path, tmp_path: Path):
    wrong = {INV_FREQ: np.full(8, 0.5, np.float32)}
    with pytest.raises(ValueError, match=r"'backbone.rotary_emb.inv_freq' is \[0.5 0.5 ... 0.5"):
        load(rewritten(goldens, tmp_path, **wrong))
    with pytest.raises(ValueError, match="belong to another model"):
        load(rewritten(goldens, tmp_path, **{INV_FREQ: np.ones(4, np.float32)}))


# Configs


def test_config_and_back(goldens: Path):
    fields = json.loads((goldens / "bd3lm" / "config.json").read_text())
    config = bd3lm.config_from_published(fields)
    assert (config.attention, config.alignment, config.block_size) == (
        "block_causal", "same_position", 4,
    )  # fmt: skip
    assert (config.mask_id, config.noise_min, config.noise_max) == (65, 1e-3, 0.999)
    for one in (config, CONFIG, dataclasses.replace(CONFIG, mask_id=3, noise_min=0.45)):
        assert bd3lm.config_from_published(bd3lm.config_to_published(one)) == one
    small = {**fields, "vocab_size": 50258, "n_blocks": 12, "hidden_dim": 768, "n_heads": 12}
    config = bd3lm.config_from_published({**small, "cond_dim": 128})
    assert (config.mask_id, config.eos_ids, config.pad_id) == (50257, (50256,), 50256)
    count = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(config)))
    assert round(count / 1e6) == 170  # the paper's models, with both embeddings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(time_conditioning=True), "time_conditioning=True; only False is supported"),
        (dict(causal=True), "causal=True; only False"),
        (dict(n_blocks=None), "no n_blocks"),
        (dict(n_heads=3), "num_heads=3 heads of an even size"),
    ],
)
def test_what_is_not_built_says_so(changes, message):
    fields = {**bd3lm.config_to_published(CONFIG), **changes}
    with pytest.raises(ValueError, match=message):
        bd3lm.config_from_published(fields)


# The model


def test_blocks_through_the_cache_equal_one_pass():
    """A ragged prefill of whole blocks, then block after block: noisy, then clean and cached."""
    rng, size, rows = np.random.default_rng(0), CONFIG.block_size, 2
    clean = rng.integers(0, 19, (rows, 16)).astype(np.int32)
    noisy = np.where(rng.random(clean.shape) < 0.5, CONFIG.mask_id, clean)
    whole, want = dual_stream(CONFIG, PARAMS, clean, noisy)
    lengths = np.array([8, 4])
    model = CONFIG.build()
    prompt = np.where(np.arange(8) < lengths[:, None], clean[:, :8], 7)
    out = apply(CONFIG, PARAMS, prompt, lengths=lengths)
    kept = append(model.cache(rows, 24), out.kv, jnp.asarray(lengths))
    step = BlockMask.dual_stream(size, size, stride=0, offset=0, clean_block=size)
    for _ in range(2):
        at = np.asarray(kept.lengths)[:, None] + np.arange(size)
        both = np.concatenate([np.take_along_axis(x, at, axis=1) for x in (clean, noisy)], axis=1)
        out = apply(
            CONFIG, PARAMS, both, mask=step, positions=np.tile(at, (1, 2)), cache=kept,
            lengths=np.full(rows, size),
        )  # fmt: skip
        scores = logits_of(CONFIG, PARAMS, out.hidden[:, size:])
        for row in range(rows):
            np.testing.assert_allclose(scores[row], want[row, at[row]], atol=2e-5)
            np.testing.assert_allclose(
                out.hidden[row, :size], whole.hidden[row, at[row]], atol=2e-5
            )
        kept = append(kept, cut(out.kv, 0, size), jnp.full(rows, size))
    with pytest.raises(ValueError, match="needs the `mask` of its blocks"):
        apply(CONFIG, PARAMS, clean[:, :4], cache=kept)


def test_remat_and_noise_level_zero_change_no_number():
    tokens = np.array([[3, 4, 19, 19, 5, 6, 7, 19]])
    plain = apply(CONFIG, PARAMS, tokens).hidden
    at = lambda level: apply(CONFIG, PARAMS, tokens, sigma=np.float32([level])).hidden  # noqa: E731
    np.testing.assert_array_equal(plain, at(0))
    assert not np.allclose(plain, at(1), atol=1e-3)

    @partial(jax.jit, static_argnums=1)
    @jax.grad
    def gradient(params, config):
        return jnp.square(apply(config, params, tokens).hidden).sum()

    grads = (gradient(PARAMS, dataclasses.replace(CONFIG, remat=on)) for on in (False, True))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), *grads)


def test_a_fresh_model_is_the_identity_between_embedding_and_head():
    tokens = jnp.array([[3, 4, 5, 6]])
    params = jax.jit(CONFIG.build().init)(jax.random.key(0), tokens)["params"]
    assert jax.tree.structure(params) == jax.tree.structure(param_shapes(CONFIG))
    jax.tree.map(lambda p, a: None, params, param_axes(CONFIG))
    x = params["embed"][tokens]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + CONFIG.norm_eps)
    np.testing.assert_allclose(apply(CONFIG, params, tokens).hidden, x, atol=1e-5)
