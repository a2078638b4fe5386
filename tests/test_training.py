"""The training loop: what it changes, and that interruptions leave no trace in its numbers."""

import dataclasses
import importlib.util
import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dllm_jax import training
from dllm_jax.corruption import MaskedBlocks
from dllm_jax.data import Conversations, Packed, Store, tokenise, train_tokenizer, write_part
from dllm_jax.losses import DualStream
from dllm_jax.nn.adapters import AdapterConfig
from dllm_jax.nn.transformer import Transformer
from dllm_jax.nn.tree import param_shapes
from dllm_jax.pretraining import ConversationData
from dllm_jax.tasks import Addition, Examples
from dllm_jax.testing import tiny
from dllm_jax.training import loop, records, step
from dllm_jax.training.feed import what_is_cut
from dllm_jax.training.identity import described
from tests import toy_training

# One program for the whole file: the same model, objective, optimiser and shapes.
MODEL, PARAMS = tiny()
PARAMS = jax.device_put(PARAMS, jax.devices()[0])  # on a device of their own, as `load` gives them
OBJECTIVE = DualStream(noise=MaskedBlocks(block_size=2, blocks=4))
STEPS = 20
TX = training.Optimiser(learning_rate=2e-2, warmup=2).build(STEPS)
FIT = training.Fit(steps=STEPS, batch=4, length=12, save_every=6, evaluate_every=8)
NAMES = ("adapter", "head")


class Source(Conversations):
    """Rows that count, and an event that happens when the given row is read."""

    event = None
    reads = 0

    def __getitem__(self, index: int):
        self.reads += 1
        if self.event and self.reads == self.event[0]:
            self.event[1]()
        return super().__getitem__(index)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """64 rows to train on, three to evaluate (fewer than a batch)."""
    path = tmp_path_factory.mktemp("data")
    rows = [[2 + (7 * i + j) % 30 for j in range(8 + i % 5)] for i in range(67)]
    write_part(path / "train-00000.npz", rows[:64], [3] * 64)
    write_part(path / "heldout-00000.npz", rows[64:], [3] * 3)
    return path


def fit(run: Path, folder: Path, event=None, **changes) -> training.TrainState:
    """A run, continued if there is one; `event` is (a step, a function to call in it)."""
    source = Source(folder, "train")
    if event:
        source.event = (FIT.batch * (event[0] - 1) + 2, event[1])
    state = training.create(PARAMS, NAMES, TX)
    settings = dataclasses.replace(FIT, **changes)
    heldout = Conversations(folder, "heldout")
    return training.fit(run, settings, MODEL, PARAMS, state, OBJECTIVE, TX, source, heldout)


def rows(run: Path) -> list[dict[str, float]]:
    """The metrics without their times."""
    found = training.read_metrics(run / "metrics.jsonl")
    return [
        {name: value for name, value in row.items() if name not in training.TIMES} for row in found
    ]


def saved(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir())


def crash():
    raise RuntimeError("the machine is gone")


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, folder) -> tuple[Path, training.TrainState]:
    """An uninterrupted run."""
    run = tmp_path_factory.mktemp("whole")
    return run, fit(run, folder)


