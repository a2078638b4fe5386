"""Commit policies against plain NumPy definitions, and their laws."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given
from hypothesis import strategies as st

from dllm_jax.policies import (
    Ancestral,
    CommitView,
    ConfidenceThreshold,
    Distrust,
    EntropyBound,
    Factor,
    FirstHitting,
    Quota,
    ReMDM,
    ReviseView,
    TimeGrid,
)
from dllm_jax.policies.commit import grid

B, T, V = 2, 6, 4
TRACES = []


def commit(policy, view):
    return _commit(policy, view._replace(everything=None), view.probs)


@jax.jit
def _commit(policy, view, probs):
    TRACES.append(type(policy))
    return policy.commit(view._replace(everything=lambda: probs))


@st.composite
def views(draw) -> CommitView:
    """Blocks of every sharpness, with ties now and then: scores are thirds of whole numbers."""
    scores = st.lists(st.integers(-9, 9), min_size=B * T * V, max_size=B * T * V)
    logits = np.array(draw(scores), np.float32).reshape(B, T, V) / 3
    probs = np.asarray(jax.nn.softmax(jnp.asarray(logits)))
    tokens = np.array(draw(st.lists(st.integers(0, V - 1), min_size=B * T, max_size=B * T)))
    tokens = tokens.reshape(B, T)
    masked = np.array(draw(st.lists(st.booleans(), min_size=B * T, max_size=B * T)))
    masked = masked.reshape(B, T)
    steps = np.array(draw(st.lists(st.integers(0, 8), min_size=B, max_size=B)), np.int32)
    opened = np.maximum(masked.sum(axis=1), draw(st.integers(0, T))).astype(np.int32)
    uniform = np.random.default_rng(draw(st.integers(0, 99))).random((B, T), np.float32)
    arrays = (probs, tokens.astype(np.int32), masked, steps, opened, uniform)
    return CommitView.of(*map(jnp.asarray, arrays))


def view_of(probs, masked, step=0, opened=None, uniform=None) -> CommitView:
    """A view whose tokens are the most probable ones."""
    rows = len(probs)
    opened = masked.sum(axis=1) if opened is None else jnp.full(rows, opened)
    return CommitView.of(probs, probs.argmax(-1), masked, jnp.full(rows, step), opened, uniform)


POLICIES = st.one_of(
    st.builds(ConfidenceThreshold, st.floats(0, 1)),
    st.builds(EntropyBound, st.floats(0, 5)),
    st.builds(
        Quota,
        st.integers(1, T + 1),
        st.sampled_from(["confidence", "margin", "entropy", "position", "random"]),
        st.sampled_from(["masked", "block"]),
    ),
    st.builds(ConfidenceThreshold, st.floats(0, 1), st.builds(Quota, st.integers(1, T + 1))),
    st.builds(Factor, st.floats(0, 2)),
    st.builds(TimeGrid, st.integers(1, 9)),
    st.builds(Ancestral, st.integers(1, 9)),
    st.just(FirstHitting()),
    st.builds(ReMDM, st.integers(1, 9), st.floats(0, 1), st.sampled_from(["cap", "rescale"])),
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
        (Quota, st.integers(1, T + 1).map(lambda x: -x)),  # more steps: fewer at each
        (Factor, st.floats(0, 2)),
    ],
)
def test_a_generous_policy_picks_all_that_a_strict_one_does(policy, numbers):
    @given(numbers, numbers, views())
    def law(one, other, view):
        strict, generous = sorted((one, other), reverse=policy is ConfidenceThreshold)
        if policy is Quota:
            view = view._replace(step=jnp.zeros(B, jnp.int32))
            strict, generous = -strict, -generous
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
    np.testing.assert_array_equal(
        EntropyBound(0.0).commit(view_of(probs, masked)), [[True, True, True, False, True, False]]
    )


@given(st.integers(1, T + 1), st.sampled_from(["masked", "block"]), views())
def test_a_quota_shares_out_what_there_is(steps, per, view):
    total = np.asarray(view.opened) if per == "masked" else np.full(B, T)
    step = np.asarray(view.step)
    table = [[int(t) // steps + (i < int(t) % steps) for i in range(steps)] for t in total]
    count = np.array([row[i] if i < steps else T for row, i in zip(table, step, strict=True)])
    picked = np.asarray(commit(Quota(steps, per=per), view))
    masked, confidence = np.asarray(view.masked), np.asarray(view.confidence)
    np.testing.assert_array_equal(picked.sum(axis=1), np.minimum(count, masked.sum(axis=1)))
    for row in range(B):
        rest = confidence[row, masked[row] & ~picked[row]]
        if picked[row].any() and rest.size:
            assert confidence[row, picked[row]].min() >= rest.max()


def test_a_threshold_with_a_quota_falls_back_on_it():
    confidence = jnp.array([0.9, 0.2, 0.6, 0.3, 0.1, 0.5])
    probs = jnp.stack([confidence, 1 - confidence], axis=-1)[None]
    view = view_of(probs, jnp.ones((1, T), bool))
    view = view._replace(confidence=confidence[None], tokens=jnp.zeros((1, T), jnp.int32))
    policy = ConfidenceThreshold(0.55, Quota(2))  # 3 a step; 2 are over the threshold
    np.testing.assert_array_equal(policy.commit(view), [[True, False, True, False, False, True]])
    loose = ConfidenceThreshold(0.15, Quota(2))
    assert loose.commit(view).sum() == 5


def factor_of(confidence: list[float], factor: float) -> int:
    """Fast-dLLM's rule for how many of the sorted confidences to accept."""
    levels = [-1.0] + [1 - factor / (n + 1) for n in range(2, len(confidence) + 1)]
    last = len(levels) - 1
    breaks = (i for i in range(len(levels)) if confidence[i] < levels[i])
    place = next(breaks, last)
    return place + 1 if place in (0, last) else place


