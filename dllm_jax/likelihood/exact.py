"""The exact likelihood of a text under a deterministic order of decoding.

A recipe that picks positions by what is written, and never takes anything back, draws from a
distribution with a closed density: teacher-force the text through the recipe's own loop, and add up
the log-probabilities of the tokens in the passes that wrote them (DUEL, arXiv 2603.01367).
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.decode.generate import infill, run
from dllm_jax.decode.prompt import checked, edge
from dllm_jax.likelihood.texts import Texts, pack
from dllm_jax.nn.head import cross_entropy_of, mask_in_vocabulary, stats_of
from dllm_jax.nn.transformer import forward
from dllm_jax.policies import ReNoise, random_part
from dllm_jax.recipes import Denoise, Recipe, Verified
from dllm_jax.sharding import automatic, in_scope, placed
from dllm_jax.typing import Params


class Likelihood(NamedTuple):
    """Of each row's answer, given its prompt."""

    total: jax.Array  # float32[B]: nats
    logprobs: jax.Array  # float32[B, N]: of each answer token; 0 behind the last
    # Of writing it by the recipe, as in `decode.Result`; of a recipe that drafts, those of `ar`.
    nfe: jax.Array  # int32[B]
    queries: jax.Array  # int32[B]


@in_scope
def log_likelihood(
    model: Any, params: Params, prompt: Sequence, answer: Sequence, *, recipe: Recipe
) -> Likelihood:
    """log p(answer | prompt) of a recipe's own distribution over answers of that length.

    It is that of the recipe's order with tokens drawn from the model as it is (temperature 1, no
    mask token): each pass picks positions by the model's most probable tokens, and the tokens there
    are independent. Approximate caches count as they decode. The probabilities of all answers of a
    length sum to one; what ends an answer is a token of it like any other.

    Where an answer ends inside a block, nothing is known of what follows: those positions of the
    block stay masks, as they are when a block is opened, and share in quotas, as in decoding. To
    score an answer as one that ends, put its end-of-turn token behind it. A bidirectional canvas
    ends where the text does.

    Args:
      prompt: rows of ids. None stands for a position that the answer fills, from left to right; a
        row without any is continued by it.
      answer: rows of ids, at least one each.
      recipe: a deterministic one. `ar` and `self_speculative` are the same distribution, and take
        one pass.

    Raises:
      ValueError: the recipe draws at random or changes what it has written; or as `generate`.
    """
    check_deterministic(recipe)
    texts = pack(prompt, answer, model.config)
    if isinstance(recipe, Verified):
        _check_causal(model.config, texts)
        logprobs = _causal(model, params, texts)
        nfe = jnp.asarray(texts.there).sum(axis=1)
        queries = nfe - 1
    else:
        logprobs, nfe, queries = _forced(model, params, texts, recipe)
    return Likelihood(logprobs.sum(axis=1), logprobs, nfe, queries)


def check_deterministic(recipe: Recipe) -> None:
    """Raises ValueError, with the reason, for a recipe that reaches a text in more than one way."""

    def refuse(part: str, reason: str):
        raise ValueError(
            f"{part} {reason}: a text is reached in many ways, and their sum is out of reach;"
            " use likelihood.bound, or a recipe with a deterministic order"
        )

    temperature = recipe.sampling.temperature
    if isinstance(temperature, int | float) and temperature:
        refuse(
            f"temperature={temperature}",
            "draws tokens whose confidence decides the order (0 scores the model's own"
            " distribution, in the order of its most probable tokens)",
        )
    if isinstance(recipe, Verified):
        return
    if isinstance(recipe.revise, ReNoise):
        refuse("ReNoise", "writes nothing for good until the block is done, and draws noise")
    if (part := random_part(recipe.commit)) is not None:
        refuse(type(part).__name__, "picks positions at random")
    if recipe.revise is not None:
        refuse(type(recipe.revise).__name__, "changes tokens that are written")


