"""DiffusionGemma: the published code's logits, a canvas beside its context, and its folders."""

import dataclasses
import json
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from dllm_jax.cache import append, cut
from dllm_jax.checkpoint import load, save
from dllm_jax.corruption import NoisyText, UniformNoise
from dllm_jax.losses import Diffusion
from dllm_jax.models import diffusion_gemma
from dllm_jax.models.export import published_tensors
from dllm_jax.nn import gemma
from dllm_jax.nn.gemma import GemmaConfig
from dllm_jax.nn.head import logits_of
from dllm_jax.nn.tree import param_axes, param_shapes
from pallas_kernels import BlockMask

CONFIG = GemmaConfig(
    vocab_size=24, dim=16, num_heads=2, ffn_dim=24, num_experts=4, experts_per_token=2,
    expert_dim=12, layer_types=("sliding", "full"), head_dim=8, num_kv_heads=2, window=4,
    full_head_dim=16, full_num_kv_heads=1, canvas_length=4, max_length=64, eos_ids=(1, 5),
)  # fmt: skip


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda s: 0.3 * rng.normal(size=s.shape) + (len(s.shape) < 3)  # noqa: E731
    return jax.tree.map(lambda s: jnp.asarray(draw(s), s.dtype), param_shapes(config))


PARAMS = random_params(CONFIG)


@partial(jax.jit, static_argnums=0, static_argnames=("mask",))
def apply(config, params, tokens, **options):
    return config.build().apply({"params": params}, tokens, **options)


@partial(jax.jit, static_argnums=0)
def soft_embed(config, params, probs):
    mean = probs @ params["embed"]
    return config.build().apply({"params": params}, mean, method="soft_embed")


# The published code


@cache
def golden(folder: Path):
    return load(folder)


def test_logits_match_the_published_code(goldens: Path):
    """A prompt longer than the window, and two steps of a canvas behind it."""
    model, params = golden(goldens / "diffusion_gemma")
    given, want = (
        dict(np.load(goldens / "diffusion_gemma" / f"{name}.npz")) for name in ("inputs", "outputs")
    )
    prompt, canvas = (given[name].astype(np.int32) for name in ("prompt", "canvas"))
    rows, length = prompt.shape
    assert length > model.config.window
    run = partial(apply, model.config, params)
    kept = append(model.cache(rows, 40), run(prompt).kv, jnp.full(rows, length))
    alone = partial(run, canvas, mask=BlockMask.block_diagonal(canvas.shape[1]), cache=kept)
    # The second step is conditioned on the published scores of the first: a soft embedding is
    # normed, and the rounding of our own would be magnified.
    probs = jax.nn.softmax(want["logits_step1"])
    carry = soft_embed(model.config, params, probs)
    for out, name in (
        (alone(), "logits_step1"),
        (alone(carry=carry), "logits_step2_self_conditioned"),
    ):
        got = logits_of(model, params, out.hidden)
        np.testing.assert_allclose(got, want[name], atol=1e-4, rtol=0)


def test_a_folder_of_ours(goldens: Path, tmp_path: Path):
    model, params = golden(goldens / "diffusion_gemma")
    save(tmp_path / "ours", model, params)
    same, values = load(tmp_path / "ours")
    assert same.config == model.config
    jax.tree.map(np.testing.assert_array_equal, values, params)


def test_pictures_and_copies_are_skipped(tmp_path: Path):
    (tmp_path / "config.json").write_text(
        json.dumps(diffusion_gemma.config_to_published(CONFIG), indent=1)
    )
    tensors = published_tensors(CONFIG, PARAMS)
    text = "model.encoder.language_model."
    tensors |= {
        "lm_head.weight": tensors["model.decoder.embed_tokens.weight"].copy(),
        text + "norm.weight": tensors["model.decoder.norm.weight"].copy(),
        text + "layers.0.router.scale": np.ones(16, np.float32),
        "model.encoder.vision_tower.encoder.layers.0.mlp.up_proj.linear.weight": np.ones((2, 2)),
        "model.encoder.embed_vision.embedding_projection.weight": np.ones((2, 2)),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    model, params = load(tmp_path)
    assert model.config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)


