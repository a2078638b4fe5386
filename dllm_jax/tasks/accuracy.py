"""How many questions of a task a model answers, and at what cost."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dllm_jax import distributed
from dllm_jax.data.rows import Row
from dllm_jax.decode.generate import generate, infill
from dllm_jax.recipes import Recipe
from dllm_jax.tasks.task import Examples, Task
from dllm_jax.typing import Key, Params


class Solved(NamedTuple):
    """What `solve` found."""

    accuracy: float  # share of questions answered right
    stderr: float  # of it: what another draw of questions would change
    passes: float  # forward passes of a row, the mean
    overhead: float  # entries processed for each answer token, of all rows together
    answers: list[np.ndarray]  # int32[n] each: whole rows, for `task.check` and `task.show`
    right: np.ndarray  # bool[count]


class Answer(NamedTuple):
    """An answered row, and what it cost."""

    row: np.ndarray  # int32[n]: the question and the answer
    tokens: int  # of the answer, its end included
    passes: int  # forward passes
    queries: int  # entries processed in them


def solve(
    model: Any,
    params: Params,
    task: Task,
    *,
    recipe: Recipe,
    count: int,
    split: str = "test",
    seed: int = 0,
    batch: int = 64,
    key: Key | None = None,
) -> Solved:
    """Answers the first `count` questions of a split, and checks each.

    The layout "prompt" is answered by `generate` (at most `task.answer_length` tokens), "canvas" by
    `infill`.

    Args:
      seed: of the questions.
      batch: rows of a call; the last one is filled up by repetition, so one program serves all.
      key: as for `generate`; each question draws on its own, whatever the batch.

    Raises:
      ValueError: the model's ids are not those of the task's vocabulary; or as `generate` and
        `infill`.
    """
    _check_ids(model.config, task)
    source = Examples(task, split, count, seed)
    rows = [source[i] for i in range(count)]
    batch = min(batch, count)
    found = []
    for first in range(0, count, batch):
        part = rows[first : first + batch]
        filled = part + part[-1:] * (batch - len(part))
        numbers = jnp.arange(first, first + batch)
        keys = None if key is None else jax.vmap(lambda i: jax.random.fold_in(key, i))(numbers)
        found += _answered(model, params, task, filled, recipe, keys)[: len(part)]
    return judged(task, rows, found)


def judged(task: Task, rows: Sequence[Row], answers: Sequence[Answer]) -> Solved:
    """What of the answers is right, and the mean of what they cost."""
    pairs = zip(rows, answers, strict=True)
    right = np.array([task.check(row, answer.row) for row, answer in pairs])
    accuracy = float(right.mean())
    return Solved(
        accuracy,
        float(np.sqrt(accuracy * (1 - accuracy) / len(right))),
        float(np.mean([answer.passes for answer in answers])),
        sum(answer.queries for answer in answers) / max(sum(a.tokens for a in answers), 1),
        [answer.row for answer in answers],
        right,
    )


def _answered(
    model: Any, params: Params, task: Task, rows: Sequence[Row], recipe: Recipe, keys: Key | None
) -> list[Answer]:
    if task.layout == "canvas":
        prompts = [row.tokens[:0] for row in rows]
        asked = [
            [int(t) if g else None for t, g in zip(row.tokens, np.asarray(row.given), strict=True)]
            for row in rows
        ]
        result = infill(model, params, asked, recipe=recipe, key=keys)
        tokens = [row.count(None) for row in asked]
    else:
        prompts = [row.tokens[: row.prompt] for row in rows]
        result = generate(
            model, params, [prompt.tolist() for prompt in prompts], recipe=recipe,
            max_new_tokens=task.answer_length, key=keys,
        )  # fmt: skip
        tokens = distributed.fetched(result.lengths).tolist()
    written, lengths, passes, queries = distributed.fetched(
        (result.tokens, result.lengths, result.nfe, result.queries)
    )
    return [
        Answer(
            np.concatenate([prompt, written[r, : lengths[r]]]),
            tokens[r],
            int(passes[r]),
            int(queries[r]),
        )
        for r, prompt in enumerate(prompts)
    ]


def _check_ids(config: Any, task: Task) -> None:
    """Whether a model writes the task's ids."""
    vocabulary = task.vocabulary
    if config.vocab_size < vocabulary.size:
        raise ValueError(
            f"the model's vocab_size={config.vocab_size} is less than the {vocabulary.size} ids of"
            f" the task {task.name}"
        )
    if config.mask_id not in (None, vocabulary.mask_id):
        raise ValueError(
            f"the model's mask_id={config.mask_id} is not the tasks': {vocabulary.mask_id}"
        )
    if task.layout == "prompt" and vocabulary.eos_id not in config.eos_ids:
        raise ValueError(
            f"the model's eos_ids={config.eos_ids} lack the tasks' {vocabulary.eos_id}, with which"
            " an answer ends"
        )
