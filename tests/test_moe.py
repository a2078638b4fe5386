"""Experts: the grouped product is the dense one, and the router is the published arithmetic."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_jax.cache import append
from dllm_jax.nn.adapters import AdapterConfig
from dllm_jax.nn.transformer import Transformer, TransformerConfig, forward
from dllm_jax.nn.tree import init, param_axes, param_shapes
from dllm_jax.ops import moe
from dllm_jax.ops.grouped import rows_per_tile, tiles
from dllm_jax.ops.moe import MoEConfig, Stack, experts, route
from dllm_jax.sharding import make_mesh, shardings
from pallas_kernels import BlockMask

TOKENS, DIM, FFN, EXPERTS, TOP = 7, 6, 5, 8, 3
RNG = np.random.default_rng(0)
GATE, UP = (jnp.asarray(RNG.standard_normal((EXPERTS, DIM, FFN), np.float32)) for _ in range(2))
DOWN = jnp.asarray(RNG.standard_normal((EXPERTS, FFN, DIM), np.float32))
X = jnp.asarray(RNG.standard_normal((TOKENS, DIM), np.float32))


def pairs(seed: int):
    rng = np.random.default_rng(seed)
    chosen = np.stack([rng.permutation(EXPERTS)[:TOP] for _ in range(TOKENS)])
    weights = rng.standard_normal((TOKENS, TOP), np.float32)
    return jnp.asarray(chosen, jnp.int32), jnp.asarray(weights)


grouped = jax.jit(experts)


@jax.jit
def every_expert(x, chosen, weights, gate, up, down):
    """Each expert on each token; those that were not chosen weigh nothing."""
    out = jnp.einsum("td,edf->tef", x, gate)
    out = jax.nn.silu(out) * jnp.einsum("td,edf->tef", x, up)
    out = jnp.einsum("tef,efd->ted", out, down)
    table = jnp.zeros((len(x), EXPERTS)).at[jnp.arange(len(x))[:, None], chosen].add(weights)
    return jnp.einsum("ted,te->td", out, table)


# What CPUs, GPUs and TPUs run: tiles one by one, several in a step, and `lax.ragged_dot`.
FORMS = {
    "one": partial(moe._tiled, 1),
    "three": partial(moe._tiled, 3),
    "ragged": partial(moe._ragged, True),
    "ragged, split": partial(moe._ragged, False),
}


@partial(jax.jit, static_argnames=("form",))
def mixture(x, chosen, weights, gate, up, down, form="one"):
    stack = Stack(jnp.int32(0), gate[None], up[None], down[None])
    return FORMS[form](jax.nn.silu, x, chosen, weights, (gate, up, down), stack)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(3))
def test_grouped_equals_every_expert_on_every_token(seed: int, form: str):
    chosen, weights = pairs(seed)
    got = mixture(X, chosen, weights, GATE, UP, DOWN, form=form)
    want = every_expert(X, chosen, weights, GATE, UP, DOWN)
    np.testing.assert_allclose(got, want, atol=1e-4)


def gradients(run, chosen):
    def loss(x, weights, *matrices):
        return jnp.square(run(x, chosen, weights, *matrices)).sum()

    return jax.jit(jax.grad(loss, argnums=range(5)))


@pytest.mark.parametrize("form", [*FORMS, "experts"])
def test_gradients_are_those_of_the_dense_form(form: str):
    chosen, weights = pairs(4)
    run = experts if form == "experts" else partial(mixture, form=form)
    inputs = X, weights, GATE, UP, DOWN
    got, want = (gradients(f, chosen)(*inputs) for f in (run, every_expert))
    for a, b in zip(got, want, strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("share", ["some", "all", "none"])
def test_pieces_of_pairs_are_those_of_the_experts_here(share):
    """Pairs of other devices' experts have the number behind the last one's."""
    chosen, weights = pairs(4)
    away = {"some": chosen % 3 == 0, "all": chosen < 0, "none": chosen >= 0}[share]
    here, kept = jnp.where(away, EXPERTS, chosen), jnp.where(away, 0, weights)
    own, stack = (GATE, UP, DOWN), Stack(jnp.int32(0), GATE[None], UP[None], DOWN[None])
    form = moe._Pieces(True, 4)
    got = jax.jit(partial(form, jax.nn.silu))(X, here, kept, own, stack)
    np.testing.assert_allclose(got, every_expert(X, chosen, kept, *own), atol=1e-4)
    grad = jax.random.normal(jax.random.key(0), X.shape)
    found = jax.jit(partial(form.pull, jax.nn.silu))(X, here, kept, own, stack, grad)
    dense = lambda x, weights, own: every_expert(x, chosen, jnp.where(away, 0, weights), *own)  # noqa: E731
    wanted = jax.vjp(dense, X, kept, own)[1](grad)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-4)


def test_an_expert_that_nobody_chose_is_not_read():
    """Nor multiplied by nothing: not even its infinities are felt. Its gradient is zero."""
    chosen = jnp.asarray(np.random.default_rng(0).choice([1, 4, 6], (TOKENS, 1)), jnp.int32)
    used = np.isin(np.arange(EXPERTS), chosen)[:, None, None]
    weights = jnp.ones((TOKENS, 1))
    clean = GATE, UP, DOWN
    dirty = [jnp.where(used, matrices, jnp.nan) for matrices in clean]
    np.testing.assert_array_equal(
        grouped(X, chosen, weights, *dirty), grouped(X, chosen, weights, *clean)
    )
    run = gradients(experts, chosen)
    got, want = (run(X, weights, *matrices) for matrices in (dirty, clean))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    for grad in got[2:]:
        assert np.any(grad[4])
        assert not np.any(np.where(used, 0, grad))


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_every_platform_multiplies_grouped(platform: str):
    """XLA's `ragged_dot` is grouped on TPU alone."""
    chosen, weights = pairs(0)
    run = gradients(experts, chosen)
    text = jax.export.export(run, platforms=[platform])(X, weights, GATE, UP, DOWN).mlir_module()
    assert ("ragged_dot" in text) == (platform == "tpu")
    assert ("stablehlo.while" in text) == (platform != "tpu")


