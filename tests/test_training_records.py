"""What a run writes for people: speed, reports, curves."""

import json
import math
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax import training
from dllm_jax.cli import main
from dllm_jax.corruption import MaskedBlocks, MaskNoise
from dllm_jax.losses import Autoregressive, Diffusion, Distillation, DualStream
from dllm_jax.nn.adapters import AdapterConfig
from dllm_jax.testing import tiny
from dllm_jax.training import loop, records, throughput
from dllm_jax.training.throughput import Meter
from tests import toy_training


def clock(monkeypatch) -> list[float]:
    """A clock that tells what the list holds."""
    now = [100.0]
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def figures(tokens: float, skipped: float = 0.0) -> dict[str, jax.Array]:
    return {
        "loss": jnp.float32(1.5),
        "tokens": jnp.float32(tokens),
        "skipped": jnp.float32(skipped),
    }


def test_speed_leaves_out_compiling_and_pauses(monkeypatch):
    now = clock(monkeypatch)
    meter = Meter(flops=6e9, peak=4e10)
    meter.add(figures(1000))
    now[0] += 50  # compiling was before: `add` waits for the first step
    first = meter.look()
    assert first == {"loss": 1.5, "tokens": 1000.0, "skipped": 0.0}
    for skipped in (0.0, 1.0, 1.0):
        now[0] += 0.5
        meter.add(figures(300, skipped))
    with meter.pause():
        now[0] += 1000
    found = meter.look()
    assert found["seconds"] == pytest.approx(0.5)
    assert found["tokens_per_second"] == pytest.approx(600)
    assert found["mfu"] == pytest.approx(6e9 / 0.5 / 4e10)
    assert found["skipped"] == 2.0


def shares_of_the_compiled(objective, trained: str = "all", **config) -> list[float]:
    """FLOPs of a step over those of XLA, with the entries that reach the head, and with all."""
    model, params = tiny(
        num_layers=1, dim=64, num_heads=4, num_kv_heads=4, head_dim=16, ffn_dim=256,
        **{"vocab_size": 1024, "mask_id": 1023, "adapter": False, **config},
    )  # fmt: skip
    batch = {
        "tokens": jnp.ones((4, 32), jnp.int32), "lengths": jnp.full(4, 32),
        "prompts": jnp.zeros(4, jnp.int32),
    }  # fmt: skip
    names = tuple(params) if trained == "all" else (trained,)  # below all layers

    def loss(chosen, params):
        given = {**params, **chosen}
        return objective.loss(model, given, batch, jax.random.key(0))[0]

    chosen = {name: params[name] for name in names}
    program = jax.jit(jax.grad(loss)).lower(chosen, params).compile()
    flops = program.cost_analysis()["flops"]
    everywhere = SimpleNamespace(loss=objective.loss, entries=objective.entries)
    return [
        training.step_flops(model.config, names, asked, 4, 32) / flops
        for asked in (objective, everywhere)
    ]


@pytest.mark.parametrize("trained", ["all", "embed"])
def test_flops_of_a_step_are_about_those_of_the_compiled_program(trained):
    found = shares_of_the_compiled(Autoregressive(), trained, vocab_size=256, mask_id=None)
    assert found == pytest.approx([1, 1], rel=0.15)


@pytest.mark.parametrize(
    ("objective", "config"),
    [
        (Diffusion(noise=MaskNoise(block_size=4)), dict(attention="block_causal", block_size=4)),
        (DualStream(noise=MaskedBlocks(block_size=4, blocks=8)), {}),
        (
            Distillation(block_size=4),
            dict(attention="bidirectional", adapter=AdapterConfig(rank=4, gated=False)),
        ),
    ],
    ids=["blocks", "dual stream", "distillation"],
)
def test_flops_leave_out_the_head_where_it_is_not_applied(objective, config):
    found, everywhere = shares_of_the_compiled(objective, **config)
    assert found == pytest.approx(1, rel=0.05)
    assert everywhere > 1.15


