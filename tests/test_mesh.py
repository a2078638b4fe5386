"""The same numbers on eight devices as on one: attention, experts, vocabulary, decoding."""

import dataclasses
import itertools
import re
from collections import Counter
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax import losses, recipes, sharding
from dllm_jax.cache import KVCache, allocate, append
from dllm_jax.corruption import MaskedBlocks, MaskNoise, MixedNoise
from dllm_jax.decode import generate as decode
from dllm_jax.decode.generate import generate, infill, stream
from dllm_jax.decode.state import result
from dllm_jax.likelihood import bound, log_likelihood
from dllm_jax.nn.adapters import AdapterConfig
from dllm_jax.nn.head import cross_entropy_of, logits_of, scores_of, stats_of
from dllm_jax.nn.transformer import forward
from dllm_jax.nn.tree import param_axes, param_shapes
from dllm_jax.ops.attention import attention
from dllm_jax.ops.embedding import lookup
from dllm_jax.ops.moe import Stack, experts
from dllm_jax.sharding import make_mesh, shardings
from dllm_jax.testing import tiny
from dllm_jax.testing.systems import MODELS, SYSTEMS, prompts
from pallas_kernels import BlockMask

MESHES = {
    "8x1": dict(data=1, fsdp=8),
    "4x2": dict(data=2, fsdp=2, tensor=2),
    "2x2x2": dict(data=1, expert=2, context=2, tensor=2),
}
BUDGET = 20


@pytest.fixture
def short(monkeypatch):
    """Pieces of texts may be as short as four entries."""
    monkeypatch.setattr(sharding, "LEAST", 4)


def agrees(run, *args, mesh, atol=2e-5):
    """Whether `run` and its gradient are the same in the scope of a mesh as outside."""
    floats = [i for i, x in enumerate(args) if jnp.issubdtype(x.dtype, jnp.floating)]

    @jax.jit
    def both(*args):
        out, pull = jax.vjp(lambda *own: run(*_filled(args, floats, own)), *_picked(args, floats))
        seed = lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)  # noqa: E731
        return out, pull(jax.tree.map(seed, out))

    alone = both(*args)
    with jax.set_mesh(mesh):
        together = both(*args)
    for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(one, other, atol=atol)


def _picked(args, at):
    return [args[i] for i in at]


def _filled(args, at, own):
    found = list(args)
    for i, x in zip(at, own, strict=True):
        found[i] = x
    return found


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# Attention

DUAL = BlockMask.dual_stream(16, 4)
ATTENTION = {
    "causal": (16, BlockMask.causal(16), {}),
    "window": (16, BlockMask.causal(16), {"window": 5}),
    "bidirectional": (16, BlockMask.bidirectional(16), {"lengths": True}),
    "dual stream": (32, DUAL, {"lengths": True}),
    "window of a dual stream": (32, DUAL, {"window": 5}),
    "two noisy texts": (48, BlockMask.dual_stream(16, 4, repeat=2), {"lengths": True}),
    "riding block": (18, BlockMask.dual_stream(16, 2, stride=0, offset=16), {"lengths": True}),
    "behind a cache": (16, BlockMask.block_causal(16, 4), {"cache": "rows", "lengths": True}),
    "noise before its text": (16, BlockMask.block_diagonal(4), {"cache": "queries"}),
    "around a hole": (4, BlockMask.bidirectional(4), {"cache": "rows", "hole": True}),
}


def marked(cases, quick):
    """Parameters, all of them slow but the quick ones."""
    return [pytest.param(*x, marks=[pytest.mark.slow] * (x not in quick)) for x in cases]


SPLIT, SHARED = (4, 4), (4, 1)  # query heads and kv heads, over two devices


