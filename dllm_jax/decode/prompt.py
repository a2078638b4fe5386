"""What a person hands in, checked at the edge: prompts, keys, and whether the recipe fits."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dllm_jax.cache import DTYPES
from dllm_jax.decode.prefill import CHUNK
from dllm_jax.policies import Blocks, Pipeline, ReNoise, Sliding, random_part
from dllm_jax.recipes import Denoise, Recipe, Verified
from dllm_jax.typing import Key

BUCKET = 64


class Prompt(NamedTuple):
    """A ragged batch, padded on the right."""

    tokens: jax.Array  # int32[B, P]
    lengths: jax.Array  # int32[B]
    free: jax.Array | None = None  # bool[B, P]: positions to fill in; None: the text continues


class Memory(NamedTuple):
    """What a call holds on the device beside the weights: part of the program, hashable."""

    chunk: int = 0  # tokens of a prompt that a pass takes (`decode.prefill`); 0: all
    cache_dtype: str | None = None  # None: that of the model's activations
    samples: int = 1  # rows that answer a prompt, which is stored once for them


PLAIN = Memory()


class Job(NamedTuple):
    """A call to `generate`, ready for the device."""

    prompt: Prompt
    recipe: Recipe
    budget: jax.Array  # int32[]: the most new tokens
    keys: Key | None  # one a row
    size: int  # positions of a row's buffers, those of the canvas included
    memory: Memory


def pad(rows: Sequence, bucket: int = BUCKET) -> Prompt:
    """Packs lists of ids into a `Prompt` whose width is a multiple of `bucket`.

    None stands for a position to fill in (`infill`).

    Raises:
      ValueError: there is no row, or an empty one.
    """
    if any(not hasattr(row, "__len__") for row in rows):
        raise ValueError(
            "a prompt is a list of rows, each a list of ids: [[1, 2, 3]], not [1, 2, 3]"
        )
    if not rows or not all(len(row) for row in rows):
        raise ValueError("a prompt needs at least one row, and each row at least one token")
    width = -(-max(map(len, rows)) // bucket) * bucket
    tokens = np.zeros((len(rows), width), np.int32)
    free = np.zeros((len(rows), width), bool)
    for r, row in enumerate(rows):
        free[r, : len(row)] = [token is None for token in row]
        tokens[r, : len(row)] = [0 if token is None else token for token in row]
    lengths = jnp.asarray([len(row) for row in rows], jnp.int32)
    return Prompt(jnp.asarray(tokens), lengths, jnp.asarray(free) if free.any() else None)


def has_free(prompt) -> bool:
    """Whether a prompt has positions to fill in."""
    if isinstance(prompt, Prompt) or hasattr(prompt, "shape"):
        return getattr(prompt, "free", None) is not None
    return any(hasattr(row, "__iter__") and any(t is None for t in row) for row in prompt)


def checked(prompt, config, infilling: bool = False) -> Prompt:
    """A padded prompt whose lengths and ids are within bounds, as far as they are known."""
    if not isinstance(prompt, Prompt):
        if hasattr(prompt, "shape") and prompt.ndim != 2:
            raise ValueError(f"a prompt array is [rows, ids]; this one has shape {prompt.shape}")
        if hasattr(prompt, "shape"):
            prompt = Prompt(
                jnp.asarray(prompt, jnp.int32),
                jnp.full(prompt.shape[0], prompt.shape[1], jnp.int32),
            )
        else:
            prompt = pad(prompt)
    if infilling and prompt.free is None:
        raise ValueError("there is nothing to fill in: put None at the free positions of a row")
    if not infilling and prompt.free is not None:
        raise ValueError("the prompt has free positions (None): use infill, not generate")
    if any(isinstance(x, jax.core.Tracer) for x in prompt):
        return prompt
    tokens, lengths = np.asarray(prompt.tokens), np.asarray(prompt.lengths)
    if not ((lengths > 0) & (lengths <= tokens.shape[1])).all():
        raise ValueError(f"prompt lengths must be between 1 and {tokens.shape[1]}, got {lengths}")
    there = np.arange(tokens.shape[1]) < lengths[:, None]
    if prompt.free is not None:
        free = np.asarray(prompt.free) & there
        if not free.any(axis=1).all():
            raise ValueError(f"row {free.any(axis=1).argmin()} has no free position (None)")
        there &= ~free
    given = tokens[there]
    wrong = given[(given < 0) | (given >= config.vocab_size) | (given == config.mask_id)]
    if wrong.size:
        raise ValueError(
            f"id {wrong[0]} cannot be part of a prompt: ids are 0 to {config.vocab_size - 1}, "
            "and not the mask token's (infill takes None for a position to fill in)"
        )
    return prompt


def edge(
    model, prompt: Prompt, recipe: Any, max_new_tokens: int | None, key,
    prefill_chunk: int | None = None, cache_dtype: str | None = None, samples: int = 1,
) -> Job:  # fmt: skip
    """Whether all fits; the recipe with arrays for numbers, a key a row, and the buffers' size.

    Args:
      max_new_tokens: None when infilling.
      prefill_chunk, cache_dtype, samples: as in `generate`.
    """
    config = model.config
    if not isinstance(recipe, Verified | Denoise):
        raise TypeError(
            f"recipe={recipe!r} is not a recipe; call one of dllm_jax.recipes, e.g. ar()"
        )
    batch, width = prompt.tokens.shape
    if max_new_tokens is not None and not (
        isinstance(max_new_tokens, int | np.integer) and max_new_tokens > 0
    ):
        raise ValueError(f"max_new_tokens={max_new_tokens} must be a whole number, at least 1")
    traced = isinstance(prompt.lengths, jax.core.Tracer)
    longest = width if traced else int(np.max(np.asarray(prompt.lengths)))
    budget = max_new_tokens or 0
    if longest + budget > config.max_length:
        raise ValueError(
            f"{longest} prompt tokens + max_new_tokens={max_new_tokens} exceed the model's "
            f"{config.max_length}; ask for at most {config.max_length - longest}"
        )
    _fits(recipe, config, max_new_tokens is None)
    if max_new_tokens is None and isinstance(
        recipe, Denoise
    ):  # what ends a turn is a token like any other
        recipe = dataclasses.replace(recipe, ending="never")
    recipe.sampling.check()
    _check_samples(recipe, config, samples, prompt.free is not None)
    keys = _keys(key, batch * samples, recipe)
    room = -(-budget // BUCKET) * BUCKET
    if isinstance(recipe, Denoise) and not recipe.width.size:
        recipe = _whole(recipe, room or width)
    if cache_dtype not in (None, *DTYPES):
        raise ValueError(f"cache_dtype={cache_dtype!r} is none of {', '.join(DTYPES)}")
    memory = Memory(chunk_of(recipe, config, width, prefill_chunk), cache_dtype, int(samples))
    recipe = jax.tree.map(_strong, recipe)
    return Job(prompt, recipe, jnp.int32(budget), keys, width + room, memory)


def chunk_of(recipe: Recipe, config, width: int, asked: int | None) -> int:
    """Tokens of a chunk of a prompt of `width`, whole blocks of them; 0: it goes in one piece."""
    if asked is not None and not (isinstance(asked, int | np.integer) and asked >= 0):
        raise ValueError(f"prefill_chunk={asked} must be a number of tokens, or 0 for all at once")
    if not _is_exact(recipe, config):
        if asked:
            raise ValueError(
                "prefill_chunk is for prompts whose tokens do not see what follows; in this model,"
                " under this recipe, all of the prompt sees all of it: leave it out"
            )
        return 0
    causal = isinstance(recipe, Verified) or config.attention == "causal"
    block = 1 if causal else recipe.width.size
    chunk = -(-(CHUNK if asked is None else asked) // block) * block
    return int(chunk) if chunk < width else 0


def _is_exact(recipe: Recipe, config) -> bool:
    """Whether a prompt is cached for good, whatever follows it."""
    canvas = isinstance(recipe, Denoise) and recipe.cache in ("none", "prefix", "dual")
    return not canvas and config.attention != "bidirectional"


def _check_samples(recipe: Recipe, config, samples: int, infilling: bool) -> None:
    if not (isinstance(samples, int | np.integer) and samples > 0):
        raise ValueError(f"samples={samples} must be a whole number, at least 1")
    if samples == 1:
        return
    if infilling:
        reason = "what is filled in has text behind it"
    elif not _is_exact(recipe, config):
        reason = "the prompt is read again with each canvas behind it"
    elif hasattr(config, "window"):
        reason = "its layers with a window read no shared prompt"
    elif isinstance(recipe, Denoise) and isinstance(recipe.revise, ReNoise):
        reason = "its canvases begin as noise of their own"
    elif isinstance(recipe, Denoise) and getattr(recipe.guidance, "keep", None) is not None:
        reason = "guidance keeps other positions in each row"
    else:
        return
    raise ValueError(
        f"samples={samples} would store a prompt once for all its answers, but {reason}: give the"
        " prompt as so many rows"
    )


def _whole(recipe: Denoise, size: int) -> Denoise:
    """The recipe with one block for the whole canvas."""
    if recipe.cache not in ("none", "prefix", "dual") or not isinstance(recipe.width, Blocks):
        raise ValueError(
            "only blocks of a bidirectional canvas may be the whole of it: give a size"
        )
    return dataclasses.replace(recipe, width=Blocks(size, 0))


def _fits(recipe: Recipe, config, infilling: bool) -> None:
    """Raises ValueError where the model is not one that the recipe can decode."""
    renoise = isinstance(recipe, Denoise) and isinstance(recipe.revise, ReNoise)
    if isinstance(recipe, Verified) and infilling:
        raise ValueError("this recipe writes from left to right: it cannot fill in; use another")
    drafts = isinstance(recipe, Denoise) or recipe.width > 0
    if drafts and not config.has_mask and not renoise:
        raise ValueError(
            "this model has no mask token: load it with a diffusion adapter, or use recipes.ar()"
        )
    if isinstance(recipe, Verified) or isinstance(recipe.width, Sliding):
        if config.alignment != "shifted" or config.attention != "causal":
            raise ValueError(
                "this recipe reads a causal, shifted model; "
                f"this one is {config.attention}, {config.alignment}"
            )
        if isinstance(recipe, Verified):
            return
    if renoise != (config.mask_id is None):
        raise ValueError(
            "uniform noise (ReNoise) is for models without a mask token, and they need it"
        )
    canvas = recipe.cache in ("none", "prefix", "dual")
    if canvas and config.attention != "bidirectional":
        raise ValueError(
            f"cache={recipe.cache!r} is for bidirectional models; this one is {config.attention}:"
            ' use a recipe with cache="exact"'
        )
    pipeline = isinstance(recipe.width, Pipeline)
    if pipeline and (canvas or config.attention == "causal"):
        raise ValueError(
            'a pipeline of blocks needs cache="exact" and a model that sees in both directions'
            f" within a block; got cache={recipe.cache!r} and a {config.attention} model"
        )
    sliding = isinstance(recipe.width, Sliding)
    if config.attention == "causal" and config.alignment == "shifted" and not sliding:
        raise ValueError(
            "blocks of a causal, shifted model slide: use block_diffusion, or width=Sliding(size)"
        )
    if not canvas and config.attention == "bidirectional" and not pipeline:
        raise ValueError(
            "an exact cache needs a model whose finished blocks do not see later ones; this one is"
            " bidirectional: use llada, fast_dllm or dream (or d2f, if it was trained for it)"
        )
    if recipe.cache == "exact_sub_block" and not recipe.width.sub:
        raise ValueError('cache="exact_sub_block" needs Blocks(size, sub)')
    if recipe.first == "commit" and (recipe.cache[:5] != "exact" or config.alignment != "shifted"):
        raise ValueError('first="commit" needs an exact cache and a model with shifted outputs')
    if renoise and recipe.finish is None:
        raise ValueError("ReNoise needs a `finish`, such as StableAndConfident()")
    if recipe.guidance is not None and recipe.carry is not None:
        raise ValueError("guidance and self-conditioning do not go together")
    if recipe.guidance is not None and getattr(config, "soft_cap", 0.0):
        raise ValueError("guidance adds scores, which a head with a soft cap does not allow")


def _keys(key, batch: int, recipe: Recipe):
    """A key for each row, or None."""
    hot = recipe.sampling.temperature
    if key is None:
        if isinstance(hot, jax.core.Tracer) or hot > 0:
            raise ValueError(
                f"temperature={hot} draws at random and needs a key, e.g. jax.random.key(0)"
            )
        if (part := random_part(recipe)) is not None:
            raise ValueError(f"{part} draws at random and needs a key, e.g. jax.random.key(0)")
        return None
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise ValueError(
            "the key is an old-style array of numbers; make it with jax.random.key(...)"
        )
    if key.ndim == 0:
        return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(batch))
    if key.shape != (batch,):
        raise ValueError(f"{key.shape} keys for {batch} rows: give one key, or one for each row")
    return key


def _strong(number: Any) -> jax.Array:
    """An array of a fixed type: a Python and a NumPy number then share a compiled program."""
    array = jnp.asarray(number)
    if jnp.issubdtype(array.dtype, jnp.floating):
        return array.astype(jnp.float32)
    return array.astype(jnp.int32) if jnp.issubdtype(array.dtype, jnp.integer) else array