# Configs


def test_config_and_back(goldens: Path):
    fields = json.loads((goldens / "diffusion_gemma" / "config.json").read_text())
    config = diffusion_gemma.config_from_published(fields)
    assert (config.attention, config.alignment, config.has_mask) == (
        "causal", "same_position", False,
    )  # fmt: skip
    assert (config.canvas_length, config.window, config.eos_ids) == (16, 16, (1,))
    assert config.layer_types == ("sliding",) * 5 + ("full",)
    assert config.heads("sliding") == (2, 16)
    assert config.heads("full") == (1, 32)
    for one in (config, CONFIG, dataclasses.replace(CONFIG, full_rotary_share=0.5, soft_cap=20.0)):
        published = diffusion_gemma.config_to_published(one)
        assert diffusion_gemma.config_from_published(json.loads(json.dumps(published))) == one


def test_what_an_older_config_leaves_out():
    text = diffusion_gemma.config_to_published(CONFIG)["text_config"]
    for name in ("per_layer_config", "rope_parameters", "layer_types"):
        del text[name]
    fields = {"text_config": {**text, "num_hidden_layers": 8, "num_global_key_value_heads": 1}}
    config = diffusion_gemma.config_from_published(fields)
    assert config.layer_types == ("sliding",) * 5 + ("full", "sliding", "full")
    assert config.heads("full") == (1, 512)
    assert (config.rope_theta, config.full_rope_theta, config.full_rotary_share) == (1e4, 1e6, 0.25)
    assert config.canvas_length == 256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(attention_bias=True), "attention_bias=True; only False"),
        (dict(use_bidirectional_attention="all"), "only causal text"),
        (dict(hidden_activation="silu"), "hidden_activation='silu'"),
        (dict(layer_types=["chunked_attention", "full_attention"]), "layer_types="),
        (dict(num_experts=None), "no num_experts"),
        (
            dict(layer_types=["full_attention"] * 2, per_layer_config={"0": {"head_dim": 4}}),
            "full_attention layers of several shapes",
        ),
    ],
)
def test_what_is_not_built_says_so(changes, message):
    fields = diffusion_gemma.config_to_published(CONFIG)
    fields["text_config"] |= changes
    with pytest.raises(ValueError, match=message):
        diffusion_gemma.config_from_published(fields)


# The model


def test_a_finished_canvas_beside_the_next_one():
    """Ragged rows: clean text, cached in one pass or beside a canvas, gives one and the same."""
    rng, size = np.random.default_rng(0), CONFIG.canvas_length
    tokens = rng.integers(2, 24, (2, 20)).astype(np.int32)
    lengths, fresh = np.array([9, 5]), np.array([4, 3])  # cached, and finished since
    model, run = CONFIG.build(), partial(apply, CONFIG, PARAMS)
    prompt = np.where(np.arange(9) < lengths[:, None], tokens[:, :9], 3)
    carry = rng.normal(size=(2, size, 16)).astype(np.float32)
    out = run(prompt, lengths=lengths)
    kept = append(model.cache(2, 32), out.kv, jnp.asarray(lengths))
    at = np.concatenate([x[:, None] + np.arange(size) for x in (lengths, lengths + fresh)], axis=1)
    both = run(
        np.take_along_axis(tokens, at, axis=1), positions=at, cache=kept, lengths=fresh,
        mask=BlockMask.dual_stream(size, size, stride=0, offset=size), carry=carry,
    )  # fmt: skip
    kept = append(kept, cut(both.kv, 0, size), jnp.asarray(fresh))
    behind = run(
        np.take_along_axis(tokens, at[:, size:], axis=1), cache=kept, carry=carry,
        mask=BlockMask.block_diagonal(size),
    )  # fmt: skip
    np.testing.assert_allclose(both.hidden[:, size:], behind.hidden, atol=2e-5)
    ends, width = lengths + fresh, 13
    index = np.concatenate([np.tile(np.arange(width), (2, 1)), at[:, size:]], axis=1)
    whole = run(
        np.take_along_axis(tokens, index, axis=1), positions=index, carry=carry, lengths=ends,
        mask=BlockMask.dual_stream(width, size, stride=0, offset=width),
    )  # fmt: skip
    np.testing.assert_allclose(behind.hidden, whole.hidden[:, width:], atol=2e-5)
    for row, (start, end) in enumerate(zip(lengths, ends, strict=True)):
        np.testing.assert_allclose(
            both.hidden[row, : end - start], whole.hidden[row, start:end], atol=2e-5
        )
        for stored, own in zip(kept.kv, whole.kv, strict=True):
            np.testing.assert_allclose(stored[:, row, :, :end], own[:, row, :, :end], atol=2e-5)
    alone = run(tokens[:1, :9])  # of the first row, without padding or neighbours
    np.testing.assert_allclose(alone.hidden[0], whole.hidden[0, :9], atol=2e-5)


