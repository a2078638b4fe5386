"""The state before the first pass: where each row's canvas lies, and its noise."""

import dataclasses

import jax
import jax.numpy as jnp

from dllm_jax.cache import KVCache, behind
from dllm_jax.decode import passes
from dllm_jax.decode.prompt import PLAIN, Memory, Prompt
from dllm_jax.decode.state import RUNNING, DecodeState, lies
from dllm_jax.ops.sampling import uniform
from dllm_jax.policies import ReNoise, Sliding
from dllm_jax.recipes import Denoise, Recipe, Verified
from dllm_jax.sharding import laid_out

_FIRST_NOISE = 5  # stream of noise
_TILE = 32  # rows: of elements of one byte; of wider ones it is 8 or 16


def initial(
    model, prompt: Prompt, recipe: Recipe, budget, keys, size: int, memory: Memory = PLAIN
) -> DecodeState:
    """The batch with its canvas open and its cache empty.

    Args:
      budget: int32[], the most new tokens; nothing when filling in.
      size: positions of the buffers that prompt and budget need; the recipe's blocks may add some.
      memory: where several rows are to answer a prompt, the cache is that of the prompts.
    """
    config = model.config
    batch, width = prompt.tokens.shape
    limit = prompt.lengths + budget
    first = prompt.lengths
    if prompt.free is not None:
        first = jnp.where(prompt.free, jnp.arange(width), width).min(axis=1)
    start, end, chunk = _canvas(recipe, first, limit)
    length = size + chunk
    index = jnp.arange(length)
    within = lambda lo, hi: (index >= lo[:, None]) & (index < hi[:, None])  # noqa: E731
    free = within(limit if prompt.free is not None else first, end)
    if prompt.free is not None:
        free = free.at[:, :width].set(free[:, :width] | prompt.free)
    mask_id = config.pad_id if config.mask_id is None else config.mask_id
    noise = jnp.full((batch, length), mask_id, jnp.int32)
    if isinstance(recipe, Denoise) and isinstance(recipe.revise, ReNoise) and keys is not None:
        at = jnp.broadcast_to(index, (batch, length))
        noise = (uniform(keys, at, _FIRST_NOISE) * config.vocab_size).astype(jnp.int32)
        noise = jnp.minimum(noise, config.vocab_size - 1)
    given = jnp.pad(prompt.tokens, ((0, 0), (0, length - width))).astype(jnp.int32)
    tokens = jnp.where(index < prompt.lengths[:, None], given, config.pad_id)
    if isinstance(recipe, Denoise):
        seen = free
        if isinstance(recipe.width, Sliding):  # its canvas reaches behind the last position
            seen = free | within(end, end + recipe.width.size)
        tokens = jnp.where(seen, noise, tokens)
    rows = batch
    parts: dict = {}
    if isinstance(recipe, Denoise):
        rows = batch * (1 if recipe.guidance is None else 2)
        block = recipe.width.size
        exact = recipe.cache not in ("none", "prefix", "dual")
        if recipe.carry is not None:
            parts["carry"] = jnp.zeros((rows, block, config.dim), config.dtype)
        if recipe.finish is not None:
            parts["previous"] = jnp.full((batch, block), -1, jnp.int32)
        if exact and passes.shifted(model) and config.attention != "causal":
            parts["last"] = jnp.zeros((rows, 1, config.dim), config.dtype)
        slots = 0 if recipe.cache == "none" else _slots(recipe, length)
        reach = jnp.minimum(start + block, end)
    else:
        slots, reach = _slots(recipe, length), end
        parts["drafts"] = jnp.zeros((batch, recipe.width), jnp.int32)
    cache = KVCache((), jnp.zeros(rows, jnp.int32))
    if slots:
        slots = _whole_tiles(width) if memory.samples > 1 else slots
        cache = model.cache(rows, slots, memory.cache_dtype)
    zeros = jnp.zeros(batch, jnp.int32)
    empty = {
        "carry": jnp.zeros((0, 0, 0)),
        "previous": jnp.zeros((batch, 0), jnp.int32),
        "last": jnp.zeros((0, 1, 0)),
        "forced": jnp.zeros((batch, 0), jnp.int32),
        "drafts": jnp.zeros((batch, 0), jnp.int32),
    }
    state = DecodeState(
        tokens=tokens,
        free=free,
        open=free,
        logprobs=jnp.zeros((batch, length), jnp.float32),
        prompt=first,
        written=first,
        limit=limit,
        end=end,
        start=start,
        reach=reach,
        step=zeros,
        full_steps=zeros,
        opened=(free & within(start, reach)).sum(axis=1).astype(jnp.int32),
        blocks=zeros,
        stale=jnp.ones(batch, bool),
        cache=cache,
        stop=jnp.full(batch, RUNNING, jnp.int32),
        nfe=zeros,
        queries=zeros,
        mask_id=mask_id,
        pad_id=config.pad_id,
        **{**empty, **parts},
    )
    return laid_out(state, lies)


def spread(model, recipe: Recipe, state: DecodeState, width: int, memory: Memory) -> DecodeState:
    """The state behind the prefill of `width` prompt slots, with `memory.samples` rows for each.

    What is cached so far they share; each has a cache for what follows.
    """
    bare = dataclasses.replace(state, cache=KVCache((), state.cache.lengths))
    rows = jax.tree.map(lambda x: repeated(x, memory), bare)
    behind_prompt = state.tokens.shape[1] - width
    if isinstance(recipe, Denoise):
        behind_prompt += recipe.width.size  # its last tokens may be part of the first block
    slots = _slots(recipe, behind_prompt)
    batch = len(state.cache.lengths) * memory.samples
    cache = behind(state.cache, model.cache(batch, slots, memory.cache_dtype))
    return laid_out(dataclasses.replace(rows, cache=cache), lies)


def repeated(x: jax.Array, memory: Memory) -> jax.Array:
    """What each row has, for all the rows that it becomes."""
    return jnp.repeat(x, memory.samples, axis=0)


def _slots(recipe: Recipe, length: int) -> int:
    """Of the cache of a row of `length` positions: an append may reach behind the last."""
    if isinstance(recipe, Verified):
        return _whole_tiles(length)
    if recipe.cache in ("prefix", "dual"):  # replaced as a whole
        return length
    return _whole_tiles(length + passes.capacity(recipe) * recipe.width.size)


def _whole_tiles(slots: int) -> int:
    """At least so many slots: a TPU lays a cache of whole tiles out as kernels read it.

    Of another number of slots it puts another axis next to the last, so as to pad less, and every
    step that is a program of its own copies the cache into the kernels' layout.
    """
    return -(-slots // _TILE) * _TILE


def _canvas(recipe: Recipe, first, limit) -> tuple[jax.Array, jax.Array, int]:
    """Where a row's blocks begin and end, int32[B] each, and positions that the end may add."""
    if isinstance(recipe, Verified):
        return first, limit, recipe.width + 1
    size = recipe.width.size
    if recipe.cache in ("none", "prefix", "dual"):
        return first, limit, 0
    if isinstance(recipe.width, Sliding):
        return first, limit, 2 * size
    start = first // size * size if recipe.aligned else first
    return start, start + -(-(limit - start) // size) * size, size
