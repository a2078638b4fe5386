"""Filters against their plain definition; draws that depend on (key, position, stream) alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, example, given
from hypothesis import strategies as st

from dllm_jax.ops.sampling import Sampling, draw_with, keys_at, probabilities, uniform

VOCAB = 8
TRACES = []


@jax.jit
def filtered(logits, sampling):
    TRACES.append(1)
    return probabilities(logits, sampling)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def plain(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The definition for a row: a token stays when fewer than k, and less than p, beat it."""
    if temperature == 0:
        return np.eye(len(logits))[np.argmax(logits)]
    scaled = logits.astype(np.float64) / np.float32(temperature)
    if top_k:
        better = (scaled[None, :] > scaled[:, None]).sum(axis=1)
        scaled = np.where(better < top_k, scaled, -np.inf)
    probs = softmax(scaled)
    above = np.array([probs[scaled > s].sum() for s in scaled])
    assume(np.abs(above - top_p).min() > 1e-5)  # rounding may decide there
    return softmax(np.where((above < top_p) | (top_p == 1), scaled, -np.inf))


@given(
    st.lists(st.integers(-3, 3), min_size=2 * VOCAB, max_size=2 * VOCAB),
    st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    st.integers(0, VOCAB + 2),
    st.sampled_from([0.05, 0.33, 0.5, 0.77, 0.9, 1.0]),
)
@example([0] * 2 * VOCAB, 1.0, 3, 0.5)  # nothing but ties: all stay
@example(list(range(2 * VOCAB)), 0.0, 2, 0.5)
@example(list(range(2 * VOCAB)), 1.0, 2, 1.0)
def test_probabilities_are_their_definition(scores, temperature, top_k, top_p):
    """Scores are whole numbers, so that ties are frequent."""
    logits = np.array(scores, np.float32).reshape(2, VOCAB)
    expected = [plain(row, temperature, top_k, top_p) for row in logits]
    got = filtered(jnp.asarray(logits), Sampling(temperature, top_k, top_p))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize(("top_p", "kept"), [(0.3, 1), (0.6, 1), (0.85, 2), (0.96, 3), (1.0, 4)])
def test_a_nucleus_may_leave_out_the_token_that_crosses(top_p, kept):
    """BD3-LM's: shares of 0.5, 0.3, 0.15, 0.05 add up to 0.5, 0.8, 0.95, 1."""
    shares = np.array([0.3, 0.5, 0.05, 0.15])
    got = probabilities(jnp.log(shares), Sampling(1.0, 0, top_p, top_p_below=True))
    order = np.argsort(-shares)[:kept]
    expected = np.zeros(4)
    expected[order] = shares[order] / shares[order].sum()
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_temperature_0_takes_the_first_of_the_largest_and_forgets_the_filters():
    logits = jnp.array([[1.0, 5, 5, 0, 0, 0, 0, 0]] * 2)
    for sampling in (Sampling(), Sampling(0, 3, 0.1), Sampling(0.0, 0, 0.9)):
        np.testing.assert_array_equal(filtered(logits, sampling).argmax(axis=-1), 1)
        np.testing.assert_array_equal(filtered(logits, sampling).max(axis=-1), 1.0)


def test_filters_that_are_off_change_no_bit():
    logits = jax.random.normal(jax.random.key(0), (2, VOCAB))
    expected = jax.nn.softmax(logits / jnp.float32(0.7), axis=-1)
    np.testing.assert_array_equal(probabilities(logits, Sampling(0.7)), expected)
    everything = filtered(logits, Sampling(0.7, VOCAB, 1.0))
    np.testing.assert_allclose(everything, expected, rtol=1e-6)


def test_numbers_do_not_compile_again():
    logits = jnp.zeros((2, VOCAB))
    filtered(logits, Sampling(0.5, 1, 0.5))
    before = len(TRACES)
    for sampling in (Sampling(0.0, 0, 1.0), Sampling(1.5, 7, 0.1), Sampling(2.0, 3, 0.3)):
        filtered(logits, sampling)
    assert len(TRACES) == before
    assert len(jax.tree.leaves(Sampling())) == 3


@partial(jax.jit, static_argnums=2)
def draws(keys, positions, stream, probs):
    return draw_with(keys_at(keys, positions, stream), probs)


def test_draws_follow_the_distribution():
    probs = jnp.array([0.4, 0.3, 0.0, 0.15, 0.1, 0.05, 0.0, 0.0])
    count = 4000
    tokens = draws(
        jax.random.split(jax.random.key(3), 2),
        jnp.broadcast_to(jnp.arange(count), (2, count)),
        0,
        jnp.broadcast_to(probs, (2, count, VOCAB)),
    )
    possible = np.flatnonzero(probs)
    for row in np.asarray(tokens):
        counts = np.bincount(row, minlength=VOCAB)
        assert counts.sum() == counts[possible].sum(), "a token of probability 0 was drawn"
        assert scipy.stats.chisquare(counts[possible], count * probs[possible]).pvalue > 1e-3
    agree = (tokens[0] == tokens[1]).mean()
    assert abs(agree - jnp.square(probs).sum()) < 0.05, "rows draw the same numbers"


both = jax.jit(lambda k, p, probs: (draws(k, p, 1, probs), uniform(k, p, 1)))


def test_a_draw_depends_on_key_position_and_stream_alone():
    keys = jax.random.split(jax.random.key(4), 3)
    positions = jnp.array([[5, 6, 7, 8], [0, 1, 2, 3], [9, 2, 4, 1]])
    probs = jax.nn.softmax(jax.random.normal(jax.random.key(5), (3, 4, 64)))
    tokens, numbers = both(keys, positions, probs)
    assert ((numbers >= 0) & (numbers < 1)).all()
    for row, columns in ((0, [0, 1, 2, 3]), (2, [3]), (1, [2])):  # a row alone, one place alone
        part = np.ix_([row], columns)
        alone = both(keys[row : row + 1], positions[part], probs[part])
        np.testing.assert_array_equal(alone[0], tokens[part])
        np.testing.assert_array_equal(alone[1], numbers[part])


@pytest.mark.parametrize("change", ["key", "position", "stream"])
def test_other_keys_positions_and_streams_draw_other_numbers(change):
    keys = jax.random.split(jax.random.key(6), 1)
    positions, stream = jnp.arange(200)[None], 0
    probs = jnp.full((1, 200, VOCAB), 1 / VOCAB)
    here = (keys, positions, stream)
    there = {
        "key": (jax.random.split(jax.random.key(7), 1), positions, stream),
        "position": (keys, positions + 200, stream),
        "stream": (keys, positions, 1),
    }[change]
    same = (draws(*here, probs) == draws(*there, probs)).mean()
    assert abs(same - 1 / VOCAB) < 0.1
    here, there = uniform(*here), uniform(*there)
    assert abs(np.corrcoef(here[0], there[0])[0, 1]) < 0.25
    assert not (here == there).any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(temperature=-0.1), r"temperature=-0.1 must be 0 \(greedy\) or positive"),
        (dict(top_k=-1), "top_k=-1 must be 0"),
        (dict(top_p=0), r"top_p=0 must be in \(0, 1\]"),
        (dict(top_p=1.1), "top_p=1.1"),
    ],
)
def test_wrong_numbers_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong).check()


def test_right_and_traced_numbers_pass():
    for right in (Sampling(), Sampling(2.0, 50, 0.9), Sampling(jnp.float32(-1.0))):
        right.check()