@in_scope
def is_greedy(
    model: Any, params: Params, prompt: Sequence, answer: Sequence, *, recipe: Recipe
) -> Bool[Array, "B"]:
    """Whether decoding as many tokens greedily gives the answer; arguments as `log_likelihood`.

    (LLaDA's evaluation asks this, one token a pass: `recipes.llada(block_size=0)`.)
    """
    texts = pack(prompt, answer, model.config)
    if isinstance(recipe, Verified):
        _check_causal(model.config, texts)
        right = _most_probable(model, params, texts)
    else:
        recipe = dataclasses.replace(recipe, ending="never")
        found = infill(model, params, texts.open(), recipe=recipe)
        right = _picked(texts, found.tokens) == texts.targets
    return (right | ~texts.there).all(axis=1)


def _picked(texts: Texts, values: jax.Array) -> jax.Array:
    return automatic(Texts.pick, placed("batch"), texts, values)


def _check_causal(config, texts: Texts) -> None:
    """Raises ValueError where the model does not read the answer from left to right."""
    if (config.attention, config.alignment) != ("causal", "shifted"):
        raise ValueError(
            "this recipe reads a causal, shifted model; "
            f"this one is {config.attention}, {config.alignment}"
        )
    first, sizes = np.asarray(texts.at)[:, 0], np.asarray(texts.there).sum(axis=1)
    if (first + sizes != np.asarray(texts.lengths)).any():
        raise ValueError("this recipe writes from left to right: it cannot fill in; use another")
    if not first.all():
        raise ValueError("a causal model needs a token before the first one that it predicts")


@partial(jax.jit, static_argnames="model")
def _causal(model, params, texts: Texts) -> Float[Array, "B N"]:
    """Log-probabilities of the answers' tokens, each given all before it."""

    def run(params, texts):
        hidden = _before_answers(model, params, texts)
        barred = mask_in_vocabulary(model.config)
        nats, _ = cross_entropy_of(model, params, hidden, texts.targets, barred)
        return jnp.where(texts.there, -nats, 0.0)

    return automatic(run, placed("batch"), params, texts)


@partial(jax.jit, static_argnames="model")
def _most_probable(model, params, texts: Texts) -> Bool[Array, "B N"]:
    """Whether each token of the answers is the most probable one."""

    def run(params, texts):
        hidden = _before_answers(model, params, texts)
        found = stats_of(model, params, hidden, forbidden=mask_in_vocabulary(model.config))
        return found.ids[..., 0] == texts.targets

    return automatic(run, placed("batch"), params, texts)


def _before_answers(model, params, texts: Texts) -> Float[Array, "B N D"]:
    """What predicts the answers' tokens in a causal model."""
    out = forward(model, params, texts.tokens, lengths=texts.lengths, canvas=False)
    before = jnp.maximum(texts.at - 1, 0)
    return jnp.take_along_axis(out.hidden, before[..., None], axis=1)


def _forced(
    model, params, texts: Texts, recipe: Denoise
) -> tuple[Float[Array, "B N"], Int[Array, "B"], Int[Array, "B"]]:
    """Log-probabilities of the answers' tokens in the passes that write them; what those are."""
    config = model.config
    recipe = dataclasses.replace(recipe, ending="never", predict_mask=False)
    job = edge(model, checked(texts.open(), config, infilling=True), recipe, None, None)
    # The last block may reach behind the text. Masks are "written" there: it stays as it is.
    exact = recipe.cache not in ("none", "prefix", "dual")
    inside = jnp.arange(texts.tokens.shape[1]) < texts.lengths[:, None]
    forced = jnp.where(inside, texts.tokens, config.mask_id)
    room = ((0, 0), (0, recipe.width.size if exact else 0))
    forced = jnp.pad(forced, room, constant_values=config.mask_id)
    state = run(model, params, job, forced)
    logprobs = jnp.where(texts.there, _picked(texts, state.logprobs), 0.0)
    return logprobs, state.nfe, state.queries
