"""What a decoding loop carries, and what it returns."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dllm_jax import distributed
from dllm_jax.cache import AXES, KVCache
from dllm_jax.sharding import automatic, placed, spec_of

RUNNING, END_OF_TURN, LENGTH = 0, 1, 2
STOP_REASONS = ("running", "end_of_turn", "length")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """A batch under way. Rows are left-aligned: the token at index i of a row has position i.

    Zero-sized arrays stand for what a recipe does not need.
    """

    tokens: jax.Array  # int32[B, L]: the prompt, the answer, noise where nothing is written
    free: jax.Array  # bool[B, L]: positions that are to be written; the others are given
    open: jax.Array  # bool[B, L]: those of them that are not written yet
    logprobs: jax.Array  # float32[B, L]: of written tokens, in the pass that wrote them (nats)
    prompt: jax.Array  # int32[B]: where the answer begins
    written: jax.Array  # int32[B]: tokens that are final and gapless, prompt included
    limit: jax.Array  # int32[B]: `written` may not exceed it
    end: jax.Array  # int32[B]: where the canvas ends; blocks may reach behind `limit`
    start: jax.Array  # int32[B]: first position of the block that is denoised
    reach: jax.Array  # int32[B]: where the last block that is denoised ends
    step: jax.Array  # int32[B]: steps that the block has had
    full_steps: jax.Array  # int32[B]: those of them that began with nothing masked
    opened: jax.Array  # int32[B]: positions that were to be written when the block was opened
    blocks: jax.Array  # int32[B]: blocks done
    stale: jax.Array  # bool[B]: the row needs a pass over all of its canvas (approximate caches)
    last: jax.Array  # [R, 1, D]: hidden state of the last cached token (shifted outputs)
    carry: jax.Array  # [R, T, D]: soft embeddings of the step before (self-conditioning)
    previous: jax.Array  # int32[B, T]: the most probable tokens of the step before
    forced: jax.Array  # int32[B, L]: the tokens to write, whatever the model says (scoring)
    drafts: jax.Array  # int32[B, W]: guesses at the tokens behind `written` (speculation)
    cache: KVCache  # of R rows: B, or 2 * B with guidance, those without the prompt behind
    stop: jax.Array  # int32[B]: RUNNING, END_OF_TURN or LENGTH
    # int32[B]: forward passes that the row took part in; the prefill, in chunks too, is one of them
    nfe: jax.Array
    queries: jax.Array  # int32[B]: entries processed in those passes, the prefill's prompt left out
    mask_id: int = dataclasses.field(metadata={"static": True})
    pad_id: int = dataclasses.field(metadata={"static": True})

    @property
    def finished(self) -> jax.Array:
        return self.stop != RUNNING

    @property
    def masked(self) -> jax.Array:
        """bool[B, L]: positions that are not written."""
        return self.open

    @property
    def answer_length(self) -> jax.Array:
        """int32[B]: final, gapless tokens behind the prompt."""
        return self.written - self.prompt


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Result:
    """What `generate` returns, row by row."""

    tokens: jax.Array  # int32[B, N]: the answer, the end-of-turn token included, then the pad id
    lengths: jax.Array  # int32[B]: tokens of the answer
    logprobs: jax.Array  # float32[B, N]: of each token in the pass that wrote it (nats), else 0
    stop: jax.Array  # int32[B]: index into STOP_REASONS
    nfe: jax.Array  # int32[B]: forward passes, the prefill included
    queries: jax.Array  # int32[B]: entries processed in them, the prompt's left out

    @property
    def tokens_per_forward(self) -> jax.Array:
        """float32[B]: answer tokens for each forward pass (autoregressive: 1)."""
        return self.lengths / jnp.maximum(self.nfe, 1)

    @property
    def overhead(self) -> jax.Array:
        """float32[B]: entries processed for each answer token.

        Autoregressive: 1, less the first token's share, which the prompt pays for.
        """
        return self.queries / jnp.maximum(self.lengths, 1)

    @property
    def stop_reasons(self) -> list[str]:
        """Why each row ended: "end_of_turn" or "length"."""
        codes = distributed.fetched(self.stop)  # of all processes: all ask, all get all
        return [STOP_REASONS[int(code)] for code in codes]


def lies(path: str, shape: tuple[int, ...]) -> Any:
    """How a state lies on a mesh (`sharding.Place`): by rows, and its cache by kv heads too."""
    whole = ".cache." in path and len(shape) > 1  # keys and values, and scales of them
    return spec_of(shape, *(AXES if whole else ("batch",)))


def result(state: DecodeState, max_new_tokens: int) -> Result:
    """Cuts the answers out of a state."""
    return automatic(partial(_result, max_new_tokens), placed("batch"), state)


def _result(max_new_tokens: int, state: DecodeState) -> Result:
    index = jnp.arange(max_new_tokens)
    at = jnp.minimum(state.prompt[:, None] + index, state.tokens.shape[1] - 1)
    there = index < state.answer_length[:, None]
    tokens = jnp.where(there, jnp.take_along_axis(state.tokens, at, axis=1), state.pad_id)
    logprobs = jnp.where(there, jnp.take_along_axis(state.logprobs, at, axis=1), 0.0)
    return Result(tokens, state.answer_length, logprobs, state.stop, state.nfe, state.queries)


def write(
    state: DecodeState, start: jax.Array, values: jax.Array, keep: jax.Array, logprobs: jax.Array
) -> DecodeState:
    """Writes `values[b, i]` [B, Q] at `start[b] + i` where `keep[b, i]`."""
    return dataclasses.replace(
        state,
        tokens=put(state.tokens, start, values, keep),
        open=put(state.open, start, jnp.zeros_like(keep), keep),
        logprobs=put(state.logprobs, start, logprobs, keep),
    )


def put(into: jax.Array, start: jax.Array, values: jax.Array, keep: jax.Array) -> jax.Array:
    """`into` [B, L] with `values[b, i]` [B, Q] at `start[b] + i` where `keep[b, i]`."""
    at = jnp.where(keep, start[:, None] + jnp.arange(values.shape[1]), into.shape[1])
    # Row by row: with rows as an index, those of a batch on a mesh would travel to each other.
    write = jax.vmap(lambda row, at, new: row.at[at].set(new, mode="drop"))
    return write(into, at, values.astype(into.dtype))


def window(tokens: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """`tokens[b, start[b] : start[b] + size]`, [B, size]; behind the end, the last one."""
    at = start[:, None] + jnp.arange(size)
    return jnp.take_along_axis(tokens, jnp.minimum(at, tokens.shape[1] - 1), axis=1)


def gather(hidden: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """`hidden[b, start[b] : start[b] + size]`, [B, size, D], indices held within bounds."""
    at = jnp.clip(start[:, None] + jnp.arange(size), 0, hidden.shape[1] - 1)
    return jnp.take_along_axis(hidden, at[..., None], axis=1)


def is_end(tokens: jax.Array, eos_ids: tuple[int, ...]) -> jax.Array:
    """Which tokens end an answer."""
    found = jnp.zeros(tokens.shape, bool)
    for eos in eos_ids:
        found |= tokens == eos
    return found


def stopped(state: DecodeState, written: jax.Array, ended: jax.Array) -> jax.Array:
    """The stop codes once `written` tokens are final, `ended` rows by an end-of-turn among them."""
    stop = jnp.where(ended, END_OF_TURN, jnp.where(written >= state.limit, LENGTH, RUNNING))
    return jnp.where(state.finished, state.stop, stop)