def test_neighbours_change_nothing():
    """A token alone, among few and many others, and behind padding of any kind."""
    chosen, weights = pairs(5)
    whole = grouped(X, chosen, weights, GATE, UP, DOWN)
    for t in range(TOKENS):
        alone = grouped(X[t : t + 1], chosen[t : t + 1], weights[t : t + 1], GATE, UP, DOWN)
        np.testing.assert_allclose(alone[0], whole[t], atol=1e-5)
    many = [jnp.tile(x, (12, 1)) for x in (X, chosen, weights)]
    assert rows_per_tile(many[1].size, EXPERTS) > rows_per_tile(chosen.size, EXPERTS)
    np.testing.assert_allclose(grouped(*many, GATE, UP, DOWN)[:TOKENS], whole, atol=1e-5)
    junk = X.at[3:].set(1e6)
    np.testing.assert_array_equal(grouped(junk, chosen, weights, GATE, UP, DOWN)[:3], whole[:3])


def test_the_sum_over_experts_is_in_float32():
    """One expert in bfloat16 three times over, with weights whose sum bfloat16 would round."""
    x = X.astype(jnp.bfloat16)
    chosen, one = jnp.zeros((TOKENS, TOP), jnp.int32), jnp.ones((TOKENS, 1))
    weights = jnp.broadcast_to(jnp.array([256.0, 1.0, -256.0]), (TOKENS, TOP))
    got = grouped(x, chosen, weights, GATE, UP, DOWN)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, grouped(x, chosen[:, :1], one, GATE, UP, DOWN))


