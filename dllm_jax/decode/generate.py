"""`generate` and `stream`: a prompt, a recipe, and one loop on the device.

    prompt -> prefill, the first masks riding on it -> step, step, ... until all rows stop

Buffers are static and rounded up to buckets, so lengths, budgets, thresholds and temperatures
within a bucket share one compiled program.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dllm_jax.cache import append
from dllm_jax.decode import block, verify
from dllm_jax.decode.state import RUNNING, DecodeState, Result, result
from dllm_jax.nn.transformer import Transformer, TransformerConfig, forward
from dllm_jax.recipes import BlockDiffusion, Recipe, Verified
from dllm_jax.typing import Key, Params
from pallas_kernels import BlockMask

BUCKET = 64


class Prompt(NamedTuple):
    """A ragged batch, padded on the right."""

    tokens: jax.Array  # int32[B, P]
    lengths: jax.Array  # int32[B]


def pad(rows: Sequence, bucket: int = BUCKET) -> Prompt:
    """Packs lists of ids into a `Prompt` whose width is a multiple of `bucket`.

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
    for target, row in zip(tokens, rows, strict=True):
        target[: len(row)] = row
    return Prompt(jnp.asarray(tokens), jnp.asarray([len(row) for row in rows], jnp.int32))


def generate(
    model: Transformer,
    params: Params,
    prompt: Prompt | Sequence | jax.Array,
    *,
    recipe: Recipe,
    max_new_tokens: int = 128,
    key: Key | None = None,
) -> Result:
    """Answers a batch of prompts, in one compiled loop on the device.

    Args:
      model: what `load` returned; static.
      params: its parameters, on any device or mesh.
      prompt: rows of ids, which may differ in length; an array [B, P]; or a padded `Prompt`.
      recipe: how to decode, one of `dllm_jax.recipes` or your own.
      max_new_tokens: the most tokens an answer may have; a row stops earlier at an end-of-turn id.
      key: None decodes greedily. A key (one for the batch, row r then uses `fold_in(key, r)`, or
        one for each row) draws with the recipe's temperature, top-k and top-p.

    Returns:
      A `Result`: tokens, lengths, stop reasons, and the cost of each row. Each row's answer is the
      one it would get alone.

    Raises:
      TypeError: `recipe` is not a recipe.
      ValueError: the recipe asks for a temperature without a key, the model lacks what the recipe
        needs (a mask id, shifted outputs), or the lengths do not fit the model.
    """
    prompt, recipe, keys, slots = _prepare(model, params, prompt, recipe, max_new_tokens, key)
    state = _generate(model, params, prompt, recipe, jnp.int32(max_new_tokens), keys, slots=slots)
    return result(state, max_new_tokens)


def stream(
    model: Transformer,
    params: Params,
    prompt: Prompt | Sequence | jax.Array,
    *,
    recipe: Recipe,
    max_new_tokens: int = 128,
    key: Key | None = None,
) -> Iterator[DecodeState]:
    """As `generate`, but yields the state after the prefill and after every step.

    `decode.state.result(state, max_new_tokens)` cuts the answers out of any of them.
    """
    prompt, recipe, keys, slots = _prepare(model, params, prompt, recipe, max_new_tokens, key)
    state = _start(model, params, prompt, recipe, jnp.int32(max_new_tokens), keys, slots=slots)
    yield state
    while not bool(state.finished.all()):
        state = _step(model, params, recipe, keys, state)
        yield state