def same(left: training.TrainState, right: training.TrainState) -> None:
    """Bit for bit, the optimiser included."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_loss_falls_and_only_what_is_named_changes(whole):
    run, state = whole
    losses = [row["loss"] for row in rows(run) if "loss" in row]
    assert len(losses) == STEPS
    assert np.mean(losses[-4:]) < 0.7 * np.mean(losses[:4])
    assert set(state.trainable) == set(NAMES)
    for name in NAMES:
        before, after = jax.tree.leaves(PARAMS[name]), jax.tree.leaves(state.trainable[name])
        assert all((a != b).any() for a, b in zip(before, after, strict=True))
    # The given parameters, trained ones too, are still there: a step donates its state alone.
    assert np.isfinite(sum(np.abs(leaf).sum() for leaf in jax.tree.leaves(PARAMS)))


def test_a_run_leaves_its_files(whole):
    run, state = whole
    assert int(state.step) == STEPS
    assert saved(run) == [18, STEPS]  # the last two of 6, 12, 18 and the end
    found = rows(run)
    assert [row["step"] for row in found if "loss" in row] == list(range(1, STEPS + 1))
    assert [row["step"] for row in found if "heldout_diffusion" in row] == [8, 16, STEPS]
    looks = [row["heldout_loss"] for row in found if "heldout_loss" in row]
    assert len(looks) == 3
    assert looks[-1] < looks[0]
    assert {"loss", "diffusion", "accepted", "accuracy_1", "grad_norm"} <= found[0].keys()
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_is_left_as_it_is(whole, folder):
    run, state = whole
    before = {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")}
    lines = (run / "metrics.jsonl").read_text()
    same(fit(run, folder), state)
    assert {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")} == before
    assert (run / "metrics.jsonl").read_text() == lines


def test_a_step_compiles_once_fresh_or_restored(tmp_path, folder):
    step._step.clear_cache()
    fit(tmp_path, folder, steps=3, evaluate_every=0)
    fit(tmp_path, folder, steps=5, evaluate_every=0)
    assert step._step._cache_size() == 1


def test_a_run_that_goes_on_makes_room_for_what_it_reads(tmp_path, folder, monkeypatch):
    fit(tmp_path, folder, steps=2, evaluate_every=0)
    create, given = training.create, []
    monkeypatch.setattr(training, "create", lambda *all: given.append(create(*all)) or given[-1])
    fit(tmp_path, folder, steps=3, evaluate_every=0)
    assert given
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))


@pytest.mark.parametrize("after_save", [1, 4])
def test_a_crash_costs_the_steps_since_the_last_save_and_nothing_else(
    tmp_path, folder, whole, after_save
):
    run, state = whole
    with pytest.raises(RuntimeError, match="machine is gone"):
        fit(tmp_path, folder, event=(12 + after_save, crash))
    assert saved(tmp_path) == [6, 12]
    assert rows(tmp_path)[-1]["step"] == 11 + after_save
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 17, "lo')  # cut short by the crash
    (tmp_path / "checkpoints" / "18.orbax-checkpoint-tmp").mkdir()  # so was a save
    same(fit(tmp_path, folder), state)
    assert rows(tmp_path) == rows(run)
    assert saved(tmp_path) == saved(run)


def test_a_signal_ends_the_step_saves_and_returns(tmp_path, folder, whole):
    run, state = whole
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    stopped = fit(tmp_path, folder, event=(8, terminate))
    assert int(stopped.step) == 8
    assert saved(tmp_path) == [6, 8]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    stopped = fit(tmp_path, folder, event=(3, lambda: signal.raise_signal(signal.SIGINT)))
    assert int(stopped.step) == 11
    same(fit(tmp_path, folder), state)
    assert rows(tmp_path) == rows(run)


def test_the_budget_in_minutes(tmp_path, folder, whole, monkeypatch):
    """A clock that ticks once a look: five looks are in the budget, the first is its start."""
    ticks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: next(ticks), perf_counter=time.perf_counter)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "time", clock)
        assert int(fit(tmp_path, folder, minutes=0.0).step) == 0
        assert saved(tmp_path) == []  # nothing happened, nothing to keep
        assert int(fit(tmp_path, folder, minutes=5.5 / 60).step) == 5
    assert saved(tmp_path) == [5]
    same(fit(tmp_path, folder), whole[1])
    assert rows(tmp_path) == rows(whole[0])


def test_other_settings_do_not_fit_a_checkpoint(tmp_path, folder):
    fit(tmp_path, folder, steps=1, evaluate_every=0)
    source = Conversations(folder, "train")
    small = Transformer(dataclasses.replace(MODEL.config, adapter=AdapterConfig(rank=2)))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), param_shapes(small.config))
    momentum = optax.sgd(0.1, momentum=0.9)
    for model, params, names, tx, found in (
        (small, zeros, NAMES, TX, r"trainable/adapter/v/out is float32\[2, 4, 2, 8\], here it is"),
        (MODEL, PARAMS, ("adapter",), TX, "trainable/head is .* here it is missing"),
        (MODEL, PARAMS, NAMES, momentum, "its opt_state/.* is .*, here it is missing"),
    ):
        state = training.create(params, names, tx)
        with pytest.raises(ValueError, match=f"step 1 does not fit this run: .*{found}") as error:
            training.fit(tmp_path, FIT, model, params, state, OBJECTIVE, tx, source)
        assert "choose another folder" in str(error.value)
        assert len(str(error.value)) < 300
    state = training.create(PARAMS, NAMES, TX)
    for name, value in (("seed", 99), ("batch", 3), ("length", 9)):
        other = dataclasses.replace(FIT, **{name: value})
        with pytest.raises(ValueError, match=f"started with {name}=.* here it is {value}"):
            training.fit(tmp_path, other, MODEL, PARAMS, state, OBJECTIVE, TX, source)
    other = DualStream(noise=MaskedBlocks(block_size=2, blocks=3))
    with pytest.raises(ValueError, match=r"objective=.*blocks=4.*, here it is .*blocks=3"):
        training.fit(tmp_path, FIT, MODEL, PARAMS, state, other, TX, source)
    assert len(rows(tmp_path)) == 1


def test_a_run_goes_on_with_what_it_is_about(tmp_path, folder):
    source, once = Conversations(folder, "train"), dataclasses.replace(FIT, steps=1)

    def run(name: str, objective: Any = OBJECTIVE, **given) -> int:
        state = training.create(PARAMS, NAMES, TX)
        fitted = training.fit(
            tmp_path / name, once, MODEL, PARAMS, state, objective, TX, source, **given
        )
        return int(fitted.step)

    one, other = ConversationData(folder=Path("one")), ConversationData(folder=Path("other"))
    assert run("run", about={"data": one}) == run("run", about={"data": one}) == 1
    with pytest.raises(ValueError, match=r"data=.*one.*, here it is .*other.*: its data and noise"):
        run("run", about={"data": other})
    assert run("older", about={}) == 1  # as checkpoints were before
    assert run("older", DualStream(), about={"data": one}) == 1


def test_what_a_run_is_about_is_told_by_what_is_not_as_usual():
    found = described(DualStream(noise=MaskedBlocks(blocks=4), ar_weight=0.5))
    assert found == "DualStream(noise=MaskedBlocks(blocks=4), ar_weight=0.5)"
    assert described(object()) == "object()"
    assert " at 0x" not in described(crash)


def test_rows_that_the_length_cuts_are_told_of(folder, tmp_path, capsys):
    fit(tmp_path / "whole", folder, steps=1, evaluate_every=0)
    assert "cuts" not in capsys.readouterr().out  # the longest has 12 tokens
    fit(tmp_path / "cut", folder, steps=1, evaluate_every=0, length=8)
    told = "length=8 cuts 51 of 64 rows; nothing to learn is left in 0\n"
    assert told in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"length=3 leaves nothing to learn: .* each of 64 rows"):
        fit(tmp_path / "nothing", folder, steps=1, evaluate_every=0, length=3)
    assert not (tmp_path / "nothing").exists()


def test_a_store_knows_what_is_cut_without_a_row(tmp_path, monkeypatch):
    talks = [
        [{"role": "user", "content": "x" * i}, {"role": "assistant", "content": "y"}]
        for i in range(1, 9)
    ]
    tokenizer = train_tokenizer([], 300, tmp_path / "bytes", kind="byte", chat=True)
    tokenise(talks, tokenizer, tmp_path / "store")
    store = Store(tmp_path / "store")
    sizes = [len(row.tokens) for row in store]
    prompts = [row.prompt for row in store]
    monkeypatch.setattr(Store, "__getitem__", lambda *_: crash())
    assert what_is_cut(store, max(sizes)) == ""
    told = what_is_cut(store, prompts[5])
    cut = sum(size > prompts[5] for size in sizes)
    assert told == f"length={prompts[5]} cuts {cut} of 8 rows; nothing to learn is left in 3"
    with pytest.raises(ValueError, match="the prompt of each of 8 rows fills it"):
        what_is_cut(store, min(prompts))
    packed = Packed(store, 20)
    assert what_is_cut(packed, 20) == ""
    full = len(store.tokens) // 20
    told = f"length=19 cuts {full} of {len(packed)} rows; nothing to learn is left in 0"
    assert what_is_cut(packed, 19) == told
    assert what_is_cut([], 3) == ""  # nobody knows
    task = Addition(digits=3)
    assert what_is_cut(Examples(task, "train", 5), task.length) == ""
    with pytest.raises(ValueError, match=rf"length=12 cuts rows .* up to {task.length} tokens"):
        what_is_cut(Examples(task, "train", 5), 12)

    class Own(list):  # anybody's, without prompts
        sizes = np.array([3, 5, 9])

    assert (
        what_is_cut(Own([1, 2, 3]), 5) == "length=5 cuts 1 of 3 rows; nothing to learn is left in 0"
    )


def test_evaluation_reads_as_many_rows_as_it_is_told(folder, tmp_path, monkeypatch):
    class Count:
        def loss(self, model, params, batch, key):
            rows = jnp.float32(len(batch["tokens"]))
            return 2 * rows, {"rows": rows}

    source = Conversations(folder, "train")
    for batch, limit, count in ((4, 2, 2), (4, 64, 4), (99, 99, 64)):
        found = training.evaluate(
            MODEL, PARAMS, Count(), source, batch=batch, length=12, limit=limit
        )
        assert found == {"loss": 2 * count, "rows": count}
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", lambda *_, **given: asked.append(given) or {})
        toy_training.write(tmp_path)
        looks = dict(evaluate_every=1, heldout_rows=9, heldout=source)
        toy_training.fit(tmp_path / "run", steps=1, accumulate=2, **looks)
    (given,) = asked
    assert (given["batch"], given["limit"]) == (4, 9)  # for the memory of a part


def test_a_figure_that_a_batch_does_not_have_is_the_mean_of_the_others(folder, tmp_path):
    class Some:
        def loss(self, model, params, batch, key):
            first = batch["tokens"][0, 0].astype(jnp.float32)
            none, low = jnp.float32(jnp.nan), first < bound
            figures = {"low": jnp.where(low, first, none), "none": none}
            return jnp.where(low | whole, first, none), figures

    source = Conversations(folder, "train")
    settings = dict(batch=1, length=12, limit=64)
    firsts = [source[i].tokens[0] for i in range(64)]
    bound, whole = int(np.median(firsts)), True
    found = training.evaluate(MODEL, PARAMS, Some(), source, **settings)
    assert found["low"] == pytest.approx(np.mean([x for x in firsts if x < bound]))
    assert found["loss"] == pytest.approx(np.mean(firsts))
    assert np.isnan(found["none"])
    whole = False
    assert np.isnan(training.evaluate(MODEL, PARAMS, Some(), source, **settings)["loss"])


def test_figures_that_are_no_number_are_left_out_of_the_metrics(tmp_path):
    toy_training.write(tmp_path)
    look = {"look": lambda params, step: {"loss": np.nan, "level_0": np.nan, "level_1": 1.0}}
    toy_training.fit(tmp_path / "run", steps=1, evaluate_every=1, evaluations=look)
    own = training.read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert list(own) == ["step", "look_loss", "look_level_1"]


def test_a_signal_asks_those_around_and_within_too():
    with records.interrupts() as outer:
        with records.interrupts() as inner:
            signal.raise_signal(signal.SIGTERM)
            assert inner()
        assert outer()
    with records.interrupts() as outer:
        with records.interrupts():
            pass
        assert not outer()
        signal.raise_signal(signal.SIGTERM)
        with records.interrupts() as inner:
            assert inner()


def test_an_interrupted_run_writes_what_it_has_not_logged(tmp_path):
    toy_training.write(tmp_path)
    done = toy_training.fit(tmp_path / "run", event=(8 * 2 + 1, terminate), log_every=5).step
    assert 0 < int(done) < 5
    toy_training.fit(tmp_path / "run", log_every=5)
    found = training.read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in found] == [int(done), 5, 10, 12]


@pytest.mark.parametrize(
    "name", ["steps", "batch", "length", "accumulate", "save_every", "keep", "log_every"]
)
def test_a_run_has_at_least_one_of_everything(name):
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        dataclasses.replace(FIT, **{name: 0})


def test_a_spike_in_the_first_step_names_no_checkpoint():
    figures = {"loss": 1.0, "grad_norm": 2.0}
    assert "is a fresh one, not kept" in str(loop._spike(1, figures, "here", Path("x.npz")))
    assert "is checkpoint 1 of here" in str(loop._spike(2, figures, "here", Path("x.npz")))


@pytest.mark.parametrize(("steps", "warmup"), [(1, 20), (3, 20), (50, 10), (50, 0)])
def test_the_learning_rate_warms_up_and_decays_in_any_number_of_steps(steps, warmup):
    tx = training.Optimiser(learning_rate=0.5, warmup=warmup, clip=1e9).build(steps)
    weight, moves = {"w": jnp.zeros(())}, []
    state = tx.init(weight)
    for _ in range(steps):  # Adam moves by the learning rate when gradients do not change
        update, state = tx.update({"w": jnp.ones(())}, state, weight)
        moves.append(-float(update["w"]))
    assert max(moves) == pytest.approx(0.5, rel=1e-3)
    assert int(np.argmax(moves)) == min(warmup, steps - 1)
    assert all(np.diff(moves[min(warmup, steps - 1) :]) < 0)


def test_names_to_train_must_exist():
    with pytest.raises(ValueError, match=r"nothing named \['lora'\] to train.*adapter"):
        training.create(PARAMS, ("lora",), TX)


def test_evaluation_is_a_function_of_its_seed(whole, folder):
    source = Conversations(folder, "train")
    settings = dict(batch=4, length=12, limit=8)
    one, again, other = (
        training.evaluate(MODEL, PARAMS, OBJECTIVE, source, seed=seed, **settings)
        for seed in (1, 1, 2)
    )
    assert one == again
    assert one["diffusion"] != other["diffusion"]
    trained = {**PARAMS, **whole[1].trainable}
    better = training.evaluate(MODEL, trained, OBJECTIVE, source, seed=1, **settings)
    assert better["diffusion"] < one["diffusion"]


def test_plotting_needs_matplotlib_and_training_does_not(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert training.plot(tmp_path) is None
    assert not (tmp_path / "loss.png").exists()


@pytest.fixture(scope="module")
def bench():
    """scripts/bench/kill_training.py, whose processes train a tiny model."""
    path = Path(__file__).resolve().parents[1] / "scripts" / "bench" / "kill_training.py"
    spec = importlib.util.spec_from_file_location("kill_training", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_terminated_process_exits_with_0_and_the_next_one_goes_on(bench, tmp_path):
    config = bench.Kill(run=tmp_path, kills=0, steps=60, seed=1, out=tmp_path / "report")
    report = bench.main(config)
    (kill,) = report["kills"]
    assert (kill["signal"], kill["exit_code"]) == ("SIGTERM", 0)
    assert kill["step"] == kill["resumed_from"] > 0
    assert report["identical"]


@pytest.mark.slow
def test_killed_three_times_continues_on_the_same_curve(bench, tmp_path):
    config = bench.Kill(run=tmp_path, kills=3, steps=120, out=tmp_path / "report")
    report = bench.main(config)
    kills = report["kills"]
    assert sorted(kill["signal"] for kill in kills) == ["SIGKILL"] * 3 + ["SIGTERM"]
    for kill in kills:
        assert 0 <= kill["resumed_from"] <= kill["step"] < 120
        assert kill["exit_code"] == (0 if kill["signal"] == "SIGTERM" else -signal.SIGKILL)
    assert report["identical"]
    assert report["largest_difference"] == 0
    steps = [row["step"] for row in bench.figures(tmp_path / "killed") if "loss" in row]
    assert steps == list(range(1, 121))
    assert report["last_loss"] < 0.5 * report["first_loss"]
    assert not bench.unfinished(tmp_path / "killed")
    assert json.loads((tmp_path / "report.json").read_text())["kills"] == kills
    assert (tmp_path / "report.png").stat().st_size > 1000