def test_a_canvas_without_a_signal_has_none():
    """The first step: nothing expected is zeros expected, to the bit, and text feels no signal."""
    tokens = np.random.default_rng(0).integers(2, 24, (1, 10)).astype(np.int32)
    run = partial(
        apply, CONFIG, PARAMS, tokens, mask=BlockMask.dual_stream(6, 4, stride=0, offset=6)
    )
    none, zeros = run().hidden, run(carry=np.zeros((1, 4, 16), np.float32)).hidden
    np.testing.assert_array_equal(none, zeros)
    sure = jax.nn.one_hot(tokens[:, 6:], 24)
    carry = soft_embed(CONFIG, PARAMS, sure)
    np.testing.assert_allclose(carry, 4 * PARAMS["embed"][tokens[:, 6:]], rtol=1e-6)
    told = run(carry=carry).hidden
    np.testing.assert_array_equal(none[:, :6], told[:, :6])
    assert not np.allclose(none[:, 6:], told[:, 6:], atol=1e-2)
    logits = logits_of(CONFIG.build(), PARAMS, 100 * told)
    assert 29 < np.abs(logits).max() <= 30


@pytest.mark.parametrize("types", ["sfsssfss", "ss"])
def test_scans_are_the_layers_in_their_order(types):
    """Two periods of three runs, and one kind alone, against the layers one by one."""
    kinds = {"s": "sliding", "f": "full"}
    config = dataclasses.replace(CONFIG, layer_types=tuple(kinds[c] for c in types))
    params = random_params(config, seed=1)
    tokens = jnp.asarray(np.random.default_rng(0).integers(2, 24, (1, 7)))
    got = apply(config, params, tokens)
    mask, positions = BlockMask.causal(7), jnp.arange(7)[None]
    angles = {kind: gemma._angles(config, kind, positions) for kind in config.kinds}
    context = gemma._Context(config, mask, angles, None, None, None, None)
    layer = {kind: jax.jit(partial(gemma._layer, context, kind)) for kind in config.kinds}
    hidden, seen, kv = gemma._embed(params, config, tokens), dict.fromkeys(config.kinds, 0), {}
    for kind in config.layer_types:
        hidden, own = layer[kind](params["layers"][kind], hidden, jnp.int32(seen[kind]))
        kv.setdefault(kind, []).append(own)
        seen[kind] += 1
    hidden = gemma.rms_norm(hidden, params["final_norm"], config.norm_eps)
    np.testing.assert_allclose(got.hidden, hidden, atol=1e-5)
    for stacked, kind in zip(got.kv, config.kinds, strict=True):
        np.testing.assert_allclose(stacked, jnp.stack(kv[kind]), atol=1e-5)


@pytest.mark.slow
def test_remat_changes_no_gradient():
    tokens = np.array([[3, 4, 5, 6]])

    @partial(jax.jit, static_argnums=1)
    @jax.grad
    def gradient(params, config):
        return jnp.square(apply(config, params, tokens).hidden).sum()

    grads = (gradient(PARAMS, dataclasses.replace(CONFIG, remat=on)) for on in (False, True))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), *grads)


