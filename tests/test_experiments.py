"""Several ways to learn one thing: the same parameters and FLOPs, and what is asked of them."""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax import generate, recipes, tasks, training
from dllm_jax.data import CorpusData, Row
from dllm_jax.experiments import Bits, modes, text_modes
from dllm_jax.likelihood import bound, log_likelihood
from dllm_jax.nn.head import logits_of
from dllm_jax.nn.transformer import forward
from dllm_jax.nn.tree import param_shapes
from dllm_jax.testing import tiny
from dllm_jax.training.throughput import step_flops

SUDOKU = tasks.Sudoku(size=4, pool=16)
PROMPT = dataclasses.replace(SUDOKU, layout="prompt")
TEXT = CorpusData(folder=Path("nowhere"), length=64, kind="char", vocab_size=96)


@pytest.mark.parametrize(
    "runs",
    [
        modes(PROMPT, canvas=SUDOKU, run=Path("runs"), flops=1e12),
        modes(tasks.Addition(digits=3), run=Path("runs"), flops=1e12),
        text_modes(TEXT, run=Path("runs"), flops=1e12),
    ],
    ids=["sudoku", "addition", "text"],
)
def test_runs_have_the_same_parameters_and_flops(runs):
    sizes = []
    for run in runs:
        shapes = param_shapes(run.model)
        sizes.append(sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)))
        step = step_flops(run.model, shapes, run.objective, run.fit.batch, run.fit.length)
        assert abs(run.fit.steps * step - 1e12) <= step / 2 + 1
    assert len(set(sizes)) == 1
    assert len({run.run for run in runs}) == len(runs)


def test_rows_of_a_corpus_must_be_whole_blocks():
    with pytest.raises(ValueError, match="blocks of 16"):
        text_modes(dataclasses.replace(TEXT, length=50), run=Path("runs"), flops=1e12)


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Rows of ids, of half a token a character; and what else is told of each."""

    told: tuple[dict, ...] = ({}, {}, {})

    def source(self, split: str):
        assert split == "heldout"
        draw = np.random.default_rng(0)
        return [Row(draw.integers(3, 30, 16).astype(np.int32), **more) for more in self.told]

    def store(self, split: str):
        return SimpleNamespace(characters_per_token=2.0)


def test_bits_are_exact_for_a_causal_model():
    model, params = tiny(adapter=False, mask_id=None)
    found = Bits(data=Pairs(), batch=2)(model, params, 0)
    rows = np.stack([row.tokens for row in Pairs().source("heldout")])
    logits = logits_of(model, params, forward(model, params, jnp.asarray(rows)).hidden)
    logs = np.asarray(jax.nn.log_softmax(logits[:, :-1], axis=-1))
    nats = -np.take_along_axis(logs, rows[:, 1:, None], axis=-1).sum()
    assert found["characters"] == 3 * 15 * 2
    np.testing.assert_allclose(found["per_character"], nats / math.log(2) / 90, rtol=1e-5)
    assert found["stderr"] == 0
    assert found["passes"] == 15
    assert found["overhead"] == pytest.approx(14 / 15)  # the first comes with the prompt


def test_bits_are_a_bound_for_a_diffusion_model():
    model, params = tiny(
        adapter=False, mask_id=2, attention="block_causal", block_size=4,
        alignment="same_position",
    )  # fmt: skip
    found = Bits(data=Pairs(), batch=3, samples=8)(model, params, 0)
    rows = [row.tokens.tolist() for row in Pairs().source("heldout")]
    below = bound(
        model, params, [row[:1] for row in rows], [row[1:] for row in rows],
        key=jax.random.key(0), samples=8,
    )  # fmt: skip
    nats = -float(np.asarray(below.mean).sum())
    np.testing.assert_allclose(found["per_character"], nats / math.log(2) / 90, rtol=1e-5)
    assert 0 < found["stderr"] < found["per_character"]


def test_bits_are_of_as_much_as_a_model_reads():
    """Of rows of 16 tokens the first 12; the second's prompt leaves nothing."""
    model, params = tiny(adapter=False, mask_id=None, max_length=12)
    data = Pairs(told=({"prompt": 5}, {"prompt": 13}, {}))
    assert Bits(data=data)(model, params, 0)["characters"] == (7 + 11) * 2


def test_bits_by_a_recipe_are_those_of_its_texts():
    model, params = tiny(
        adapter=False, mask_id=2, attention="block_causal", block_size=4,
        alignment="same_position",
    )  # fmt: skip
    recipe = recipes.sdar(block_size=4, order="static", steps_per_block=2)
    found = Bits(data=Pairs(), batch=2, recipe=recipe)(model, params, 0)
    rows = [row.tokens.tolist() for row in Pairs().source("heldout")]
    own = log_likelihood(
        model, params, [row[:1] for row in rows], [row[1:] for row in rows], recipe=recipe
    )
    nats = -float(np.asarray(own.total).sum())
    np.testing.assert_allclose(found["per_character"], nats / math.log(2) / 90, rtol=1e-5)
    # As many as decoding takes.
    decoded = generate(
        model, params, [row[:1] for row in rows], max_new_tokens=15,
        recipe=dataclasses.replace(recipe, ending="never"),
    )  # fmt: skip
    np.testing.assert_array_equal(own.nfe, decoded.nfe)
    np.testing.assert_array_equal(own.queries, decoded.queries)
    assert (found["passes"], found["stderr"]) == (float(np.mean(decoded.nfe)), 0)
    assert found["overhead"] == pytest.approx(np.sum(decoded.queries) / 45)


def test_bits_of_answers_are_behind_their_prompts():
    model, params = tiny(adapter=False, mask_id=None)
    data = Pairs(told=({"prompt": 5}, {"prompt": 16}, {"prompt": 9}))
    found = Bits(data=data, batch=2)(model, params, 0)
    rows = [row.tokens.tolist() for row in data.source("heldout")]
    logs = log_likelihood(
        model, params, [rows[0][:5], rows[2][:9]], [rows[0][5:], rows[2][9:]], recipe=recipes.ar()
    ).total
    assert found["characters"] == (11 + 7) * 2  # the second row has no answer
    nats = -float(np.asarray(logs).sum())
    np.testing.assert_allclose(found["per_character"], nats / math.log(2) / 36, rtol=1e-5)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"given": np.ones(16, bool)}, "behind its prompt"),
        ({"segments": np.zeros(16, np.int32)}, "behind its prompt"),
        ({"prompt": 16}, "none of the first 3 held-out rows"),
    ],
)
def test_bits_of_other_rows_are_refused(told, said):
    with pytest.raises(ValueError, match=said):
        Bits(data=Pairs(told=3 * (told,)))(*tiny(adapter=False, mask_id=None), 0)


@pytest.mark.slow
def test_two_processes_ask_together(tmp_path):
    """What is decoded on the way lies on both; the run of one process asks the same."""
    root, found = Path(__file__).parents[1], []
    for count in (1, 2):
        run = tmp_path / str(count)
        command = [sys.executable, "-m", "dllm_jax", "train", "tests/toy_config.py", "--run", run]
        if count > 1:
            launcher = [sys.executable, "scripts/launch/local.py", str(count), "--"]
            command = [*launcher, *command]
        environ = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root), "XLA_FLAGS": ""}
        subprocess.run(command, cwd=root, check=True, env=environ, timeout=500)
        found.append(
            [
                row
                for row in training.read_metrics(run / "metrics.jsonl")
                if "addition_passes" in row
            ]
        )
    assert [row["step"] for row in found[0]] == [2, 3]
    assert found[0] == found[1]
