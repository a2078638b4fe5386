"""Commit policies against plain NumPy definitions, and their laws."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dllm_jax.policies.commit import CommitView, ConfidenceThreshold, EntropyBound, Quota

B, T, V = 2, 6, 4
TRACES = []


@jax.jit
def commit(policy, view):
    TRACES.append(type(policy))
    return policy.commit(view)


@st.composite
def views(draw) -> CommitView:
    """Blocks of every sharpness, with ties now and then: scores are thirds of whole numbers."""
    scores = st.lists(st.integers(-9, 9), min_size=B * T * V, max_size=B * T * V)
    logits = np.array(draw(scores), np.float32).reshape(B, T, V) / 3
    probs = np.asarray(jax.nn.softmax(jnp.asarray(logits)))
    tokens = np.array(draw(st.lists(st.integers(0, V - 1), min_size=B * T, max_size=B * T)))
    tokens = tokens.reshape(B, T)
    masked = np.array(draw(st.lists(st.booleans(), min_size=B * T, max_size=B * T)))
    confidence = np.take_along_axis(probs, tokens[..., None], axis=-1)[..., 0]
    arrays = (probs, tokens.astype(np.int32), confidence, masked.reshape(B, T))
    return CommitView(*map(jnp.asarray, arrays))


POLICIES = st.one_of(
    st.builds(ConfidenceThreshold, st.floats(0, 1)),
    st.builds(EntropyBound, st.floats(0, 5)),
    st.builds(Quota, st.integers(0, T + 1)),
)


@given(POLICIES, views())
def test_only_masked_positions(policy, view):
    picked = commit(policy, view)
    assert picked.shape == (B, T)
    assert picked.dtype == bool
    assert not (picked & ~view.masked).any()


@pytest.mark.parametrize(
    ("policy", "numbers"),
    [
        (ConfidenceThreshold, st.floats(0, 1).map(lambda x: 1 - x)),  # from strict to generous
        (EntropyBound, st.floats(0, 5)),
        (Quota, st.integers(0, T + 1)),
    ],
)
def test_a_generous_policy_picks_all_that_a_strict_one_does(policy, numbers):
    @given(numbers, numbers, views())
    def law(one, other, view):
        strict, generous = sorted((one, other), reverse=policy is ConfidenceThreshold)
        few, many = commit(policy(strict), view), commit(policy(generous), view)
        assert not (few & ~many).any()

    law()


@given(st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]), views())
def test_confidence_threshold_is_its_definition(threshold, view):
    expected = np.asarray(view.masked) & (np.asarray(view.confidence) > np.float32(threshold))
    np.testing.assert_array_equal(commit(ConfidenceThreshold(threshold), view), expected)


def largest_bounded_set(probs: np.ndarray, masked: np.ndarray, bound: float) -> set[float]:
    """Brute force over all subsets of one row: the entropies of the largest set within the bound.

    Of sets of one size the one with the lowest entropies is meant.
    """
    probs = probs.astype(np.float64)
    entropy = -(probs * np.log(probs)).sum(axis=-1)
    best = ()
    for size in range(1, masked.sum() + 1):
        sets = itertools.combinations(np.flatnonzero(masked), size)
        costs = [(sum(h := sorted(entropy[list(s)])) - max(h), h) for s in sets]
        cost, entropies = min(costs, key=lambda pair: sum(pair[1]))
        assume(abs(cost - bound) > 1e-5 or cost == 0)  # rounding may decide there
        if cost <= bound:
            best = entropies
    return best


@given(st.sampled_from([0.0, 0.1, 0.7, 1.5, 4.0]), views())
def test_entropy_bound_is_its_definition(bound, view):
    """Compared by their entropies, since positions may tie."""
    picked = np.asarray(commit(EntropyBound(bound), view))
    for row in range(B):
        probs = np.asarray(view.probs[row])
        expected = largest_bounded_set(probs, np.asarray(view.masked[row]), bound)
        got = probs[picked[row]].astype(np.float64)
        entropy = np.sort(-(got * np.log(got)).sum(axis=-1))
        assert len(entropy) == len(expected)
        np.testing.assert_allclose(entropy, expected, atol=1e-5)


def test_entropy_bound_counts_certain_tokens_as_free():
    probs = jnp.array(
        [[[1.0, 0, 0, 0], [0, 0, 1, 0], [0.25] * 4, [0.25] * 4, [1.0, 0, 0, 0], [1] * 4]]
    )
    masked = jnp.array([[True, True, True, True, True, False]])
    view = CommitView(probs, probs.argmax(-1), probs.max(-1), masked)
    np.testing.assert_array_equal(
        EntropyBound(0.0).commit(view), [[True, True, True, False, True, False]]
    )


@given(st.integers(0, T + 1), views())
def test_quota_picks_exactly_its_count_and_the_most_confident(count, view):
    picked = np.asarray(commit(Quota(count), view))
    masked, confidence = np.asarray(view.masked), np.asarray(view.confidence)
    np.testing.assert_array_equal(picked.sum(axis=1), np.minimum(count, masked.sum(axis=1)))
    for row in range(B):
        rest = confidence[row, masked[row] & ~picked[row]]
        if picked[row].any() and rest.size:
            assert confidence[row, picked[row]].min() >= rest.max()


def test_numbers_are_leaves_and_do_not_compile_again():
    probs = jnp.full((B, T, V), 1 / V)
    masked = jnp.ones((B, T), bool)
    view = CommitView(probs, probs.argmax(-1), probs.max(-1), masked)
    for policy, numbers in (
        (ConfidenceThreshold, (0.1, 0.5, 0.9)),
        (EntropyBound, (0.0, 0.1, 3.0)),
        (Quota, (1, 2, 3)),
    ):
        assert jax.tree.leaves(policy(numbers[1])) == [numbers[1]]
        commit(policy(numbers[0]), view)
        before = len(TRACES)
        for number in numbers[1:]:
            commit(policy(number), view)
        assert len(TRACES) == before
