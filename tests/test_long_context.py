"""Long texts: positions that are stretched, prompts in chunks, caches of fewer bits."""

import dataclasses
import json
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.extend.core import ClosedJaxpr, Jaxpr

from dllm_jax import recipes
from dllm_jax.cache import _ROOM, allocate, append, cut
from dllm_jax.decode.generate import Prompt, _generate, _start, generate, infill, pad, stream
from dllm_jax.decode.prefill import CHUNK
from dllm_jax.decode.prompt import edge
from dllm_jax.models.folders import _from_json, _to_json
from dllm_jax.models.registry import family
from dllm_jax.nn.dit import DiTConfig
from dllm_jax.nn.gemma import GemmaConfig
from dllm_jax.nn.head import logits_of
from dllm_jax.nn.transformer import TransformerConfig, forward
from dllm_jax.nn.tree import param_shapes
from dllm_jax.ops.rope import RopeScaling, rope_angles
from dllm_jax.policies import Guidance
from dllm_jax.testing import tiny
from dllm_jax.testing.aot import compile_for, temporary_bytes
from pallas_kernels.block_attention.quantised import dequantise

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
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5 in its rope_parameters",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5; only 1.0"),
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


def test_a_field_that_says_nothing_is_fine():
    scaling = {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": None}
    config = family(LLAMA).config_from_published({**LLAMA, "rope_scaling": scaling})
    assert config.rope_scaling == RopeScaling(kind="linear", factor=2.0)


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


# Prompts in chunks

WINDOWED = GemmaConfig(
    vocab_size=24, dim=16, num_heads=2, ffn_dim=24, num_experts=4, experts_per_token=2,
    expert_dim=12, layer_types=("sliding", "full"), head_dim=8, num_kv_heads=2, window=4,
    full_head_dim=16, full_num_kv_heads=1, canvas_length=4, max_length=64, eos_ids=(1, 5),
)  # fmt: skip
DIT = DiTConfig(
    vocab_size=20, num_layers=2, dim=16, num_heads=2, cond_dim=8, max_length=64, block_size=4,
    mask_id=19, eos_ids=(1,),
)  # fmt: skip
IN_PLACE = {"attention": "block_causal", "block_size": 4, "alignment": "same_position"}
SHIFTED = {"attention": "block_causal", "block_size": 8}
CASES = {
    "ar": (tiny, recipes.ar(), 7),
    "self_speculative": (tiny, recipes.self_speculative(width=2), 8),
    "sliding": (tiny, recipes.block_diffusion(block_size=4, threshold=0.6), 8),
    "sdar": (partial(tiny, **IN_PLACE), recipes.sdar(block_size=4), 6),
    "fast_dllm_v2": (partial(tiny, **SHIFTED), recipes.fast_dllm_v2(block_size=8), 8),
    "bd3lm": (lambda: random_model(DIT, axes=1), recipes.bd3lm(block_size=4), 12),
    "windows": (lambda: random_model(WINDOWED), recipes.diffusion_gemma(canvas=4, steps=4), 8),
}

QUICK = ("sdar", "windows")


def random_model(config, axes=2):
    """Numbers that are all of them felt: a fresh model's modulations are zero.

    Those of at most so many `axes`, norms among them, lie about one.
    """
    rng = np.random.default_rng(0)
    draw = lambda s: 0.3 * rng.normal(size=s.shape) + (len(s.shape) <= axes)  # noqa: E731
    shapes = param_shapes(config)
    return config.build(), jax.tree.map(lambda s: jnp.asarray(draw(s), s.dtype), shapes)


def rows(*lengths, seed=0):
    """Prompts that end in different chunks, in a buffer of 32."""
    rng = np.random.default_rng(seed)
    return pad([rng.integers(6, 19, length).tolist() for length in lengths], bucket=16)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in CASES]
)
def test_a_prompt_in_chunks_is_the_prompt(name):
    """The state behind the prefill: what is cached, written and drafted, of rows that end in the
    first chunk, at the end of one, in the middle and in the last.
    """
    make, recipe, chunk = CASES[name]
    model, params = make()

    def first(asked):
        return next(stream(
            model, params, rows(3, 8, 18, 30), recipe=recipe, max_new_tokens=9,
            key=jax.random.key(0), prefill_chunk=asked,
        ))  # fmt: skip

    whole, found = first(0), first(chunk)
    lengths = np.asarray(whole.cache.lengths)
    kept = np.arange(whole.cache.slots) < lengths[:, None]  # [B, S]
    for got, want in zip(*(jax.tree.leaves(x.cache.kv) for x in (found, whole)), strict=True):
        got, want = (jnp.where(kept[None, :, None, :, None], x, 0) for x in (got, want))
        np.testing.assert_allclose(got, want, atol=1e-5)
    for field in ("tokens", "open", "drafts", "written", "start", "stop", "nfe", "queries"):
        np.testing.assert_array_equal(getattr(found, field), getattr(whole, field))
    np.testing.assert_array_equal(found.cache.lengths, lengths)
    for field in ("logprobs", "carry"):
        np.testing.assert_allclose(getattr(found, field), getattr(whole, field), atol=1e-5)
    if len(found.last):
        np.testing.assert_allclose(found.last[lengths > 0], whole.last[lengths > 0], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_an_answer_to_a_prompt_in_chunks_is_the_answer(name):
    make, recipe, chunk = CASES[name]
    model, params = make()
    ask = partial(
        generate, model, params, rows(3, 8, 18, 30), recipe=recipe, max_new_tokens=9,
        key=jax.random.key(0),
    )  # fmt: skip
    whole, found = ask(prefill_chunk=0), ask(prefill_chunk=chunk)
    np.testing.assert_array_equal(found.tokens, whole.tokens)
    np.testing.assert_allclose(found.logprobs, whole.logprobs, atol=1e-5)
    for field in ("lengths", "stop", "nfe", "queries"):
        np.testing.assert_array_equal(getattr(found, field), getattr(whole, field))


@pytest.mark.slow
def test_what_is_filled_in_may_lie_behind_a_long_text():
    model, params = tiny(**IN_PLACE)
    given = [[*row[:-6], None, None, *row[-4:]] for row in (list(range(6, 31)), [7] * 12)]
    ask = partial(infill, model, params, given, recipe=recipes.sdar(block_size=4))
    whole, found = ask(prefill_chunk=0), ask(prefill_chunk=8)
    np.testing.assert_array_equal(found.tokens, whole.tokens)
    np.testing.assert_allclose(found.logprobs, whole.logprobs, atol=1e-5)


@pytest.mark.slow
def test_guidance_takes_a_prompt_in_chunks():
    """Rows twice, those without the prompt behind."""
    model, params = tiny(**IN_PLACE)
    recipe = dataclasses.replace(recipes.sdar(block_size=4), guidance=Guidance(1.5))
    ask = partial(generate, model, params, rows(3, 18), recipe=recipe, max_new_tokens=6)
    whole, found = ask(prefill_chunk=0), ask(prefill_chunk=8)
    np.testing.assert_array_equal(found.tokens, whole.tokens)


def test_chunks_are_those_that_the_call_can_have():
    model, _ = tiny()

    def size(prompt, config, recipe, asked):
        return edge(config.build(), prompt, recipe, 4, None, asked).memory.chunk

    longest = dataclasses.replace(model.config, max_length=1 << 17)
    long = pad([[7] * (CHUNK + 1)])
    assert size(long, longest, recipes.ar(), None) == CHUNK
    assert size(long, longest, recipes.ar(), 0) == 0
    assert size(rows(30), longest, recipes.ar(), None) == 0
    assert size(rows(30), longest, recipes.ar(), 32) == 0  # one piece: the program of no chunks
    blocks = dataclasses.replace(longest, **{**IN_PLACE, "block_size": 12})
    assert size(long, blocks, recipes.sdar(block_size=12), None) == 4104
    bidirectional = dataclasses.replace(longest, attention="bidirectional")
    assert size(long, bidirectional, recipes.dream(), None) == 0
    with pytest.raises(ValueError, match="all of the prompt sees all of it"):
        size(long, bidirectional, recipes.dream(), 64)
    with pytest.raises(ValueError, match="prefill_chunk=-1 must be a number of tokens"):
        size(long, longest, recipes.ar(), -1)


# Caches of fewer bits


def test_the_first_append_of_a_row_sets_its_scales():
    """From what it keeps; a block that is written before it counts is kept whole."""
    draw = lambda key, scale: scale * jax.random.normal(jax.random.key(key), (2, 3, 2, 4, 6))  # noqa: E731
    first, later = draw(0, 1.0), draw(1, 4.0)
    first = first.at[:, 0, :, 2:].set(1e3)  # behind the count of row 0
    step = jax.jit(append)
    cache = step(allocate(2, 3, 2, 12, 3, "int8"), first, jnp.array([2, 4, 0]))
    halves = np.abs(first).reshape(2, 3, 2, 4, 2, 3).max(axis=5)
    counted = np.arange(4) < np.array([2, 4, 4])[:, None]
    most = np.where(counted[None, :, None, :, None], halves, 0).max(axis=3)
    np.testing.assert_allclose(cache.scale, _ROOM * most / 127, rtol=1e-6)
    stored = dequantise(cache.kv, cache.scale)
    half = np.repeat(np.asarray(cache.scale), 3, axis=-1)[..., None, :] / 2
    for row, count in enumerate((2, 4, 4)):
        error = np.abs(stored[:, row, :, :count] - first[:, row, :, :count])
        assert (error <= 1.001 * half[:, row]).all()
    after = step(cache, later, jnp.array([3, 1, 1]))
    np.testing.assert_array_equal(after.scale[:, :2], cache.scale[:, :2])  # later ones are clipped
    limit = 127 * half[:, 0] * 2
    want = np.clip(later[:, 0, :, :3], -limit, limit)
    got = dequantise(after.kv, after.scale)[:, 0, :, 2:5]
    np.testing.assert_allclose(got, want, atol=1.001 * half[:, 0].max())
    assert (np.abs(later[:, 0, :, :3]) > limit).any()
    assert (after.scale[:, 2] != cache.scale[:, 2]).all()  # row 2 was still empty


LARGEST = {"float32": 1e-4, "bfloat16": 0.02, "int8": 0.05}  # of a log-probability
ALIKE = {"float32": 1.0, "bfloat16": 1.0, "int8": 0.9}  # of the tokens; random weights


@pytest.mark.parametrize("family", ["transformer", pytest.param("gemma", marks=pytest.mark.slow)])
def test_what_a_cache_of_fewer_bits_costs(family):
    """Log-probabilities behind a cached text against those of one whole pass in float32."""
    model, params = tiny(sharpness=4.0) if family == "transformer" else random_model(WINDOWED)
    text = jnp.asarray(np.random.default_rng(0).integers(6, 19, (3, 32)))
    lengths = jnp.array([25, 9, 17])
    at = lengths[:, None] + jnp.arange(7)

    @jax.jit
    def said(params):
        whole = forward(model, params, text, canvas=False)
        rest = jnp.take_along_axis(text, at, axis=1)
        hidden = [jnp.take_along_axis(whole.hidden, at[..., None], axis=1)]
        for dtype in LARGEST:
            kept = append(model.cache(3, 32, dtype), cut(whole.kv, 0, 25), lengths)
            hidden.append(forward(model, params, rest, cache=kept, canvas=False).hidden)
        return [jax.nn.log_softmax(logits_of(model, params, x)) for x in hidden]

    want, *found = said(params)
    errors = [float(jnp.abs(got - want).max()) for got in found]
    assert errors == sorted(errors)
    for dtype, error, got in zip(LARGEST, errors, found, strict=True):
        assert error < LARGEST[dtype], errors
        assert (got.argmax(-1) == want.argmax(-1)).mean() >= ALIKE[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdar", "dual"])
def test_rows_of_an_int8_cache_are_as_alone(name):
    """A row's scales are its own: of its prompt's first chunk, or of each pass over its canvas."""
    recipe = recipes.fast_dllm_dual(block_size=4) if name == "dual" else recipes.sdar(block_size=4)
    more = {**IN_PLACE, "attention": "bidirectional"} if name == "dual" else IN_PLACE
    model, params = tiny(**more)
    texts = [[7, 8, 9], list(range(6, 29)), [11] * 8]
    ask = partial(generate, model, params, recipe=recipe, max_new_tokens=8, cache_dtype="int8")
    chunk = {} if name == "dual" else {"prefill_chunk": 8}
    together = ask(texts, **chunk)
    for row, text in enumerate(texts):
        alone = ask([text], **chunk)
        np.testing.assert_array_equal(together.tokens[row], alone.tokens[0])
        np.testing.assert_allclose(together.logprobs[row], alone.logprobs[0], atol=1e-5)


def test_a_dtype_that_no_cache_has():
    model, params = tiny()
    with pytest.raises(ValueError, match="cache_dtype='int4' is none of float32, bfloat16"):
        generate(model, params, [[3]], recipe=recipes.ar(), cache_dtype="int4")


# Prompts that several rows share

SHARED = {
    "ar": recipes.ar(temperature=0.9),
    "self_speculative": recipes.self_speculative(width=2, temperature=0.9),
    "sliding": recipes.block_diffusion(block_size=4, threshold=0.3, temperature=0.9),
    "sdar": recipes.sdar(block_size=4, temperature=0.9),
    "fast_dllm_v2": recipes.fast_dllm_v2(block_size=8, temperature=0.9),
    "bd3lm": recipes.bd3lm(block_size=4),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "ar")) for name in SHARED]
)
def test_answers_to_a_shared_prompt_are_those_of_rows_of_their_own(name):
    """Prompts shorter than a block, at the end of one, and long; each row with its key."""
    model, params = CASES.get(name, CASES["self_speculative"])[0]()
    keys = jax.random.split(jax.random.key(0), 9)
    prompt = rows(3, 8, 30)
    each = Prompt(*(jnp.repeat(x, 3, axis=0) for x in prompt[:2]))
    ask = partial(generate, model, params, recipe=SHARED[name], max_new_tokens=9, key=keys)
    shared, alone = ask(prompt, samples=3, prefill_chunk=8), ask(each)
    np.testing.assert_array_equal(shared.tokens, alone.tokens)
    np.testing.assert_allclose(shared.logprobs, alone.logprobs, atol=1e-5)
    for field in ("lengths", "stop", "nfe", "queries"):
        np.testing.assert_array_equal(getattr(shared, field), getattr(alone, field))
    assert len(np.unique(shared.tokens, axis=0)) > 3