@pytest.mark.parametrize(
    ("form", "dtype"), [("experts", "float32"), ("ragged", "float32"), ("ragged", "bfloat16")]
)
def test_the_experts_of_a_layer_are_read_in_their_stack(form, dtype):
    """The values are the stack's, whatever its dtype; the gradients go to the layer's own."""
    chosen, weights = pairs(6)
    own = tuple(m.astype(dtype) for m in (GATE, UP, DOWN))
    stack = Stack(jnp.int32(1), *(jnp.stack([m + 1, m, m - 1]) for m in own))

    def run(x, chosen, weights, *own, stack=stack):
        if form == "experts":
            return experts(x, chosen, weights, *own, stack=stack)
        return moe._ragged(True, jax.nn.silu, x, chosen, weights, own, stack)

    alone = partial(run, stack=Stack(jnp.int32(0), *(m[None] for m in own)))
    zeros = [jnp.zeros_like(m) for m in own]
    got, want = jax.jit(run)(X, chosen, weights, *zeros), jax.jit(alone)(X, chosen, weights, *own)
    np.testing.assert_array_equal(got, want)
    got, want = (gradients(f, chosen)(X, weights, *own) for f in (run, alone))
    jax.tree.map(np.testing.assert_array_equal, got, want)


# Tiles

laid = jax.jit(tiles, static_argnums=(1, 2))


@given(
    shape=st.sampled_from([(1, 1, 4, 1), (5, 2, 70, 5), (40, 4, 9, 1), (16, 3, 3, 5)]),
    seed=st.integers(0, 10_000),
)
def test_tiles_hold_every_pair_once(shape: tuple[int, ...], seed: int):
    """Of tokens that choose among all groups, or among some."""
    tokens, top, groups, at_once = shape
    rng = np.random.default_rng(seed)
    some = rng.permutation(groups)[: rng.integers(top, groups + 1)]
    chosen = np.stack([rng.permutation(some)[:top] for _ in range(tokens)])
    lie = jax.tree.map(np.asarray, laid(jnp.asarray(chosen, jnp.int32), groups, at_once))
    count, size = lie.source.shape
    assert size == rows_per_tile(chosen.size, groups)
    assert count % at_once == 0
    assert len(np.unique(lie.slot)) == chosen.size
    at, row = np.divmod(lie.slot, size)
    np.testing.assert_array_equal(lie.group[at], chosen)
    np.testing.assert_array_equal(lie.source[at, row], np.arange(tokens)[:, None].repeat(top, 1))
    assert (lie.source < tokens).sum() == chosen.size  # the rest is empty
    needed = np.ceil(np.bincount(chosen.reshape(-1)) / size).sum()
    assert lie.used == needed <= min(chosen.size, count)
    assert ((lie.group >= 0) & (lie.group < groups)).all()


@pytest.mark.parametrize(
    ("pairs", "groups", "rows"),
    [(8, 64, 4), (256, 256, 4), (256, 64, 8), (512, 64, 16), (4096, 64, 32), (1, 1, 4)],
)
def test_rows_of_a_tile(pairs: int, groups: int, rows: int):
    assert rows_per_tile(pairs, groups) == rows


# The router

GROUPED = MoEConfig(
    num_experts=EXPERTS,
    experts_per_token=TOP,
    ffn_dim=FFN,
    score="sigmoid",
    groups=4,
    top_groups=2,
    expert_bias=True,
    normalise=True,
    scale=2.5,
)
routed = jax.jit(route, static_argnames="config")


