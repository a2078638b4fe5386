"""The accuracy of a model at a task: who answers, what is checked, and what it costs."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from dllm_jax import recipes, tasks
from dllm_jax.decode.generate import generate, infill
from dllm_jax.nn.transformer import Transformer
from dllm_jax.tasks.accuracy import Answer
from dllm_jax.testing import tiny

ADDITION = tasks.named("addition", digits=2)
IDS = dict(mask_id=1, eos_ids=(2,), sharpness=6.0, num_layers=1)
CANVAS = dict(attention="bidirectional", alignment="same_position", adapter=False)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DLLM_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "accuracy-cache"))


@functools.cache
def model_for(task: tasks.Task, **changes):
    return tiny(vocab_size=task.vocabulary.size, **{**IDS, **changes})


def test_right_answers_are_counted():
    source = tasks.Examples(ADDITION, "test", 8)
    rows = [source[i] for i in range(8)]
    perfect = [Answer(row.tokens, len(row.tokens) - row.prompt, 3, 12) for row in rows]
    solved = tasks.judged(ADDITION, rows, perfect)
    assert (solved.accuracy, solved.stderr, solved.passes) == (1.0, 0.0, 3.0)
    assert solved.right.all()
    assert solved.overhead == 8 * 12 / sum(len(row.tokens) - row.prompt for row in rows)
    # Two rows answer each other's question, and took longer.
    swapped = [perfect[1], perfect[0], *perfect[2:]]
    swapped = [a._replace(passes=7) if i < 2 else a for i, a in enumerate(swapped)]
    solved = tasks.judged(ADDITION, rows, swapped)
    assert solved.right.tolist() == [False, False] + [True] * 6
    assert (solved.accuracy, solved.passes) == (0.75, 4.0)
    np.testing.assert_allclose(solved.stderr, np.sqrt(0.75 * 0.25 / 8))


def test_each_prompt_is_answered_with_a_key_of_its_own():
    model, params = model_for(ADDITION)
    recipe, key = recipes.ar(temperature=1.0), jax.random.key(0)
    solved = tasks.solve(model, params, ADDITION, recipe=recipe, count=5, batch=2, key=key)
    assert solved.right.shape == (5,)
    rows = [ADDITION.example("test", i) for i in range(5)]
    costs = []
    for pair in ([0, 1], [3, 2], [4, 0]):  # not the batches of above
        result = generate(
            model, params, [rows[i].tokens[: rows[i].prompt].tolist() for i in pair],
            recipe=recipe, max_new_tokens=ADDITION.answer_length,
            key=jax.numpy.stack([jax.random.fold_in(key, i) for i in pair]),
        )  # fmt: skip
        for r, i in enumerate(pair):
            length = int(result.lengths[r])
            made = np.asarray(result.tokens[r, :length])
            whole = np.concatenate([rows[i].tokens[: rows[i].prompt], made])
            np.testing.assert_array_equal(solved.answers[i], whole)
            assert 0 < length <= ADDITION.answer_length
            assert solved.right[i] == ADDITION.check(rows[i], whole)
            costs.append((int(result.nfe[r]), int(result.queries[r]), length))
    passes, queries, lengths = np.array(costs[:5]).T
    np.testing.assert_allclose(solved.passes, passes.mean())
    np.testing.assert_allclose(solved.overhead, queries.sum() / lengths.sum())


def test_canvases_are_filled_in():
    # One cell of each is free: a model that guesses is right now and then.
    task = tasks.named("sudoku", size=4, clues=15, pool=8)
    model, params = model_for(task, seed=1, **CANVAS)
    recipe = recipes.llada(block_size=16)
    solved = tasks.solve(model, params, task, recipe=recipe, count=32, batch=16, split="train")
    asked, right = [], []
    for i, answer in enumerate(solved.answers):
        row = task.example("train", i)
        assert (~row.given).sum() == 1
        np.testing.assert_array_equal(answer[row.given], row.tokens[row.given])
        assert (answer != task.vocabulary.mask_id).all()
        asked.append([int(t) if g else None for t, g in zip(row.tokens, row.given, strict=True)])
        right.append(np.array_equal(answer, row.tokens))  # one solution
    np.testing.assert_array_equal(solved.right, right)
    assert 0 < solved.accuracy == np.mean(right) < 1
    results = [infill(model, params, asked[at : at + 16], recipe=recipe) for at in (0, 16)]
    whole = np.concatenate([np.asarray(result.tokens)[:, :16] for result in results])
    np.testing.assert_array_equal(whole, np.stack(solved.answers))
    passes, queries = (
        np.concatenate([np.asarray(getattr(result, name)) for result in results])
        for name in ("nfe", "queries")
    )
    np.testing.assert_allclose(solved.passes, passes.mean())
    np.testing.assert_allclose(solved.overhead, queries.sum() / 32)


def test_ids_must_be_the_tasks():
    model, params = model_for(ADDITION)

    def solve(task: tasks.Task = ADDITION, **changes):
        other = Transformer(dataclasses.replace(model.config, **changes))
        tasks.solve(other, params, task, recipe=recipes.ar(), count=2)

    with pytest.raises(ValueError, match="mask_id=5 is not the tasks': 1"):
        solve(mask_id=5)
    with pytest.raises(ValueError, match=r"eos_ids=\(3,\) lack the tasks' 2"):
        solve(eos_ids=(3,))
    with pytest.raises(ValueError, match="vocab_size=10 is less than the 15 ids of the task addit"):
        solve(vocab_size=10)
    with pytest.raises(ValueError, match="cannot fill in"):
        solve(tasks.named("addition", digits=2, layout="canvas"))