@pytest.mark.parametrize(
    ("name", "heads"),
    marked(
        itertools.product(ATTENTION, (SPLIT, SHARED)),
        [("noise before its text", SHARED), ("around a hole", SPLIT)],
    ),
)
def test_attention_over_a_mesh(name, heads, short):
    entries, mask, kinds = ATTENTION[name]
    batch, size, slots, kv_heads = 2, 8, 24, heads[1]
    q, k, v = (draw(batch, entries, n, size, seed=n + i) for i, n in enumerate((*heads, kv_heads)))
    options, packed = {}, draw(3, batch, kv_heads, slots, 2 * size, seed=9)
    if kinds.get("lengths"):
        options["lengths"] = jnp.array([mask.clean, 5])
    if kinds.get("window"):
        options["window"] = kinds["window"]
    if kinds.get("hole"):
        options["hole"] = jnp.array([4, 8]), jnp.array([8, 12])
    end = jnp.array([slots, 7])
    if kinds.get("cache") == "queries":
        end = jnp.arange(batch * entries).reshape(batch, entries) % slots
    if "cache" not in kinds:
        run = lambda q, k, v: attention(q, k, v, mask, **options)  # noqa: E731
        return agrees(run, q, k, v, mesh=make_mesh(data=2, context=2, tensor=2))

    def run(q, k, v, packed):
        layer = {"cache": packed, "layer": jnp.int32(1), "cache_end": end}
        return attention(q, k, v, mask, **layer, **options)

    agrees(run, q, k, v, packed, mesh=make_mesh(data=2, context=2, tensor=2))
    return None


@pytest.mark.slow
def test_kv_heads_that_fit_no_axis_are_whole():
    q, k, v = draw(2, 6, 6, 8), draw(2, 6, 3, 8, seed=1), draw(2, 6, 3, 8, seed=2)
    run = lambda q, k, v: attention(q, k, v, BlockMask.causal(6))  # noqa: E731
    agrees(run, q, k, v, mesh=make_mesh(data=4, tensor=2))


# What else is mapped


WITH_TENSOR, WITH_FSDP = (("expert", 2), ("tensor", 2)), (("fsdp", 2), ("expert", 4))


@pytest.mark.parametrize(
    ("sizes", "count"),
    marked(itertools.product((WITH_TENSOR, WITH_FSDP), (4, 3)), [(WITH_TENSOR, 4)]),
)
def test_experts_over_a_mesh(sizes, count):
    dim, ffn, layers = 8, 6, 2
    x = draw(8, 4, dim)
    rng = np.random.default_rng(1)
    chosen = jnp.asarray(np.argsort(rng.normal(size=(8, 4, count)))[..., :2])
    weights = draw(8, 4, 2, seed=2)
    gate, up = (draw(layers, count, dim, ffn, seed=i) for i in (3, 4))
    down = draw(layers, count, ffn, dim, seed=5)

    def run(x, weights, gate, up, down):
        stack = Stack(jnp.int32(1), *jax.lax.stop_gradient((gate, up, down)))
        return experts(x, chosen, weights, gate[1], up[1], down[1], stack=stack)

    agrees(run, x, weights, gate, up, down, mesh=make_mesh(**dict(sizes)), atol=1e-4)


@pytest.mark.parametrize(("fsdp", "vocab"), marked([(2, 16), (1, 16), (2, 15)], [(2, 16)]))
def test_lookup_over_a_mesh(fsdp, vocab):
    tokens = jnp.arange(24).reshape(4, 6) % (vocab + 2) - 1  # two ids out of bounds
    mesh = make_mesh(data=4 // fsdp, fsdp=fsdp, tensor=2)
    agrees(lambda table: lookup(table, tokens), draw(vocab, 8), mesh=mesh)


@pytest.mark.parametrize("vocab", [32, pytest.param(31, marks=pytest.mark.slow)])
def test_the_vocabulary_over_a_mesh(vocab):
    model, params = tiny(vocab_size=vocab, adapter=False)
    hidden, targets = draw(4, 6, 32), jnp.arange(24).reshape(4, 6)
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), (4, 6)))

    @jax.jit
    def run(params, hidden):
        loss = lambda p, h: cross_entropy_of(model, p, h, targets, (3,)).nats.sum()  # noqa: E731
        stats = stats_of(
            model, params, hidden, top=3, keys=keys, temperature=jnp.float32(0.7), soft="exact",
            scale=jnp.full((4, 6), 0.9), active=targets > 3, forbidden=(2,),
        )  # fmt: skip
        nats = jax.value_and_grad(loss, argnums=(0, 1))(params, hidden)
        return stats, nats, scores_of(model, params, hidden, 5), logits_of(model, params, hidden)

    alone = run(params, hidden)
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        together = run(params, hidden)
    for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(one, other, atol=3e-5)
    np.testing.assert_array_equal(alone[0].ids, together[0].ids)
    np.testing.assert_array_equal(alone[0].drawn.ids, together[0].drawn.ids)


