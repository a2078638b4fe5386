"""What a step keeps beside the parameters, and refuses: averages, spikes, steps that are no number.

All of it at once, with Muon and accumulation, leaves no trace of an interruption.
"""

import dataclasses
from functools import cache
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax import training
from dllm_jax.data import batches
from dllm_jax.training import loop
from dllm_jax.training.step import WINDOW
from tests import toy_training
from tests.test_distributed import together
from tests.toy_training import EXTRAS, POISON, POISONED

EVERYTHING = dict(ill=True, accumulate=2, evaluate_every=4, log_every=1, **EXTRAS)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("guard")
    toy_training.write(path)
    return path


def rows(run: Path) -> list[dict[str, float]]:
    found = training.read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in training.TIMES} for row in found]


def looks():
    """An evaluation, and the parameters that it was given."""
    seen = []

    def look(params, step):
        seen.append(jax.device_get(params["embed"]))
        return {"mean": float(params["embed"].mean()), "words": [f"at {step}", "twice"]}

    return {"look": look}, seen


@cache
def ill_steps() -> list[int]:
    """The steps whose batch has the poisoned row in it, of twelve."""
    source = [training_row(i) for i in range(40)]
    data = batches(source, batch=8, length=8, pad_id=0, seed=0)
    return [i + 1 for i in range(12) if (next(data)["tokens"][:, 0] == POISON[0]).any()]


def training_row(i: int):
    from dllm_jax.data import Row

    return Row(np.array([2 + (7 * i + j) % 30 for j in range(5 + i % 4)], np.int32), 2)


def same(left, right) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def whole(data) -> tuple[Path, training.TrainState]:
    run = data / "whole"
    return run, toy_training.fit(run, evaluations=looks()[0], **EVERYTHING)


def test_skipped_steps_are_counted_and_change_nothing(whole):
    run, state = whole
    assert 2 <= len(ill_steps()) < 6
    found = {row["step"]: row for row in rows(run) if "loss" in row}
    assert [step for step, row in found.items() if row["skipped"]] == ill_steps()
    assert [step for step, row in found.items() if np.isnan(row["loss"])] == ill_steps()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state.trainable, state.ema)))
    assert int(state.step) == 12
    applied = [row["loss"] for step, row in found.items() if step not in ill_steps()]
    kept = np.asarray(state.losses)
    np.testing.assert_allclose(kept[-len(applied) :], applied, rtol=1e-6)
    assert np.isnan(kept[: -len(applied)]).all()
    assert applied[-1] < applied[0]


