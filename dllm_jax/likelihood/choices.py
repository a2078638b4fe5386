"""Multiple choice: which of several answers a model finds most probable."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dllm_jax.likelihood.bounds import bound
from dllm_jax.likelihood.exact import log_likelihood
from dllm_jax.recipes import Recipe
from dllm_jax.typing import Key, Params


class Choices(NamedTuple):
    """What `score_choices` finds, prompt by prompt."""

    scores: list[list[float]]  # nats, normalised
    best: list[int]


def score_choices(
    model: Any,
    params: Params,
    prompts: Sequence,
    choices: Sequence,
    *,
    recipe: Recipe | None = None,
    key: Key | None = None,
    normalize: str = "none",
    sizes: Sequence[Sequence[int]] | None = None,
    batch_size: int = 16,
    **options: Any,
) -> Choices:
    """Scores several answers to each prompt.

    Args:
      prompts: rows of ids, as in `log_likelihood`, with None where the choice is to be filled in.
      choices: for each of them, a list of answers, each a list of ids.
      recipe: scores by its exact likelihood.
      key: scores by the bound. The choices of a prompt share their noise.
      normalize: "none", "token" (nats per token) or "byte" (nats per byte, by `sizes`).
      sizes: the bytes of each choice's text.
      batch_size: answers in a pass.
      options: of `bound`.

    Raises:
      ValueError: not one of `recipe` and `key` is given, `sizes` are missing, or a prompt has no
        choice; or as `log_likelihood` and `bound`.
    """
    if normalize not in ("none", "token", "byte"):
        raise ValueError(f"normalize={normalize!r} is none of none, token, byte")
    if normalize == "byte" and sizes is None:
        raise ValueError('normalize="byte" needs the `sizes` of the choices\' texts')
    if (recipe is None) == (key is None):
        raise ValueError("give a recipe (exact likelihoods) or a key (bounds): one of them")
    if len(prompts) != len(choices) or not all(len(answers) for answers in choices):
        raise ValueError(f"{len(prompts)} prompts need a list of choices each, and none empty")
    pairs = [(p, c) for p, answers in enumerate(choices) for c in range(len(answers))]
    pairs.sort(key=lambda pair: len(prompts[pair[0]]) + len(choices[pair[0]][pair[1]]))
    scores = [[0.0] * len(answers) for answers in choices]
    for first in range(0, len(pairs), batch_size):
        part = pairs[first : first + batch_size]
        rows, answers = [prompts[p] for p, _ in part], [choices[p][c] for p, c in part]
        if recipe is not None:
            total = log_likelihood(model, params, rows, answers, recipe=recipe, **options).total
        else:
            assert key is not None  # checked above
            numbers = jnp.array([p for p, _ in part])
            keys = jax.vmap(partial(jax.random.fold_in, key))(numbers)
            total = bound(model, params, rows, answers, key=keys, **options).mean
        for (p, c), nats in zip(part, np.asarray(total).tolist(), strict=True):
            if normalize == "token":
                nats /= len(choices[p][c])
            elif sizes is not None and normalize == "byte":
                nats /= sizes[p][c]
            scores[p][c] = nats
    return Choices(scores, [int(np.argmax(row)) for row in scores])