# Whole programs


@cache
def model_of(name):
    return MODELS[name]()


def on(mesh, model, params):
    placed = shardings(param_axes(model.config), mesh, shapes=param_shapes(model.config))
    return jax.device_put(params, placed)


def decoded(name, params=None, rows=8):
    model, own = model_of(SYSTEMS[name].model)
    key = jax.random.key(3) if SYSTEMS[name].draws else None
    return generate(
        model, own if params is None else params, prompts(rows, 70), recipe=SYSTEMS[name].recipe,
        max_new_tokens=BUDGET, key=key,
    )  # fmt: skip


alone = cache(decoded)


def same(one, other):
    for field in ("tokens", "lengths", "stop", "nfe", "queries"):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field), err_msg=field)
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=2e-4)


DECODED = [
    (name, sizes, explicit)
    for name in SYSTEMS
    for sizes in MESHES
    for explicit in (False, True)
    if not explicit or sizes == "2x2x2"
]


@pytest.mark.parametrize(
    ("name", "sizes", "explicit"),
    marked(DECODED, [("ar", "2x2x2", True)]),
)
def test_a_recipe_writes_the_same_on_a_mesh(name, sizes, explicit):
    mesh = make_mesh(**MESHES[sizes], explicit=explicit)
    params = on(mesh, *model_of(SYSTEMS[name].model))
    same(alone(name), decoded(name, params))
    assert jax.sharding.get_abstract_mesh().empty


def test_every_named_recipe_is_among_them():
    assert set(SYSTEMS) == set(recipes.TABLE)
    assert {system.model for system in SYSTEMS.values()} == set(MODELS)


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_whole():
    mesh = make_mesh(data=4, tensor=2)
    same(decoded("ar", rows=3), decoded("ar", on(mesh, *model_of("causal")), rows=3))


@pytest.mark.slow
@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
def test_streams_gaps_and_likelihoods_on_a_mesh(explicit):
    model, params = model_of("llada")
    recipe = SYSTEMS["fast_dllm_dual"].recipe
    rows = [[*row[:9], None, None, *row[9:14]] for row in prompts(4, 20)]
    far = on(make_mesh(data=4, tensor=2, explicit=explicit), model, params)
    same(infill(model, params, rows, recipe=recipe), infill(model, far, rows, recipe=recipe))
    ends = [
        [*stream(model, p, prompts(4, 20), recipe=recipe, max_new_tokens=8)][-1]
        for p in (params, far)
    ]
    same(*(result(state, 8) for state in ends))
    answers = [row[:3] for row in prompts(4, 20)]
    for run in (
        partial(log_likelihood, recipe=recipe),
        partial(bound, key=jax.random.key(2), samples=4, chunk=2),
    ):
        found = [run(model, p, prompts(4, 20), answers)[0] for p in (params, far)]
        np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("name", ["causal", "llada2"])
def test_the_loss_and_its_gradient_on_a_mesh(name, sizes, explicit):
    model, params = model_of(name)
    model = dataclasses.replace(model.config, remat=True).build()
    tokens = np.random.default_rng(0).integers(3, 30, (8, 128)).astype(np.int32)
    batch = {"tokens": tokens, "lengths": np.full(8, 120), "prompts": np.arange(8) + 2}
    objective = losses.DualStream(noise=MaskedBlocks(block_size=8, blocks=16), ar_weight=0.5)
    if name != "causal":
        objective = losses.Diffusion(noise=MaskNoise(block_size=8))

    @jax.jit
    def run(params, batch):
        loss = lambda p: objective.loss(model, p, batch, jax.random.key(1))  # noqa: E731
        return jax.value_and_grad(loss, has_aux=True)(params)

    mesh = make_mesh(**MESHES[sizes], explicit=explicit)
    one = run(params, batch)
    with jax.set_mesh(mesh):
        other = run(on(mesh, model, params), batch)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-4)