@given(st.floats(0, 3), views())
def test_factor_is_its_definition(factor, view):
    picked = np.asarray(commit(Factor(factor), view))
    for row in range(B):
        masked = np.asarray(view.masked[row])
        ranked = np.sort(np.asarray(view.confidence[row])[masked])[::-1]
        levels = 1 - np.float32(factor) / np.arange(2, len(ranked) + 2, dtype=np.float32)
        assume(np.abs(ranked - levels).min(initial=1) > 1e-6)  # rounding may decide there
        expected = factor_of(ranked.tolist(), factor) if len(ranked) else 0
        assert picked[row].sum() == expected
        np.testing.assert_array_equal(
            np.sort(np.asarray(view.confidence[row])[picked[row]])[::-1], ranked[:expected]
        )


@pytest.mark.parametrize("steps", [1, 4, 7, 32])
def test_a_time_grid_writes_all_in_its_steps(steps):
    """Dream's counts, from NumPy's float32 linspace."""
    times = np.linspace(1, 1e-3, steps + 1, dtype=np.float64).astype(np.float32)
    np.testing.assert_allclose(
        [float(grid(jnp.int32(i), steps, 1e-3)) for i in range(steps + 1)], times, rtol=1e-6
    )
    probs = jax.nn.softmax(jax.random.normal(jax.random.key(0), (1, T, V)) * 3)
    masked = jnp.ones((1, T), bool)
    for step in range(steps):
        left = int(masked.sum())
        picked = TimeGrid(steps).commit(view_of(probs, masked, step, T))
        last = step == steps - 1
        expected = left if last else int(np.float32(left) * (1 - times[step + 1] / times[step]))
        assert int(picked.sum()) == expected
        masked = masked & ~picked
    assert not masked.any()


def test_ancestral_steps_reveal_with_the_probability_of_the_grid():
    rows = 4000
    uniform = jax.random.uniform(jax.random.key(1), (rows, T))
    probs = jnp.full((rows, T, V), 1 / V)
    masked = jnp.ones((rows, T), bool).at[:, 0].set(False)
    picked = Ancestral(8).commit(view_of(probs, masked, 3, T, uniform))
    assert not picked[:, 0].any()
    share = float(picked[:, 1:].mean())  # t = 5/8, s = 4/8: 1 - s / t
    assert abs(share - 0.2) < 4 * (0.2 * 0.8 / (rows * (T - 1))) ** 0.5
    everything = Ancestral(8).commit(view_of(probs, masked, 7, T, uniform))
    np.testing.assert_array_equal(everything, masked)


def test_first_hitting_writes_one_at_random():
    rows = 3000
    uniform = jax.random.uniform(jax.random.key(2), (rows, T))
    masked = jnp.ones((rows, T), bool).at[:, 2].set(False)
    picked = FirstHitting().commit(view_of(jnp.full((rows, T, V), 1 / V), masked, 0, T, uniform))
    np.testing.assert_array_equal(picked.sum(axis=1), 1)
    shares = np.asarray(picked.mean(axis=0))
    assert shares[2] == 0
    np.testing.assert_allclose(shares[[0, 1, 3, 4, 5]], 0.2, atol=4 * (0.16 / rows) ** 0.5)