def by_hand(logits, bias, c: MoEConfig):
    """The published router in NumPy, one token at a time."""
    logits, chosen, weights = logits.astype(np.float64), [], []
    for row in logits:
        if c.score == "sigmoid":
            score = 1 / (1 + np.exp(-row))
        else:
            score = np.exp(row - row.max())
            score /= score.sum()
        ranked = score if bias is None else score + bias
        size = c.num_experts // c.groups
        value = [np.sort(ranked[g * size : (g + 1) * size])[-2:].sum() for g in range(c.groups)]
        kept = np.argsort(value)[::-1][: c.top_groups]
        allowed = [e for e in range(c.num_experts) if e // size in kept]
        best = sorted(allowed, key=lambda e: -ranked[e])[: c.experts_per_token]
        weight = (ranked if c.biased_weights else score)[best]
        chosen.append(best)
        weights.append(c.scale * (weight / weight.sum() if c.normalise else weight))
    return np.array(chosen), np.array(weights)


@given(seed=st.integers(0, 10_000), spread=st.sampled_from([0.1, 1.0, 5.0]))
def test_groups_limit_the_choice(seed: int, spread: float):
    rng = np.random.default_rng(seed)
    logits = (spread * rng.standard_normal((TOKENS, EXPERTS))).astype(np.float32)
    bias = (0.3 * rng.standard_normal(EXPERTS)).astype(np.float32)
    chosen, weights = (
        np.asarray(x) for x in routed(jnp.asarray(logits), jnp.asarray(bias), GROUPED)
    )
    want, want_weights = by_hand(logits, bias, GROUPED)
    np.testing.assert_array_equal(chosen, want)
    np.testing.assert_allclose(weights, want_weights, rtol=1e-4)
    for row in chosen:
        assert len(set(row)) == TOP
        assert len({e // 2 for e in row}) <= GROUPED.top_groups
    np.testing.assert_allclose(weights.sum(axis=-1), 2.5, rtol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        dict(),
        dict(normalise=True),
        dict(expert_bias=True, biased_weights=True),
        dict(expert_bias=True),
        dict(score="sigmoid", groups=8, top_groups=4),
    ],
    ids=str,
)
def test_routers_without_groups(config: dict):
    config = MoEConfig(num_experts=EXPERTS, experts_per_token=TOP, ffn_dim=FFN, **config)
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((TOKENS, EXPERTS)).astype(np.float32)
    bias = rng.standard_normal(EXPERTS).astype(np.float32) if config.expert_bias else None
    chosen, weights = route(
        jnp.asarray(logits), None if bias is None else jnp.asarray(bias), config
    )
    want, want_weights = by_hand(logits, bias, config)
    np.testing.assert_array_equal(chosen, want)
    np.testing.assert_allclose(weights, want_weights, rtol=1e-5)
    assert weights.dtype == jnp.float32


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(score="tanh"), "score='tanh' is neither softmax nor sigmoid"),
        (dict(groups=3), "num_experts=8 must be a multiple of groups=3"),
        (dict(groups=4, top_groups=5), "top_groups=5 must be from 1 to 4"),
        (dict(experts_per_token=0), "experts_per_token=0 must be from 1 to 8"),
        (dict(groups=4), "experts_per_token=3 must be from 1 to 2, the experts that a token may"),
    ],
)
def test_impossible_mixtures_are_named(wrong: dict, message: str):
    good = dict(num_experts=EXPERTS, experts_per_token=TOP, ffn_dim=FFN)
    with pytest.raises(ValueError, match=message):
        MoEConfig(**{**good, **wrong})


# In the transformer

MOE = MoEConfig(
    num_experts=4, experts_per_token=2, ffn_dim=16, shared_ffn_dim=8, first_dense=1,
    score="sigmoid", groups=2, top_groups=1, expert_bias=True, normalise=True,
)  # fmt: skip
MODEL = Transformer(
    TransformerConfig(
        vocab_size=32, num_layers=3, dim=32, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48,
        rotary_dim=4, qk_norm=True, moe=MOE,
    )
)  # fmt: skip
PARAMS = jax.jit(lambda key: init(key, param_shapes(MODEL.config)))(jax.random.key(0))
run = jax.jit(partial(forward, MODEL))


def test_two_stacks_of_layers():
    assert PARAMS["dense_layers"]["mlp"]["gate"].shape == (1, 32, 48)
    assert PARAMS["layers"]["mlp"]["gate"].shape == (2, 4, 32, 16)
    assert PARAMS["layers"]["attention"]["q"].shape[0] == 2
    spread = np.asarray(PARAMS["layers"]["mlp"]["gate"]).std()
    assert 0.8 < spread * 32**0.5 < 1.2  # by the inputs of one expert, not by how many there are