WHOLE = dict(attention="bidirectional", alignment="same_position")
BLOCKS = dict(attention="block_causal", block_size=4, alignment="shifted")
OBJECTIVES = {
    "masked": (WHOLE, losses.Diffusion(confidence_weight=0.5)),
    "mixed": (WHOLE, losses.Diffusion(noise=MixedNoise())),
    "blocks": (
        BLOCKS,
        losses.Diffusion(noise=MaskNoise(block_size=4, weighting="flat"), complementary=True),
    ),
    "documents": (BLOCKS, losses.Diffusion(noise=MaskNoise(block_size=4))),
    "autoregressive": ({}, losses.Autoregressive()),
    "distillation": (
        WHOLE | dict(adapter=AdapterConfig(rank=2, gated=False)),
        losses.Distillation(block_size=4),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_and_its_gradient_on_a_mesh(name, explicit):
    changes, objective = OBJECTIVES[name]
    model, params = tiny(**{"adapter": False, "mask_id": 2, **changes})
    tokens = np.random.default_rng(0).integers(3, 30, (8, 32)).astype(np.int32)
    batch = {"tokens": tokens, "lengths": np.full(8, 30), "prompts": np.arange(8) + 2}
    if name == "documents":
        segments = np.repeat(np.arange(2, dtype=np.int32), 16)
        batch |= {"segments": np.tile(segments, (8, 1)), "prompts": np.zeros(8, int)}

    @jax.jit
    def run(params, batch):
        loss = lambda p: objective.loss(model, p, batch, jax.random.key(1))  # noqa: E731
        return jax.value_and_grad(loss, has_aux=True)(params)

    mesh = make_mesh(data=2, fsdp=2, tensor=2, explicit=explicit)
    one = run(params, batch)
    with jax.set_mesh(mesh):
        other = run(on(mesh, model, params), batch)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
def test_a_pass_that_is_not_compiled(explicit):
    model, params = model_of("causal")
    tokens = jnp.arange(32).reshape(4, 8) % 30 + 1
    near, mesh = forward(model, params, tokens), make_mesh(data=4, tensor=2, explicit=explicit)
    with jax.set_mesh(mesh):
        far = forward(model, on(mesh, model, params), tokens)
        assert far.hidden.sharding.spec[0] == "data"
    np.testing.assert_allclose(near.hidden, far.hidden, atol=1e-5)
    np.testing.assert_allclose(near.kv, far.kv, atol=1e-5)


# What travels

_COLLECTIVE = re.compile(
    r"= (\S+) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
)


def collectives(text):
    """The kind and the type of each collective of a compiled program, as often as it is written."""
    return [(kind, type_.split("{")[0]) for type_, kind in _COLLECTIVE.findall(text)]


def test_nothing_travels_for_an_append():
    def run(kv, lengths, more, counts):
        cache = append(KVCache(kv, lengths), more, counts)
        return cache.kv, cache.lengths

    mesh = make_mesh(data=2, context=2, tensor=2)
    with jax.set_mesh(mesh):
        cache = jax.jit(lambda: allocate(2, 4, 2, 32, 8))()
        assert cache.kv.addressable_shards[0].data.shape == (2, 2, 1, 32, 16)
        arrays = cache.kv, cache.lengths, jnp.ones((2, 4, 2, 3, 16)), jnp.arange(4)
        program = jax.jit(run, donate_argnums=0).lower(*arrays).compile()
    assert collectives(program.as_text()) == []
    assert program.memory_analysis().alias_size_in_bytes == cache.kv.nbytes // 4


# Two sums a layer, one of the embedding, one gathering for the choice. A step of blocks is written
# twice, for one and for two blocks, and asks how many it needs and for the mask token's score.
@pytest.mark.parametrize(
    ("name", "sums"), [("ar", 2 + 1), pytest.param("sdar", 2 * (2 + 1) + 2, marks=pytest.mark.slow)]
)
def test_what_travels_in_a_step(name, sums, optimised):
    model, params = model_of(SYSTEMS[name].model)
    recipe = dataclasses.replace(SYSTEMS[name].recipe, sampling=recipes.ar().sampling)
    mesh = make_mesh(data=2, tensor=2)
    with jax.set_mesh(mesh):
        far = on(mesh, model, params)
        state = next(stream(model, far, prompts(4, 20), recipe=recipe, max_new_tokens=8))
        leaves, tree = jax.tree.flatten(state)  # a state is of arrays alone

        def step(params, leaves):
            state = jax.tree.unflatten(tree, leaves)
            return jax.tree.leaves(decode._step(model, params, recipe, None, state))

        text = jax.jit(step).lower(far, leaves).compile().as_text()
    assert Counter(kind for kind, _ in collectives(text)) == {"all-reduce": sums, "all-gather": 1}
