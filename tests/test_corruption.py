"""Laws of masked blocks: where they lie, what they hide, and what each entry has to learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from dllm_jax.corruption import MaskedBlocks, NoisyBlocks

B, L, G, T, MASK = 3, 20, 7, 4, 99
NOISE = MaskedBlocks(block_size=T, blocks=G, whole=0.5, decay=0.5)
draw = jax.jit(NOISE.draw, static_argnums=4)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 90, (B, L)), jnp.int32)


def blocks(noisy: NoisyBlocks) -> NoisyBlocks:
    """As NumPy arrays [B, G, T]."""
    return NoisyBlocks(*(np.asarray(x).reshape(B, G, T) for x in noisy))


@st.composite
def rows(draw) -> tuple[jax.Array, jax.Array]:
    """Lengths, and prompts that leave an answer of at least one token."""
    lengths = draw(st.lists(st.integers(1, L), min_size=B, max_size=B))
    prompts = [draw(st.integers(0, length - 1)) for length in lengths]
    return jnp.array(lengths), jnp.array(prompts)


@given(rows(), st.integers(0, 1 << 30))
def test_laws_of_a_draw(row, seed):
    lengths, prompts = row
    noisy = draw(jax.random.key(seed), TOKENS, lengths, prompts, MASK)
    assert all(x.shape == (B, G * T) for x in noisy)
    b = blocks(noisy)
    lengths, prompts = (np.asarray(x)[:, None, None] for x in row)
    text = np.asarray(TOKENS)

    # A block begins in the answer, before its last token, and its entries follow one another.
    start = b.positions[..., :1]
    assert (start >= prompts).all()
    assert (start < np.maximum(lengths - 1, prompts + 1)).all()
    np.testing.assert_array_equal(b.positions, start + np.arange(T))
    np.testing.assert_array_equal(b.prefix, np.broadcast_to(start, b.prefix.shape))

    # Inside the text the noise is the text with masks in it, and a target is the next token.
    at = np.broadcast_to(np.arange(B)[:, None, None], b.positions.shape)
    visible = b.tokens != MASK
    inside = b.positions < lengths
    np.testing.assert_array_equal(
        b.tokens[visible & inside], text[at, np.minimum(b.positions, L - 1)][visible & inside]
    )
    follows = b.positions + 1 < lengths
    np.testing.assert_array_equal(
        b.targets[follows], text[at, np.minimum(b.positions + 1, L - 1)][follows]
    )

    # Whole blocks are all masks; every block begins with one, and ends in them behind the text.
    assert not visible[b.whole].any()
    assert not visible[..., 0].any()
    assert not visible[~inside].any()
    assert (b.whole == b.whole[..., :1]).all()

    # Weights: zero exactly where the target is visible or behind the end. The target of the last
    # entry is not in its block; it counts when the entry itself is a mask.
    hidden = ~np.concatenate([visible[..., 1:], visible[..., -1:]], axis=-1)
    expected = np.where(hidden & follows, 0.5 ** np.arange(T), 0.0)
    np.testing.assert_array_equal(b.weights, expected)


def test_every_start_is_equally_likely_and_every_target_is_learnt():
    """One program for many draws: the blocks of a row, over 400 keys."""
    lengths, prompts = jnp.full(B, L), jnp.array([0, 4, 9])
    keys = jax.random.split(jax.random.key(0), 400)
    many = jax.vmap(NOISE.draw, in_axes=(0, None, None, None, None))
    noisy = jax.jit(many, static_argnums=4)(keys, TOKENS, lengths, prompts, MASK)
    starts = np.asarray(noisy.prefix).reshape(400, B, G, T)[..., 0]
    # One draw's starts lie T apart, so only one of each draw is independent of the others.
    for row, prompt in enumerate(np.asarray(prompts)):
        span = L - 1 - prompt
        counts = np.bincount(starts[:, row, 0] - prompt, minlength=span)
        assert len(counts) == span
        assert scipy.stats.chisquare(counts).pvalue > 1e-3
        positions = np.asarray(noisy.positions)[:, row]
        learnt = positions[np.asarray(noisy.weights)[:, row] > 0] + 1
        counts = np.bincount(learnt, minlength=L)[prompt + 1 :]
        middle = counts[T:]  # the first T targets have fewer places to be learnt from
        assert (counts > 0).all()
        assert middle.max() < 1.4 * middle.min()
    assert abs(np.asarray(noisy.whole).mean() - NOISE.whole) < 0.03
    # In the others the first is masked, and each one behind it with probability E[t] = 1 / 2.
    partial = ~np.asarray(noisy.whole).reshape(-1, T)[:, 0]
    partial &= (np.asarray(noisy.positions) < L).reshape(-1, T).all(axis=1)
    masked = (np.asarray(noisy.tokens) == MASK).reshape(-1, T)[partial]
    np.testing.assert_allclose(masked.mean(axis=0), [1, 0.5, 0.5, 0.5], atol=0.04)
    # One level for a block, not one for each token: tokens of a block are masked together.
    assert np.corrcoef(masked[:, 1], masked[:, 2])[0, 1] > 0.2


def test_a_draw_is_a_function_of_its_key():
    arguments = (TOKENS, jnp.full(B, L), jnp.array([0, 4, 9]), MASK)
    first, again, other = (draw(jax.random.key(k), *arguments) for k in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (first.tokens != other.tokens).any()
    assert (first.prefix != other.prefix).any()


def test_the_shortest_answers():
    """One token has nothing to learn (its output is the causal mode's); of two, the second has."""
    lengths, prompts = jnp.array([5, 6, 1]), jnp.array([4, 4, 0])
    b = blocks(draw(jax.random.key(0), TOKENS, lengths, prompts, MASK))
    assert not b.weights[[0, 2]].any()
    learnt = b.weights[1] > 0
    assert (b.positions[1][learnt] == 4).all()
    assert (b.targets[1][learnt] == TOKENS[1, 5]).all()
    assert learnt[b.whole[1]].any()


@pytest.mark.parametrize("wrong", [dict(block_size=0), dict(blocks=0), dict(whole=1.5)])
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MaskedBlocks(**wrong)