@pytest.mark.parametrize("schedule", ["cap", "rescale"])
@pytest.mark.parametrize("by_confidence", [False, True])
def test_remdm_keeps_the_marginals_of_the_masked_process(schedule, by_confidence):
    """Revealing and re-masking together leave a share 1 - t of the positions written at time t."""
    rows, steps = 3000, 10
    part = ReMDM(steps, 0.4, schedule, by_confidence)
    masked = jnp.ones((rows, T), bool)
    probs = jnp.full((rows, T, V), 1 / V)
    for step in range(steps):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(4), step))
        uniform = [jax.random.uniform(key, (rows, T)) for key in keys]
        view = view_of(probs, masked, step, T, uniform[0])
        commit = part.commit(view)
        zeros = jnp.zeros((rows, T))
        change = part.revise(
            ReviseView(view, commit, zeros.astype(int), ~masked, zeros, uniform[1])
        )
        assert not change.replace.any()
        masked = (masked & ~commit) | (change.remask & ~masked)
        written = 1 - float(masked.mean())
        if not by_confidence:  # which shares sigma out over the written ones: fewer are re-masked
            assert abs(written - (step + 1) / steps) < 0.02
    assert not masked.any()


def test_a_random_order_needs_a_key():
    view = view_of(jnp.full((B, T, V), 1 / V), jnp.ones((B, T), bool))
    for policy in (FirstHitting(), Ancestral(3), Quota(3, "random")):
        with pytest.raises(ValueError, match="key"):
            policy.commit(view)
    with pytest.raises(ValueError, match="none of confidence"):
        Quota(3, "beauty").commit(view)


def test_numbers_are_leaves_and_do_not_compile_again():
    view = view_of(jnp.full((B, T, V), 1 / V), jnp.ones((B, T), bool), uniform=jnp.zeros((B, T)))
    for policy, numbers in (
        (ConfidenceThreshold, (0.1, 0.5, 0.9)),
        (EntropyBound, (0.0, 0.1, 3.0)),
        (Quota, (1, 2, 3)),
        (Factor, (0.5, 1.0, 2.0)),
        (Ancestral, (1, 2, 3)),
    ):
        assert jax.tree.leaves(policy(numbers[1]))[0] == numbers[1]
        commit(policy(numbers[0]), view)
        before = len(TRACES)
        for number in numbers[1:]:
            commit(policy(number), view)
        assert len(TRACES) == before


def test_distrusted_tokens_are_judged_as_if_impossible():
    """The softmax without them, as LLaDA takes it; where one is the token, its share is zero."""
    logits = jax.random.normal(jax.random.key(0), (B, T, V)) * 2
    plain = view_of(jax.nn.softmax(logits), jnp.ones((B, T), bool))
    shares = jax.nn.softmax(logits.at[..., jnp.array([0, 2])].set(-jnp.inf))
    expected = jnp.take_along_axis(shares, plain.tokens[..., None], axis=-1)[..., 0]
    seen = []

    class Look(NamedTuple):
        def commit(self, view):
            seen.append(view)
            return view.masked

    Distrust((0, 2), Look()).commit(plain)
    np.testing.assert_allclose(seen[0].confidence, expected, atol=1e-6)
    np.testing.assert_allclose(seen[0].probs, shares, atol=1e-6)
    np.testing.assert_array_equal(seen[0].tokens, plain.tokens)
    assert (np.asarray(expected) == 0).any()
    assert (np.asarray(expected) > 0).any()


def test_an_order_with_noise_is_drawn():
    """The first of one position a step falls by softmax(score / noise)."""
    draws, noise = 20_000, 0.2
    probs = jnp.broadcast_to(
        jax.nn.softmax(jax.random.normal(jax.random.key(1), (T, V))), (1, T, V)
    )
    uniform = jax.random.uniform(jax.random.key(2), (draws, T))
    view = view_of(jnp.repeat(probs, draws, axis=0), jnp.ones((draws, T), bool), uniform=uniform)
    policy = TimeGrid(T, 0.0, "confidence", noise)
    picked = np.asarray(policy.commit(view))
    assert (picked.sum(axis=1) == 1).all()
    shares = np.asarray(jax.nn.softmax(probs[0].max(axis=-1) / noise), np.float64)
    shares /= shares.sum()
    assert scipy.stats.chisquare(picked.sum(axis=0), draws * shares).pvalue > 1e-3
    cold = TimeGrid(T, 0.0, "confidence", 0.0).commit(view)
    np.testing.assert_array_equal(cold, TimeGrid(T, 0.0, "confidence").commit(view))
