"""Plans: settings and meshes by name, collectives of known programs, the command."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import dllm_jax.plan
from dllm_jax.bench.collectives import collectives
from dllm_jax.cli import main
from dllm_jax.losses import Diffusion, DualStream
from dllm_jax.nn.transformer import TransformerConfig
from dllm_jax.plan import NAMED, plan
from dllm_jax.plan.compiled import Compiled
from dllm_jax.plan.programs import objective, program
from dllm_jax.plan.setting import setting
from dllm_jax.plan.topology import default_layouts, layout, topology_of
from dllm_jax.sharding import make_mesh


def test_collectives_of_a_program_that_is_known():
    """Each kind once, and a sum that a loop repeats: what a device of a ring sends."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def inside(x):  # float32[8, 16]: 512 bytes
        summed = jax.lax.fori_loop(0, 3, lambda _, x: jax.lax.psum(jnp.sin(x), "b"), x)
        gathered = jax.lax.all_gather(summed, "a", tiled=True)  # [16, 16]
        scattered = jax.lax.psum_scatter(gathered, "b", tiled=True)  # [4, 16]
        turned = jax.lax.ppermute(scattered, "a", [(0, 1), (1, 0)])
        return jax.lax.all_to_all(turned, "b", 0, 1, tiled=True)  # [1, 64]

    mapped = jax.shard_map(
        inside, mesh=mesh, in_specs=P(("a", "b")), out_specs=P(("a", "b")), check_vma=False
    )
    text = jax.jit(mapped).lower(jnp.zeros((64, 16))).compile().as_text()
    found = {x.kind: (x.bytes, x.group, x.times) for x in collectives(text)}
    scatter = {"reduce-scatter": (1024 * 3 // 4, 4, 1)}
    assert {k: v for k, v in found.items() if k != "reduce-scatter"} == {
        "all-reduce": (2 * 512 * 3 // 4, 4, 3),
        "all-gather": (512, 2, 1),
        "collective-permute": (256, 2, 1),
        "all-to-all": (256 * 3 // 4, 4, 1),
    }
    assert found["reduce-scatter"] == scatter["reduce-scatter"]


def test_groups_are_read_in_every_spelling():
    line = (
        "  ROOT %r = f32[8]{0} all-reduce(%x), channel_id=1, replica_groups=GROUPS, to_apply=%add"
    )
    text = f"ENTRY %main (x: f32[8]) -> f32[8] {{\n  %x = f32[8]{{0}} parameter(0)\n{line}\n}}\n"
    for groups in (
        "{{0,1,2,3},{4,5,6,7}}",
        "[2,4]<=[8]",
        "mesh['a'=2,'b'=4] {'b'}",
        "mesh['a'=2,'b'=2,'c'=2], device_ids=([2,4]T(1,0)) {'a','c'}",
    ):
        (one,) = collectives(text.replace("GROUPS", groups))
        assert (one.group, one.bytes) == (4, 48)
    with pytest.raises(ValueError, match="which devices"):
        collectives(text.replace("GROUPS", "somewhere"))


def test_a_sum_of_which_each_keeps_a_part_is_found_in_its_fusion():
    text = """%all-reduce-scatter.1 (p: f32[8]) -> f32[2] {
  %p = f32[8]{0} parameter(0)
  %sum = f32[8]{0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %part = f32[2]{0} dynamic-slice(%sum, %zero), dynamic_slice_sizes={2}
}

ENTRY %main (x: f32[8]) -> f32[2] {
  %x = f32[8]{0} parameter(0)
  ROOT %r = f32[2]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    (one,) = collectives(text)
    assert (one.kind, one.bytes, one.group) == ("reduce-scatter", 24, 4)


def test_topologies():
    assert topology_of("v5e:16x16").devices == 256
    assert topology_of("tpu7x:2x2x1").devices == 8  # two a chip
    assert topology_of("H100:8").chip.name == "h100"
    for name, words in (("v5e", "no shape"), ("v8:2x2", "none of the chips"),
                        ("v5p:4x4", "3 dimensions"), ("v5e:0x2", "no shape")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            topology_of(name)


def test_meshes():
    flash, own = NAMED["llada2-flash-100b"].config, topology_of("v6e:8x8")
    (found,) = default_layouts(flash, "decode", own, 64)
    assert found == {"data": 1, "expert": 16, "tensor": 4}
    assert layout(own, found)["context"] == 1
    assert layout(own, {"fsdp": 64})["fsdp"] == 64
    trained = default_layouts(flash, "train", topology_of("v5e:16x16"), 256)
    assert {"fsdp": 16, "expert": 16, "tensor": 1} in trained
    assert all(x["fsdp"] * x["expert"] * x["tensor"] == 256 for x in trained)
    with pytest.raises(ValueError, match="not the 64 devices"):
        layout(own, {"tensor": 4})
    with pytest.raises(ValueError, match=r"\['rows'\] are none of"):
        layout(own, {"rows": 64})


def test_a_plan_in_closed_form():
    found = plan("llada2-flash-100b", "v6e:8x8", batch=64, context=8192, compiling=False)
    assert found.compiled is None
    assert found.peak == found.estimate == sum(found.memory.values())
    assert found.fits
    at_most = plan(
        "llada2-flash-100b", "v6e:8x8", batch=found.largest_batch, context=8192, compiling=False
    )
    one_more = plan(
        "llada2-flash-100b", "v6e:8x8", batch=found.largest_batch + 64, context=8192,
        compiling=False,
    )  # fmt: skip
    assert (at_most.fits, one_more.fits) == (True, False)
    assert not plan("llada-8b", "v5e:1x1", compiling=False).fits
    assert json.dumps(found.to_dict())
    parts = plan("smollm2-135m", "v5e:2x2", mode="train", batch=16, accumulate=2, compiling=False)
    assert parts.largest_batch % 8 == 0  # whole rows of each part on each device
    gpu = plan("sdar-8b", "h100:8", batch=8)
    assert gpu.reason == "programs are compiled for TPUs alone"
    assert gpu.tokens_per_second == pytest.approx(8 * 32 / 15 / gpu.time.least)


def test_full_effort_tries_contexts_that_the_model_does_not_have(monkeypatch):
    """The programs of the search are traced; the compiler is not there."""
    tried = []

    def found(planned, devices, *, effort):
        tried.append(max(x.shape[1] for x in planned.arguments["job"] if x.ndim == 2))
        return Compiled(2**30, {}, 0, [], 0, 0.0)

    monkeypatch.setattr(dllm_jax.plan, "has_compiler", lambda platform: True)
    monkeypatch.setattr(dllm_jax.plan, "mesh_of", lambda own, sizes: make_mesh(data=1))
    monkeypatch.setattr(dllm_jax.plan, "compile_program", found)
    most = plan("smollm2-135m", "v5p:1x1x1", batch=1, context=4096, effort="full")
    assert most.largest_context > NAMED["smollm2-135m"].config.max_length
    assert max(tried) > NAMED["smollm2-135m"].config.max_length


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "llada-9b"}, "a plan also knows the architectures llada-8b"),
        ({"mode": "serve"}, "none of decode, prefill, train"),
        ({"batch": 0}, "batch 0 must be at least 1"),
        ({"batch": 6, "accumulate": 4}, "accumulate 4 must divide batch 6"),
        ({"recipe": "magic"}, "no recipe 'magic'"),
        ({"mesh": {"tensor": 3}}, "not the 8 devices"),
    ],
)
def test_mistakes(options, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        plan(**{"model": "llada-8b", "topology": "v5e:2x4", **options})


def test_the_command(capsys):
    asked = ["plan", "--model", "llada-8b", "--topology", "v5e:2x4", "--batch", "8"]
    assert main([*asked, "--effort", "none"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("llada-8b, decode on v5e:2x4: 8 devices, tensor 8\n")
    assert "fits in 15.75 GiB" in out
    assert "tokens/s" in out
    assert "nothing is compiled: not asked for" in err
    assert main([*asked, "--effort", "none", "--json", "--mesh", "data=2,tensor=4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["mesh"] == {"data": 2, "tensor": 4}
    assert found["memory"]["weights"] == 4_008_189_952
    assert main([*asked, "--mesh", "tensor"]) == 2
    assert "is no AXIS=N" in capsys.readouterr().err


def test_without_the_compiler_the_package_is_named(monkeypatch):
    monkeypatch.setattr("dllm_jax.plan.has_compiler", lambda platform: False)
    found = plan("smollm2-135m", "v5e:1x1")
    assert found.compiled is None
    assert "pip install 'dllm-jax[aot]'" in found.reason


TINY = TransformerConfig(
    family="sdar", vocab_size=2048, num_layers=4, dim=256, num_heads=8, num_kv_heads=4,
    head_dim=64, ffn_dim=512, attention="block_causal", block_size=16, alignment="same_position",
    mask_id=2047,
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (TINY, Diffusion),
        (dataclasses.replace(TINY, alignment="shifted"), Diffusion),
        (dataclasses.replace(TINY, attention="causal"), Diffusion),
        (dataclasses.replace(TINY, attention="causal", alignment="shifted"), DualStream),
    ],
)
def test_a_model_is_trained_by_what_is_made_for_it(config, kind, monkeypatch):
    """In blocks of another size than the model's too; the program is traced."""
    monkeypatch.setitem(NAMED, "tiny", NAMED["sdar-8b"]._replace(config=config, block=16))
    own = setting("tiny", "train", batch=4, context=64, block=8)
    found = objective(own)
    assert isinstance(found, kind)
    assert (found.entries(4, 64), found.outputs(4, 64)) == (4 * 128, 4 * 64)
    planned = program(own, make_mesh(data=1))
    changed, _ = jax.eval_shape(planned.function, *planned.arguments.values())
    expected = planned.arguments["trained"] + planned.arguments["optimiser"]
    assert [x.shape for x in changed] == [x.shape for x in expected]


@pytest.mark.aot("tpu")
@pytest.mark.parametrize(
    "mode", ["decode", "prefill", pytest.param("train", marks=pytest.mark.slow)]
)
def test_a_plan_that_is_compiled(mode: str, monkeypatch):
    own = NAMED["sdar-8b"]._replace(config=TINY, block=16)
    monkeypatch.setitem(NAMED, "tiny", own)
    found = plan("tiny", "v5e:2x2", mode=mode, batch=8, context=512, mesh={"data": 2, "tensor": 2})
    compiled = found.compiled
    assert compiled is not None
    assert found.fits
    name = "trained" if mode == "train" else "params"
    assert compiled.arguments[name] == pytest.approx(found.memory["weights"], rel=0.01)
    if mode == "train":
        assert compiled.arguments["optimiser"] == 2 * compiled.arguments[name] + 8
    assert compiled.peak > sum(compiled.arguments.values())
    kinds = {x.kind: x for x in compiled.exchanges}
    assert kinds["all-reduce"].count >= 2 * TINY.num_layers


@pytest.mark.aot("tpu")
def test_closed_forms_are_the_compilers():
    """Of a model of 8B over eight chips: what each holds, and what it sends."""
    found = plan("llada-8b", "v5e:2x4", batch=8, context=4096)
    assert found.estimate == pytest.approx(found.peak, rel=0.02)
    sent = sum(x.bytes for x in found.compiled.exchanges)
    assert found.work.sent == pytest.approx(sent, rel=0.01)


@pytest.mark.aot("tpu")
def test_what_does_not_fit_is_refused_in_the_compilers_words():
    found = plan("sdar-8b", "v5e:1x1", batch=8, context=4096)
    assert not found.fits
    assert found.compiled is None
    assert "15.75G" in found.reason