def test_a_shared_prompt_is_stored_once():
    model, params = tiny()
    ask = partial(
        stream, model, params, rows(30, 17), recipe=recipes.ar(), max_new_tokens=9, samples=8
    )

    def made(**more):
        cache = next(ask(**more)).cache
        return cache.prefix.kv, cache.kv

    prefix, own = jax.eval_shape(made)
    assert prefix.shape == (2, 2, 2, 32, 16)
    assert own.shape == (2, 16, 2, 96, 16)  # a bucket of 64 for the answer, and one entry
    assert {x.dtype.name for x in jax.eval_shape(partial(made, cache_dtype="int8"))} == {"int8"}


@pytest.mark.slow
def test_a_shared_prompt_in_int8_has_the_scales_of_its_own():
    model, params = tiny()
    ask = partial(
        generate, model, params, recipe=recipes.ar(temperature=1.0), max_new_tokens=9,
        key=jax.random.key(0), cache_dtype="int8",
    )  # fmt: skip
    alone = ask([[7, 8, 9, 10]] * 3)
    np.testing.assert_array_equal(ask([[7, 8, 9, 10]], samples=3).tokens, alone.tokens)


@pytest.mark.parametrize(
    ("more", "recipe", "samples", "message"),
    [
        ({}, recipes.ar(), 0, "samples=0 must be a whole number, at least 1"),
        (
            {"attention": "bidirectional"}, recipes.dream(), 2,
            "the prompt is read again with each canvas",
        ),
        (
            {"attention": "block_causal", "alignment": "same_position"},
            dataclasses.replace(
                recipes.sdar(block_size=4), guidance=Guidance(1.5, keep=jnp.ones((1, 1), bool))
            ),
            2, "guidance keeps other positions in each row",
        ),
    ],
)  # fmt: skip
def test_what_cannot_share_a_prompt_says_so(more, recipe, samples, message):
    model, params = tiny(**more)
    with pytest.raises(ValueError, match=message):
        generate(model, params, [[3]], recipe=recipe, samples=samples)


