"""Runs as files say: train, adapt, and what they leave, on tiny models."""

import dataclasses
import itertools
import json
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax import adaptation, checkpoint, pretraining, recipes, training
from dllm_jax.adaptation import Adapt
from dllm_jax.cli import main
from dllm_jax.cli.training import load_config
from dllm_jax.corruption import MaskNoise
from dllm_jax.data import Row, StoreData, tokenise
from dllm_jax.generation_config import load_recipe
from dllm_jax.losses import Autoregressive, Diffusion
from dllm_jax.nn.adapters import AdapterConfig
from dllm_jax.nn.dit import DiTConfig
from dllm_jax.nn.transformer import Transformer, forward
from dllm_jax.tasks import Addition
from dllm_jax.testing import tiny
from dllm_jax.training import phases, records
from dllm_jax.training.feed import mesh_for
from tests import test_cli, toy_config

CONFIG = Path(toy_config.__file__)
CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counting:
    """Rows that count."""

    rows: int = 24

    def source(self, split: str):
        if split != "train":
            raise FileNotFoundError
        return [Row(np.arange(2 + i % 5, 12 + i % 5, dtype=np.int32), 2) for i in range(self.rows)]


def rows(run: Path) -> list[dict]:
    return training.read_metrics(run / "metrics.jsonl")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The command, with fields changed, end to end."""
    run = tmp_path_factory.mktemp("runs") / "toy"
    changed = ["--data.rows", "40", "--model.dim", "24", "--optimiser.learning-rate", "0.02"]
    line = ["train", str(CONFIG), "--run", str(run), *changed, "--ema", "0.5", "--debug"]
    assert main(line) == 0
    return run


def test_a_command_trains_evaluates_and_writes_a_model(trained):
    found = rows(trained)
    assert [row["step"] for row in found if "loss" in row] == [1, 2, 3]
    assert all(np.isfinite(row["loss"]) for row in found if "loss" in row)
    last = next(row for row in reversed(found) if "loss" in row)
    assert {"tokens_per_second", "mfu", "seconds"} <= last.keys()
    asked = [row for row in found if "addition_accuracy" in row]
    assert [row["step"] for row in asked] == [2, 3]
    assert [row["step"] for row in found if "heldout_loss" in row] == [2, 3]
    assert asked[0]["addition_passes"] >= 1
    sample, _ = training.read_metrics(trained / "samples.jsonl")
    assert sample["name"] == "addition_answers"
    assert "=" in sample["text"]
    model, params = checkpoint.load(trained / "model")
    assert model.config.dim == 24
    assert load_recipe(trained / "model") == toy_config.config.recipe
    told = json.loads((trained / "settings.json").read_text())
    assert (told["steps"], told["batch"], told["rows"], told["objective"]) == (
        3, 8, 40, "Autoregressive()",
    )  # fmt: skip
    assert "dim=24" in told["architecture"]
    assert told["optimiser"] == "Optimiser(learning_rate=0.02, warmup=0)"
    _, mean = training.restore(trained, ("embed",), ema=True)  # what is written is the average
    np.testing.assert_array_equal(params["embed"], mean["embed"])


def test_the_same_command_goes_on_and_a_finished_run_stays(trained, tmp_path):
    config = dataclasses.replace(
        toy_config.config, run=tmp_path, evaluations={}, recipe=None,
        data=dataclasses.replace(toy_config.config.data, rows=40),
        model=dataclasses.replace(toy_config.config.model, dim=24),
        optimiser=dataclasses.replace(toy_config.config.optimiser, learning_rate=0.02),
        fit=dataclasses.replace(toy_config.config.fit, ema=0.5, minutes=0.0),
    )  # fmt: skip
    pretraining.train(config)
    assert rows(tmp_path) == []
    assert not (tmp_path / "model").exists()
    go_on = dataclasses.replace(config.fit, minutes=None)
    _, params = pretraining.train(dataclasses.replace(config, fit=go_on))
    losses = [[row["loss"] for row in rows(run) if "loss" in row] for run in (trained, tmp_path)]
    assert losses[0] == losses[1]
    written = checkpoint.load(trained / "model")[1]
    jax.tree.map(np.testing.assert_array_equal, params, written)


def test_a_model_that_is_there_is_trained_on(trained, tmp_path):
    config = dataclasses.replace(
        toy_config.blocks, run=tmp_path, model=str(trained / "model"), names=("head",),
        objective=toy_config.config.objective, export=tmp_path / "second",
    )  # fmt: skip
    model, params = pretraining.train(config)
    before = checkpoint.load(trained / "model")[1]
    np.testing.assert_array_equal(params["embed"], before["embed"])
    assert (np.asarray(params["head"]) != before["head"]).any()
    assert checkpoint.load(tmp_path / "second")[0].config.dim == model.config.dim == 24


def test_a_store_is_packed_and_gives_its_tokenizer(tmp_path):
    texts = [f"{number} and so on" for number in range(40)]
    tokenise(texts, test_cli.byte_tokenizer(), tmp_path / "store", heldout=0.2)
    data = StoreData(folder=tmp_path / "store", length=16)
    train, heldout = pretraining.sources(data)
    assert {len(row.tokens) for row in list(train)[:-1]} == {16}
    assert heldout is not None
    text = data.tokenizer.decode(np.concatenate([row.tokens for row in train]).tolist())
    assert "and so on" in text
    apart = dataclasses.replace(data, length=None).source("train")
    assert len(apart) > len(train) / 2
    found = pretraining.tokenizer_of(toy_config.config.model, data)
    assert found is not None
    found.save(tmp_path / "tokenizer")
    model, params = tiny(adapter=False, vocab_size=data.tokenizer.vocab_size, mask_id=None)
    ask = pretraining.Samples(
        prompts=("one and", "two"), tokenizer=str(tmp_path / "tokenizer"), recipe=recipes.ar(),
        max_new_tokens=3,
    )  # fmt: skip
    said = ask(model, params, 0)
    assert [text[: len(start)] for text, start in zip(said["texts"], ask.prompts, strict=True)] == [
        "one and", "two",
    ]  # fmt: skip
    assert 1 <= said["passes"] <= 4


@pytest.mark.slow
def test_another_config_of_a_file_by_its_name_on_a_mesh(tmp_path):
    name = f"{CONFIG}:blocks"
    assert main(["train", name, "--run", str(tmp_path), "--fsdp", "2"]) == 0
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == [1, 2, 3]
    alone = tmp_path / "alone"
    config = dataclasses.replace(
        load_config(name, pretraining.Train), run=alone,
        fit=dataclasses.replace(toy_config.blocks.fit, batch=8),
    )  # fmt: skip
    pretraining.train(config)
    losses = [[row["loss"] for row in rows(x) if "loss" in row] for x in (tmp_path, alone)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_model_is_not_written_over_its_run(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained.parent)
    before = sorted(trained.rglob("*"))
    own = dataclasses.replace(toy_config.config, run=trained)
    for folder in (trained, Path(trained.name), trained.parent, Path(".")):
        with pytest.raises(ValueError, match="this one holds the run"):
            pretraining.train(dataclasses.replace(own, export=folder))
    elsewhere = dataclasses.replace(own.fit, checkpoints=str(tmp_path / "saved" / "steps"))
    with pytest.raises(ValueError, match="this one holds the run"):
        pretraining.train(
            dataclasses.replace(own, run=tmp_path / "run", fit=elsewhere, export=tmp_path / "saved")
        )
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match="holds no model"):
        pretraining.train(dataclasses.replace(own, export=tmp_path))
    assert sorted(trained.rglob("*")) == before


def test_another_architecture_of_the_same_shapes_does_not_go_on(base, tmp_path):
    """Though other dtypes and longer rows may."""
    config = dataclasses.replace(toy_config.config, run=tmp_path / "run", evaluations={})
    pretraining.train(config)
    other = dataclasses.replace(config.model, rope_theta=123.0)
    with pytest.raises(ValueError, match=r"started with backbone=.*here it is .*rope_theta=123\.0"):
        pretraining.train(dataclasses.replace(config, model=other))
    longer = dataclasses.replace(config.model, max_length=config.model.max_length + 8, remat="full")
    assert pretraining.backbone(longer) == pretraining.backbone(config.model)
    adapt = adapt_to(base, tmp_path / "a", adapter=AdapterConfig(rank=2, gated=False), steps=1)
    adaptation.adapt(adapt)
    with pytest.raises(ValueError, match="started with backbone="):
        adaptation.adapt(
            dataclasses.replace(adapt, adapter=dataclasses.replace(adapt.adapter, alpha=3.0))
        )


def test_mistakes_are_told_in_a_line(tmp_path, capsys):
    broken = tmp_path / "broken.py"
    broken.write_text("config = 3\n")
    for line, message in (
        (["train", str(tmp_path / "none.py")], "no file .*none.py; give a Python file"),
        (["train", str(broken)], "exports no Train named config; there are []"),
        (["train", f"{CONFIG}:third"], "named third; there are ['blocks', 'config', 'tuned']"),
        (["adapt", str(CONFIG)], "exports no Adapt named config"),
    ):
        assert main(line) == 2
        told = capsys.readouterr().err
        assert all(part in told for part in message.split(".*")), told


def test_fields_are_listed_and_checked(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", str(CONFIG), "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for option in ("--model.dim", "--data.task.digits", "--on-spike", "--optimiser.kind"):
        assert option in text
    with pytest.raises(SystemExit) as ended:
        main(["train", str(CONFIG), "--model.width", "3"])
    assert ended.value.code == 2


def test_configs_load():
    for path in CONFIGS.glob("*.py"):
        text = path.read_text()
        kind = Adapt if "Adapt(" in text else pretraining.Train
        only = ":addition" if path.stem == "tasks" else ""  # one of many, none of them the first
        load_config(f"{path}{only}", kind)
    for name in ("cpu", "gpu", "tpu"):
        assert load_config(f"{CONFIGS / 'adapt_smollm2.py'}:{name}", Adapt).run.name.endswith(name)


def test_a_mesh_takes_what_divides():
    assert mesh_for(1) is None  # of eight devices
    for batch, size in ((3, 3), (4, 4), (6, 6), (14, 7), (24, 8), (22, 2)):
        assert dict(mesh_for(batch).shape)["data"] == size
    with pytest.raises(ValueError, match="fsdp=0 must be at least 1"):
        mesh_for(8, fsdp=0)
    mesh = mesh_for(8, accumulate=2, fsdp=2, tensor=2)
    assert {axis: size for axis, size in mesh.shape.items() if size > 1} == {
        "data": 2, "fsdp": 2, "tensor": 2,
    }  # fmt: skip


# Adaptation


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """An autoregressive model in a folder; its last token is for masks."""
    model, params = tiny(adapter=False, mask_id=None, num_layers=1)
    folder = tmp_path_factory.mktemp("base") / "model"
    checkpoint.save(folder, model, params)
    return folder


def phase(until: int, block_size: int) -> training.Phase:
    return training.Phase(until=until, block_size=block_size)


def adapt_to(base: Path, run: Path, **fields) -> Adapt:
    given = dict(
        data=Counting(), run=run, model=str(base), mask_id=31, steps=4, batch=4, length=12,
        attention="block_causal", alignment="same_position", save_every=2,
        objective=Diffusion(noise=MaskNoise(block_size=2)),
        phases=(phase(1, 1), phase(3, 4), phase(9, 2)),
        optimiser=training.Optimiser(learning_rate=1e-2, warmup=0, schedule="wsd"),
    )  # fmt: skip
    return Adapt(**{**given, **fields})


@pytest.mark.parametrize(
    "name",
    [
        "d2f",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("blocks", "blocks_lora", "canvas")),
    ],
)
def test_configs_of_adaptation_make_models(base, tmp_path, name: str):
    """Two steps of each, of a tiny base."""
    config = load_config(f"{CONFIGS / 'adapt_smollm2.py'}:{name}", Adapt)
    if name == "d2f":  # its own base was made bidirectional
        model, params = checkpoint.load(base)
        model = dataclasses.replace(model.config, attention="bidirectional", mask_id=31).build()
        base = tmp_path / "canvas"
        checkpoint.save(base, model, params)
    parts = enumerate(config.phases[1:], 1)
    parts = tuple(dataclasses.replace(part, until=i) for i, part in parts)
    small = dict(data=Counting(), run=tmp_path / "run", model=str(base), mask_id=31, steps=2)
    adaptation.adapt(dataclasses.replace(config, **small, phases=parts))
    model, params = checkpoint.load(tmp_path / "run" / "model")
    attention = "block_causal" if name.startswith("blocks") else "bidirectional"
    assert (model.config.attention, model.config.alignment, model.config.adapter) == (
        attention, "shifted", None,
    )  # fmt: skip
    assert model.config.block_size == (16 if name.startswith("blocks") else 1)
    before = checkpoint.load(base)[1]["layers"]["attention"]["q"]
    assert not np.array_equal(params["layers"]["attention"]["q"], before)


@pytest.mark.slow
def test_lora_is_merged_into_a_model_that_loads_and_is_exported(base, tmp_path, capsys):
    lora = AdapterConfig(rank=2, gated=False)
    config = adapt_to(base, tmp_path / "run", adapter=lora, phases=(phase(9, 2),), steps=2)
    adaptation.adapt(config)
    folder = tmp_path / "run" / "model"
    assert f"step 2: the model is in {folder}" in capsys.readouterr().out
    model, params = checkpoint.load(folder)
    assert model.config.adapter is None
    found = model.config
    assert (found.attention, found.block_size, found.alignment, found.mask_id) == (
        "block_causal", 2, "same_position", 31,
    )  # fmt: skip
    # What was trained beside the weights computes what the merged ones do.
    adapter = jax.device_get(training.restore(tmp_path / "run", ("adapter",))[1])
    apart = Transformer(dataclasses.replace(found, adapter=config.adapter))
    tokens = jnp.arange(24).reshape(2, 12)
    whole = {**checkpoint.load(base)[1], **adapter}
    one, other = forward(apart, whole, tokens).hidden, forward(model, params, tokens).hidden
    np.testing.assert_allclose(one, other, atol=2e-5)
    assert np.abs(one - forward(model, checkpoint.load(base)[1], tokens).hidden).max() > 1e-3


@pytest.mark.slow
def test_an_adapted_model_is_published_as_another_family(tmp_path):
    """Its tensors are read by transformers' Qwen3 to 6e-7, with SDAR's mask (tried by hand)."""
    own = dict(adapter=False, mask_id=None, num_layers=1, family="qwen3", qk_norm=True)
    checkpoint.save(tmp_path / "base", *tiny(**own))
    config = adapt_to(tmp_path / "base", tmp_path / "run", adapter=None, family="sdar", steps=2)
    adaptation.adapt(config)
    model, params = checkpoint.load(tmp_path / "run" / "model")
    checkpoint.export(tmp_path / "published", model, params)
    fields = json.loads((tmp_path / "published" / "config.json").read_text())
    assert (fields["model_type"], fields["block_size"]) == ("sdar", model.config.block_size)
    again, read = checkpoint.load(tmp_path / "published")
    assert again.config == model.config
    tokens = jnp.arange(24).reshape(2, 12)
    one, other = forward(model, params, tokens).hidden, forward(again, read, tokens).hidden
    np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_block_sizes_follow_each_other_and_interruptions_leave_no_trace(
    base, tmp_path, monkeypatch
):
    config = adapt_to(base, tmp_path / "whole", adapter=None, ema=0.5)
    adaptation.adapt(config)
    part = dataclasses.replace(config, run=tmp_path / "parts")
    ticks = itertools.count()  # one a look at the clock, of which the first is its start
    clock = SimpleNamespace(monotonic=lambda: next(ticks))
    with monkeypatch.context() as patch:
        patch.setattr(training.loop, "time", clock)
        patch.setattr(phases, "time", SimpleNamespace(monotonic=lambda: 0.0))
        adaptation.adapt(dataclasses.replace(part, minutes=1.5 / 60))
    assert rows(tmp_path / "parts")[-1]["step"] == 2  # within the second phase
    adaptation.adapt(part)
    left, right = rows(tmp_path / "whole"), rows(tmp_path / "parts")
    assert [row["loss"] for row in left] == [row["loss"] for row in right]
    assert [row["step"] for row in left] == [1, 2, 3, 4]
    one, other = (checkpoint.load(tmp_path / run / "model") for run in ("whole", "parts"))
    jax.tree.map(np.testing.assert_array_equal, one[1], other[1])
    assert one[0].config.block_size == 2


def test_a_phase_is_its_own_model_and_objective():
    found = phases.listed((phase(1, 1), phase(3, 4), phase(9, 2)), 4)
    assert [part[:2] for part in found] == [(1, 1), (3, 4), (4, 2)]
    objective = Diffusion(noise=MaskNoise(block_size=2))
    model, _ = tiny(adapter=False, attention="block_causal", block_size=2)
    assert phases.of_size(model, objective, None) == (model, objective)
    own, aim = phases.of_size(model, objective, 0)
    assert (own.config.attention, aim.noise.block_size) == ("bidirectional", 0)
    own, aim = phases.of_size(model, objective, 4)
    assert (own.config.block_size, aim.noise.block_size) == (4, 4)
    causal, _ = tiny(adapter=False, attention="causal")
    own, aim = phases.of_size(causal, objective, 4)
    assert (own.config.attention, aim.noise.block_size) == ("causal", 4)
    with pytest.raises(ValueError, match="Autoregressive has none"):
        phases.of_size(causal, Autoregressive(), 4)
    dit = DiTConfig(vocab_size=8, num_layers=1, dim=16, num_heads=2, cond_dim=8, mask_id=1).build()
    own, aim = phases.of_size(dit, objective, 4)
    assert (own.config.block_size, aim.noise.block_size) == (4, 4)
    with pytest.raises(ValueError, match="the attention of a DiT is block_causal"):
        phases.of_size(dit, objective, 0)
    with pytest.raises(ValueError, match="each must end after"):
        dataclasses.replace(toy_config.config, phases=(phase(3, 4), phase(3, 2)))


def test_a_run_begins_with_the_whole_text_and_ends_in_blocks(tmp_path):
    asked = []
    config = dataclasses.replace(
        toy_config.config, run=tmp_path, data=Counting(), recipe=None,
        model=tiny(adapter=False, mask_id=31, attention="block_causal", block_size=2)[0].config,
        objective=Diffusion(noise=MaskNoise(block_size=2)), phases=(phase(2, 0), phase(3, 2)),
        evaluations={"model": lambda model, *_: asked.append(model.config.attention) or {}},
    )  # fmt: skip
    model, _ = pretraining.train(config)
    assert asked == ["bidirectional", "block_causal"]
    for found in (model, checkpoint.load(tmp_path / "model")[0]):
        assert (found.config.attention, found.config.block_size) == ("block_causal", 2)
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == [1, 2, 3]
    pretraining.train(dataclasses.replace(config, phases=(phase(2, 0), phase(9, 2))))  # as it was
    for other in ((phase(1, 0), phase(3, 2)), ()):
        with pytest.raises(ValueError, match="phases='blocks of 0 until step 2, then blocks of 2"):
            pretraining.train(dataclasses.replace(config, phases=other))


def test_a_phase_chooses_its_interval_of_noise(tmp_path, monkeypatch):
    aims = []

    def fit(*rest, **given):
        aims.append(rest[5].noise)
        assert given["settings"]["steps"] == 3  # of all phases
        return training.fit(*rest, **given)

    monkeypatch.setattr(phases, "fit", fit)
    config = dataclasses.replace(toy_config.tuned, run=tmp_path)
    noise = config.objective.noise
    pretraining.train(config)
    file = tmp_path / "interval-2.json"
    found = json.loads(file.read_text())
    assert found["interval"] == min(found["variances"], key=lambda x: x[2])[:2]
    assert len({x[2] for x in found["variances"]}) == len(found["variances"]) > 20
    tuned = dataclasses.replace(noise, beta=found["interval"][0], omega=found["interval"][1])
    assert aims == [noise, tuned]
    file.write_text('{"interval": [0.1, 0.7]}')
    pretraining.train(config)  # goes on with what the file says
    assert (aims[-1].beta, aims[-1].omega) == (0.1, 0.7)
    file.unlink()
    with pytest.raises(ValueError, match="is lost"):
        pretraining.train(config)
    for fields, told in (
        (dict(objective=Diffusion(noise=MaskNoise(block_size=2))), "an interval is of"),
        (dict(data=dataclasses.replace(config.data, heldout=0)), "no held-out rows"),
        (dict(data=dataclasses.replace(config.data, heldout=2)), "at least two batches of"),
        (dict(phases=config.phases[:1]), "tuned on 3 batches"),
    ):
        with pytest.raises(ValueError, match=told):
            pretraining.train(dataclasses.replace(config, **fields))
    with pytest.raises(ValueError, match="one batch has no variance"):
        dataclasses.replace(config, phases=(training.Phase(until=3, block_size=2, tune=1),))


def test_documents_end_within_no_block_of_any_phase(tmp_path):
    tokenise(["some text"] * 40, test_cli.byte_tokenizer(), tmp_path / "store")
    config = dataclasses.replace(
        toy_config.config, run=tmp_path / "run", recipe=None, evaluations={},
        data=StoreData(folder=tmp_path / "store", length=18, documents=True),
        model=tiny(adapter=False, attention="block_causal", block_size=2)[0].config,
        objective=Diffusion(noise=MaskNoise(block_size=2)), phases=(phase(2, 2), phase(3, 4)),
    )  # fmt: skip
    config = dataclasses.replace(config, fit=dataclasses.replace(config.fit, length=18))
    with pytest.raises(ValueError, match="18 tokens are no multiple of block_size=4"):
        pretraining.train(config)
    assert not list((tmp_path / "run").rglob("*"))  # before the first step


def test_blocks_of_attention_are_those_of_the_noise(base, tmp_path):
    config = adapt_to(base, tmp_path, adapter=None, phases=())
    config = dataclasses.replace(config, objective=Diffusion(noise=MaskNoise(block_size=8)))
    settings = adaptation.adapted(checkpoint.load(base)[0].config, config)
    assert settings.block_size != 8
    assert adaptation.built(settings, config)[0].config.block_size == 8
    meta = adaptation._meta(config, 4, 24, None)
    assert meta["block_size"] == 8


def test_an_adapter_tells_what_it_was_made_from(tmp_path):
    """Whatever its objective is, and that of the one that it began with."""
    first = tmp_path / "adapter.json"
    config = Adapt(data=Counting(), run=tmp_path, init=tmp_path, steps=4)
    own = dataclasses.replace(config, objective=Diffusion(noise=MaskNoise(block_size=8)))
    for meta, steps, seen in (
        ({"steps": 3, "noisy_tokens_seen": 7}, 7, 7 + 4 * 4 * 48 * 4),
        ({"steps": 3, "noisy_tokens_seen": None}, 7, None),
        ({}, 4, None),
    ):
        first.write_text(json.dumps({"meta": meta}))
        found = adaptation._meta(config, 4, 24, None)
        assert (found["steps"], found["noisy_tokens_seen"]) == (steps, seen)
        assert adaptation._meta(own, 4, 24, None)["noisy_tokens_seen"] is None

    class Mine:
        def loss(self, model, params, batch, key): ...

    for objective, told in (
        (own.objective, "Diffusion(noise=MaskNoise(block_size=8))"),
        (Mine(), "Mine()"),
    ):
        found = adaptation._meta(dataclasses.replace(config, objective=objective), 4, 24, None)
        assert json.loads(json.dumps(found))["settings"]["objective"] == told


def test_phases_that_a_shorter_run_does_not_reach_are_none(base, tmp_path):
    config = adapt_to(base, tmp_path, steps=3)
    found = phases.listed(config.phases, config.steps)
    assert [part[:2] for part in found] == [(1, 1), (3, 4)]
    found = [adaptation._meta(config, step, 24, None)["block_size"] for step in range(1, 4)]
    assert found == [1, 4, 4]


def test_a_signal_in_the_last_step_of_a_phase_ends_the_run(base, tmp_path, monkeypatch, capsys):
    given = []

    def fit(run, config, model, params, state, *rest, evaluations, about, **_):
        given.append((config, evaluations, about))
        with records.interrupts():
            signal.raise_signal(signal.SIGTERM)
        return dataclasses.replace(state, step=jnp.int32(config.steps))

    monkeypatch.setattr(phases, "fit", fit)
    config = adapt_to(base, tmp_path, adapter=None, keep=5, evaluations={"mine": lambda *_: {}})
    adaptation.adapt(config)
    ((config, evaluations, about),) = given
    assert (config.steps, config.keep) == (1, 5)
    assert set(evaluations) == {"mine"}
    assert about["data"] == Counting()
    assert about["model"] == ("model, attention=block_causal, alignment=same_position, mask_id=31")
    assert "step 1 of 4, saved; the same command continues" in capsys.readouterr().out


def test_a_model_keeps_its_own_settings_where_a_run_has_none(monkeypatch):
    given = []
    monkeypatch.setattr(phases, "fit", lambda *rest, **_: given.append(rest[2:5]) or 1 / 0)
    own = dataclasses.replace(
        toy_config.config.model, dtype="bfloat16", param_dtype="bfloat16", remat="full"
    )
    config = dataclasses.replace(toy_config.config, model=own)
    for run, dtype, remat in (
        (config, "bfloat16", "full"),
        (dataclasses.replace(config, dtype="float32", remat="dots"), "float32", "dots"),
    ):
        with pytest.raises(ZeroDivisionError):
            pretraining.train(run)
        model, frozen, state = given.pop()
        assert (model.config.dtype, model.config.remat) == (dtype, remat)
        assert not frozen  # what is trained is held once
        assert state.trainable["embed"].dtype == jnp.bfloat16


def test_what_is_trained_of_stored_weights_is_float32(tmp_path, monkeypatch):
    model, params = tiny(adapter=False, num_layers=1)
    model = dataclasses.replace(model.config, param_dtype="bfloat16").build()
    small = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    checkpoint.save(tmp_path / "small", model, small)
    run = dataclasses.replace(
        toy_config.config, model=str(tmp_path / "small"), run=tmp_path / "part", names=("embed",),
        evaluations={},
    )  # fmt: skip
    part, made = pretraining.train(run)
    assert {x.dtype for x in jax.tree.leaves(made)} == {jnp.dtype("bfloat16")}
    found, loaded = checkpoint.load(tmp_path / "part" / "model")
    assert found.config.param_dtype == part.config.param_dtype == "bfloat16"
    assert not np.array_equal(loaded["embed"], small["embed"])
    chex.assert_trees_all_equal(loaded["layers"], small["layers"])

    kinds = []

    def fit(*rest, **_):
        kinds.append([{x.dtype.name for x in jax.tree.leaves(own)} for own in rest[3:5]])
        raise ZeroDivisionError

    monkeypatch.setattr(phases, "fit", fit)
    to = partial(adapt_to, tmp_path / "small", tmp_path / "run")
    lora = AdapterConfig(rank=2, gated=False)
    for config in (
        run, dataclasses.replace(run, names=()), dataclasses.replace(run, param_dtype="bfloat16"),
        to(adapter=None), to(adapter=lora), to(adapter=lora, param_dtype="bfloat16"),
    ):  # fmt: skip
        with pytest.raises(ZeroDivisionError):
            (adaptation.adapt if isinstance(config, Adapt) else pretraining.train)(config)
    part, whole, own = [{"bfloat16"}, "float32"], [set(), "float32"], [{"bfloat16"}, "bfloat16"]
    for found, (held, kind) in zip(kinds, (part, whole, own, whole, part, own), strict=True):
        assert found[0] == held
        assert found[1] - {"int32"} == {kind}  # steps are counted


def test_a_stored_model_computes_as_it_says(tmp_path):
    model, params = tiny(adapter=False, num_layers=1)
    stored = dataclasses.replace(model.config, dtype="bfloat16", param_dtype="bfloat16").build()
    checkpoint.save(tmp_path / "m", stored, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    for options in (dict(whole=True), dict(whole=False)):
        model, params = pretraining.start(str(tmp_path / "m"), 0, None, None, **options)
        assert model.config.dtype == "bfloat16"
        wide = "float32" if options["whole"] else "bfloat16"
        assert {x.dtype.name for x in jax.tree.leaves(params)} == {wide}


def test_an_accuracy_is_of_the_data_of_its_run():
    more = dataclasses.replace(toy_config.config.data, task=Addition(digits=3))
    (asked,) = pretraining.asked_of(toy_config.config.evaluations, more).values()
    assert asked.task == Addition(digits=3)
    assert asked.of(toy_config.config.data) is asked  # it has one of its own by now
    with pytest.raises(ValueError, match="an accuracy needs a task: Counting has none"):
        pretraining.asked_of(toy_config.config.evaluations, Counting())


def test_a_run_may_hold_nothing_out(capsys):
    class Empty(Counting):
        def source(self, split: str):
            return super().source(split) if split == "train" else []

    train, heldout = pretraining.sources(Empty())
    assert (len(train), heldout) == (24, None)
    assert "the held-out split is empty" in capsys.readouterr().out
    data = dataclasses.replace(toy_config.config.data, heldout=0)
    assert pretraining.sources(data)[1] is None
    assert capsys.readouterr().out.startswith("heldout=0: there are no rows of 'heldout'")


def test_other_architectures_are_not_adapted(tmp_path):
    dit = DiTConfig(vocab_size=8, num_layers=1, dim=16, num_heads=2, cond_dim=8, mask_id=1)
    with pytest.raises(ValueError, match="is a DiTConfig: a Transformer is adapted"):
        adaptation.adapted(dit, Adapt(data=Counting(), run=tmp_path))


def test_what_an_adaptation_cannot_be(base, tmp_path):
    for fields, message in (
        (dict(mask_id=None), r"has no mask token: give mask_id, an id below 32"),
        (dict(mask_id=32), "mask_id=32 is outside the vocabulary of 32"),
    ):
        with pytest.raises(ValueError, match=message):
            adaptation.adapt(adapt_to(base, tmp_path, adapter=None, **fields))
    with pytest.raises(ValueError, match=r"phases end at \[3, 1\]"):
        adapt_to(base, tmp_path, phases=(phase(3, 1), phase(1, 2)))
    with pytest.raises(ValueError, match=r"phases end at \[0\]: .* from 1 on"):
        adapt_to(base, tmp_path, phases=(phase(0, 1),))
    with pytest.raises(ValueError, match=r"phases have blocks of \[1, -1\]"):
        adapt_to(base, tmp_path, phases=(phase(1, 1), phase(2, -1)))
    with pytest.raises(ValueError, match="init is an adapter to start from"):
        adapt_to(base, tmp_path, adapter=None, init=tmp_path)
    with pytest.raises(ValueError, match="family='sdar': a gated adapter leaves the base as it is"):
        adaptation.adapt(adapt_to(base, tmp_path, family="sdar"))
    for attention, told in (
        ("block_causal", "attention='block_causal'"),
        (None, "alignment='same"),
    ):
        with pytest.raises(ValueError, match=f"{told}.*: a gated adapter leaves the base as it is"):
            adaptation.adapt(adapt_to(base, tmp_path, attention=attention))
    lora = dict(init=tmp_path, adapter=AdapterConfig(rank=2, gated=False))  # init's own is gated
    with pytest.raises(ValueError, match="family='sdar': a gated adapter leaves the base as it is"):
        adaptation.adapted(tiny()[0].config, adapt_to(base, tmp_path, **lora, family="sdar"))
    for attention in ("block_causal", "bidirectional"):
        fields = dict(adapter=None, attention=attention, objective=None, phases=())
        with pytest.raises(ValueError, match=f"'{attention}'.*the default objective, the dual st"):
            adaptation.adapt(adapt_to(base, tmp_path, **fields))
    fields = dict(
        adapter=None, attention="causal", alignment="same_position", objective=None, phases=()
    )
    with pytest.raises(ValueError, match="'same_position': the default objective, the dual stream"):
        adaptation.adapt(adapt_to(base, tmp_path, **fields))
    with pytest.raises(ValueError, match=r"the family 'sdar' cannot say qk_norm=False"):
        adaptation.adapt(adapt_to(base, tmp_path, adapter=None, family="sdar"))


def test_a_gated_adapter_by_the_command(base, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from pathlib import Path\n"
        "from dllm_jax.adaptation import Adapt\n"
        "from dllm_jax.nn.adapters import AdapterConfig\n"
        "from tests.test_pretraining import Counting\n"
        f"config = Adapt(data=Counting(), run=Path({str(tmp_path / 'run')!r}),\n"
        f"    model={str(base)!r}, steps=1, batch=4, length=12, adapter=AdapterConfig(rank=2))\n"
    )
    assert main(["adapt", str(file), "--adapter.rank", "3", "--noise.blocks", "2", "--debug"]) == 0
    meta = json.loads((tmp_path / "run" / "adapter" / "adapter.json").read_text())
    assert meta["adapter"]["rank"] == 3
    assert (meta["meta"]["steps"], meta["meta"]["noisy_tokens_seen"]) == (1, 2 * 4 * 4)
    model, _ = checkpoint.load(base, adapter=tmp_path / "run" / "adapter")
    assert model.config.mask_id == 32
