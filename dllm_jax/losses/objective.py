"""What a training step asks of an objective, and what all objectives share."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dllm_jax.nn.transformer import Transformer
from dllm_jax.typing import Key, Params

LEVELS = 4  # parts of [0, 1] of noise levels that figures tell apart


@runtime_checkable
class Objective(Protocol):
    """What a training step asks of an objective; static under jit, so hashable."""

    def loss(
        self, model: Any, params: Params, batch: dict[str, jax.Array], key: Key
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of a batch (`data.batches`), and figures about it: scalars."""
        ...


class Drawn(NamedTuple):
    """A batch with its noise, and what its sums are divided by."""

    rows: Any  # the batch and its noise; every leaf has one entry a row
    totals: dict[str, jax.Array]  # of the whole batch

    def with_rows(self, rows: Any) -> "Drawn":
        """A part of the batch: its losses and figures are shares of the whole batch's."""
        return Drawn(rows, self.totals)


def learnable(batch: dict[str, jax.Array]) -> Bool[Array, "B L"]:
    """The tokens to be learnt: behind the prompt, within the text, and not given."""
    index = jnp.arange(batch["tokens"].shape[1])
    found = (index >= batch["prompts"][:, None]) & (index < batch["lengths"][:, None])
    return found & ~batch["given"] if "given" in batch else found


def follows(batch: dict[str, jax.Array]) -> Bool[Array, "B L"]:
    """The tokens that have one of their own document before them."""
    index = jnp.arange(batch["tokens"].shape[1])
    if "segments" not in batch:
        return jnp.broadcast_to(index > 0, batch["tokens"].shape)
    segments = batch["segments"]
    return (index > 0) & (segments == jnp.roll(segments, 1, axis=1))


def check_packed(model: Any, batch: dict[str, jax.Array]) -> bool:
    """Whether rows hold several documents; ValueError where the model cannot tell them apart."""
    if "segments" in batch and not isinstance(model, Transformer):
        raise ValueError(
            f"rows of several documents are for models of the Llama line, not for a"
            f" {type(model).__name__}"
        )
    return "segments" in batch


def check_whole_blocks(length: int, size: int) -> None:
    """Raises ValueError where rows of several documents, of this length, end within a block."""
    if size and length % size:
        raise ValueError(
            f"rows of several documents must be whole blocks: {length} tokens are no multiple of"
            f" block_size={size}"
        )


def answers(batch: dict[str, jax.Array]) -> Bool[Array, "B M"]:
    """The places of clean tokens that a causal loss scores: the next one is to be learnt."""
    return (learnable(batch) & follows(batch))[:, 1:]


def by_level(learnt: Bool[Array, "..."], times: Float[Array, "..."]) -> list[Bool[Array, "..."]]:
    """The learnt entries of each of `LEVELS` parts of noise levels."""
    level = jnp.clip(jnp.floor(times * LEVELS), 0, LEVELS - 1)
    return [learnt & (level == i) for i in range(LEVELS)]


def level_figures(
    nats: Float[Array, "..."], levels: list[Bool[Array, "..."]], totals: jax.Array
) -> dict[str, Array]:
    """`level_0`, ...: the mean nats of each level's entries, NaN where there are none.

    Args:
      levels: `by_level` of the entries.
      totals: their numbers in the whole batch.
    """
    pairs = enumerate(zip(levels, totals, strict=True))
    return {f"level_{i}": jnp.where(here, nats, 0.0).sum() / n for i, (here, n) in pairs}