def test_a_fresh_model_fits_its_tree():
    model = dataclasses.replace(CONFIG, dtype="bfloat16").build()
    tokens = jnp.zeros((1, 2), jnp.int32)
    fresh = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    assert fresh == param_shapes(CONFIG)
    jax.tree.map(lambda p, a: None, fresh, param_axes(CONFIG))
    assert apply.eval_shape(model.config, fresh, tokens).hidden.dtype == jnp.bfloat16
    scales = gemma._init(jax.random.key(0), {"expert_scale": jax.ShapeDtypeStruct((2, 4), "f4")})
    assert (scales["expert_scale"] == 1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(layer_types=("sliding", "wide")), "must be of sliding, full"),
        (dict(num_kv_heads=3), "must be a multiple of 3"),
        (dict(window=0), "a token sees itself"),
    ],
)
def test_bad_configurations_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


# Training


def told_rows():
    """The objective's loss, and a canvas read once, and one twice, by the steps of decoding."""
    model, size, prompt = CONFIG.build(), CONFIG.canvas_length, 3
    draw = np.random.default_rng(1)
    tokens, noise = draw.integers(6, 24, (2, prompt + size)), draw.integers(6, 24, (2, size))
    weights = jnp.asarray(draw.uniform(0.5, 1.0, (2, size)), jnp.float32)
    tokens, noise = jnp.asarray(tokens, jnp.int32), jnp.asarray(noise, jnp.int32)

    def reference(params, before):
        """The first read by parameters of their own, which have no part in the gradient."""
        nats = []
        for row, twice in (0, True), (1, False):

            def run(params, row=row, **options):
                clean = apply(CONFIG, params, tokens[row : row + 1, :prompt]).kv
                kept = append(model.cache(1, 16), clean, jnp.full(1, prompt))
                mask = BlockMask.block_diagonal(size)
                out = apply(CONFIG, params, noise[row : row + 1], mask=mask, cache=kept, **options)
                return logits_of(model, params, out.hidden)

            carry = {}
            if twice:
                carry = dict(carry=soft_embed(CONFIG, before, jax.nn.softmax(run(before))))
            logs = jax.nn.log_softmax(run(params, **carry)[0])
            nats.append(-jnp.take_along_axis(logs, tokens[row, prompt:, None], axis=-1)[:, 0])
        return (weights * jnp.stack(nats)).sum() / (2 * size)

    objective = Diffusion(
        noise=UniformNoise(block_size=size, weighting="flat"), divide="learnt",
        self_conditioning=0.5,
    )  # fmt: skip
    behind = lambda x: jnp.pad(x, ((0, 0), (0, size)))[:, None]  # noqa: E731  # no text is there
    noisy = NoisyText(behind(noise), jnp.full((2, 1, 2 * size), 0.5), behind(weights))
    batch = {
        "tokens": tokens, "prompts": jnp.full(2, prompt), "lengths": jnp.full(2, prompt + size)
    }  # fmt: skip

    def loss(params, told=(True, False)):
        drawn = objective.given(model, batch, noisy, jnp.array(told))
        return objective.score(model, params, drawn)[0]

    return loss, reference


def test_a_row_is_told_what_a_first_read_expects():
    loss, reference = told_rows()
    found = loss(PARAMS)
    np.testing.assert_allclose(found, reference(PARAMS, PARAMS), rtol=1e-5)
    assert abs(loss(PARAMS, (False, False)) - found) > 1e-3 * abs(found)


@pytest.mark.slow
def test_what_a_first_read_expects_has_no_gradient():
    loss, reference = told_rows()
    slopes = jax.jit(jax.grad(loss))(PARAMS)
    wanted = jax.jit(jax.grad(reference))(PARAMS, PARAMS)
    through = jax.jit(jax.grad(lambda params: reference(params, params)))(PARAMS)
    same = partial(jax.tree.map, partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6))
    same(slopes, wanted)
    with pytest.raises(AssertionError):  # a gradient through the first read would be another
        same(through, wanted)