def test_prefill_and_a_block_equal_one_pass():
    """The number of a layer in the cache goes on from one stack to the next."""

    @jax.jit
    def both(tokens):
        whole = forward(MODEL, PARAMS, tokens, mask=BlockMask.block_causal(12, 4))
        first = forward(MODEL, PARAMS, tokens[:, :8], mask=BlockMask.block_causal(8, 4))
        cache = append(MODEL.cache(2, 12), first.kv, jnp.full(2, 8))
        mask = BlockMask.block_causal(4, 4)
        return whole, forward(MODEL, PARAMS, tokens[:, 8:], mask=mask, cache=cache)

    whole, rest = both(jnp.asarray(RNG.integers(2, 30, (2, 12)), jnp.int32))
    assert whole.kv.shape[0] == 3
    np.testing.assert_allclose(whole.kv[:, :, :, 8:], rest.kv, atol=1e-5)
    np.testing.assert_allclose(whole.hidden[:, 8:], rest.hidden, atol=1e-5)


def test_frozen_layers_across_the_stacks():
    @jax.jit
    @jax.grad
    def gradient(params):
        hidden = forward(MODEL, params, jnp.array([[3, 4, 5, 6]]), frozen_layers=2).hidden
        return jnp.square(hidden - 1).sum()

    grads = gradient(PARAMS)
    router = np.asarray(grads["layers"]["mlp"]["router"])
    assert not np.any(grads["dense_layers"]["mlp"]["up"])
    assert not np.any(router[0])
    assert np.any(router[1])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


def test_split_over_a_mesh():
    placed = shardings(
        param_axes(MODEL.config), make_mesh(fsdp=2, tensor=2), shapes=param_shapes(MODEL.config)
    )
    params = jax.device_put(PARAMS, placed)
    assert not params["layers"]["mlp"]["down"].sharding.is_fully_replicated
    tokens = jnp.asarray(RNG.integers(2, 30, (2, 8)), jnp.int32)
    np.testing.assert_allclose(
        run(params, tokens).hidden, run(PARAMS, tokens).hidden, atol=1e-5, rtol=1e-5
    )


def test_half_of_a_head_is_turned():
    """Past `rotary_dim`, keys do not know where they are."""
    keys = np.asarray(run(PARAMS, jnp.full((2, 8), 5)).kv)[0, 0, :, :, :8]  # K Q H, first layer
    assert not np.allclose(keys[:, 0, :4], keys[:, 5, :4], atol=1e-3)
    np.testing.assert_allclose(keys[:, 0, 4:], keys[:, 5, 4:], atol=1e-6)


def test_a_pass_copies_no_layer_of_experts():
    """Handed through a scan, all experts of a layer would be copied, whoever is chosen."""
    config = dataclasses.replace(MODEL.config, moe=dataclasses.replace(MOE, num_experts=256))
    shapes = param_shapes(config)
    layer = sum(shapes["layers"]["mlp"][name].size * 4 // 2 for name in ("gate", "up", "down"))
    lowered = jax.jit(partial(forward, config.build())).lower(
        shapes, jax.ShapeDtypeStruct((1, 2), jnp.int32)
    )
    assert lowered.compile().memory_analysis().temp_size_in_bytes < layer / 10


def test_bad_mixtures_in_a_model_are_named():
    good = dict(
        vocab_size=8, num_layers=1, dim=8, num_heads=2, num_kv_heads=1, head_dim=4, ffn_dim=8
    )
    for wrong, message in (
        (dict(moe=MOE), "first_dense=1 leaves no layer for the experts"),
        (dict(rotary_dim=6), "rotary_dim=6 must be even, and at most head_dim=4"),
        (dict(rotary_dim=3), "rotary_dim=3 must be even"),
    ):
        with pytest.raises(ValueError, match=message):
            TransformerConfig(**{**good, **wrong})
    with pytest.raises(ValueError, match="with experts takes no adapter"):
        dataclasses.replace(MODEL.config, adapter=AdapterConfig(rank=2))
