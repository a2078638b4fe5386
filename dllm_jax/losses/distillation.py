"""A bidirectional teacher distilled into a block-causal student, in the same weights."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dllm_jax.cache import KVCache
from dllm_jax.losses.objective import Drawn, by_level, learnable, level_figures
from dllm_jax.nn.head import logits_of, over_vocabulary, without_mask
from dllm_jax.nn.transformer import forward
from dllm_jax.sharding import automatic, placed
from dllm_jax.typing import Key, Params
from pallas_kernels import BlockMask


class Rows(NamedTuple):
    """A batch under noise, row by row."""

    batch: dict[str, jax.Array]
    noisy: jax.Array  # int32[B, L]: the text with masks in its answer
    weights: jax.Array  # float32[B, L]: 1 / p of masks, 0 elsewhere


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation:
    """Discrete diffusion forcing (D2F, Wang et al. 2025, 2508.09192, equation 5).

        loss = sum over masks of CE(teacher, student) / p of the block / masks

    Teacher and student read the same noisy text: the teacher, the model without its adapter, all
    of it; the student, the model with its adapter, block by block, each behind the noisy blocks
    before it. Blocks begin where the answer does, and their noise rises from left to right: the
    first one's share is p ~ U(low, high), those of the others add parts of what is left. So the
    student learns to go on behind blocks that are not done, as `recipes.d2f` decodes.
    """

    block_size: int = 16
    low: float = 0.2
    high: float = 0.7

    def __post_init__(self):
        if self.block_size < 1 or not 0 < self.low <= self.high <= 1:
            raise ValueError(f"needs block_size >= 1 and 0 < low <= high <= 1, got {self}")

    def loss(
        self, model: Any, params: Params, batch: dict[str, jax.Array], key: Key
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The loss of a batch (`data.batches`), in nats per mask, and figures about it.

        Returns:
          The loss, and the figures `agreement` (masks where both find the same token best),
          `level_0`, ... (mean nats of masks by their block's share) and `tokens` (to be learnt).

        Raises:
          ValueError: the model is not bidirectional, or has no adapter of its own for the student.
        """

        def run(params: Params, batch: dict[str, jax.Array], key: Key):
            return self.score(model, params, self.draw(model, batch, key))

        return automatic(run, placed(), params, batch, key)

    def entries(self, batch: int, length: int) -> float:
        """Positions that a step computes, forward and backward; the teacher's are a third."""
        return batch * length * (2 + 1 / 3)

    def outputs(self, batch: int, length: int) -> float:
        """Those of them that the output head is applied to: not those of the prompt's own pass."""
        return batch * length * (1 + 1 / 3)

    def draw(self, model: Any, batch: dict[str, jax.Array], key: Key) -> Drawn:
        """The noise of a batch, with the batch."""
        _check(model.config, batch)
        tokens, (rows, length) = batch["tokens"], batch["tokens"].shape
        first_key, rise_key, mask_key = jax.random.split(key, 3)
        count = -(-length // self.block_size)
        first = jax.random.uniform(first_key, (rows, 1), minval=self.low, maxval=self.high)
        rise = jax.random.uniform(rise_key, (rows, count)) * (self.high - first)
        answer = batch["lengths"] - batch["prompts"]
        blocks = -(-answer // self.block_size)
        rise = rise / jnp.maximum(blocks - 1, 1)[:, None]
        share = jnp.minimum(first + jnp.cumsum(rise, axis=1) - rise[:, :1], 1.0)
        block = (jnp.arange(length) - batch["prompts"][:, None]) // self.block_size
        share = jnp.take_along_axis(share, jnp.clip(block, 0, count - 1), axis=1)
        masked = learnable(batch) & (jax.random.uniform(mask_key, tokens.shape) < share)
        behind = jnp.arange(length) >= batch["lengths"][:, None]
        noisy = jnp.where(masked | behind, model.config.mask_id, tokens)
        weights = jnp.where(masked, 1 / share, 0.0)
        levels = jnp.array([x.sum() for x in by_level(masked, share)])
        totals = {"masks": jnp.maximum(masked.sum(), 1), "levels": levels}
        return Drawn(Rows(batch, noisy, weights), totals)

    def score(
        self, model: Any, params: Params, drawn: Drawn
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The loss and the figures; of a part of a batch, what it adds to those of the whole."""
        (batch, noisy, weights), total = drawn.rows, drawn.totals["masks"]
        teacher: Any = dataclasses.replace(model.config, adapter=None).build()
        frozen = jax.lax.stop_gradient(params)
        told = forward(teacher, frozen, noisy, lengths=batch["lengths"]).hidden
        own = self._student(model, params, batch, noisy)
        if model.config.alignment == "shifted":  # the first predicts itself, as when decoding
            told, own = (jnp.concatenate([x[:, :1], x[:, :-1]], axis=1) for x in (told, own))

        def one(logits, told):
            scores = logits_of(teacher, frozen, told)
            expected = jax.nn.softmax(without_mask(scores, model.config.mask_id))
            logs = jnp.where(expected > 0, jax.nn.log_softmax(logits), 0.0)
            return -(expected * logs).sum(), expected.argmax() == logits.argmax()

        nats, same = over_vocabulary(model, params, one, own, told)
        masked = weights > 0
        levels = by_level(masked, 1 / jnp.where(masked, weights, 1.0))
        figures = {
            **level_figures(nats, levels, drawn.totals["levels"]),
            "agreement": (same & masked).sum() / total,
            "tokens": learnable(batch).sum().astype(jnp.float32),
        }
        return jnp.where(masked, nats * weights, 0.0).sum() / total, figures

    def _student(self, model, params, batch, noisy) -> Float[Array, "B L D"]:
        """Outputs at all positions, those of the prompt included.

        The prompt is read first, as when decoding: it does not see the answer.
        """
        prompts, (_, length) = batch["prompts"], noisy.shape
        prompt = forward(
            model, params, batch["tokens"], mask=BlockMask.bidirectional(length), lengths=prompts
        )
        index = prompts[:, None] + jnp.arange(length)
        behind = jnp.take_along_axis(noisy, jnp.minimum(index, length - 1), axis=1)
        answer = forward(
            model, params, behind, mask=BlockMask.block_causal(length, self.block_size),
            positions=index, cache=KVCache(prompt.kv, prompts), cache_end=prompts,
            lengths=batch["lengths"] - prompts,
        )  # fmt: skip
        back = jnp.arange(length) - prompts[:, None]
        answered = jnp.take_along_axis(answer.hidden, jnp.maximum(back, 0)[..., None], axis=1)
        return jnp.where((back >= 0)[..., None], answered, prompt.hidden)


def _check(config: Any, batch: dict[str, jax.Array]) -> None:
    adapter = getattr(config, "adapter", None)
    if config.attention != "bidirectional" or not config.has_mask:
        raise ValueError(
            "a bidirectional model with a mask token teaches here; this one is"
            f" {config.attention}, its mask_id={config.mask_id}"
        )
    if adapter is None or adapter.gated:
        raise ValueError(
            "the student is the model with an adapter that all tokens feel (AdapterConfig(gated="
            f"False)), the teacher the model without; this one's adapter is {adapter}"
        )
    if "segments" in batch or "given" in batch:
        raise ValueError("one text a row here, whose given tokens are its prompt")