def test_the_clean_texts_outputs_are_counted_where_they_are_learnt():
    noise = MaskedBlocks(block_size=4, blocks=8)
    blocks = MaskNoise(block_size=4)
    assert Autoregressive().outputs(4, 32) == 4 * 31
    assert DualStream(noise=noise, ar_weight=1.0).outputs(4, 32) == 4 * (32 + 31)
    assert Diffusion(noise=blocks, ar_weight=1.0).outputs(4, 32) == 4 * (32 + 31)
    twice = Diffusion(noise=blocks, complementary=True)
    assert (twice.outputs(4, 32), twice.entries(4, 32)) == (4 * 64, 4 * 96)


def test_mfu_is_of_the_entries_that_reach_the_head(tmp_path, monkeypatch):
    model, params = tiny(mask_id=31, vocab_size=32)
    given = []
    monkeypatch.setattr(loop, "step_flops", lambda *own: given.append(own) or 1.0)
    objective = DualStream(noise=MaskedBlocks(block_size=2, blocks=3))
    config = training.Fit(steps=1, batch=2, length=8, peak_flops=1e9)
    state = training.TrainState(jnp.int32(0), params, None)
    assert loop._rates(config, model, objective, state, 2) == (1.0, 2e9)
    assert given == [(model.config, params, objective, 2, 8)]


def test_figures_that_are_no_number_are_not_written_but_losses_are():
    nan = float("nan")
    figures = {"level_0": nan, "level_1": 2.0, "loss": nan, "grad_norm": nan, "heldout_loss": nan}
    assert list(records.known(figures)) == ["level_1", "loss", "grad_norm", "heldout_loss"]


def report_to(monkeypatch, name: str):
    """A package of that name that notes what it is told."""
    told = []

    class Board:
        def __init__(self, folder=None):
            told.append(("open", folder))

        def add_scalar(self, figure, value, step):
            told.append((figure, step, value))

        def close(self):
            told.append(("close",))

    def init(**fields):
        told.append(("open", fields))
        return SimpleNamespace(
            log=lambda found, step=None: told.append((found.get("step", step), found)),
            define_metric=lambda *names, **_: None,
            finish=lambda: told.append(("close",)),
        )

    module = ModuleType(name)
    module.SummaryWriter, module.init = Board, init
    monkeypatch.setitem(sys.modules, name, module)
    return told


def test_reports_are_told_what_the_metrics_are(tmp_path, monkeypatch):
    toy_training.write(tmp_path)
    told = {name: report_to(monkeypatch, name) for name in ("tensorboardX", "wandb", "trackio")}
    run = tmp_path / "run"
    toy_training.fit(run, steps=2, report=("tensorboard", "wandb", "trackio"))
    losses = toy_training.losses(run)
    board = told["tensorboardX"]
    assert board[0] == ("open", str(run / "tensorboard"))
    assert [entry[1:] for entry in board if entry[0] == "loss"] == [(1, losses[0]), (2, losses[1])]
    own = (run / "report-id").read_text()
    assert len(own) == 8
    assert told["wandb"][0][1]["id"] == own
    config = told["wandb"][0][1]["config"]
    assert json.loads(json.dumps(config)) == json.loads((run / "settings.json").read_text())
    for name, called in (("wandb", "run"), ("trackio", f"run-{own}")):
        assert told[name][0][1]["name"] == called
        assert told[name][0][1]["config"]["batch"] == 8
        assert [(step, found["loss"]) for step, found in told[name][1:-1]] == [
            (1, losses[0]), (2, losses[1]),
        ]  # fmt: skip
    assert all(entries[-1] == ("close",) for entries in told.values())
    toy_training.fit(run, steps=3, report=("wandb",))  # goes on under the same id
    assert [entry[1]["id"] for entry in told["wandb"] if entry[0] == "open"] == [own, own]