def test_layers_with_windows_share_no_prompt():
    model, params = random_model(WINDOWED)
    recipe = recipes.diffusion_gemma(canvas=4)
    with pytest.raises(ValueError, match="layers with a window read no shared prompt"):
        generate(
            model, params, [[3]], recipe=recipe, samples=2, key=jax.random.key(0), max_new_tokens=8
        )


# What a program of a long text holds


def arrays(jaxpr):
    """The shapes of all that a program makes, in its loops and branches too."""
    for equation in jaxpr.eqns:
        yield from (out.aval.shape for out in equation.outvars)
        for value in jax.tree.leaves(
            equation.params, is_leaf=lambda x: isinstance(x, (ClosedJaxpr, Jaxpr))
        ):
            if isinstance(value, (ClosedJaxpr, Jaxpr)):
                yield from arrays(getattr(value, "jaxpr", value))


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        (recipes.self_speculative(width=2), {}),
        pytest.param(
            recipes.sdar(block_size=32),
            {**IN_PLACE, "block_size": 32, "adapter": False},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["self_speculative", "sdar"],
)
def test_nothing_has_a_side_for_the_text_and_one_for_keys_or_tokens(recipe, more):
    """The program of 131,072 tokens, prefill and loop: its largest array is the cache.

    Neither [L, S] scores nor [L, V] logits nor the hidden states [L, D] of the prompt exist.
    """
    length, vocab = 131_072, 40_000
    model, _ = tiny(
        vocab_size=8, dim=128, num_kv_heads=1, max_length=2 * length, param_dtype="bfloat16", **more
    )
    mask_id = vocab if model.config.adapter else vocab - 1
    model = dataclasses.replace(model.config, vocab_size=vocab, mask_id=mask_id).build()
    params = param_shapes(model.config)
    job = edge(model, pad([[7] * length]), recipe, 64, None)
    assert job.memory.chunk == CHUNK
    program = jax.make_jaxpr(
        partial(_generate, size=job.size, memory=job.memory), static_argnums=0
    )(model, params, job.prompt, job.recipe, job.budget, None)
    shapes = {shape for shape in arrays(program.jaxpr)}
    largest = max(math.prod(shape) for shape in shapes)
    slots = job.size + 96
    assert largest <= max(2 * slots * 16, vocab * 128), max(shapes, key=math.prod)
    assert largest < length * 128 / 2
    assert any(CHUNK in shape for shape in shapes)


