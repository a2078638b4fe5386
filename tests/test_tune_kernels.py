"""The script that times tilings of the TPU kernels, through the interpreter."""

import json

import pytest

from pallas_kernels import BlockMask
from pallas_kernels.block_attention import tpu, tuned
from tests.test_scripts import script

tune = script("bench/tune_kernels")


@pytest.mark.slow
def test_it_writes_what_beats_the_rule(tmp_path, monkeypatch, capsys):
    """A clock by which one candidate of each kernel is twice as fast as everything else."""
    monkeypatch.setattr(tuned, "TUNED", {"another device": [256, 128, 128]})
    monkeypatch.setattr(tune.tokens_tuned, "TUNED", {})
    shape, rows = tune.SMOKE["attention"], 8
    monkeypatch.setattr(tune, "tilings", lambda *_: [tuned.Tiling(128, 128, 128)])
    times = iter([2.0, 1.0, 2.0, 2.0, 1.0])  # attention: rule, candidate; tokens: rule, 128, 256

    run, tiles = tune.seconds, []

    def seconds(kernel, options):
        if kernel.file.name == "attention.json":  # what the kernel itself would take now
            q, _, kv, *_ = kernel.arrays
            tiles.append(tpu._specify(q, BlockMask.bidirectional(4), kv, None, True, None).tile)
        assert run(kernel, options) > 0
        return next(times)

    monkeypatch.setattr(tune, "seconds", seconds)
    tune.main(tune.Options(interpret_smoke=True, out=tmp_path))
    assert tiles == [256, 128]
    said = capsys.readouterr().out
    assert said.count("x2.00") == 2
    name = tuned.key(rows, shape.size, shape.cache)
    assert json.loads((tmp_path / "attention.json").read_text()) == {
        name: [128, 128, 128], "another device": [256, 128, 128]
    }  # fmt: skip
    assert list(json.loads((tmp_path / "tokens.json").read_text()).values()) == [256]


def test_without_a_tpu_it_says_so(capsys):
    with pytest.raises(SystemExit) as stopped:
        tune.main(tune.Options())
    assert stopped.value.code == 2
    assert "this is for a TPU" in capsys.readouterr().out
