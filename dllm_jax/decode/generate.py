"""`generate`, `infill` and `stream`: a prompt, a recipe, and one loop on the device.

    prompt -> prefill, the first canvas riding on it -> step, step, ... until all rows stop

Buffers are static and rounded up to buckets, so lengths, budgets, thresholds and temperatures
within a bucket share one compiled program.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dllm_jax.decode import denoise, verify
from dllm_jax.decode.prompt import BUCKET, PLAIN, Prompt, checked, edge, has_free, pad
from dllm_jax.decode.start import initial
from dllm_jax.decode.state import DecodeState, Result, lies, result
from dllm_jax.recipes import Recipe, Verified
from dllm_jax.sharding import automatic, in_scope, placed, scope
from dllm_jax.typing import Key, Params

__all__ = ["BUCKET", "Prompt", "generate", "infill", "pad", "stream"]


@in_scope
def generate(
    model: Any,
    params: Params,
    prompt: Prompt | Sequence | jax.Array,
    *,
    recipe: Recipe,
    max_new_tokens: int = 128,
    key: Key | None = None,
    prefill_chunk: int | None = None,
    cache_dtype: str | None = None,
    samples: int = 1,
) -> Result:
    """Answers a batch of prompts, in one compiled loop on the device.

    Args:
      model: what `load` returned; static.
      params: its parameters, on any device or mesh. Where no mesh is in scope, theirs is: rows are
        split over it, as far as their number allows, and the cache by kv heads too. The answers
        are the same.
      prompt: rows of ids, which may differ in length; an array [B, P]; or a padded `Prompt`.
      recipe: how to decode, one of `dllm_jax.recipes` or your own.
      max_new_tokens: the most tokens an answer may have; a row stops earlier at an end-of-turn id.
        Bidirectional models see it: their canvas is that long.
      key: None decodes greedily. A key (one for the batch, row r then uses `fold_in(key, r)`, or
        one for each row) draws with the recipe's temperature, top-k and top-p.
      prefill_chunk: the most tokens of a prompt that one forward pass takes; a longer one goes in
        chunks, each against the cache of those before it, and what a pass holds does not grow with
        the prompt. 0: all at once. None: chunks of 4,096. Rounded up to whole blocks of a
        block-causal model; where all of a prompt sees all of it (bidirectional models) it goes at
        once. Results are equal up to rounding, `nfe` too: a prefill counts as one pass.
      cache_dtype: of keys and values of the text so far: "bfloat16", or "int8" with scales of each
        row, layer and kv head that its prompt sets (its first chunk); both approximate. None: that
        of the model's activations.
      samples: answers to each prompt, of rows that follow each other: row r is the answer of number
        r % samples to prompt r // samples, with a key of its own. The prompt is read and stored
        once for them. For an exact cache, of models without windows.

    Returns:
      A `Result`: tokens, lengths, stop reasons, and the cost of each row. Each row's answer is the
      one it would get alone.

    Raises:
      TypeError: `recipe` is not a recipe.
      ValueError: the recipe asks for a temperature without a key, the model lacks what the recipe
        needs (a mask id, its kind of attention), or the lengths do not fit the model.
    """
    prompt = checked(prompt, model.config)
    job = edge(model, prompt, recipe, max_new_tokens, key, prefill_chunk, cache_dtype, samples)
    return result(run(model, params, job), max_new_tokens)


def stream(
    model: Any,
    params: Params,
    prompt: Prompt | Sequence | jax.Array,
    *,
    recipe: Recipe,
    max_new_tokens: int = 128,
    key: Key | None = None,
    prefill_chunk: int | None = None,
    cache_dtype: str | None = None,
    samples: int = 1,
) -> Iterator[DecodeState]:
    """As `generate`, but yields the state after the prefill and after every step.

    `decode.state.result(state, max_new_tokens)` cuts the answers out of any of them. Rows with free
    positions (None) are filled in, as by `infill`, whatever `max_new_tokens` says.
    """
    filling = has_free(prompt)
    prompt = checked(prompt, model.config, infilling=filling)
    budget = None if filling else max_new_tokens
    job = edge(model, prompt, recipe, budget, key, prefill_chunk, cache_dtype, samples)
    yield from _stream(model, params, job)


@in_scope
def infill(
    model: Any,
    params: Params,
    rows: Prompt | Sequence,
    *,
    recipe: Recipe,
    key: Key | None = None,
    prefill_chunk: int | None = None,
    cache_dtype: str | None = None,
) -> Result:
    """Fills in the free positions of texts; the given ones stay as they are.

    Args:
      rows: lists of ids with None at the free positions, in any pattern; or a `Prompt` with `free`.
        Bidirectional models read the text on both sides; causal and block-causal ones what is
        before, and what their canvas holds.

    Returns:
      A `Result` whose tokens are the whole rows. Rows do not end early: what ends a turn is a token
      like any other here.

    Raises:
      TypeError, ValueError: as `generate`; or a row has no free position; or the recipe writes
        from left to right only (`ar`, `self_speculative`).
    """
    prompt = checked(rows, model.config, infilling=True)
    job = edge(model, prompt, recipe, None, key, prefill_chunk, cache_dtype)
    state = run(model, params, job)
    return automatic(_filled, placed("batch"), prompt.tokens, prompt.lengths, state)


def _filled(tokens: jax.Array, lengths: jax.Array, state: DecodeState) -> Result:
    index = jnp.arange(tokens.shape[1])
    there = index < lengths[:, None]
    cut = lambda x, fill: jnp.where(there, x[:, : len(index)], fill)  # noqa: E731
    return Result(
        cut(state.tokens, state.pad_id), lengths, cut(state.logprobs, 0.0), state.stop, state.nfe,
        state.queries,
    )  # fmt: skip


@in_scope
def run(model: Any, params: Params, job, forced: jax.Array | None = None) -> DecodeState:
    """The last state of a checked job (`prompt.edge`).

    Args:
      forced: int32[B, P], tokens to write whatever the model says; `logprobs` then scores them.
    """
    return _generate(
        model, params, job.prompt, job.recipe, job.budget, job.keys, forced, size=job.size,
        memory=job.memory,
    )  # fmt: skip


def _stream(model, params, job) -> Iterator[DecodeState]:
    with scope(params):  # left before each state is given away
        state = _start(
            model, params, job.prompt, job.recipe, job.budget, job.keys, None, size=job.size,
            memory=job.memory,
        )  # fmt: skip
    yield state
    while not bool(state.finished.all()):
        with scope(params):
            state = _step(model, params, job.recipe, job.keys, state)
        yield state


@partial(jax.jit, static_argnames=("model", "size", "memory"))
def _generate(
    model, params, prompt, recipe, budget, keys, forced=None, *, size, memory=PLAIN
) -> DecodeState:
    run = partial(_answered, model, size, memory)
    return automatic(run, lies, params, prompt, recipe, budget, keys, forced)


def _answered(model, size, memory, params, prompt, recipe, budget, keys, forced) -> DecodeState:
    state = _start(model, params, prompt, recipe, budget, keys, forced, size=size, memory=memory)
    going = lambda s: ~s.finished.all()  # noqa: E731
    if isinstance(recipe, Verified):
        return jax.lax.while_loop(going, partial(verify.step, model, params, recipe, keys), state)

    def wide(state):
        rows = denoise.wide_rows(recipe, state)
        return denoise.step(model, params, recipe, keys, state, rows, wide=True)

    if not denoise.two_kinds(recipe):
        return jax.lax.while_loop(going, wide, state)

    # The cache does not change from one narrow pass to the next, which the inner loop lets the
    # compiler know; and rows that wait for a wide pass share it.
    narrow_rows = lambda s: ~s.finished & ~denoise.wide_rows(recipe, s)  # noqa: E731

    def narrow(state):
        return denoise.step(model, params, recipe, keys, state, narrow_rows(state), wide=False)

    def both(state):
        return jax.lax.while_loop(lambda s: narrow_rows(s).any(), narrow, wide(state))

    return jax.lax.while_loop(going, both, state)


@partial(jax.jit, static_argnames=("model",))
def _step(model, params, recipe: Recipe, keys, state) -> DecodeState:
    return automatic(partial(_stepped, model), lies, params, recipe, keys, state)


def _stepped(model, params, recipe: Recipe, keys, state) -> DecodeState:
    if isinstance(recipe, Verified):
        return verify.step(model, params, recipe, keys, state)
    rows = denoise.wide_rows(recipe, state)

    def wide(state):
        return denoise.step(model, params, recipe, keys, state, rows, wide=True)

    if not denoise.two_kinds(recipe):
        return wide(state)
    narrow_rows = ~state.finished & ~rows

    def narrow(state):
        return denoise.step(model, params, recipe, keys, state, narrow_rows, wide=False)

    return jax.lax.cond(narrow_rows.any(), narrow, wide, state)


@partial(jax.jit, static_argnames=("model", "size", "memory"))
def _start(model, params, prompt, recipe, budget, keys, forced, *, size, memory) -> DecodeState:
    run = partial(_started, model, size, memory)
    return automatic(run, lies, params, prompt, recipe, budget, keys, forced)


def _started(model, size, memory, params, prompt, recipe, budget, keys, forced) -> DecodeState:
    state = initial(model, prompt, recipe, budget, keys, size, memory)
    width = prompt.tokens.shape[1]
    if isinstance(recipe, Verified):
        return verify.first_steps(model, params, recipe, keys, state, width, memory)
    if forced is not None:
        room = state.tokens.shape[1] - forced.shape[1]
        state = dataclasses.replace(state, forced=jnp.pad(forced, ((0, 0), (0, room))))
    return denoise.first_steps(model, params, recipe, keys, state, width, memory)