@pytest.mark.slow
@pytest.mark.aot("tpu")
@pytest.mark.parametrize("dtype", [None, "int8"])
def test_a_prompt_of_131072_tokens_compiles_for_a_tpu(dtype):
    """Two layers of an 8B shape: the kernels run, the cache is copied nowhere, and what the
    prefill holds beside it is a chunk's.
    """
    length = 131_072
    config = TransformerConfig(
        vocab_size=32_000, num_layers=2, dim=4096, num_heads=32, num_kv_heads=8, head_dim=128,
        ffn_dim=14_336, max_length=2 * length, dtype="bfloat16", param_dtype="bfloat16",
    )  # fmt: skip
    model = config.build()

    def run(params, tokens, lengths):
        job = edge(model, Prompt(tokens, lengths), recipes.ar(), 64, None, None, dtype)
        state = _start(
            model, params, job.prompt, job.recipe, job.budget, None, None, size=job.size,
            memory=job.memory,
        )  # fmt: skip
        return state.tokens, state.cache

    ids, ends = (jax.ShapeDtypeStruct(x, jnp.int32) for x in ((1, length), (1,)))
    program = compile_for("v5p", run, param_shapes(config), ids, ends)
    text = program.as_text()
    assert "tpu_custom_call" in text
    copied = re.findall(r"= \w+\[2,1,8,(\d+),256\]\S* copy\(", text)
    assert not copied, copied
    states = CHUNK * 3 * config.ffn_dim * 2  # of a feed-forward, in bytes
    assert temporary_bytes(program) < 2 * states
