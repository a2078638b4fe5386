"""The Hopper kernel of token statistics: interpreted against the definition, and lowered."""

from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels.token_stats import gpu, gpu_running, noise, reference
from pallas_kernels.token_stats import partial as parts

needs_mosaic = pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason="Mosaic GPU as the kernel uses it is in JAX 0.12"
)


def drawn(seed, rows, vocab, dim):
    keys = jax.random.split(jax.random.key(seed), 5)
    hidden = 2 * jax.random.normal(keys[0], (rows, dim), jnp.bfloat16)
    vocabulary = jax.random.normal(keys[1], (vocab, dim), jnp.bfloat16) / dim**0.5
    own = {
        "bias": jax.random.normal(keys[2], (vocab,)),
        "scale": jax.random.uniform(keys[3], (rows, 1)) + 0.5,
        "keys": jax.random.key_data(jax.random.split(keys[4], rows)),
        "temperature": jnp.linspace(0.3, 1.5, rows)[:, None],
    }
    return hidden, vocabulary, own


# rows, tokens, numbers of a vector
CASES = {
    "one row": (1, 256, 64, {"top": 1}),
    "a few rows, the last half tile is empty": (
        13, 3 * 256 + 40, 192, {"top": 4, "first": 7, "keys": True, "forbidden": (7, 300, 812)},
    ),
    "two warpgroups of rows": (
        77, 640, 64, {"top": 2, "bias": True, "scale": True, "soft_cap": 3.0},
    ),
    "several blocks of rows, all at once": (
        300, 400, 64,
        {"bias": True, "scale": True, "soft_cap": 3.0, "keys": True, "forbidden": (5,)},
    ),
}  # fmt: skip


@needs_mosaic
@pytest.mark.parametrize("name", CASES)
def test_interpreted_is_the_definition(name):
    rows, vocab, dim, options = CASES[name]
    hidden, vocabulary, own = drawn(3, rows, vocab, dim)
    options = {key: own[key] if key in own else value for key, value in options.items()}
    if "keys" in options:
        options["temperature"] = own["temperature"]
    exact = hidden.astype(jnp.float32), vocabulary.astype(jnp.float32)
    want = jax.jit(lambda h, v: reference.partial_stats(h, v, **options))(*exact)
    checked = plgpu.InterpretGPUParams(detect_races=True)
    got = jax.jit(lambda h, v: gpu.stats(h, v, **options, programs=3, interpret=checked))(
        hidden, vocabulary
    )
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-5)
    jax.tree.map(close, got._replace(ids=None), want._replace(ids=None))
    np.testing.assert_array_equal(got.ids, want.ids)
    if want.race is not None:
        np.testing.assert_array_equal(got.race.id, want.race.id)


@needs_mosaic
@pytest.mark.parametrize("count", [3, 300])
def test_rows_that_are_not_active_change_nothing(count):
    hidden, vocabulary, own = drawn(4, 400, 640, 64)
    active = jax.random.permutation(jax.random.key(1), 400) < count
    options = {"keys": own["keys"], "temperature": own["temperature"], "scale": own["scale"]}
    got = jax.jit(
        lambda h, v: gpu.stats(
            h, v, **options, active=active, programs=9, interpret=plgpu.InterpretGPUParams()
        )
    )(hidden, vocabulary)
    exact = hidden.astype(jnp.float32), vocabulary.astype(jnp.float32)
    want = reference.partial_stats(*exact, **options)
    keep = np.flatnonzero(active)
    got, want = jax.tree.map(lambda x: x[keep], (got, want))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-5), got, want)


@needs_mosaic
def test_of_equal_scores_the_lowest_id_is_first():
    """Across the warpgroups of a tile, the tiles of a range, and the ranges."""
    hidden = jnp.ones((2, 64), jnp.bfloat16)
    vocabulary = jnp.zeros((4 * 256, 64), jnp.bfloat16).at[jnp.array([190, 500, 130, 900])].set(1)
    got = gpu.stats(hidden, vocabulary, top=4, programs=2, interpret=plgpu.InterpretGPUParams())
    np.testing.assert_array_equal(got.ids, [[130, 190, 500, 900]] * 2)
    np.testing.assert_array_equal(got.scores, np.full((2, 4), 64.0))


