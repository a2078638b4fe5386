"""The TPU kernel of token statistics: interpreted against the definition, compiled for chips."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_jax.testing.aot import CHIPS, compile_for, temporary_bytes
from pallas_kernels import cross_entropy
from pallas_kernels.token_stats import cross_entropy_tpu, reference, tpu
from pallas_kernels.token_stats.cross_entropy import _slopes, _Static

# rows, vocabulary, hidden size of one pass: a block (or 16 rows of it) of a published model
SHAPES = {
    "llada-8b": (32, 126_464, 4096),
    "fast-dllm-v2-7b": (32, 151_936, 3584),
    "llada2-mini": (512, 157_184, 2048),
    "diffusion-gemma": (256, 262_144, 2816),
    "gpt2-medium": (64, 50_258, 1024),
}


def drawn(seed, rows, vocab, dim, dtype):
    keys = jax.random.split(jax.random.key(seed), 5)
    hidden = 2 * jax.random.normal(keys[0], (rows, dim))
    vocabulary = jax.random.normal(keys[1], (vocab, dim)) / dim**0.5
    own = {
        "bias": jax.random.normal(keys[2], (vocab,)),
        "scale": jax.random.uniform(keys[3], (rows, 1)) + 0.5,
        "keys": jax.random.key_data(jax.random.split(keys[4], rows)),
        "temperature": jnp.full((rows, 1), 0.7),
    }
    return hidden.astype(dtype), vocabulary.astype(dtype), own


@settings(max_examples=12)
@given(
    seed=st.integers(0, 99),
    rows=st.sampled_from([1, 13, 300]),
    vocab=st.sampled_from([128, 300, 517]),
    dim=st.sampled_from([64, 128, 200]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    top=st.sampled_from([1, 2, 9, 64]),
    soft_cap=st.sampled_from([0.0, 3.0]),
    forbidden=st.sampled_from([(), (9, 300)]),
    asked=st.sets(st.sampled_from(["bias", "scale", "keys"])),
    soft=st.booleans(),
)
def test_interpreted_is_the_definition(
    seed, rows, vocab, dim, dtype, top, soft_cap, forbidden, asked, soft
):
    hidden, vocabulary, own = drawn(seed, rows, vocab, dim, dtype)
    asked = asked | ({"temperature"} if "keys" in asked else set())
    options = {
        **{name: own[name] for name in asked},
        "soft_cap": soft_cap, "forbidden": forbidden, "top": top, "soft": soft, "first": 7,
    }  # fmt: skip
    want = jax.jit(lambda h, v: reference.partial_stats(h, v, **options))(hidden, vocabulary)
    got = jax.jit(lambda h, v: tpu.stats(h, v, **options, tile=128, interpret=True))(
        hidden, vocabulary
    )
    exact = dtype == "float32"
    close = partial(
        np.testing.assert_allclose, rtol=1e-5 if exact else 2e-2, atol=2e-5 if exact else 2e-2
    )
    jax.tree.map(close, got.mass, want.mass)
    close(got.scores, want.scores)
    jax.tree.map(close, (got.hot, got.soft), (want.hot, want.soft))
    if exact:
        np.testing.assert_array_equal(got.ids, want.ids)
        if want.race is not None:
            np.testing.assert_array_equal(got.race.id, want.race.id)
            close(got.race.score, want.race.score)


def test_blocks_of_rows_that_nobody_asks_for():
    hidden, vocabulary, own = drawn(1, 600, 128, 64, "float32")
    del own["keys"], own["temperature"]
    run = jax.jit(
        lambda active: tpu.stats(hidden, vocabulary, **own, active=active, interpret=True)
    )
    want = reference.partial_stats(hidden, vocabulary, **own)
    some = lambda found, rows: jax.tree.map(lambda x: x[rows], found)  # noqa: E731
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-5)
    for share in (0.0, 0.1, 0.7, 1.0):
        active = np.random.default_rng(0).random(600) < share
        jax.tree.map(close, some(run(active), active), some(want, active))


def test_what_lies_behind_the_vocabulary_is_not_felt():
    """The last tile is partly outside, where a device may find anything."""
    hidden, vocabulary, _ = drawn(0, 5, 300, 128, "float32")
    from jax.experimental.pallas import tpu as pltpu

    poisoned = pltpu.InterpretParams(uninitialized_memory="nan")
    got = tpu.stats(hidden, vocabulary, top=2, soft=True, tile=256, interpret=poisoned)
    want = reference.partial_stats(hidden, vocabulary, top=2, soft=True)
    np.testing.assert_allclose(got.mass.total, want.mass.total, rtol=1e-5)
    np.testing.assert_allclose(got.soft, want.soft, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(got.ids, want.ids)


def test_what_the_kernel_does_not_take():
    shape = jax.ShapeDtypeStruct
    assert tpu.takes(shape((4, 128), "float32"), np.empty((500, 128))) is None
    assert "float16" in tpu.takes(shape((4, 128), "float16"), np.empty((500, 128)))
    assert "less than a tile" in tpu.takes(shape((4, 128), "float32"), np.empty((100, 128)))
    assert "vectors of 576" in tpu.takes(shape((4, 576), "float32"), np.empty((500, 576)))
    assert "tile=100" in tpu.takes(shape((4, 128), "float32"), np.empty((500, 128)), 100)


def _asked(name, hidden, vocabulary, keys, temperature, active):
    """What decoding asks, of some rows; DiffusionGemma's mean vector and soft cap too."""
    gemma = name == "diffusion-gemma"
    return tpu.stats(
        hidden, vocabulary, top=2, keys=keys, temperature=temperature, soft=gemma, active=active,
        soft_cap=30.0 if gemma else 0.0, forbidden=() if gemma else (len(vocabulary) - 1,),
    )  # fmt: skip


