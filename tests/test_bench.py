"""The benchmark command: its closed forms by hand, a run of one small shape, what goes wrong.

And what a decode step moves, by the program that the TPU compiler makes of it.
"""

import dataclasses
import importlib.util
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.bench import decode, grid, report, rivals, suite, training, vocabulary
from dllm_jax.bench.ceilings import Ceilings
from dllm_jax.bench.clock import Program, timed
from dllm_jax.bench.shapes import ATTENTION, VOCABULARY, Attention, Vocabulary, Work
from dllm_jax.bench.sides import Jax
from dllm_jax.bench.traffic import traffic
from dllm_jax.cli import main
from dllm_jax.testing.aot import compile_for

TINY = "tiny"
CEILINGS = Ceilings(1e9, {"float32": 1e10})


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A model of a few numbers, beside the real ones."""
    monkeypatch.setitem(ATTENTION, TINY, Attention(4, 2, 64))
    monkeypatch.setitem(ATTENTION, "sliding", Attention(4, 2, 64, window=9))
    monkeypatch.setitem(VOCABULARY, TINY, Vocabulary(300, 128, soft_cap=30.0))


def one(**changes) -> decode.Decode:
    fields = dict(model=TINY, entries=4, slots=32, batch=2, dtype="float32")
    return decode.Decode(**{**fields, **changes})


def rows_of(case, **options) -> dict[str, dict]:
    options = dict(implementations=(None,), until=time.monotonic() + 60, each=0.0) | options
    return {row["side"]: row for row in suite.run([case], CEILINGS, **options)}


def test_a_block_against_a_cache_by_hand():
    # 2 rows of 32 slots, 2 heads of 64, keys and values; 4 queries and results a row of 4 heads,
    # and 4 own keys and values of 2; each of them against 32 + 4 keys, twice two operations.
    cached, passed = 2 * 32 * 2 * 64 * 2, 2 * 4 * 64 * (4 + 4 + 2 + 2)
    assert one().work == Work(4 * (cached + passed), 2 * 4 * 4 * (32 + 4) * 64 * 4)
    assert one(dtype="bfloat16").work.bytes * 2 == one().work.bytes
    assert one(ragged=True).ends == [8, 32]
    assert one(ragged=True).work.flops == 4 * 4 * 64 * 4 * (8 + 32 + 2 * 4)
    # A window of 9 lets a block see the last 8 slots, however many there are.
    assert one(model="sliding", slots=32).work == one(slots=8).work


def test_the_vocabulary_by_hand():
    case = vocabulary.Scores(model=TINY, rows=5, dtype="float32")
    assert case.work == Work(4 * (300 + 5) * 128, 2 * 5 * 300 * 128)


@pytest.mark.parametrize("block", [0, 8])
def test_pairs_are_those_that_the_mask_shows(block):
    case = training.Training(model=TINY, length=32, batch=2, block=block, dtype="float32")
    assert case.pairs == int(case.mask.dense(case.entries).sum())
    assert case.work.flops == 2 * 2 * 2 * 4 * 64 * case.pairs
    more = dataclasses.replace(case, gradient=True).work
    assert more.flops == 3.5 * case.work.flops
    # In: queries, keys, values and a cotangent; out: a gradient of each of the former.
    assert more.bytes == 4 * 2 * case.entries * 64 * (3 * 4 + 4 * 2)


@pytest.mark.parametrize(
    "case",
    [
        one(),
        one(model="sliding", ragged=True),
        training.Training(model=TINY, length=16, batch=1, block=4, gradient=True, dtype="float32"),
        training.Training(model=TINY, length=16, batch=1, dtype="float32"),
        vocabulary.Scores(model=TINY, rows=5, asks="sampled", dtype="float32"),
        vocabulary.Scores(model=TINY, rows=5, asks="top 8", dtype="float32"),
    ],
    ids=lambda case: f"{case.kind} {case.model} {getattr(case, 'ragged', '')}",
)
def test_every_side_computes_the_same(case):
    found = rows_of(case)
    assert {"ours", "jax"} <= found.keys() or {"ours", "dense"} <= found.keys()
    for side, row in found.items():
        if not side.startswith("torch"):  # some of its versions refuse some shapes
            assert row["status"] == "timed", row
            assert row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
            assert row["share"] == pytest.approx(row["least_seconds"] / row["seconds"]["median"])
    assert found["ours"]["least_seconds"] == max(case.work.bytes / 1e9, case.work.flops / 1e10)


@pytest.mark.parametrize("ragged", [False, True])
def test_splash_is_given_the_same_problem(ragged, monkeypatch):
    """Interpreted: it needs no TPU for that."""
    monkeypatch.setitem(ATTENTION, TINY, Attention(4, 2, 128))
    case = one(entries=8, slots=64, ragged=ragged)
    ours = case.sides((None,))["ours"]().result()
    assert suite.difference(rivals._decode_splash(case, interpret=True).result(), ours) < 1e-5


def test_what_goes_wrong_is_said(monkeypatch):
    case = one()
    right = case.sides((None,))["ours"]

    def other(change):
        side = right()
        return lambda: Jax(
            lambda *args: change(side.run(*args)), side.first, side.variants, side.form, side.link
        )

    def refuses():
        raise NotImplementedError("heads of 64 are too small")

    sides = {
        "ours": right,
        "off": other(lambda out: out * 1.01),
        "nan": other(lambda out: out.at[0, 0].set(jnp.nan)),
        "short": other(lambda out: out[:, :1]),
        "refuses": refuses,
    }
    monkeypatch.setattr(decode.Decode, "sides", lambda self, names: sides)
    found = rows_of(case)
    assert {name: row["status"] for name, row in found.items()} == {
        "ours": "timed", "off": "wrong", "nan": "wrong", "short": "wrong", "refuses": "refused",
    }  # fmt: skip
    assert found["off"]["error"] == pytest.approx(0.01, rel=0.1)
    assert found["refuses"]["reason"] == "NotImplementedError: heads of 64 are too small"
    assert "seconds" not in found["off"]


def test_an_implementation_is_passed_on():
    found = rows_of(one(), implementations=(None, "xla", "abacus"), without=("jax",))
    assert "jax" not in found
    assert found["xla"]["status"] == "timed"
    assert found["abacus"]["status"] == "refused"
    assert "abacus" in found["abacus"]["reason"]


def test_neither_time_nor_memory_for_it(monkeypatch):
    (late,) = rows_of(one(), until=0.0).values()
    assert late["status"] == "no time"
    monkeypatch.setattr(suite, "room", lambda: 1000)
    (large,) = rows_of(one()).values()
    assert large["status"] == "too large"


def test_a_call_hangs_on_the_one_before():
    """Nothing is computed once for all calls of a run: the last result says how many there were."""
    side = Jax(lambda x, y: x + y, jnp.zeros(3), [(jnp.ones(3),)], lambda out: {"out": out},
               lambda first, out: out, least=7)  # fmt: skip
    side.once = 1.0
    program = side.program()
    assert program.calls == 7
    first, (last,) = program.run()
    np.testing.assert_array_equal([first, last], np.full((2, 3), 7.0))


def test_programs_take_turns():
    log = []
    times = timed([Program(lambda: log.append("a"), 1), Program(lambda: log.append("b"), 2)], 0.001)
    assert log == ["a", "b"] * (len(log) // 2)
    assert times[0].runs == times[1].runs == len(log) // 2 - 1
    assert all(t.low <= t.median <= t.high for t in times)


@pytest.mark.parametrize("quick", [False, True])
def test_the_grid(quick):
    cases = grid.cases(grid.PARTS, "bfloat16", quick=quick)
    assert len({(case.kind, case.model, *case.shape.values()) for case in cases}) == len(cases)
    if not quick:
        assert cases[0].shape == {"entries": 32, "slots": 32768, "batch": 8, "ragged": False}
        assert {case.model for case in cases} >= ATTENTION.keys() - {TINY, "sliding"}
    assert {type(case) for case in grid.cases(("vocabulary",), "float32", quick=quick)} == {
        vocabulary.Scores
    }


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The command, on a grid of two tiny cases."""
    cases = [one(), vocabulary.Scores(model=TINY, rows=5, dtype="float32")]
    monkeypatch.setattr(grid, "cases", lambda parts, dtype, *, quick: cases)
    monkeypatch.setattr(
        "dllm_jax.bench.ceilings.measured",
        lambda dtypes: Ceilings(1e9, dict.fromkeys(dtypes, 1e10)),
    )
    return ["bench", "--quick", "--out", str(tmp_path / "new" / "k-cpu.v1")]


