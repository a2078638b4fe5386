"""Closed forms against trees, compiled programs, and arithmetic by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from dllm_jax import roofline
from dllm_jax.cache import KVCache
from dllm_jax.nn.head import logits_of
from dllm_jax.nn.transformer import TransformerConfig, forward
from dllm_jax.nn.tree import param_axes, param_shapes
from dllm_jax.ops.moe import MoEConfig
from dllm_jax.plan import NAMED
from dllm_jax.roofline.memory import weights
from dllm_jax.roofline.sizes import attentions
from dllm_jax.sharding import shardings

TINY = TransformerConfig(
    vocab_size=512, num_layers=1, dim=64, num_heads=8, num_kv_heads=4, head_dim=16, ffn_dim=256,
    attention="bidirectional", alignment="same_position",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_parameters_are_those_of_the_tree(name: str):
    config = NAMED[name].config
    shapes = jax.tree.leaves(param_shapes(config))
    assert roofline.parameters(config).total == sum(math.prod(x.shape) for x in shapes)
    assert weights(config, {}) == sum(math.prod(x.shape) * x.dtype.itemsize for x in shapes)
    cache = jax.eval_shape(lambda: config.build().cache(3, 64).kv)
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(cache))
    assert roofline.cache_bytes(config, {}, 3, 64) == size


def test_parameters_of_published_models():
    """The figures that go by their names."""
    billions = {
        "llada-8b": (8.0, 7.5), "sdar-8b": (8.2, 7.6), "dream-7b": (7.6, 7.1),
        "llada2-mini-16b": (16.3, 1.1), "llada2-flash-100b": (102.9, 5.5),
        "diffusion-gemma-26b": (25.3, 3.9),
    }  # fmt: skip
    for name, (total, active) in billions.items():
        found = roofline.parameters(NAMED[name].config)
        assert found.total / 1e9 == pytest.approx(total, abs=0.06), name
        assert found.active / 1e9 == pytest.approx(active, abs=0.06), name


@pytest.mark.parametrize("name", ["llada-8b", "llada2-flash-100b", "smollm2-135m"])
def test_a_device_holds_its_part(name: str):
    config = NAMED[name].config
    layout = {"data": 1, "fsdp": 2, "expert": 2, "context": 1, "tensor": 2}
    mesh = jax.make_mesh(tuple(layout.values()), tuple(layout))
    shapes = param_shapes(config)
    places = shardings(param_axes(config), mesh, shapes=shapes)
    parts = jax.tree.map(lambda x, p: math.prod(p.shard_shape(x.shape)), shapes, places)
    own = sum(n * x.dtype.itemsize for n, x in
              zip(jax.tree.leaves(parts), jax.tree.leaves(shapes), strict=True))  # fmt: skip
    assert weights(config, layout) == own


def test_flops_are_those_of_the_compiler(optimised):
    """Of one layer and the vocabulary, in straight lines."""
    batch, entries, context = 4, 64, 192
    model, shapes = TINY.build(), param_shapes(TINY)

    def run(params, tokens, kv, lengths):
        out = forward(model, params, tokens, cache=KVCache(kv, lengths))
        return logits_of(model, params, out.hidden)

    tokens = jax.ShapeDtypeStruct((batch, entries), jnp.int32)
    kv = jax.eval_shape(lambda: model.cache(batch, context).kv)
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
    compiled = jax.jit(run).lower(shapes, tokens, kv, lengths).compile()
    own = roofline.decode_pass(batch=batch, entries=entries, context=context)
    work = roofline.forward_work(TINY, {}, own)
    assert work.flops == pytest.approx(compiled.cost_analysis()["flops"], rel=0.1)
    memory = compiled.memory_analysis()
    held = roofline.decode_memory(TINY, {}, batch=batch, slots=context, entries=entries)
    assert held["weights"] + held["cache"] == pytest.approx(memory.argument_size_in_bytes, rel=0.01)


def test_work_by_hand():
    own = roofline.decode_pass(batch=8, entries=4, context=100)
    matrices = 64 * (8 + 2 * 4 + 8) * 16 + 3 * 64 * 256
    head = 512 * 64
    pairs = 4 * (100 + 4)
    one = roofline.forward_work(TINY, {}, own)
    assert one.flops == 2 * 8 * 4 * (matrices + head) + 4 * 8 * 8 * 16 * pairs
    cached = 8 * 100 * 4 * 2 * 16 * 4
    assert one.bytes == 4 * (matrices + head) + cached + 12 * 8 * 4 * 64 * 4
    assert one.sent == 0
    four = roofline.forward_work(TINY, {"tensor": 4}, own)
    assert four.flops == one.flops / 4
    assert four.sent == 3 * 2 * (8 * 4 * 64 * 4) * 3 / 4  # two a layer, and the embeddings
    rows = roofline.forward_work(TINY, {"data": 4}, own)
    assert (rows.flops, rows.sent) == (one.flops / 4, 0)
    odd = roofline.forward_work(TINY, {"tensor": 8}, own)  # keys of four heads are whole
    assert attentions(TINY, {"tensor": 8})[0].kv_heads == 4
    assert odd.flops > one.flops / 8


def test_a_cache_of_fewer_bits_is_read_faster():
    own = roofline.decode_pass(batch=8, entries=4, context=100)
    full, int8 = (
        roofline.forward_work(TINY, {}, own, cache_dtype=dtype) for dtype in (None, "int8")
    )
    assert full.bytes - int8.bytes == 8 * 100 * 4 * 2 * 16 * (4 - 1)


def test_an_adapter_costs_what_is_trained():
    """The clean stream passes once, and the base has neither gradients nor moments."""
    smol = NAMED["smollm2-135m"].config
    bare = dataclasses.replace(smol, adapter=None, mask_id=None)
    some, all_ = (roofline.train_work(c, {}, batch=4, length=256, block=8) for c in (smol, bare))
    assert 0.45 < some.flops / all_.flops < 0.6


def test_experts_by_hand():
    """A token passes those it chose; a batch reads those that any of its tokens chose."""
    moe = MoEConfig(num_experts=8, experts_per_token=2, ffn_dim=32)
    config = dataclasses.replace(TINY, moe=moe)
    one, none = (
        roofline.forward_work(
            c, {}, roofline.decode_pass(batch=1, entries=1, context=1)
        )
        for c in (config, dataclasses.replace(TINY, ffn_dim=1))
    )  # fmt: skip
    expert = 3 * 64 * 32
    assert one.flops - none.flops == 2 * (2 * expert + 8 * 64 - 3 * 64)
    assert one.bytes - none.bytes == 4 * (2 * expert + 8 * 64 - 3 * 64)
    own = roofline.decode_pass(batch=4, entries=16, context=1)
    split = roofline.forward_work(config, {"expert": 4}, own)
    whole = roofline.forward_work(config, {}, own)
    assert split.flops == pytest.approx(whole.flops / 4, rel=0.01)
    assert split.sent == 2 * (16 * 64 * 4) * 4 * 3 / 4  # tokens to every expert, and back


def test_windows_bound_the_cache_that_is_read():
    config = NAMED["diffusion-gemma-26b"].config
    near, far = (
        roofline.forward_work(
            config, {}, roofline.decode_pass(batch=1, entries=256, context=context)
        )
        for context in (8192, 16_384)
    )
    full = 5 * 2 * 2 * 512  # of the five layers that see everything, in float32
    assert far.bytes - near.bytes == 8192 * full * 4


def test_time_is_the_slowest_part():
    chip = roofline.CHIPS["v5e"]
    time = roofline.time_of(roofline.Work(197e9, 819e6, 1e6), chip)
    assert time == pytest.approx((1e-3, 1e-3, 1e-5))
    slow = roofline.time_of(roofline.Work(0, 819e9, 0), chip)
    assert (slow.least, slow.bound) == (1.0, "memory")


def test_chips_are_told_by_their_ridge():
    """FLOPs a byte, from tables that others printed."""
    ridge = {"v5e": 240, "v5p": 166, "v6e": 560, "v7x": 312, "h100": 295, "h200": 206}
    for name, flops in ridge.items():
        chip = roofline.CHIPS[name]
        assert chip.bf16 / chip.bandwidth == pytest.approx(flops, rel=0.01)