def _as_kernel(found: list[parts.Partial]):
    """Parts as the kernel writes them."""
    stack = lambda *columns: jnp.stack([jnp.stack(x) for x in columns])  # noqa: E731
    numbers = stack(
        *([*x.scores.T, x.mass.total, x.mass.spread, x.hot.total, x.hot.spread, x.race.value,
           x.race.score, x.hot.top] for x in found)
    )  # fmt: skip
    return numbers, stack(*([*x.ids.T, x.race.id] for x in found))


@pytest.mark.parametrize("top", [1, 4])
def test_merging_parts_is_folding_them(top):
    keys = jax.random.split(jax.random.key(top), 2)
    scores = jnp.round(3 * jax.random.normal(keys[0], (5, 4 * 7)))  # some are equal
    scores = scores.at[:, 7:14].set(parts.LOWEST)  # a part where all are barred
    of = partial(
        parts.of_scores, top=top, temperature=jnp.full((5, 1), 0.5),
        keys=jax.random.key_data(jax.random.split(keys[1], 5)),
    )  # fmt: skip
    found = [of(scores[:, i : i + 7], jnp.arange(i, i + 7)) for i in range(0, 28, 7)]
    want = reduce(parts.merge, found)
    numbers, ids = _as_kernel(found)
    got = gpu._merged(numbers, ids, top)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, want)
    behind = gpu._without(jnp.concatenate([numbers, jnp.full_like(numbers, 1e9)]), 4, top)
    again = gpu._merged(behind, jnp.concatenate([ids, ids]), top)
    jax.tree.map(np.testing.assert_array_equal, again, got)


def test_noise_without_log1p_is_the_noise():
    ends = [0, 1, 2, 2**30, 2**31 - 2, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1]
    bits = jnp.concatenate([
        jnp.array(ends, jnp.uint32), jax.random.bits(jax.random.key(0), (1 << 16,))
    ])  # fmt: skip
    np.testing.assert_allclose(
        gpu_running.gumbel(bits), noise.gumbel_of(bits), rtol=2e-6, atol=2e-6
    )


def test_what_the_kernel_does_not_take(monkeypatch):
    shape = jax.ShapeDtypeStruct
    hidden = shape((4, 576), jnp.bfloat16)
    vocabulary = shape((49_152, 576), jnp.bfloat16)
    if jax.__version_info__ < (0, 12):
        assert "needs 0.12" in gpu.takes(hidden, vocabulary)
        monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    assert gpu.takes(hidden, vocabulary, top=4) is None
    assert "chooses its tile" in gpu.takes(hidden, vocabulary, 128)
    assert "hidden states are float32" in gpu.takes(shape((4, 576), "float32"), vocabulary)
    assert "vectors are float32" in gpu.takes(hidden, shape((49_152, 576), "float32"))
    narrow = shape((4, 100), jnp.bfloat16), shape((512, 100), jnp.bfloat16)
    assert "no multiple of 64" in gpu.takes(*narrow)
    assert "no multiple of 8" in gpu.takes(hidden, shape((50_257, 576), jnp.bfloat16))
    assert "top=5" in gpu.takes(hidden, vocabulary, top=5)
    assert "mean vector" in gpu.takes(hidden, vocabulary, soft=True)
    with pytest.raises(ValueError, match="mean vector"):
        gpu.stats(hidden, vocabulary, soft=True)


@needs_mosaic
@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("sampled", [False, True])
def test_lowers_for_a_gpu(rows, sampled):
    """Layouts that Mosaic GPU takes, and shared memory that there is, without a compiler."""
    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), (AxisType.Explicit,), abstract_device=device)
    shape = jax.ShapeDtypeStruct
    arrays = [shape((rows, 576), jnp.bfloat16), shape((49_152, 576), jnp.bfloat16)]
    if sampled:
        arrays += [shape((rows, 2), jnp.uint32), shape((rows, 1), jnp.float32)]

    def asked(hidden, vocabulary, keys=None, temperature=None):
        return gpu.stats(hidden, vocabulary, keys=keys, temperature=temperature)

    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(asked).trace(*arrays).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
