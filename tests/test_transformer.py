"""The backbone: cached equals uncached, padding is invisible, an adapter feels masks only."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_jax.cache import append
from dllm_jax.nn.head import logits_of
from dllm_jax.nn.transformer import Transformer, TransformerConfig
from dllm_jax.nn.tree import param_axes, param_shapes
from dllm_jax.testing import tiny
from pallas_kernels import BlockMask

MODEL, PARAMS = tiny()


def apply(model, params, tokens, **more):
    more = {k: jnp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in more.items()}
    return model.apply({"params": params}, jnp.asarray(tokens), **more)


def forward(tokens, **more):
    return apply(MODEL, PARAMS, tokens, **more)


WIDTH, LONGEST = 16, 28  # one compiled program for each block size, whatever the lengths


@partial(jax.jit, static_argnames="block")
def in_blocks(prompt, lengths, rest, block):
    """Hidden states of a padded prefill, then of each block of `rest` [blocks, B, block]."""
    out = forward(prompt, lengths=lengths, canvas=False)
    cache = append(MODEL.cache(len(lengths), LONGEST), out.kv, lengths)
    hidden = []
    for piece in rest:
        step = forward(piece, cache=cache, canvas=False)
        cache = append(cache, step.kv, jnp.full(len(lengths), block))
        hidden.append(step.hidden)
    return out.hidden, jnp.concatenate(hidden, axis=1), cache.lengths


whole = jax.jit(lambda tokens, lengths: forward(tokens, lengths=lengths, canvas=False).hidden)


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, WIDTH), min_size=3, max_size=3),
    block=st.sampled_from([1, 3, 4]),
    padding=st.integers(0, 31),
    seed=st.integers(0, 99),
)
def test_prefill_and_blocks_equal_one_pass(lengths, block, padding, seed):
    """Ragged rows, any junk in the padding: a prefill and then three blocks, against one pass."""
    lengths, blocks = np.array(lengths), 3
    tokens = np.random.default_rng(seed).integers(2, 30, (3, LONGEST))
    prompt = np.where(np.arange(WIDTH) < lengths[:, None], tokens[:, :WIDTH], padding)
    at = lengths[:, None] + np.arange(blocks * block)
    rest = np.take_along_axis(tokens, at, axis=1).reshape(3, blocks, block).swapaxes(0, 1)
    first, later, ends = in_blocks(*map(jnp.asarray, (prompt, lengths, rest)), block)
    expected = whole(jnp.asarray(tokens), jnp.asarray(lengths + blocks * block))
    np.testing.assert_array_equal(ends, lengths + blocks * block)
    for row, length in enumerate(lengths):
        got = np.concatenate([first[row, :length], later[row]])
        np.testing.assert_allclose(got, expected[row, : len(got)], atol=2e-5)


def test_two_passes_equal_the_dual_stream_in_one():
    """Noisy blocks read a cache of the clean stream, or sit beside it: the same hidden states."""
    tokens = np.random.default_rng(0).integers(2, 30, (2, 8)).astype(np.int32)
    noisy = tokens.copy()
    noisy[:, ::3] = MODEL.config.mask_id
    positions = np.broadcast_to(np.arange(8), (2, 8))
    joint = forward(
        np.concatenate([tokens, noisy], axis=1),
        mask=BlockMask.dual_stream(8, 4),
        positions=np.concatenate([positions, positions], axis=1),
    ).hidden
    clean = forward(tokens, canvas=False)
    cache = append(MODEL.cache(2, 8), clean.kv, jnp.full(2, 8))
    apart = forward(
        noisy, mask=BlockMask.block_diagonal(4), positions=positions, cache=cache,
        cache_end=positions // 4 * 4,
    ).hidden  # fmt: skip
    np.testing.assert_allclose(joint[:, :8], clean.hidden, atol=1e-5)
    np.testing.assert_allclose(joint[:, 8:], apart, atol=1e-5)


def test_the_adapter_is_felt_by_masks_alone_bit_for_bit():
    base = Transformer(dataclasses.replace(MODEL.config, adapter=None))
    without = {k: v for k, v in PARAMS.items() if k != "adapter"}
    tokens = np.random.default_rng(1).integers(2, 30, (2, 9)).astype(np.int32)
    expected = apply(base, without, tokens)
    for canvas in (False, True):
        got = forward(tokens, canvas=canvas)
        np.testing.assert_array_equal(got.hidden, expected.hidden)
        np.testing.assert_array_equal(got.kv, expected.kv)
    tokens[:, -2:] = MODEL.config.mask_id
    gated, plain = forward(tokens), apply(base, without, tokens)
    np.testing.assert_array_equal(gated.hidden[:, :-2], plain.hidden[:, :-2])
    assert not np.allclose(gated.hidden[:, -2:], plain.hidden[:, -2:], atol=1e-2)


def test_a_fresh_adapter_changes_nothing_but_the_mask_embedding():
    from dllm_jax.nn.adapters import init_adapter

    shapes = param_shapes(MODEL.config)["adapter"]
    fresh = init_adapter(jax.random.key(0), shapes, MODEL.config.adapter, PARAMS)
    fresh["mask_embedding"] = PARAMS["embed"][5]
    tokens = np.array([[3, 4, MODEL.config.mask_id]])
    got = apply(MODEL, {**PARAMS, "adapter": fresh}, tokens).hidden
    np.testing.assert_array_equal(got, forward(np.array([[3, 4, 5]]), canvas=False).hidden)


def test_remat_and_frozen_layers_change_no_number():
    tokens = np.array([[3, 4, 5, MODEL.config.mask_id]])
    model = Transformer(dataclasses.replace(MODEL.config, remat=True))

    def loss(adapter, model, frozen):
        out = apply(model, {**PARAMS, "adapter": adapter}, tokens, frozen_layers=frozen)
        return jnp.square(out.hidden).sum()

    value, grads = jax.value_and_grad(loss)(PARAMS["adapter"], MODEL, 0)
    again, regrads = jax.value_and_grad(loss)(PARAMS["adapter"], model, 0)
    np.testing.assert_allclose(value, again, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, regrads
    )
    frozen, cut = jax.value_and_grad(loss)(PARAMS["adapter"], MODEL, 1)
    np.testing.assert_allclose(value, frozen, rtol=1e-6)
    assert not cut["q"]["out"][0].any()
    np.testing.assert_allclose(cut["q"]["out"][1], grads["q"]["out"][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        dict(qkv_bias=True, tied_head=True),
        dict(qk_norm=True),
        dict(attention="bidirectional", alignment="same_position"),
        dict(attention="block_causal", block_size=4),
    ],
)
def test_the_family_is_a_matter_of_configuration(changes):
    model, params = tiny(adapter=False, **changes)
    shapes = param_shapes(model.config)
    assert jax.tree.structure(shapes) == jax.tree.structure(params)
    axes = param_axes(model.config)
    jax.tree.map(lambda s, p, a: None, shapes, params, jax.tree.map(tuple, axes, is_leaf=_is_axes))
    out = apply(model, params, np.array([[3, 4, 5, 6, 7]]))
    logits = logits_of(model, params, out.hidden)
    assert logits.shape == (1, 5, 32)
    assert np.isfinite(logits).all()
    changed = apply(model, params, np.array([[3, 4, 5, 6, 8]])).hidden
    sees_ahead = not np.allclose(out.hidden[0, 0], changed[0, 0])
    assert sees_ahead == (changes.get("attention") == "bidirectional")


def _is_axes(x):
    return isinstance(x, tuple)


def test_bad_configurations_are_named():
    good = dict(
        vocab_size=8, num_layers=1, dim=8, num_heads=2, num_kv_heads=1, head_dim=4, ffn_dim=8
    )
    for wrong, message in (
        (dict(num_kv_heads=3), "multiple of num_kv_heads"),
        (dict(head_dim=3), "must be even"),
        (dict(attention="sideways"), "sideways"),
        (dict(alignment="left"), "left"),
    ):
        with pytest.raises(ValueError, match=message):
            TransformerConfig(**{**good, **wrong})