def _prepare(model, params, prompt, recipe, max_new_tokens, key):
    """Checks at the edge; the padded prompt, the recipe, a key a row, and the buffers' slots."""
    config = model.config
    if not isinstance(recipe, Verified | BlockDiffusion):
        raise TypeError(
            f"recipe={recipe!r} is not a recipe; call one of dllm_jax.recipes, e.g. ar()"
        )
    prompt = _prompt(prompt, config)
    batch, width = prompt.tokens.shape
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    traced = isinstance(prompt.lengths, jax.core.Tracer)
    longest = width if traced else int(np.max(np.asarray(prompt.lengths)))
    if longest + max_new_tokens > config.max_length:
        raise ValueError(
            f"{longest} prompt tokens + max_new_tokens={max_new_tokens} exceed the model's "
            f"{config.max_length}; ask for at most {config.max_length - longest}"
        )
    drafts = isinstance(recipe, BlockDiffusion) or recipe.width > 0
    if drafts and not config.has_mask:
        raise ValueError(
            "this model has no mask token: load it with a diffusion adapter, or use recipes.ar()"
        )
    if config.alignment != "shifted" or config.attention != "causal":
        raise ValueError(
            "these recipes read a causal, shifted model; "
            f"this one is {config.attention}, {config.alignment}"
        )
    recipe.sampling.check()
    keys, recipe = _keys(key, batch, recipe), jax.tree.map(_strong, recipe)
    chunk = 2 * recipe.block_size if isinstance(recipe, BlockDiffusion) else recipe.width + 1
    slots = width + -(-max_new_tokens // BUCKET) * BUCKET + chunk
    return prompt, recipe, keys, slots


def _prompt(prompt, config: TransformerConfig) -> Prompt:
    """A padded prompt whose lengths and ids are within bounds, as far as they are known."""
    if not isinstance(prompt, Prompt):
        if getattr(prompt, "ndim", 2) == 2 and hasattr(prompt, "shape"):
            prompt = Prompt(
                jnp.asarray(prompt, jnp.int32),
                jnp.full(prompt.shape[0], prompt.shape[1], jnp.int32),
            )
        else:
            prompt = pad(prompt)
    if isinstance(prompt.lengths, jax.core.Tracer) or isinstance(prompt.tokens, jax.core.Tracer):
        return prompt
    tokens, lengths = np.asarray(prompt.tokens), np.asarray(prompt.lengths)
    if not ((lengths > 0) & (lengths <= tokens.shape[1])).all():
        raise ValueError(f"prompt lengths must be between 1 and {tokens.shape[1]}, got {lengths}")
    given = tokens[np.arange(tokens.shape[1]) < lengths[:, None]]
    wrong = given[(given < 0) | (given >= config.vocab_size) | (given == config.mask_id)]
    if wrong.size:
        raise ValueError(
            f"id {wrong[0]} cannot be part of a prompt: ids are 0 to {config.vocab_size - 1}, "
            "and not the mask token's"
        )
    return prompt


def _keys(key, batch: int, recipe: Recipe):
    """A key for each row, or None."""
    hot = recipe.sampling.temperature
    if key is None:
        if isinstance(hot, jax.core.Tracer) or hot > 0:
            raise ValueError(
                f"temperature={hot} draws at random and needs a key, e.g. jax.random.key(0)"
            )
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


def _strong(number) -> jax.Array:
    """An array of a fixed type: a Python and a NumPy number then share a compiled program."""
    array = jnp.asarray(number)
    if jnp.issubdtype(array.dtype, jnp.floating):
        return array.astype(jnp.float32)
    return array.astype(jnp.int32) if jnp.issubdtype(array.dtype, jnp.integer) else array


def _part(recipe: Recipe):
    """The room where the recipe's step lives."""
    return {Verified: verify, BlockDiffusion: block}[type(recipe)]


@partial(jax.jit, static_argnames=("model", "slots"))
def _generate(model, params, prompt, recipe, budget, keys, *, slots) -> DecodeState:
    state = _start(model, params, prompt, recipe, budget, keys, slots=slots)
    return jax.lax.while_loop(
        lambda s: ~s.finished.all(), partial(_step, model, params, recipe, keys), state
    )


@partial(jax.jit, static_argnames=("model",))
def _step(model, params, recipe, keys, state) -> DecodeState:
    return _part(recipe).step(model, params, recipe, keys, state)


@partial(jax.jit, static_argnames=("model", "slots"))
def _start(model, params, prompt: Prompt, recipe, budget, keys, *, slots) -> DecodeState:
    """The prefill: the prompt into the cache, and the first tokens out of it."""
    config, part = model.config, _part(recipe)
    batch, width = prompt.tokens.shape
    masks = part.prefill_queries(recipe)
    mask_id = -1 if config.mask_id is None else config.mask_id
    positions = jnp.broadcast_to(jnp.arange(width), (batch, width))
    entries, mask = prompt.tokens, BlockMask.causal(width)
    if masks:
        entries = jnp.concatenate([entries, jnp.full((batch, masks), mask_id, jnp.int32)], axis=1)
        ahead = prompt.lengths[:, None] + jnp.arange(masks)
        positions = jnp.concatenate([positions, ahead], axis=1)
        mask = BlockMask.dual_stream(width, masks, stride=0, offset=width)
    out = forward(model, params, entries, mask=mask, positions=positions, lengths=prompt.lengths,
        canvas=masks > 0,
    )  # fmt: skip
    last = jnp.take_along_axis(out.hidden, prompt.lengths[:, None, None] - 1, axis=1)
    given = jnp.arange(width) < prompt.lengths[:, None]
    tokens = jnp.where(given, prompt.tokens, config.pad_id).astype(jnp.int32)
    drafts = recipe.width if isinstance(recipe, Verified) else 0
    sampled = 0 if keys is None else config.vocab_size
    state = DecodeState(
        tokens=jnp.pad(tokens, ((0, 0), (0, slots - width)), constant_values=config.pad_id),
        prompt=prompt.lengths,
        written=prompt.lengths,
        limit=prompt.lengths + budget,
        drafts=jnp.zeros((batch, drafts), jnp.int32),
        draft_probs=jnp.zeros((batch, drafts, sampled), jnp.float32),
        cache=append(model.cache(batch, slots), out.kv[:, :, :, :width], prompt.lengths),
        stop=jnp.full(batch, RUNNING, jnp.int32),
        nfe=jnp.ones(batch, jnp.int32),
        queries=jnp.full(batch, masks, jnp.int32),
        mask_id=mask_id,
        pad_id=config.pad_id,
    )
    return part.first_tokens(model, params, recipe, keys, state, last, out.hidden[:, width:])
