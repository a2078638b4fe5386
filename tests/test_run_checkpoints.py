"""The checkpoints of a run: damage is found and skipped, parts restored, saves overlap steps."""

import json
import logging
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax import sharding, training
from dllm_jax.training import checkpoints, curves
from tests import toy_training


@pytest.fixture(scope="module", autouse=True)
def unplotted():
    """Pictures take longer than these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "plot", lambda run: None)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, training.TrainState]:
    """A run that nobody disturbs; it ends at step 12, with the checkpoints 9 and 12."""
    folder = tmp_path_factory.mktemp("whole")
    toy_training.write(folder)
    return folder / "run", toy_training.fit(folder / "run")


@pytest.fixture
def run(tmp_path, whole) -> Path:
    """A copy of it that stopped at step 9, with the checkpoints 6 and 9."""
    for file in whole[0].parent.glob("*.npz"):
        shutil.copy(file, tmp_path)
    toy_training.fit(tmp_path / "run", steps=9)
    assert steps(tmp_path / "run") == [6, 9]
    return tmp_path / "run"


def steps(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())


def arrays_of(step: Path) -> Path:
    """The file with most of a step's arrays."""
    return max(step.rglob("ocdbt.process_*/d/*"), key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def same(left, right) -> None:
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(one, other)


def goes_on(run: Path, whole, caplog) -> str:
    """Finishes a run, which must end as `whole`; returns what was told."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        state = toy_training.fit(run)
    same(state, whole[1])
    np.testing.assert_array_equal(toy_training.losses(run), toy_training.losses(whole[0]))
    assert steps(run) == [9, 12]
    return caplog.text


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (lambda step: flip(arrays_of(step)), "is not what was written: its sum is"),
        (lambda step: cut(arrays_of(step)), r"bytes where \d+ were written"),
        (lambda step: arrays_of(step).unlink(), "is missing"),
        (lambda step: (step / "_CHECKPOINT_METADATA").unlink(), "_CHECKPOINT_METADATA is missing"),
        (lambda step: flip(step / "_CHECKPOINT_METADATA"), "is not what was written"),
        (lambda step: cut(step / "sums.0.json"), "sums.0.json cannot be read"),
    ],
    ids=["flipped", "cut", "lost", "no facts", "other facts", "no sums"],
)
def test_a_damaged_checkpoint_is_skipped_with_a_warning_and_kept(run, whole, caplog, how, reason):
    how(run / "checkpoints" / "9")
    content = {p.name: p.read_bytes() for p in (run / "checkpoints/9").rglob("*") if p.is_file()}
    text = goes_on(run, whole, caplog)
    assert "the checkpoint of step 9 is damaged" in text
    (line,) = (line for line in text.splitlines() if "is damaged" in line)
    assert re.search(reason, line), line
    kept = run / "checkpoints" / "damaged" / "9"
    assert f"step 9 is skipped, and kept as {kept}" in text
    assert {p.name: p.read_bytes() for p in kept.rglob("*") if p.is_file()} == content


@pytest.mark.parametrize("how", [cut, Path.unlink], ids=["cut", "lost"])
def test_without_sums_reading_tells(run, whole, caplog, how):
    """A process killed between the save and its sums; Orbax sees what is missing by itself."""
    (run / "checkpoints" / "9" / "sums.0.json").unlink()
    how(arrays_of(run / "checkpoints" / "9"))
    assert "the checkpoint of step 9 is damaged" in goes_on(run, whole, caplog)


def test_a_checkpoint_without_sums_is_as_good_as_it_reads(run, whole, caplog):
    (run / "checkpoints" / "9" / "sums.0.json").unlink()
    assert "damaged" not in goes_on(run, whole, caplog)


def test_a_save_that_was_cut_short_is_told_and_removed(run, whole, caplog):
    remains = run / "checkpoints" / "12.orbax-checkpoint-tmp"
    (remains / "state").mkdir(parents=True)
    assert f"cut short; its remains, {remains}" in goes_on(run, whole, caplog)
    assert not remains.exists()


def test_when_none_can_be_read_nothing_is_moved_and_nothing_begins_anew(run):
    for step in (6, 9):
        flip(arrays_of(run / "checkpoints" / str(step)))
    with pytest.raises(ValueError, match=r"none of the checkpoints \[6, 9\] .* can be read"):
        toy_training.fit(run)
    assert steps(run) == [6, 9]
    assert not (run / "checkpoints" / "damaged").exists()


def test_damage_twice_in_one_place_is_kept_twice(run, whole, caplog):
    for number in ("9", "9-2"):
        flip(arrays_of(run / "checkpoints" / "9"))
        toy_training.fit(run, steps=9)
        assert (run / "checkpoints" / "damaged" / number).exists()
    goes_on(run, whole, caplog)


def test_old_steps_are_collected_but_those_that_are_asked_for(tmp_path, whole):
    for file in whole[0].parent.glob("*.npz"):
        shutil.copy(file, tmp_path)
    toy_training.fit(tmp_path / "run", save_every=1, keep=1, keep_every=4)
    assert steps(tmp_path / "run") == [4, 8, 12]


def test_checkpoints_may_lie_elsewhere(tmp_path, whole):
    for file in whole[0].parent.glob("*.npz"):
        shutil.copy(file, tmp_path)
    for last in (5, 12):
        state = toy_training.fit(tmp_path / "run", steps=last, checkpoints=str(tmp_path / "there"))
    assert not (tmp_path / "run" / "checkpoints").exists()
    same(state, whole[1])
    assert training.restore(tmp_path / "there", ("head",))[0] == 12


def test_the_arrays_of_a_save_are_those_of_its_step(tmp_path):
    """They are donated to the next step, and written over there, while the save goes on."""
    saver = checkpoints.Saver(tmp_path)
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    tree = {"w": jnp.zeros((512, 1024)), "step": jnp.int32(0)}
    for number in (1, 2, 3):
        tree = step(tree)
        saver.save(number, tree, {"number": number})
        for _ in range(5):
            tree = step(tree)
    saver.close()
    for number in (2, 3):
        like = jax.tree.map(checkpoints.target_of, tree)
        found = checkpoints.read(checkpoints.epath.Path(tmp_path / str(number)), like)
        assert (found["w"] == 6 * number - 5).all()
        assert checkpoints.facts_of(checkpoints.epath.Path(tmp_path / str(number)))[1] == {
            "number": number
        }


# Parts, elsewhere


def test_a_part_is_restored_alone(whole):
    run, state = whole
    step, found = training.restore(run, ("head",))
    assert step == 12
    assert set(found) == {"head"}
    same(found["head"], state.trainable["head"])
    step, found = training.restore(str(run))
    assert set(found) == {"embed", "head"}


def test_a_part_is_restored_onto_a_mesh_and_in_another_dtype(whole):
    run, state = whole
    mesh = sharding.make_mesh(data=2, fsdp=4)
    homes = sharding.shardings({"head": ("vocab", "embed")}, mesh)
    params = {
        **toy_training.model()[1],
        "head": jax.device_put(toy_training.model()[1]["head"], homes["head"]),
    }
    _, found = training.restore(run, ("head",), like=params, dtype="bfloat16")
    assert found["head"].sharding == homes["head"]
    assert found["head"].dtype == jnp.bfloat16
    same(found["head"], state.trainable["head"].astype(jnp.bfloat16))


def test_a_part_that_does_not_fit_is_named(whole, tmp_path):
    run, _ = whole
    with pytest.raises(ValueError, match=r"\['adapter'\] was not trained .* \['embed', 'head'\]"):
        training.restore(run, ("adapter",))
    with pytest.raises(ValueError, match=r"does not fit `like`: its head is .*, here it is \[3\]"):
        training.restore(run, ("head",), like={"head": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"its head is .*, here it is missing"):
        training.restore(run, ("head",), like={})
    with pytest.raises(FileNotFoundError, match="has no checkpoint"):
        training.restore(tmp_path)


def test_restoring_a_part_skips_damage_and_moves_nothing(run, caplog):
    flip(arrays_of(run / "checkpoints" / "9"))
    step, _ = training.restore(run, ("head",))
    assert step == 6
    assert "step 9 is damaged" in caplog.text
    assert steps(run) == [6, 9]


def test_a_run_goes_on_on_another_mesh(run, whole):
    """Saved from one device; continued on eight, and at last on two."""
    state = toy_training.fit(run, sharding.make_mesh(data=2, fsdp=4), steps=10)
    (homes,) = {leaf.sharding.mesh.size for leaf in jax.tree.leaves(state)}
    assert homes == 8
    state = toy_training.fit(run, sharding.make_mesh(data=1, fsdp=2))
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(whole[1]), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(toy_training.losses(run), toy_training.losses(whole[0]), rtol=1e-5)


def test_the_sums_are_of_every_file(run):
    for step in (6, 9):
        folder = run / "checkpoints" / str(step)
        named = json.loads((folder / "sums.0.json").read_text())["files"]
        there = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
        assert set(named) == there - {"sums.0.json"}


def test_a_run_may_be_named_from_where_one_stands(tmp_path, whole, monkeypatch):
    (tmp_path / "runs").mkdir()
    toy_training.write(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    run = Path("runs/x")
    toy_training.fit(run, steps=9)
    assert steps(run) == steps(tmp_path / run) == [6, 9]
    same(toy_training.fit(run).trainable, whole[1].trainable)
    step, mean = training.average(run, 2)
    assert step == [9, 12]
    step, found = training.restore(str(run), ("embed",))
    assert step == 12
    np.testing.assert_array_equal(found["embed"], whole[1].trainable["embed"])
    assert (np.asarray(mean["embed"]) != found["embed"]).any()
    toy_training.fit(Path("runs/y"), steps=1, checkpoints="runs/elsewhere")
    assert training.restore("runs/elsewhere")[0] == 1