def test_the_batches_of_skipped_steps_can_be_looked_at(whole):
    run, _ = whole
    paths = sorted((run / "spikes").iterdir())
    assert sorted(path.name for path in paths) == sorted(f"step-{n}.npz" for n in ill_steps())
    batch, key = training.read_spike(run / "spikes" / f"step-{ill_steps()[0]}.npz")
    model, params = toy_training.model()
    assert np.isnan(POISONED.loss(model, params, batch, key)[0])
    expected = jax.random.fold_in(jax.random.key(0), ill_steps()[0] - 1)
    np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(expected))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_crash_at_any_step_leaves_no_trace(data, whole, seed):
    """Muon, accumulation, average, guard and samples; the data's order is in every loss."""
    step = int(np.random.default_rng(seed).integers(2, 13))
    run = data / f"crashed-{seed}"
    event = (8 * (step - 1) + 3, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        toy_training.fit(run, event=event, evaluations=looks()[0], **EVERYTHING)
    state = toy_training.fit(run, evaluations=looks()[0], **EVERYTHING)
    same(state, whole[1])
    for file in ("metrics.jsonl", "samples.jsonl"):
        left, right = (training.read_metrics(x / file) for x in (run, whole[0]))
        assert len(left) == len(right)
    assert str(rows(run)) == str(rows(whole[0]))  # as text: nan is not nan
    assert (run / "samples.jsonl").read_text() == (whole[0] / "samples.jsonl").read_text()


@pytest.mark.parametrize("log_every", [1, 5])
def test_a_run_told_to_stop_keeps_the_state_before_and_goes_on_when_told(data, whole, log_every):
    """Also where steps were started behind the one that was not applied, before anybody looked."""
    run = data / f"stopped-{log_every}"
    first = ill_steps()[0]
    stopping = {**EVERYTHING, "on_spike": "stop", "log_every": log_every}
    for _ in range(2):  # again, it stops again
        with pytest.raises(
            training.Spike, match=f"step {first} is not applied: its loss is nan"
        ) as e:
            toy_training.fit(run, evaluations=looks()[0], **stopping)
        for word in (str(run / "spikes" / f"step-{first}.npz"), f"checkpoint {first - 1}", "skip"):
            assert word in str(e.value)
    step, _ = training.restore(run)
    assert step == first - 1
    last = [row for row in rows(run) if "loss" in row][-1]
    expected = next(row for row in rows(whole[0]) if row["step"] == first)
    assert str(last) == str(expected)
    same(toy_training.fit(run, evaluations=looks()[0], **EVERYTHING), whole[1])
    if log_every == 1:
        assert str(rows(run)) == str(rows(whole[0]))


def test_without_a_guard_the_poison_is_taken(data):
    settings = {**EVERYTHING, "on_spike": "ignore", "spike": 0.0, "evaluate_every": 0}
    state = toy_training.fit(data / "ignored", **settings)
    assert np.isnan(np.asarray(state.trainable["embed"])).any()
    assert not (data / "ignored" / "spikes").exists()
    assert not (data / "ignored" / "samples.jsonl").exists()


def test_evaluations_are_of_the_average(data, whole):
    ask, seen = looks()
    run = data / "average"
    state = toy_training.fit(run, evaluations=ask, **EVERYTHING)
    assert len(seen) == 3
    np.testing.assert_array_equal(seen[-1], np.asarray(training.trained(state)["embed"]))
    assert np.abs(seen[-1] - np.asarray(state.trainable["embed"])).max() > 1e-3
    assert [row["step"] for row in rows(run) if "look_mean" in row] == [4, 8, 12]
    samples = training.read_metrics(run / "samples.jsonl")
    assert samples[:2] == [
        {"step": 4, "name": "look_words", "text": "at 4"},
        {"step": 4, "name": "look_words", "text": "twice"},
    ]
    saved = training.restore(run, ("embed",), ema=True)[1]["embed"]
    np.testing.assert_array_equal(saved, state.ema["embed"])


def steps_of(**options):
    """A step of the toy, its state, and what it is called with."""
    model, params = toy_training.model()
    params = jax.device_put(params, jax.devices()[0])
    names = dict(ema=bool(options.get("ema")), losses=bool(options.pop("losses", False)))
    names["stopped"] = options.get("stop", False)
    state = training.create(params, ("embed",), toy_training.TX, **names)
    step = training.make_train_step(model, toy_training.TOY, toy_training.TX, **options)
    data = batches([training_row(i) for i in range(40)], batch=8, length=8, pad_id=0, seed=0)
    return step, state, params, data, jax.random.key(0)


def test_an_average_follows_its_equation_and_moves_nothing():
    step, state, params, data, key = steps_of(ema=0.2)
    plain, bare, *_ = steps_of()
    mean = np.asarray(state.trainable["embed"], np.float64)
    for n in range(4):
        batch = next(data)
        state, _ = step(state, params, batch, key)
        bare, _ = plain(bare, params, batch, key)
        decay = min(0.2, (1 + n) / (10 + n))
        mean = decay * mean + (1 - decay) * np.asarray(state.trainable["embed"], np.float64)
    np.testing.assert_allclose(state.ema["embed"], mean, rtol=1e-5, atol=1e-7)
    same(state.trainable, bare.trainable)
    assert bare.ema is None
    assert training.trained(bare) is bare.trainable


def test_a_spike_is_a_loss_far_above_the_median_of_enough():
    step, state, params, data, key = steps_of(spike=3.0, losses=True)
    batch = next(data)
    noise = jax.random.fold_in(key, 0)
    loss = float(toy_training.TOY.loss(toy_training.model()[0], params, batch, noise)[0])
    usual = np.full(WINDOW, loss / 3.1, np.float32)
    usual[: WINDOW // 2 - 1] = 1e6  # a median does not mind
    for losses, spiked in ((usual, True), (np.where(np.arange(WINDOW), usual, np.nan), False)):
        given = dataclasses.replace(
            jax.tree.map(jnp.copy, state), losses=jax.device_put(losses, jax.devices()[0])
        )
        after, figures = step(given, params, batch, key)
        assert float(figures["skipped"]) == spiked
        assert int(after.step) == 1
        moments = jax.tree.leaves(after.opt_state)
        assert any(np.asarray(moment).any() for moment in moments) != spiked
        np.testing.assert_allclose(after.losses, [*losses[1:], loss], rtol=1e-6)


def test_nothing_is_applied_behind_a_step_that_was_not():
    step, state, params, data, key = steps_of(spike=3.0, losses=True, stop=True)
    good = next(data)
    usual = jax.device_put(np.full(WINDOW, 1e-3, np.float32), jax.devices()[0])
    state = dataclasses.replace(state, losses=usual)
    own = lambda: jax.device_get((state.step, state.trainable, state.opt_state))  # noqa: E731
    before = own()
    state, figures = step(state, params, good, key)  # far above what is usual
    assert float(figures["skipped"]) == 1
    np.testing.assert_array_equal(state.losses, np.full(WINDOW, 1e-3, np.float32))
    fine = jax.device_put(np.full(WINDOW, 1e3, np.float32), jax.devices()[0])
    state, figures = step(dataclasses.replace(state, losses=fine), params, good, key)
    assert float(figures["skipped"]) == 1
    same(own(), before)


def test_what_a_run_returns_is_for_steps_of_ones_own(data):
    state = toy_training.fit(data / "returned", steps=1)  # which would stop at a spike
    step, _, params, source, key = steps_of()
    assert int(step(state, params, next(source), key)[0].step) == 2


def test_losses_of_another_objective_are_no_measure(data):
    """Where a phase begins, and there alone: a run that goes on within it knows its losses."""
    run = data / "phases"
    for steps, begins, kept in ((3, 0, 3), (4, 3, 1), (6, 3, 3)):
        state = toy_training.fit(run, steps=steps, begins=begins, on_spike="skip", spike=50.0)
        assert np.isfinite(state.losses).sum() == kept


def test_a_run_that_applies_nothing_any_more_ends(data, monkeypatch):
    class Lost(toy_training.Toy):
        factor = np.nan

        def score(self, model, params, drawn):
            loss, figures = super().score(model, params, drawn)
            return loss * self.factor, figures

    monkeypatch.setattr(toy_training, "TOY", Lost())
    monkeypatch.setattr(loop, "WINDOW", 5)
    run = data / "lost"
    with pytest.raises(training.Spike, match=r"5 steps up to step 5 were not applied, one after"):
        toy_training.fit(run, on_spike="skip")
    assert len(list((run / "spikes").iterdir())) == 5
    monkeypatch.setattr(Lost, "factor", 1.0)
    monkeypatch.setattr(toy_training, "TOY", Lost())
    assert int(toy_training.fit(run, on_spike="skip").step) == 12  # from step 5, where it was saved


def test_what_is_given_together_must_fit():
    step = steps_of(ema=0.5)[0]
    _, bare, params, data, key = steps_of()
    with pytest.raises(ValueError, match=r"ema=0.5 takes a state .* created with ema=True"):
        step(bare, params, next(data), key)
    for make, message in (
        (lambda: steps_of(spike=0.5), "must be above 1"),
        (
            lambda: training.Fit(steps=1, batch=1, length=1, on_spike="ignore", spike=2.0),
            "does nothing where on_spike is ignore",
        ),
        (lambda: steps_of(ema=1.0), r"ema=1.0 is a decay"),
        (lambda: steps_of(stop=True), "stop=True needs to know what is not applied"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_a_run_keeps_the_average_that_it_began_with(data, whole):
    with pytest.raises(ValueError, match=r"its ema/.* here it is missing"):
        toy_training.fit(whole[0], **{**EVERYTHING, "ema": 0.0})
    run = data / "plain"
    toy_training.fit(run, steps=1)
    with pytest.raises(ValueError, match="kept no average"):
        training.restore(run, ema=True)


def test_a_run_is_given_an_average_and_a_limit_on_its_way(data):
    run = data / "later"
    toy_training.fit(run, steps=2)
    state = toy_training.fit(run, steps=4, ema=0.5, spike=9.0)
    assert np.isfinite(np.asarray(state.losses)).sum() == 2
    plain = toy_training.fit(data / "never", steps=4)
    chex.assert_trees_all_equal(state.trainable, plain.trainable)
    assert not np.array_equal(state.ema["embed"], state.trainable["embed"])
    again = toy_training.fit(run, steps=4, ema=0.5, spike=9.0)
    chex.assert_trees_all_equal(again.ema, state.ema)


def test_the_mean_of_checkpoints(data):
    run = data / "kept"
    toy_training.fit(run, keep=3)
    steps, mean = training.average(run, 3)
    assert steps == [6, 9, 12]
    found = []
    for end in (6, 9, 12):
        found.append(np.asarray(toy_training.fit(data / "again", steps=end).trainable["embed"]))
    np.testing.assert_allclose(mean["embed"], np.mean(found, axis=0), rtol=1e-6, atol=1e-7)
    assert mean["embed"].dtype == jnp.float32
    with pytest.raises(FileNotFoundError, match="has 3 checkpoints, not last=4"):
        training.average(run, 4)


@pytest.mark.slow
def test_two_processes_agree_on_what_is_skipped_and_one_goes_on(data, whole):
    """Both refuse the same step, one of them has its row; a lone process continues the run."""
    first = ill_steps()[0]
    run = data / "apart" / "run"
    run.parent.mkdir()
    toy_training.write(run.parent)
    out = together(2, 2, run, "stop")
    assert out.returncode == 1
    assert out.stdout.count(f"step {first} is not applied") >= 2
    batch, _ = training.read_spike(run / "spikes" / f"step-{first}.npz")
    assert batch["tokens"].shape == (8, 8)
    assert (batch["tokens"][:, 0] == POISON[0]).any()
    state = toy_training.fit(run, ill=True, **EXTRAS)
    assert int(state.step) == 12
    skipped = [row["step"] for row in rows(run) if row.get("skipped")]
    assert skipped == ill_steps()
    for one, other in zip(*map(jax.tree.leaves, (state.ema, whole[1].ema)), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-4)
