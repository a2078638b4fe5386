"""What training minimises: the joint loss of a dual stream, clean and causal beside noisy blocks.

    loss = ar_weight * CE(clean i -> token i + 1) + CE(noisy i -> token i + 1, hidden from it)

(frontier models train this jointly: TiDAR 2511.08923, Nemotron-Labs-Diffusion 2607.05722). The
clean pass runs once for all noisy blocks of a row, which read its keys and values as a decoder
reads its cache.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.cache import KVCache
from dllm_jax.corruption import MaskedBlocks
from dllm_jax.nn.head import cross_entropy_of
from dllm_jax.nn.transformer import Transformer, forward
from dllm_jax.sharding import automatic, placed
from dllm_jax.typing import Key, Params
from pallas_kernels import BlockMask


@dataclasses.dataclass(frozen=True, kw_only=True)
class DualStream:
    """The joint objective; static under jit."""

    noise: MaskedBlocks = MaskedBlocks()
    # An adapter that only masks feel cannot change the clean stream: 0 saves its logits.
    ar_weight: float = 0.0
    frozen_layers: int = 0  # layers without trainable parameters below the first that has some

    def loss(
        self,
        model: Transformer,
        params: Params,
        batch: dict[str, jax.Array],
        key: Key,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The loss of a batch (`data.batches`), and figures about it.

        Returns:
          The loss in nats per learnt token, and a dict of scalars: `diffusion` (its noisy part),
          `ar` (when weighted), and for the blocks that are all masks `accuracy_0`, `accuracy_1`,
          ... by place in the block, and `accepted`, the expected number of drafts that a greedy
          check would pass.
        """
        if model.config.mask_id is None:
            raise ValueError("the model has no mask token to train; set mask_id in its config")
        run = partial(self._loss, model, model.config.mask_id)
        return automatic(run, placed(), params, batch, key)

    def _loss(self, model: Transformer, mask_id: int, params: Params, batch, key: Key):
        tokens, lengths = batch["tokens"], batch["lengths"]
        clean = forward(model, params, tokens, lengths=lengths, canvas=False)
        noisy = self.noise.draw(key, tokens, lengths, batch["prompts"], mask_id)
        out = forward(
            model,
            params,
            noisy.tokens,
            mask=BlockMask.block_diagonal(self.noise.block_size),
            positions=noisy.positions,
            cache=KVCache(clean.kv, lengths),
            cache_end=noisy.prefix,
            frozen_layers=self.frozen_layers,
        )
        nats, best = cross_entropy_of(model, params, out.hidden, noisy.targets)
        total = jnp.maximum(noisy.weights.sum(), 1.0)
        loss = diffusion = (nats * noisy.weights).sum() / total
        figures = {"diffusion": diffusion, **self._drafts(best, noisy)}
        if self.ar_weight:
            scored = jnp.arange(tokens.shape[1] - 1)
            weights = (scored + 1 >= batch["prompts"][:, None]) & (scored + 1 < lengths[:, None])
            nats, _ = cross_entropy_of(model, params, clean.hidden[:, :-1], tokens[:, 1:])
            ar = (nats * weights).sum() / jnp.maximum(weights.sum(), 1)
            figures["ar"] = ar
            loss = loss + self.ar_weight * ar
        return loss, figures

    def _drafts(self, best, noisy) -> dict[str, Array]:
        size = self.noise.block_size
        right = (best == noisy.targets).reshape(-1, size)
        counted = ((noisy.weights > 0) & noisy.whole).reshape(-1, size)
        share = lambda hits: (hits & counted).sum(axis=0) / jnp.maximum(counted.sum(axis=0), 1)  # noqa: E731
        accuracy = share(right)
        accepted = share(jnp.cumprod(right, axis=1).astype(bool)).sum()
        return {**{f"accuracy_{j}": accuracy[j] for j in range(size)}, "accepted": accepted}


def cross_entropy(logits: Float[Array, "*B V"], targets: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """Nats of each target under softmax(logits), float32."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def subs_loss(
    logits: Float[Array, "B L V"],
    targets: Int[Array, "B L"],
    masked: Bool[Array, "B L"],
    t: Float[Array, "B L"],
    mask_id: int,
) -> Float[Array, ""]:
    """The bound of masked diffusion under the linear schedule, in nats per token.

        sum(CE * masked / t) / (B * L)

    (Sahoo et al. 2024, arXiv 2406.07524, equation 11; by blocks: Arriola et al. 2025, arXiv
    2503.09573, equation 8). The mask token is never predicted, and written tokens count nothing.

    Args:
      logits: where the noisy text was read.
      targets: the clean text.
      masked: where the noisy text has masks.
      t: the probability, in (0, 1], with which each position was masked: its block's time.
    """
    barred = jnp.where(jnp.arange(logits.shape[-1]) == mask_id, -jnp.inf, logits)
    return jnp.where(masked, cross_entropy(barred, targets) / t, 0.0).sum() / targets.size
