"""The scripts that a user runs, on a tiny model: distil conversations, then adapt the model."""

import dataclasses
import importlib.util
import itertools
import json
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax import adaptation, checkpoint, training
from dllm_jax.corruption import MaskedBlocks
from dllm_jax.data import Conversations
from dllm_jax.nn.adapters import AdapterConfig
from dllm_jax.nn.transformer import Transformer
from dllm_jax.nn.tree import param_shapes
from tests.test_cli import CONFIG, END, byte_tokenizer

BASE = dataclasses.replace(CONFIG, adapter=None, mask_id=None)
TOKENIZER = byte_tokenizer()


def script(name: str) -> ModuleType:
    """A script as a module."""
    path = Path(__file__).resolve().parents[1] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


distill = script("distill")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A folder with a model that writes letters, and ends its turn now and then."""
    noise = np.random.default_rng(12)
    scales = {"embed": 1.0, "head": 0.7}

    def random(path, leaf) -> np.ndarray:
        return noise.normal(scale=scales.get(path[0].key, 0.3), size=leaf.shape).astype(np.float32)

    params = jax.tree.map_with_path(random, param_shapes(BASE))
    params["layers"]["attention"]["o"] *= 2  # what was said matters
    params["layers"]["mlp"]["down"] *= 0.3
    params["final_norm"][:] = 1
    # The first axis of the residual stream is about constant, so that the head has a bias there.
    params["embed"][:, 0] = 4
    letters = [TOKENIZER.decode([i]).isalpha() for i in range(256)]
    params["head"][:, 0] = np.where([*letters, False, False], 0, -8)
    params["head"][END, 0] = 0.6
    path = tmp_path_factory.mktemp("scripts") / "tiny"
    checkpoint.save(path, Transformer(BASE), jax.tree.map(jnp.asarray, params), TOKENIZER)
    return path


def distil(model: Path, out: Path, **changes) -> None:
    fields = dict(
        out=out, conversations=8, batch=6, model=str(model), user_tokens=10, answer_tokens=6
    )
    distill.main(distill.Distill(**{**fields, **changes}))


def parts(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of every part."""
    return {path.name: dict(np.load(path)) for path in sorted(folder.glob("*.npz"))}


def same(left, right) -> bool:
    return all(np.array_equal(left[name], right[name]) for name in left.keys() | right.keys())


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    """Two parts to train on."""
    out = tmp_path_factory.mktemp("data") / "conversations"
    distil(model, out)
    return out


def test_conversations_are_laid_out_by_the_template(folder):
    opening, closing = distill.turns(TOKENIZER)
    assert opening + TOKENIZER.encode("Why?") + closing == TOKENIZER.chat("Why?")
    source = Conversations(folder, "train")
    assert len(source) > 4, "few questions end in time: the test shows too little"
    for tokens, prompt, *_ in source:
        row = tokens.tolist()
        question = row[len(opening) : prompt - len(closing)]
        assert row[:prompt] == opening + question + closing
        assert 1 <= len(question) < 10
        assert END not in question
        answer = row[prompt:]
        assert 1 <= len(answer) <= 6
        assert END not in answer[:-1]
        assert answer[-1] == END or len(answer) == 6
    assert {len(tokens) - prompt == 6 for tokens, prompt, *_ in source} == {True, False}


def test_a_part_is_a_function_of_model_seed_split_and_number(model, folder, tmp_path):
    found = parts(folder)
    assert list(found) == ["train-00000.npz", "train-00001.npz"]
    assert not same(*found.values())
    distil(model, tmp_path / "again", conversations=6)
    assert same(parts(tmp_path / "again")["train-00000.npz"], found["train-00000.npz"])
    for name, changes in (("heldout", dict(split="heldout")), ("seed", dict(seed=1))):
        distil(model, tmp_path / name, conversations=6, **changes)
        (other,) = parts(tmp_path / name).values()
        assert not same(other, found["train-00000.npz"])


def test_only_missing_parts_are_written(model, folder, tmp_path):
    distil(model, tmp_path)
    lost, kept = tmp_path / "train-00000.npz", tmp_path / "train-00001.npz"
    lost.unlink()
    before = kept.stat().st_mtime_ns
    (tmp_path / ".train-00000.npz.1").write_bytes(b"PK")  # of a process that was killed
    distil(model, tmp_path)
    assert kept.stat().st_mtime_ns == before
    assert list(parts(tmp_path)) == [lost.name, kept.name]
    assert all(same(parts(tmp_path)[name], parts(folder)[name]) for name in (lost.name, kept.name))


def test_processes_write_the_parts_in_turn(model, folder, tmp_path, monkeypatch):
    second = SimpleNamespace(process_index=lambda: 1, process_count=lambda: 2, random=jax.random)
    monkeypatch.setattr(distill, "jax", second)
    distil(model, tmp_path)
    (part,) = parts(tmp_path).items()
    assert part[0] == "train-00001.npz"
    assert same(part[1], parts(folder)["train-00001.npz"])


def test_splits_are_named(model, tmp_path):
    with pytest.raises(ValueError, match="split='test' is not one of"):
        distil(model, tmp_path, split="test")


def test_adapting_stops_continues_and_exports(model, folder, tmp_path, monkeypatch, capsys):
    config = adaptation.Adapt(
        data=folder, run=tmp_path / "run", model=str(model), steps=4, batch=2, length=48,
        adapter=AdapterConfig(rank=2, first_layer=1), noise=MaskedBlocks(block_size=3, blocks=4),
    )  # fmt: skip
    ticks = itertools.count()  # one a look at the clock: the first is the start, then one a step
    clock = SimpleNamespace(monotonic=lambda: next(ticks), perf_counter=time.perf_counter)
    with monkeypatch.context() as patch:
        patch.setattr(training.loop, "time", clock)
        adaptation.adapt(dataclasses.replace(config, minutes=2.5 / 60))
    assert "step 2 of 4, saved; the same command continues" in capsys.readouterr().out
    assert not (tmp_path / "run" / "adapter").exists()

    adaptation.adapt(config)
    exported = tmp_path / "run" / "adapter"
    assert f"step 4: the adapter is in {exported}" in capsys.readouterr().out
    rows = training.read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(np.isfinite(row["loss"]) for row in rows)

    adapted, params = checkpoint.load(model, adapter=exported)
    assert adapted.config.adapter == config.adapter
    assert adapted.config.mask_id == BASE.vocab_size
    pair = params["adapter"]["q"]
    assert pair["out"][1].any()
    assert not pair["out"][0].any()  # below the first layer
    meta = json.loads((exported / "adapter.json").read_text())["meta"]
    assert (meta["steps"], meta["noisy_tokens_seen"]) == (4, 4 * 2 * 3 * 4)
    assert meta["settings"]["steps"] == 4
    assert str(tmp_path) not in json.dumps(meta["settings"]), "folders are nobody's business"

    # From that adapter, with no time for a step: what goes in comes out.
    more = dataclasses.replace(
        config, run=tmp_path / "more", init=exported, minutes=0.0, export=tmp_path / "second"
    )
    adaptation.adapt(more)
    assert json.loads((tmp_path / "second" / "adapter.json").read_text())["meta"]["steps"] == 4
    _, again = checkpoint.load(model, adapter=tmp_path / "second")
    jax.tree.map(np.testing.assert_array_equal, again["adapter"], params["adapter"])