def test_the_command_writes_its_files(command, tmp_path):
    assert main(command) == 0
    folder = tmp_path / "new"
    names = {path.name for path in folder.iterdir()}
    assert names == {"k-cpu.v1.json", "k-cpu.v1.md", "k-cpu.v1.png"}
    found = json.loads((folder / "k-cpu.v1.json").read_text())
    assert found.keys() == {
        "title", "device", "platform", "versions", "date", "commit", "copy_bytes_per_second",
        "flops_per_second", "absent", "rows",
    }  # fmt: skip
    assert found["platform"] == "cpu"
    assert found["versions"]["jax"] == jax.__version__
    assert {"cudnn", "splash"} <= found["absent"].keys()
    ours = [row for row in found["rows"] if row["side"] == "ours"]
    assert [row["kind"] for row in ours] == ["block attention", "vocabulary, greedy"]
    for row in ours:
        assert row.keys() >= {"model", "dtype", "status", "seconds", "bytes", "flops", "share"}
        assert row["seconds"].keys() == {"median", "low", "high", "runs", "calls"}
    text = (folder / "k-cpu.v1.md").read_text()
    assert "| tiny | batch 2, entries 4, slots 32 |" in text
    assert "- splash: runs on TPUs, not on this CPU" in text


def test_an_interruption_keeps_the_rows(command, tmp_path, monkeypatch):
    run = suite.run

    def stopped(*args, **options):
        for row in run(*args, **options):
            yield row
            if row["side"] == "jax":
                raise KeyboardInterrupt

    monkeypatch.setattr(suite, "run", stopped)
    assert main(command) == 130
    found = json.loads((tmp_path / "new" / "k-cpu.v1.json").read_text())
    assert [row["side"] for row in found["rows"]] == ["ours", "jax"]
    assert (tmp_path / "new" / "k-cpu.v1.png").exists()


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'dllm-jax[plot]'" in report.plot({"rows": []}, tmp_path / "x")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--minutes", "0"], "--minutes 0.0 must be positive"),
        (["--dtype", "float16"], "float16 is not timed"),
    ],
)
def test_a_mistake_is_told(arguments, says, tmp_path, capsys):
    assert main(["bench", "--out", str(tmp_path / "x"), *arguments]) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