def test_a_report_that_cannot_be_is_told_before_any_step(tmp_path, monkeypatch):
    toy_training.write(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match="needs the package wandb: pip install wandb"):
        toy_training.fit(tmp_path / "run", steps=2, report=("wandb",))
    with pytest.raises(ValueError, match="report='board' is not one of tensorboard, wandb, track"):
        toy_training.fit(tmp_path / "run", steps=2, report=("board",))
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_metrics_are_json_and_a_damaged_line_costs_no_other(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with records.metrics(path, 0) as log:
        for step, loss in ((1, math.nan), (2, math.inf), (3, 0.5)):
            log({"step": step, "loss": loss})
    first, *others = path.read_text().splitlines()
    assert first == '{"step": 1, "loss": null}'
    path.write_text("\n".join([first, "damaged", *others, '{"step": 4, "lo']))
    with pytest.warns(UserWarning, match="line 2 is damaged, and left out"):
        found = training.read_metrics(path)
    assert [row["step"] for row in found] == [1, 2, 3]
    np.testing.assert_array_equal([row["loss"] for row in found], [np.nan, np.nan, 0.5])


def test_a_thread_trains_without_signals():
    asked = []

    def ask():
        with records.interrupts() as interrupted:
            asked.append(interrupted())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert asked == [False]


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """Two runs with the same names of figures."""
    found = []
    for number in (1, 2):
        run = tmp_path / f"run-{number}"
        run.mkdir()
        rows = [{"step": i, "loss": number / i, "grad_norm": float("nan")} for i in range(1, 61)]
        rows += [{"step": 60, "heldout_loss": 0.5}]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found.append(run)
    return found


def drawn(monkeypatch) -> list:
    """The axes of every figure that is saved."""
    from matplotlib.figure import Figure

    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: kept.append(self.axes))
    return kept


def test_curves_of_several_runs_share_panels(runs, monkeypatch):
    kept = drawn(monkeypatch)
    curves = training.Curves(figures=("loss+held*", "loss"), smooth=10, log_x=True, log_y=True)
    training.plot(*runs, curves=curves)
    left, right = kept[0]
    labels = [text.get_text() for text in left.get_legend().get_texts()]
    assert labels == [
        "run-1: loss", "run-1: heldout_loss", "run-2: loss", "run-2: heldout_loss",
    ]  # fmt: skip
    smooth = next(line for line in right.lines if line.get_label() == "run-2: loss").get_ydata()
    assert smooth[0] == 2.0
    assert smooth[29] == pytest.approx(sum(2 / i for i in range(21, 31)) / 10)
    assert (left.get_xscale(), left.get_yscale()) == ("log", "log")


def test_the_loss_is_drawn_beside_that_of_held_out_rows(runs, monkeypatch):
    kept = drawn(monkeypatch)
    with (runs[0] / "metrics.jsonl").open("a") as file:
        print(json.dumps({"step": 60, "heldout_loss": 0.5, "heldout_level_0": 9.0}), file=file)
    training.plot(runs[0])
    (panel,) = kept[0]
    labels = [text.get_text() for text in panel.get_legend().get_texts()]
    assert labels == ["loss", "heldout_loss"]


def test_figures_are_named(runs):
    with pytest.raises(ValueError, match="no run has grad_norm, wide; there are grad_norm, held"):
        training.plot(*runs, curves=training.Curves(figures=("grad_norm", "wide")))
    for panel in ("wide", "loss+wide"):  # beside others that there are
        with pytest.raises(ValueError, match="no run has wide; there are"):
            training.plot(*runs, curves=training.Curves(figures=("loss", panel)))
    with pytest.raises(FileNotFoundError, match=r"nowhere has no metrics.jsonl"):
        training.plot("nowhere")


def test_the_command_draws(runs, tmp_path, capsys):
    out = tmp_path / "curves.png"
    assert main(["plot", *map(str, runs), "--figures", "loss", "--out", str(out), "--log-y"]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert str(out) in capsys.readouterr().err
    assert main(["plot", str(runs[0]), "--smooth", "0"]) == 2
    assert "--smooth 0 must be at least 1" in capsys.readouterr().err
