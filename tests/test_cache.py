"""The cache: appends, rows at their own pace, taking back."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax import recipes
from dllm_jax.cache import allocate, append
from dllm_jax.decode.generate import generate
from dllm_jax.testing import tiny
from pallas_kernels import BlockMask, block_attention


@pytest.mark.parametrize("rows", [3, 70])  # unrolled, and in a loop
def test_rows_grow_at_their_own_pace_and_take_back(rows):
    cache = allocate(2, rows, 1, 12, 2)
    rng = np.random.default_rng(0)
    expected = [[] for _ in range(rows)]
    step = jax.jit(append)
    for _ in range(3):
        new = rng.normal(size=(2, rows, 1, 3, 4)).astype(np.float32)
        counts = rng.integers(0, 4, rows)
        cache = step(cache, jnp.asarray(new), jnp.asarray(counts))
        for row in range(rows):
            expected[row] += [new[:, row, :, i] for i in range(counts[row])]
    np.testing.assert_array_equal(cache.lengths, [len(e) for e in expected])
    for row, entries in enumerate(expected):
        for i, entry in enumerate(entries):
            np.testing.assert_array_equal(cache.kv[:, row, :, i], entry)
    shorter = dataclasses.replace(cache, lengths=jnp.maximum(cache.lengths - 2, 0))
    again = append(shorter, jnp.ones((2, rows, 1, 1, 4)), jnp.ones(rows, int))
    for row in range(rows):
        np.testing.assert_array_equal(again.kv[:, row, :, int(shorter.lengths[row])], 1.0)


def test_more_entries_than_slots_is_an_error():
    with pytest.raises(ValueError, match="5 entries do not fit a cache of 4 slots"):
        append(allocate(1, 1, 1, 4, 2), jnp.zeros((1, 1, 1, 5, 4)), jnp.ones(1, int))


@pytest.mark.parametrize("size", [80, 96])
def test_heads_that_do_not_fill_registers_are_padded_and_read_as_they_are(size):
    """Decoding from the padded cache is attention over keys and values as they were written."""
    keys = jax.random.split(jax.random.key(0), 3)
    new = jax.random.normal(keys[0], (2, 2, 1, 5, 2 * size))
    cache = append(allocate(2, 2, 1, 8, size), new, jnp.array([5, 3]))
    assert cache.kv.shape[-1] == 256
    q, k = (jax.random.normal(key, (2, 3, 1, size)) for key in keys[1:])
    attend = jax.jit(lambda kv: block_attention(
        q, k, k, BlockMask.causal(3), cache=kv, layer=jnp.int32(1), cache_end=cache.lengths
    ))  # fmt: skip
    np.testing.assert_allclose(attend(cache.kv), attend(new), atol=1e-6)


def test_a_canvas_is_cached_whole_in_padded_slots():
    """As many tokens, the same ones, from a model whose heads are padded as without a cache."""
    model, params = tiny(head_dim=80, attention="bidirectional", alignment="same_position")
    ask = partial(generate, model, params, [[3, 4, 5], [6, 7]], max_new_tokens=8)
    padded = ask(recipe=recipes.fast_dllm_dual(block_size=4, steps_per_block=1))
    plain = ask(recipe=recipes.fast_dllm(cache="none", block_size=4, steps_per_block=1))
    np.testing.assert_array_equal(padded.tokens, plain.tokens)