HLO = """
HloModule jit_f, is_scheduled=true

%body.1 (arg: (s32[], bf16[8,256], bf16[4,256,256])) -> (s32[], bf16[8,256], bf16[4,256,256]) {
  %arg = (s32[], bf16[8,256]{1,0:T(8,128)(2,1)}, bf16[4,256,256]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %x = bf16[8,256]{1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=1
  %w = bf16[4,256,256]{2,1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=2
  %y = bf16[8,256]{1,0:T(8,128)(2,1)S(1)} fusion(%x, %w, %i), kind=kOutput, calls=%fused.1
  %z = bf16[8,256]{1,0:T(8,128)(2,1)} copy(%y)
  %k = f32[3,9]{1,0:T(4,128)} custom-call(%y, %w), custom_call_target="tpu_custom_call", backend_config={"cost_estimate":{"flops":"1","transcendentals":"0","bytes_accessed":"10000"}}
  ROOT %out = (s32[], bf16[8,256]{1,0:T(8,128)(2,1)}, bf16[4,256,256]{2,1,0:T(8,128)(2,1)}) tuple(%i, %z, %w)
}

%fused.1 (p0: bf16[8,256], p1: bf16[4,256,256], p2: s32[]) -> bf16[8,256] {
  %p0 = bf16[8,256]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[4,256,256]{2,1,0:T(8,128)(2,1)} parameter(1)
  %p2 = s32[]{:T(128)} parameter(2)
  %c = s32[]{:T(128)} constant(0)
  %v = bf16[4,256,256]{2,1,0:T(16,128)(2,1)} fusion(%p1), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%view.1
  %s = bf16[1,256,256]{2,1,0:T(8,128)(2,1)} dynamic-slice(%v, %p2, %c, %c), dynamic_slice_sizes={1,256,256}
  %b = bf16[256,256]{1,0:T(8,128)(2,1)} bitcast(%s)
  ROOT %d = bf16[8,256]{1,0:T(8,128)(2,1)S(1)} convolution(%p0, %b), dim_labels=bf_io->bf
}

%condition.1 (arg: (s32[], bf16[8,256], bf16[4,256,256])) -> pred[] {
  %arg = (s32[], bf16[8,256]{1,0:T(8,128)(2,1)}, bf16[4,256,256]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %four = s32[]{:T(128)} constant(4)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %four), direction=LT
}

ENTRY %main (x: bf16[8,256], w: bf16[4,256,256]) -> bf16[8,256] {
  %x.1 = bf16[8,256]{1,0:T(8,128)(2,1)} parameter(0)
  %w.1 = bf16[4,256,256]{2,1,0:T(8,128)(2,1)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %t = (s32[], bf16[8,256]{1,0:T(8,128)(2,1)}, bf16[4,256,256]{2,1,0:T(8,128)(2,1)}) tuple(%zero, %x.1, %w.1)
  %loop = (s32[], bf16[8,256]{1,0:T(8,128)(2,1)}, bf16[4,256,256]{2,1,0:T(8,128)(2,1)}) while(%t), condition=%condition.1, body=%body.1, metadata={op_name="jit(f)/Model/while"}
  ROOT %r = bf16[8,256]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_the_traffic_of_a_program_by_hand():
    """Of a stack its layer; nothing of what stays in vector memory; a loop as often as it runs."""
    x, layer = 2 * 8 * 256, 2 * 256 * 256
    found = {moved.text.split()[0]: moved for moved in traffic(HLO)}
    assert {name: (m.bytes, m.times) for name, m in found.items()} == {
        "y": (x + layer, 4),
        "z": (x, 4),
        "k": (10_000 - x, 4),  # by its estimate, less an operand that is there already
    }
    assert [m.times for m in traffic(HLO, {"Model/while": 30})] == [30] * 3
    (kernel,) = (m for m in traffic(HLO, reads={"k": 1}) if m.text.startswith("k "))
    assert kernel.bytes == layer + 4 * 4 * 128  # and its result, padded to registers
    with pytest.raises(ValueError, match="how often a loop runs"):
        traffic(HLO.replace("direction=LT", "direction=NE"))


@pytest.mark.aot("tpu")
def test_the_traffic_of_a_program_that_is_known():
    """Eight layers of a stack, a transposed copy, and nothing else."""
    rows, dim, layers = 64, 2048, 8

    def run(x, stack, other):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0], other.T + 1

    arrays = [(rows, dim), (layers, dim, dim), (dim, 4 * dim)]
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in arrays]
    found = traffic(compile_for("v5e", run, *shapes).as_text())
    least = 2 * (2 * rows * dim + layers * dim * dim + 2 * dim * 4 * dim)
    assert least <= sum(moved.total for moved in found) < 1.02 * least


@pytest.mark.aot("tpu")
@pytest.mark.parametrize(
    ("model", "layers"),
    [("Fast-dLLM v2 7B", 28), pytest.param("LLaDA2-mini", 8, marks=pytest.mark.slow)],
)
def test_a_decode_step_moves_little_more_than_it_must(model, layers):
    path = Path(__file__).resolve().parents[1] / "scripts" / "bench" / "decode_bytes.py"
    spec = importlib.util.spec_from_file_location("decode_bytes", path)
    script = importlib.util.module_from_spec(spec)
    sys.modules["decode_bytes"] = script  # dataclasses look their module up
    spec.loader.exec_module(script)
    found, least = script.measure("v5e", model, 1, 4096, layers)
    each, once = script.a_pass(found)
    assert 0.99 * least < each < 1.15 * least
    assert once < 0.15 * least
