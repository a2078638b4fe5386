"""Long texts: positions that are stretched, prompts in chunks, caches of fewer bits."""

import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from dllm_jax.models.folders import _from_json, _to_json
from dllm_jax.models.registry import family
from dllm_jax.ops.rope import RopeScaling, rope_angles

# Positions

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "rope_theta": 500000.0,
    "pad_token_id": 0,
}


def planes(dim, theta, stretch):
    """Radians a position of each plane, `stretch(own, i)` of those of an unscaled one."""
    return [stretch(theta ** (-2 * i / dim), i) for i in range(dim // 2)]


def llama3(factor, low, high, length):
    """Llama 3.1's: by how often a wave fits into the first training's length."""

    def stretch(own, _):
        wave = 2 * math.pi / own
        if wave < length / high:
            return own
        if wave > length / low:
            return own / factor
        smooth = (length / wave - low) / (high - low)
        return (1 - smooth) * own / factor + smooth * own

    return stretch


def yarn(dim, theta, factor, length, fast=32, slow=1, truncate=True):
    """NTK-by-parts (YaRN, section 3.2), the ramp over planes as in the authors' code."""
    at = lambda turns: dim * math.log(length / (2 * math.pi * turns)) / (2 * math.log(theta))  # noqa: E731
    first, last = at(fast), at(slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)

    def stretch(own, i):
        ramp = min(max((i - first) / (last - first), 0.0), 1.0)
        return own / factor * ramp + own * (1 - ramp)

    return stretch


@pytest.mark.parametrize(
    ("said", "theta", "dim", "stretch", "magnitude", "reach"),
    [
        ({"type": "linear", "factor": 4.0}, 1e4, 64, lambda own, _: own / 4, 1.0, 4096),
        ({"rope_type": "dynamic", "factor": 4.0}, 1e4, 64, lambda own, _: own, 1.0, 4096),
        (
            {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 512,
            },
            5e5, 64, llama3(8, 1, 4, 512), 1.0, 4096,
        ),
        (
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
            1e6, 64, yarn(64, 1e6, 4, 4096), 0.1 * math.log(4) + 1, 16384,
        ),
        (
            {
                "rope_type": "yarn", "factor": 40.0, "beta_fast": 16, "beta_slow": 2,
                "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False,
                "original_max_position_embeddings": 128,
            },
            1e4, 64, yarn(64, 1e4, 40, 128, 16, 2, False),
            (0.1 * math.log(40) + 1) / (0.05 * math.log(40) + 1), 5120,
        ),
        (
            {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.5, "finetuned": True},
            1e4, 64, yarn(64, 1e4, 2, 4096), 1.5, 8192,
        ),
    ],
    ids=["linear", "dynamic", "llama3", "yarn", "yarn mscale", "yarn attention_factor"],
)  # fmt: skip
@pytest.mark.parametrize("newer", [False, True])
def test_scaled_positions_are_those_of_the_papers(
    said, theta, dim, stretch, magnitude, reach, newer
):
    """Read from config.json in its older and newer form, written back, and saved as ours."""
    fields = {**LLAMA, "rope_theta": theta, "rope_scaling": said}
    if newer:
        kind = said.get("type") or said["rope_type"]
        rest = {k: v for k, v in said.items() if k != "type"}
        fields |= {"rope_scaling": None, "rope_theta": None}
        fields["rope_parameters"] = {**rest, "rope_type": kind, "rope_theta": theta}
    reader = family(fields)
    config = reader.config_from_published(fields)
    assert config.max_length == reach
    positions = jnp.array([[0, 1, 77, 4000]])
    found = rope_angles(
        positions, dim, config.rope_theta, config.rope_scaling, config.max_length
    )  # fmt: skip
    angles = np.asarray(positions)[..., None] * np.array(planes(dim, theta, stretch))
    for got, want in zip(found, (np.cos(angles), np.sin(angles)), strict=True):
        np.testing.assert_allclose(got, magnitude * want, atol=1e-3)  # 4000 rad in float32
        np.testing.assert_allclose(got[:, :2], magnitude * want[:, :2], atol=1e-6)
    assert reader.config_from_published(reader.config_to_published(config)) == config
    saved = json.loads(json.dumps(_to_json(config)))
    assert _from_json(saved, epath.Path("config.json")) == config


def test_a_dynamic_scaling_is_that_of_the_longest_text():
    """transformers' base for a text of `max_length`, which a longer model is given."""
    fields = {**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    config = family(fields).config_from_published(fields)
    longer = dataclasses.replace(config, max_length=4 * 4096)
    base = longer.rope_theta * (2 * 4 - 1) ** (64 / 62)
    got = rope_angles(
        jnp.array([[5]]), 64, longer.rope_theta, longer.rope_scaling, longer.max_length
    )  # fmt: skip
    np.testing.assert_allclose(got, rope_angles(jnp.array([[5]]), 64, base), atol=1e-6)
    plain = rope_angles(jnp.array([[5]]), 64, config.rope_theta, config.rope_scaling, 4096)
    np.testing.assert_allclose(plain, rope_angles(jnp.array([[5]]), 64, 5e5), atol=1e-6)
    again = family(fields).config_from_published(family(fields).config_to_published(longer))
    assert again.rope_scaling == longer.rope_scaling
    assert again.max_length == 4096


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "'longrope', which is not suppor"),
        ({"rope_scaling": {"type": "linear"}}, "no factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor of at least 1"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 3}}, "beta_fast=3 in a Ro"),
        (
            {
                "rope_scaling": {
                    "type": "dynamic", "factor": 2, "original_max_position_embeddings": 512
                }
            },
            "a dynamic scaling has one length",
        ),
        (
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
            "sliding_attention in 1 of 2 layers",
        ),
        (
            {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64},
            "sliding_attention in 1 of 2 layers",
        ),
    ],
)  # fmt: skip
def test_what_a_config_asks_for_is_done_or_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        family(LLAMA).config_from_published({**LLAMA, **changes})


def test_a_window_that_reaches_no_layer_is_no_window():
    said = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}
    for fields in (said, {"layer_types": ["full_attention"] * 2, "sliding_window": 64}):
        family(LLAMA).config_from_published({**LLAMA, **fields})


def test_a_scaling_needs_numbers_that_fit():
    with pytest.raises(ValueError, match="'ntk' is none of linear"):
        RopeScaling(kind="ntk", factor=2.0)
    with pytest.raises(ValueError, match="needs the length of the first training"):
        RopeScaling(kind="yarn", factor=2.0)
    with pytest.raises(ValueError, match=r"high_factor=.* must exceed"):
        RopeScaling(kind="llama3", factor=2.0, original_length=8, low_factor=2.0, high_factor=2.0)
