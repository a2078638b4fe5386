"""What a decoding loop carries, and what it returns."""

import dataclasses

import jax
import jax.numpy as jnp

from dllm_jax.cache import KVCache
from dllm_jax.nn.transformer import Transformer, logits_of
from dllm_jax.typing import Params

RUNNING, END_OF_TURN, LENGTH = 0, 1, 2
STOP_REASONS = ("running", "end_of_turn", "length")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """A batch under way. Rows are left-aligned: the token at index i of a row has position i."""

    tokens: jax.Array  # int32[B, L]: prompt, answer, the mask id where a canvas is open
    prompt: jax.Array  # int32[B]: tokens of the prompt
    written: jax.Array  # int32[B]: tokens that are final and gapless, prompt included
    limit: jax.Array  # int32[B]: `written` may not exceed it
    drafts: jax.Array  # int32[B, W]: guesses at the tokens behind `written` (speculation)
    draft_probs: jax.Array  # float32[B, W, V] when sampling, else [B, W, 0]: their distributions
    cache: KVCache
    stop: jax.Array  # int32[B]: RUNNING, END_OF_TURN or LENGTH
    nfe: jax.Array  # int32[B]: forward passes while the row was running, the prefill included
    queries: jax.Array  # int32[B]: entries processed in those passes, the prompt's left out
    mask_id: int = dataclasses.field(metadata={"static": True})
    pad_id: int = dataclasses.field(metadata={"static": True})

    @property
    def finished(self) -> jax.Array:
        return self.stop != RUNNING

    @property
    def masked(self) -> jax.Array:
        """bool[B, L]: positions of the current canvas that are not written."""
        return self.tokens == self.mask_id

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
        return [STOP_REASONS[int(code)] for code in jax.device_get(self.stop)]


def result(state: DecodeState, max_new_tokens: int) -> Result:
    """Cuts the answers out of a state."""
    index = jnp.arange(max_new_tokens)
    at = jnp.minimum(state.prompt[:, None] + index, state.tokens.shape[1] - 1)
    tokens = jnp.take_along_axis(state.tokens, at, axis=1)
    tokens = jnp.where(index < state.answer_length[:, None], tokens, state.pad_id)
    return Result(tokens, state.answer_length, state.stop, state.nfe, state.queries)


def put(tokens: jax.Array, start: jax.Array, values: jax.Array, keep: jax.Array) -> jax.Array:
    """Writes `values[b, i]` [B, Q] at `start[b] + i` of `tokens` [B, L] where `keep[b, i]`."""
    rows = jnp.arange(tokens.shape[0])[:, None]
    at = jnp.where(keep, start[:, None] + jnp.arange(values.shape[1]), tokens.shape[1])
    return tokens.at[rows, at].set(values, mode="drop")


def window(tokens: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """`tokens[b, start[b] : start[b] + size]`, int32[B, size]."""
    at = start[:, None] + jnp.arange(size)
    return jnp.take_along_axis(tokens, jnp.minimum(at, tokens.shape[1] - 1), axis=1)


def is_end(tokens: jax.Array, eos_ids: tuple[int, ...]) -> jax.Array:
    """Which tokens end an answer."""
    found = jnp.zeros(tokens.shape, bool)
    for eos in eos_ids:
        found |= tokens == eos
    return found


def scores(model: Transformer, params: Params, hidden: jax.Array) -> jax.Array:
    """Logits, float32[..., V]; a mask token inside the vocabulary is never to be written."""
    logits, mask_id = logits_of(model, params, hidden), model.config.mask_id
    if mask_id is None or mask_id >= model.config.vocab_size:
        return logits
    return logits.at[..., mask_id].set(-jnp.inf)


def stopped(state: DecodeState, written: jax.Array, ended: jax.Array) -> jax.Array:
    """The stop codes once `written` tokens are final, `ended` rows by an end-of-turn among them."""
    stop = jnp.where(ended, END_OF_TURN, jnp.where(written >= state.limit, LENGTH, RUNNING))
    return jnp.where(state.finished, state.stop, stop)
