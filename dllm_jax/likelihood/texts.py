"""Prompts with their answers in place."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dllm_jax.decode.prompt import BUCKET, Prompt, checked


class Texts(NamedTuple):
    """A ragged batch, padded on the right."""

    tokens: jax.Array  # int32[B, P]
    lengths: jax.Array  # int32[B]
    scored: jax.Array  # bool[B, P]: the answers' positions
    at: jax.Array  # int32[B, N]: the same, from left to right
    there: jax.Array  # bool[B, N]: answers are ragged

    @property
    def targets(self) -> jax.Array:
        """int32[B, N]: the answers' tokens."""
        return self.pick(self.tokens)

    def pick(self, values: jax.Array) -> jax.Array:
        """`values` [B, P] at the answers' positions, [B, N]."""
        return jnp.take_along_axis(values, self.at, axis=1)

    def open(self) -> Prompt:
        """With the answers to be filled in."""
        return Prompt(jnp.where(self.scored, 0, self.tokens), self.lengths, self.scored)


def pack(prompt: Sequence, answer: Sequence, config) -> Texts:
    """One batch of `prompt` rows and their `answer` rows, as `log_likelihood` takes them.

    Widths are rounded up, so that few programs are compiled.

    Raises:
      ValueError: rows do not match, an answer is empty, or the model cannot read a text.
    """
    if len(prompt) != len(answer) or not len(answer):
        raise ValueError(f"{len(prompt)} prompts for {len(answer)} answers: give one for each")
    if not all(len(row) for row in answer):
        raise ValueError("an answer needs at least one token: the empty one has log-likelihood 0")
    rows, places = [], []
    for r, (given, answered) in enumerate(zip(prompt, answer, strict=True)):
        row = list(given)
        own = [i for i, token in enumerate(row) if token is None]
        if not own:
            own = list(range(len(row), len(row) + len(answered)))
            row += [None] * len(answered)
        if len(own) != len(answered):
            raise ValueError(
                f"row {r} has {len(own)} positions to fill, and {len(answered)} answer tokens"
            )
        for place, token in zip(own, answered, strict=True):
            row[place] = token
        rows.append(row)
        places.append(own)
    longest = max(map(len, rows))
    if longest > config.max_length:
        raise ValueError(f"a text of {longest} tokens exceeds the model's {config.max_length}")
    most = max(8, 1 << (max(map(len, places)) - 1).bit_length())
    tokens = np.zeros((len(rows), -(-longest // BUCKET) * BUCKET), np.int32)
    scored = np.zeros(tokens.shape, bool)
    at, there = np.zeros((len(rows), most), np.int32), np.zeros((len(rows), most), bool)
    for r, (row, own) in enumerate(zip(rows, places, strict=True)):
        tokens[r, : len(row)] = row
        scored[r, own] = True
        at[r, : len(own)] = own
        there[r, : len(own)] = True
    lengths = np.array([len(row) for row in rows], np.int32)
    texts = Texts(*map(jnp.asarray, (tokens, lengths, scored, at, there)))
    checked(Prompt(texts.tokens, texts.lengths), config)  # ids within bounds
    return texts
