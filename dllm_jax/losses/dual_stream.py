"""The joint loss of a dual stream, clean and causal beside noisy blocks at random places.

    loss = ar_weight * CE(clean i -> token i + 1) + CE(noisy i -> token i + 1, hidden from it)

(frontier models train this jointly: TiDAR 2511.08923, Nemotron-Labs-Diffusion 2607.05722). The
clean pass runs once for all noisy blocks of a row, which read its keys and values as a decoder
reads its cache.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dllm_jax.cache import KVCache
from dllm_jax.corruption import MaskedBlocks, NoisyBlocks
from dllm_jax.losses.objective import Drawn, answers, by_level, learnable, level_figures
from dllm_jax.nn.head import cross_entropy_of
from dllm_jax.nn.transformer import Transformer, forward
from dllm_jax.sharding import automatic, placed
from dllm_jax.typing import Key, Params
from pallas_kernels import BlockMask


@dataclasses.dataclass(frozen=True, kw_only=True)
class DualStream:
    """The joint objective; static under jit.

    It is made for causal models with shifted outputs. Of a block-causal one a clean token sees its
    own block, in which a noisy block may begin: `Diffusion` trains those, in whole blocks.
    """

    noise: MaskedBlocks = MaskedBlocks()
    # An adapter that only masks feel cannot change the clean stream: 0 saves its logits.
    ar_weight: float = 0.0
    frozen_layers: int = 0  # layers without trainable parameters below the first that has some
    # 1: what the backward pass needs of both streams is kept from the forward pass. 2: the clean
    # pass is run again when the gradient of the noisy one is done, so that memory holds what one
    # of them needs at a time, beside the keys and values that join them.
    phases: int = 1

    def __post_init__(self):
        if self.phases not in (1, 2):
            raise ValueError(f"phases={self.phases} is neither 1 nor 2")

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
          check would pass. They are NaN where there are no such blocks. Also `level_0`, ..., the
          mean nats of noisy entries by noise level, and `tokens` (to be learnt), as of `Diffusion`.

        Raises:
          ValueError: the model is not causal, its outputs are not shifted, it has no mask token, or
            rows hold more than a prompt and its answer.
        """

        def run(params: Params, batch: dict[str, jax.Array], key: Key):
            return self.score(model, params, self.draw(model, batch, key))

        return automatic(run, placed(), params, batch, key)

    @staticmethod
    def trains(config: Any) -> bool:
        """Whether it is made for models of these settings: causal ones, with shifted outputs."""
        return (config.attention, config.alignment) == ("causal", "shifted")

    def entries(self, batch: int, length: int) -> float:
        """Positions that a step computes, forward and backward, of both streams."""
        return float(batch * (length + self.noise.blocks * self.noise.block_size))

    def outputs(self, batch: int, length: int) -> float:
        """Those of them that the output head is applied to; the clean text's with `ar_weight`."""
        clean = length - 1 if self.ar_weight else 0
        return float(batch * (clean + self.noise.blocks * self.noise.block_size))

    def draw(self, model: Transformer, batch: dict[str, jax.Array], key: Key) -> Drawn:
        """The noise of a batch, with the batch: what `score` takes, whole or in parts."""
        config = model.config
        tokens, lengths, mask_id = batch["tokens"], batch["lengths"], config.mask_id
        if mask_id is None:
            raise ValueError("the model has no mask token to train; set mask_id in its config")
        if not self.trains(config):
            raise ValueError(
                "the dual stream teaches causal models to predict the next token; this one is"
                f" {config.attention}, its outputs {config.alignment}: train it with Diffusion"
            )
        if "segments" in batch or "given" in batch:
            raise ValueError(
                "one text a row here, whose given tokens are its prompt: rows of several documents"
                " or with other given tokens are for Diffusion, with ar_weight=1.0 and a block_size"
            )
        noisy = self.noise.draw(key, tokens, lengths, batch["prompts"], mask_id)
        totals = {
            "learnt": jnp.maximum(noisy.weights.sum(), 1.0),
            "counted": self._counted(noisy).sum(axis=0),  # 0: the figure is NaN
            "levels": jnp.array([x.sum() for x in by_level(noisy.weights > 0, noisy.times)]),
        }
        if self.ar_weight:
            totals["scored"] = jnp.maximum(answers(batch).sum(), 1)
        return Drawn((batch, noisy), totals)

    def score(
        self, model: Transformer, params: Params, drawn: Drawn
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The loss and the figures; of a part of a batch, what it adds to those of the whole."""
        (batch, noisy), totals = drawn
        tokens, lengths = batch["tokens"], batch["lengths"]

        def clean_pass(params, tokens, lengths):
            return forward(model, params, tokens, lengths=lengths, canvas=False)

        if self.phases == 2:
            clean_pass = _run_again(clean_pass)
        clean = clean_pass(params, tokens, lengths)
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
        loss = diffusion = (nats * noisy.weights).sum() / totals["learnt"]
        levels = by_level(noisy.weights > 0, noisy.times)
        figures = {
            "diffusion": diffusion, **self._drafts(best, noisy, totals["counted"]),
            **level_figures(nats, levels, totals["levels"]),
            "tokens": learnable(batch).sum().astype(jnp.float32),
        }  # fmt: skip
        if self.ar_weight:
            nats, _ = cross_entropy_of(model, params, clean.hidden[:, :-1], tokens[:, 1:])
            ar = (nats * answers(batch)).sum() / totals["scored"]
            figures["ar"] = ar
            loss = loss + self.ar_weight * ar
        return loss, figures

    def _counted(self, noisy: NoisyBlocks) -> Bool[Array, "G T"]:
        """The entries of each block that its accuracy is measured on."""
        return ((noisy.weights > 0) & noisy.whole).reshape(-1, self.noise.block_size)

    def _drafts(self, best, noisy: NoisyBlocks, totals) -> dict[str, Array]:
        size, counted = self.noise.block_size, self._counted(noisy)
        right = (best == noisy.targets).reshape(-1, size)
        share = lambda hits: (hits & counted).sum(axis=0) / totals  # noqa: E731
        accuracy = share(right)
        passed = share(jnp.cumprod(right, axis=1).astype(bool))
        accepted = jnp.where(totals.any(), jnp.nansum(passed), jnp.nan)  # short answers end early
        return {**{f"accuracy_{j}": accuracy[j] for j in range(size)}, "accepted": accepted}


def _run_again(function: Callable) -> Callable:
    """The function, run a second time for its gradient, when the gradient of its result is there.

    `jax.checkpoint` leaves the compiler free to do that at once, and to hold what comes of it.
    """

    def forwards(*arguments):
        return function(*arguments), arguments

    def backwards(arguments, gradient):
        arguments, gradient = jax.lax.optimization_barrier((arguments, gradient))
        return jax.vjp(function, *arguments)[1](gradient)

    again = jax.custom_vjp(function)
    again.defvjp(forwards, backwards)
    return again
