"""Streamed vocabulary statistics against dense ones: tiles, shards, samples, gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from pallas_kernels import cross_entropy, scores_at, token_stats
from pallas_kernels.token_stats.noise import gumbel, gumbel_of, random_bits
from pallas_kernels.token_stats.rows import over_active

TILES = [None, 7, 64, 1000]
streamed = jax.jit(
    token_stats, static_argnames=("soft_cap", "forbidden", "top", "soft", "tile", "axis_name")
)


def drawn(seed, rows, vocab, dim, dtype="float32"):
    keys = jax.random.split(jax.random.key(seed), 4)
    hidden = 2 * jax.random.normal(keys[0], (rows, dim))
    vocabulary = jax.random.normal(keys[1], (vocab, dim)) / dim**0.5
    bias = jax.random.normal(keys[2], (vocab,))
    row_keys = jax.random.key_data(jax.random.split(keys[3], rows))
    return hidden.astype(dtype), vocabulary.astype(dtype), bias, row_keys


def _mesh(shards):
    return jax.make_mesh((shards,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))


def dense(hidden, vocabulary, *, bias=None, scale=None, soft_cap=0.0, forbidden=()):
    """Scores, float64."""
    scores = np.asarray(hidden, np.float64) @ np.asarray(vocabulary, np.float64).T
    if bias is not None:
        scores = scores + np.asarray(bias, np.float64)
    if soft_cap:
        scores = soft_cap * np.tanh(scores / soft_cap)
    if scale is not None:
        scores = scores * np.asarray(scale, np.float64)[:, None]
    scores[:, list(forbidden)] = -np.inf
    return scores


@settings(max_examples=15)
@given(
    seed=st.integers(0, 99),
    rows=st.sampled_from([1, 5, 70]),
    vocab=st.sampled_from([11, 64, 301]),
    tile=st.sampled_from(TILES),
    top=st.sampled_from([1, 2, 9]),
    soft_cap=st.sampled_from([0.0, 3.0]),
    forbidden=st.sampled_from([(), (4,), (0, 10)]),
    with_bias=st.booleans(),
    with_scale=st.booleans(),
)
def test_streamed_is_dense(
    seed, rows, vocab, tile, top, soft_cap, forbidden, with_bias, with_scale
):
    hidden, vocabulary, bias, keys = drawn(seed, rows, vocab, 8)
    options = {
        "bias": bias if with_bias else None,
        "scale": jnp.linspace(0.5, 2.0, rows) if with_scale else None,
        "soft_cap": soft_cap,
    }
    got = streamed(
        hidden, vocabulary, **options, forbidden=forbidden, top=top, keys=keys,
        temperature=jnp.float32(0.7), soft="exact", tile=tile,
    )  # fmt: skip
    scores = dense(hidden, vocabulary, **options, forbidden=forbidden)
    log_z = scipy.special.logsumexp(scores, axis=1)
    probs = np.exp(scores - log_z[:, None])
    np.testing.assert_allclose(got.log_z, log_z, rtol=1e-5, atol=1e-5)
    entropy = -scipy.special.xlogy(probs, probs).sum(axis=1)
    np.testing.assert_allclose(got.entropy, entropy, atol=1e-5)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    np.testing.assert_array_equal(got.ids, order)
    best = np.take_along_axis(scores, order, axis=1)
    np.testing.assert_allclose(got.scores, best, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        got.soft, probs @ np.asarray(vocabulary, np.float64), rtol=1e-4, atol=1e-5
    )
    hot = scipy.special.logsumexp(scores / np.float32(0.7), axis=1)
    np.testing.assert_allclose(got.drawn.log_z, hot, rtol=1e-5, atol=1e-5)
    warm = np.exp(scores / np.float32(0.7) - hot[:, None])
    np.testing.assert_allclose(
        got.drawn.entropy, -scipy.special.xlogy(warm, warm).sum(axis=1), atol=1e-5
    )
    noise = np.asarray(gumbel(keys[:, :1], keys[:, 1:], jnp.arange(vocab, dtype=jnp.uint32)[None]))
    np.testing.assert_array_equal(got.drawn.ids, (scores / np.float32(0.7) + noise).argmax(axis=1))
    own = np.take_along_axis(scores, np.asarray(got.drawn.ids)[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(got.drawn.scores, own, rtol=1e-5, atol=1e-5)
    asked = jnp.stack([got.ids[:, 0], got.drawn.ids], axis=1)
    at = scores_at(hidden, vocabulary, asked, **options)
    np.testing.assert_allclose(at[:, 0], got.scores[:, 0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(at[:, 1], got.drawn.scores, rtol=1e-5, atol=1e-5)


def test_equal_scores_go_by_their_ids():
    hidden, vocabulary = jnp.ones((3, 4)), jnp.ones((40, 4)).at[21].set(2.0).at[30].set(2.0)
    for tile in (None, 8, 13):
        got = streamed(hidden, vocabulary, top=6, tile=tile)
        np.testing.assert_array_equal(got.ids, [[21, 30, 0, 1, 2, 3]] * 3)


def test_bfloat16_is_close():
    hidden, vocabulary, _, _ = drawn(0, 20, 500, 64, "bfloat16")
    got = streamed(hidden, vocabulary, top=1, tile=128)
    scores = dense(hidden.astype("float32"), vocabulary.astype("float32"))
    np.testing.assert_allclose(got.log_z, scipy.special.logsumexp(scores, axis=1), rtol=2e-2)
    np.testing.assert_array_equal(got.ids[:, 0], scores.argmax(axis=1))


@pytest.mark.parametrize("rows", [5, 300])
def test_rows_that_nobody_asks_for(rows):
    """The others get what they get without them, and these zeros."""
    hidden, vocabulary, bias, keys = drawn(2, rows, 301, 8)
    scale, warm = jnp.linspace(0.5, 2.0, rows), jnp.linspace(0.4, 1.5, rows)
    ask = partial(
        streamed, hidden, vocabulary, bias=bias, scale=scale, top=2, keys=keys, temperature=warm
    )
    whole = ask()
    rng = np.random.default_rng(0)
    for share in (0.0, 0.1, 0.5, 1.0):
        active = jnp.asarray(rng.random(rows) < share)
        got = ask(active=active)
        for own, all_of_it in zip(jax.tree.leaves(got), jax.tree.leaves(whole), strict=True):
            own, all_of_it = np.asarray(own), np.asarray(all_of_it)
            np.testing.assert_allclose(own[active], all_of_it[active], rtol=1e-5, atol=1e-5)
            assert not own[~active].any()
        np.testing.assert_array_equal(got.drawn.ids[active], whole.drawn.ids[active])
        np.testing.assert_array_equal(got.ids[active], whole.ids[active])


@pytest.mark.parametrize(
    ("asked", "pieces"), [(0, []), (3, [4]), (4, [4]), (5, [16]), (16, [16]), (35, [16, 16, 4])]
)
def test_pieces_are_as_small_as_holds_what_is_left(asked, pieces):
    seen = []

    def run(x):
        jax.debug.callback(lambda x: seen.append(len(x)), x, ordered=True)
        return 2 * x

    active = jnp.asarray(np.random.default_rng(asked).permutation(40) < asked)
    x = jnp.arange(40.0)
    got = jax.jit(lambda x, active: over_active(run, x, active, (4, 16)))(x, active)
    jax.effects_barrier()
    assert seen == pieces
    np.testing.assert_array_equal(got[active], 2 * x[active])


def test_soft_embedding_of_the_best():
    hidden, vocabulary, bias, _ = drawn(4, 6, 320, 16)
    got = streamed(hidden, vocabulary, bias=bias, forbidden=(3,), top=9, soft="top")
    scores = dense(hidden, vocabulary, bias=bias, forbidden=(3,))
    order = np.argsort(-scores, axis=1)[:, :9]
    shares = scipy.special.softmax(np.take_along_axis(scores, order, axis=1), axis=1)
    want = (shares[..., None] * np.asarray(vocabulary, np.float64)[order]).sum(axis=1)
    np.testing.assert_allclose(got.soft, want, rtol=1e-5, atol=1e-6)
    alone = streamed(hidden, vocabulary, soft="top").soft
    np.testing.assert_allclose(alone, vocabulary[streamed(hidden, vocabulary).ids[:, 0]])


@pytest.mark.parametrize(("shards", "soft"), [(2, "exact"), (4, "top"), (8, "exact")])
def test_shards_of_a_vocabulary_merge(shards, soft):
    hidden, vocabulary, bias, keys = drawn(3, 6, 320, 16)
    ask = partial(
        token_stats, soft_cap=4.0, forbidden=(200,), top=9, soft=soft, temperature=jnp.float32(1.2),
        active=jnp.arange(6) != 2,
    )  # fmt: skip
    whole = jax.jit(ask)(hidden, vocabulary, bias=bias, keys=keys)

    @jax.jit
    @partial(
        jax.shard_map, mesh=_mesh(shards), in_specs=(P(), P("tensor"), P("tensor"), P()),
        out_specs=P(), check_vma=False,
    )  # fmt: skip
    def split(hidden, vocabulary, bias, keys):
        return ask(hidden, vocabulary, bias=bias, keys=keys, axis_name="tensor")

    got = split(hidden, vocabulary, bias, keys)
    np.testing.assert_array_equal(got.ids, whole.ids)
    np.testing.assert_array_equal(got.drawn.ids, whole.drawn.ids)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, whole)
    program = split.lower(hidden, vocabulary, bias, keys).compile().as_text()
    assert "320]" not in program.split("all-gather", 1)[1].splitlines()[0], "scores travel"


@pytest.mark.parametrize("shards", [4])
def test_scores_of_tokens_of_other_shards(shards):
    hidden, vocabulary, bias, _ = drawn(3, 6, 320, 16)
    scale = jnp.linspace(0.5, 2.0, 6)
    ids = jnp.asarray(np.random.default_rng(0).permutation(320)[:30].reshape(6, 5), jnp.int32)
    ids = ids.at[0].set(jnp.asarray([0, 319, 160, 159, 40]))

    @jax.jit
    @partial(
        jax.shard_map, mesh=_mesh(shards), in_specs=(P(), P("tensor"), P("tensor"), P(), P()),
        out_specs=P(), check_vma=False,
    )  # fmt: skip
    def split(hidden, vocabulary, bias, ids, scale):
        return scores_at(
            hidden, vocabulary, ids, bias=bias, scale=scale, soft_cap=4.0, axis_name="tensor"
        )

    want = scores_at(hidden, vocabulary, ids, bias=bias, scale=scale, soft_cap=4.0)
    np.testing.assert_allclose(
        split(hidden, vocabulary, bias, ids, scale), want, rtol=1e-5, atol=1e-5
    )


# Noise


def test_random_bits_are_those_of_jax():
    for seed in range(3):
        key = jax.random.key(seed)
        k0, k1 = jax.random.key_data(key)
        ids = jnp.arange(1000, dtype=jnp.uint32)
        np.testing.assert_array_equal(random_bits(k0, k1, ids), jax.random.bits(key, (1000,)))


def test_noise_is_gumbel_with_both_tails():
    k0, k1 = jax.random.key_data(jax.random.key(5))
    noise = np.asarray(gumbel(k0, k1, jnp.arange(1 << 18, dtype=jnp.uint32)), np.float64)
    assert scipy.stats.kstest(noise, scipy.stats.gumbel_r.cdf).pvalue > 1e-3
    assert np.isfinite(noise).all()

    low, high = (float(gumbel_of(jnp.uint32(bits))) for bits in (0, 0xFFFFFFFF))
    assert -3.2 < low < -3.0
    assert 21 < high < 23


@pytest.mark.parametrize(("vocab", "temperature"), [(40, 0.5), (40, 1.0), (40, 2.0), (50_000, 1.0)])
def test_samples_follow_the_categorical(vocab, temperature):
    """Chi-square of the draws against softmax(scores / temperature)."""
    draws = 40_000 if vocab == 40 else 4_000
    hidden, vocabulary, _, _ = drawn(8, 1, vocab, 8)
    keys = jax.random.key_data(jax.random.split(jax.random.key(1), draws))
    got = []
    for piece in np.array_split(np.asarray(keys), max(draws // 4000, 1)):
        rows = jnp.broadcast_to(hidden, (len(piece), 8))
        got.append(streamed(rows, vocabulary, keys=piece, temperature=jnp.float32(temperature),
                            tile=None if vocab == 40 else 10_000).drawn.ids)  # fmt: skip
    scores = dense(hidden, vocabulary)[0] / temperature
    probs = scipy.special.softmax(scores)
    bins = np.argsort(np.argsort(probs)) * 40 // vocab  # tokens of like probability together
    counts = np.bincount(bins[np.concatenate(got)], minlength=40)
    expected = np.bincount(bins, weights=probs) * draws
    assert scipy.stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 1e-3


def test_a_sample_depends_on_its_key_alone():
    hidden, vocabulary, _, keys = drawn(9, 130, 700, 8)
    ask = partial(streamed, temperature=jnp.float32(1.0))
    whole = np.asarray(ask(hidden, vocabulary, keys=keys).drawn.ids)
    for tile in (64, 100, 333):
        np.testing.assert_array_equal(
            ask(hidden, vocabulary, keys=keys, tile=tile).drawn.ids, whole
        )
    some = np.array([3, 77, 12])
    np.testing.assert_array_equal(
        ask(hidden[some], vocabulary, keys=keys[some]).drawn.ids, whole[some]
    )


# Cross-entropy


@given(
    seed=st.integers(0, 99),
    vocab=st.sampled_from([11, 130, 301]),
    tile=st.sampled_from([None, 7, 128]),
    soft_cap=st.sampled_from([0.0, 3.0]),
    forbidden=st.sampled_from([(), (4,)]),
    with_bias=st.booleans(),
)
def test_cross_entropy_and_its_gradient(seed, vocab, tile, soft_cap, forbidden, with_bias):
    hidden, vocabulary, bias, _ = drawn(seed, 9, vocab, 8)
    targets = jnp.asarray(np.random.default_rng(seed).permutation(vocab)[:9], jnp.int32)
    targets = jnp.where(targets == 4, 5, targets)
    weights = jnp.linspace(0.0, 2.0, 9)
    own = bias if with_bias else None

    def plain(hidden, vocabulary, bias):
        scores = hidden @ vocabulary.T + (0.0 if bias is None else bias)
        if soft_cap:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        for one in forbidden:
            scores = scores.at[:, one].set(-jnp.inf)
        nats = -jnp.take_along_axis(jax.nn.log_softmax(scores), targets[:, None], axis=1)[:, 0]
        return (nats * weights).sum(), nats

    def cut(hidden, vocabulary, bias):
        nats = cross_entropy(
            hidden, vocabulary, targets, bias=bias, soft_cap=soft_cap, forbidden=forbidden,
            tile=tile,
        ).nats  # fmt: skip
        return (nats * weights).sum(), nats

    which = (0, 1, 2) if with_bias else (0, 1)
    run = lambda f: jax.jit(jax.value_and_grad(f, which, has_aux=True))(hidden, vocabulary, own)  # noqa: E731
    (_, expected), slopes = run(plain)
    (_, nats), found = run(cut)
    np.testing.assert_allclose(nats, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(found, slopes, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_cross_entropy_never_forms_the_scores():
    """The largest array of the compiled program, forward and backward, is a tile of scores."""
    rows, vocab, dim, tile = 256, 4096, 16, 128
    shapes = [jax.ShapeDtypeStruct(s, "float32") for s in ((rows, dim), (vocab, dim))]
    targets = jax.ShapeDtypeStruct((rows,), "int32")
    loss = lambda h, w, t: cross_entropy(h, w, t, tile=tile).nats.sum()  # noqa: E731
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes, targets).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < rows * vocab * 4 / 4


@pytest.mark.parametrize("shards", [4])
def test_cross_entropy_of_shards(shards):
    hidden, vocabulary, bias, _ = drawn(3, 9, 320, 16)
    targets = jnp.asarray(np.random.default_rng(0).permutation(200)[:9], jnp.int32)
    targets = targets.at[0].set(319)
    weights = jnp.linspace(0.0, 2.0, 9)
    score = partial(cross_entropy, soft_cap=4.0, forbidden=(200,))

    @partial(
        jax.shard_map, mesh=_mesh(shards), in_specs=(P(), P("tensor"), P("tensor"), P()),
        out_specs=P(), check_vma=False,
    )  # fmt: skip
    def split(hidden, vocabulary, bias, targets):
        return score(hidden, vocabulary, targets, bias=bias, axis_name="tensor")

    def whole(hidden, vocabulary, bias, targets):
        return score(hidden, vocabulary, targets, bias=bias)

    def run(f):
        def loss(*arrays):
            found = f(*arrays, targets)
            return (found.nats * weights).sum(), found

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(hidden, vocabulary, bias)

    (_, got), slopes = run(split)
    (_, want), expected = run(whole)
    np.testing.assert_array_equal(got.best, want.best)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
        (got.nats, slopes),
        (want.nats, expected),
    )


def test_what_cannot_be_asked_is_told():
    hidden, vocabulary, _, keys = drawn(0, 2, 10, 4)
    with pytest.raises(ValueError, match="top=0 must be"):
        token_stats(hidden, vocabulary, top=0)
    with pytest.raises(ValueError, match="come together"):
        token_stats(hidden, vocabulary, keys=keys)
    with pytest.raises(ValueError, match="tile=0"):
        token_stats(hidden, vocabulary, tile=0)
    with pytest.raises(ValueError, match="soft='mean'"):
        token_stats(hidden, vocabulary, soft="mean")
    with pytest.raises(ValueError, match="implementation='cpu'"):
        cross_entropy(hidden, vocabulary, jnp.zeros(2, jnp.int32), implementation="cpu")
    with pytest.raises(ValueError, match="vectors of 4 do not fill"):
        cross_entropy(hidden, vocabulary, jnp.zeros(2, jnp.int32), implementation="tpu")