def _arguments(rows, vocab, dim):
    shapes = ((rows, dim), "bfloat16"), ((vocab, dim), "bfloat16"), ((rows, 2), "uint32")
    shapes = (*shapes, ((rows, 1), "float32"), ((rows,), "bool"))
    return [jax.ShapeDtypeStruct(*one) for one in shapes]


@pytest.mark.parametrize("name", SHAPES)
def test_lowers_for_a_tpu(name):
    """Shapes and layouts that Mosaic takes, without its compiler."""
    traced = jax.jit(partial(_asked, name)).trace(*_arguments(*SHAPES[name]))
    lowered = traced.lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text()


# A program takes seconds to compile: quick tests have each shape on one chip, slow ones on all.
PAIRS = [
    pytest.param(name, chip, marks=[pytest.mark.slow] if (i + j) % len(CHIPS) else [])
    for i, name in enumerate(SHAPES)
    for j, chip in enumerate(CHIPS)
]


@pytest.mark.aot("tpu")
@pytest.mark.parametrize(("name", "chip"), PAIRS)
def test_compiles_for_a_chip(name, chip):
    rows, vocab, dim = SHAPES[name]
    compiled = compile_for(chip, partial(_asked, name), *_arguments(rows, vocab, dim))
    assert temporary_bytes(compiled) < rows * vocab * 4 / 20, "scores are formed"
    # A vocabulary that fits into vector memory, S(1), may be fetched there as a whole.
    copies = [x for x in compiled.as_text().splitlines() if " copy(" in x and f"{vocab}," in x]
    assert not [line for line in copies if "S(1)" not in line.partition(" copy(")[0]]


# Cross-entropy


@settings(max_examples=5)
@given(
    seed=st.integers(0, 99),
    rows=st.sampled_from([13, 600]),
    vocab=st.sampled_from([128, 300]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    soft_cap=st.sampled_from([0.0, 3.0]),
    forbidden=st.sampled_from([(), (9, 100)]),
    with_bias=st.booleans(),
)
def test_interpreted_gradient_is_that_of_scores(
    seed, rows, vocab, dtype, soft_cap, forbidden, with_bias
):
    """Against autodiff of all scores, and the tiles of XLA; some targets are other shards'."""
    hidden, vocabulary, own = drawn(seed, rows, vocab, 64, dtype)
    bias = own["bias"] if with_bias else None
    rng, first = np.random.default_rng(seed), 7
    targets = jnp.asarray(rng.integers(101, vocab + 50, rows) + first, jnp.int32)
    d_log_z, d_own = (jnp.asarray(rng.normal(size=rows), jnp.float32) for _ in range(2))

    def plain(hidden, vocabulary, bias):
        scores = reference.scores_of(hidden, vocabulary, bias=bias, soft_cap=soft_cap)
        at = jnp.clip(targets - first, 0, vocab - 1)[:, None]
        there = (targets >= first) & (targets < first + vocab)
        score = jnp.where(there, jnp.take_along_axis(scores, at, axis=1)[:, 0], 0.0)
        for one in forbidden:
            scores = jnp.where(first + jnp.arange(vocab) == one, -jnp.inf, scores)
        return jax.nn.logsumexp(scores, axis=1), score

    (log_z, _), pull = jax.vjp(plain, hidden, vocabulary, bias)
    arguments = hidden, vocabulary, bias, targets, jnp.int32(first), log_z, d_log_z, d_own
    got = cross_entropy_tpu.slopes(
        *arguments, soft_cap=soft_cap, forbidden=forbidden, tile=128, interpret=True
    )
    tiled = _slopes(_Static(soft_cap, forbidden, 128, "xla"), *arguments)
    exact = dtype == "float32"
    close = partial(
        np.testing.assert_allclose, rtol=1e-5 if exact else 2e-2, atol=2e-5 if exact else 2e-2
    )
    jax.tree.map(close, got, tiled)
    if exact:
        jax.tree.map(close, got, pull((d_log_z, d_own)))


def _trained(hidden, vocabulary, targets):
    """A loss and its gradients, as training asks for them; the mask token is forbidden."""
    score = partial(cross_entropy, forbidden=(len(vocabulary) - 1,), implementation="tpu")
    return jax.value_and_grad(lambda *own: score(*own, targets).nats.mean(), (0, 1))(
        hidden, vocabulary
    )


def _batch(name, rows=8192):
    _, vocab, dim = SHAPES[name]
    shapes = ((rows, dim), "bfloat16"), ((vocab, dim), "bfloat16"), ((rows,), "int32")
    return [jax.ShapeDtypeStruct(*one) for one in shapes]


@pytest.mark.parametrize("name", ["llada-8b", "gpt2-medium"])
def test_training_lowers_for_a_tpu(name):
    lowered = jax.jit(_trained).trace(*_batch(name)).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("tpu_custom_call") == 3


@pytest.mark.aot("tpu")
@pytest.mark.parametrize(
    ("chip", "name"),
    [
        ("v5e", "llada2-mini"),
        pytest.param("v5p", "fast-dllm-v2-7b", marks=pytest.mark.slow),
        pytest.param("v6e", "llada2-mini", marks=pytest.mark.slow),
        pytest.param("tpu7x", "llada-8b", marks=pytest.mark.slow),
    ],
)
def test_training_compiles_for_a_chip(chip, name):
    """No tile of scores goes through memory, nor a copy of the vocabulary."""
    compiled = compile_for(chip, _trained, *_batch(name))
    assert temporary_bytes(compiled) < 128 << 20
