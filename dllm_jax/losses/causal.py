"""The autoregressive loss."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dllm_jax.losses.objective import Drawn, answers, check_packed
from dllm_jax.nn.head import cross_entropy_of
from dllm_jax.nn.transformer import forward
from dllm_jax.sharding import automatic, placed
from dllm_jax.typing import Key, Params
from pallas_kernels import BlockMask


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoregressive:
    """Each token from those before it: -sum log p(x[i + 1] | x[..i]) / tokens.

    The mask is causal whatever the model's own attention is, and outputs predict the next token.
    """

    def loss(
        self, model: Any, params: Params, batch: dict[str, jax.Array], key: Key
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The loss of a batch (`data.batches`), in nats per learnt token; `key` is not used.

        Returns:
          The loss, and the figures `accuracy` (NaN where nothing is learnt) and `tokens` (learnt
          ones).
        """

        def run(params: Params, batch: dict[str, jax.Array]):
            return self.score(model, params, self.draw(model, batch, key))

        return automatic(run, placed(), params, batch)

    def entries(self, batch: int, length: int) -> float:
        """Positions that a step computes, forward and backward."""
        return float(batch * length)

    def outputs(self, batch: int, length: int) -> float:
        """Those of them that the output head is applied to."""
        return float(batch * (length - 1))

    def draw(self, model: Any, batch: dict[str, jax.Array], key: Key) -> Drawn:
        """The batch and its number of learnt tokens."""
        return Drawn(batch, {"learnt": answers(batch).sum()})

    def score(
        self, model: Any, params: Params, drawn: Drawn
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The loss and the figures; of a part of a batch, what it adds to those of the whole."""
        batch, total = drawn.rows, drawn.totals["learnt"]
        tokens, learnt = batch["tokens"], answers(batch)
        packed = {"segments": batch["segments"]} if check_packed(model, batch) else {}
        out = forward(
            model, params, tokens, mask=BlockMask.causal(tokens.shape[1]),
            lengths=batch["lengths"], canvas=False, **packed,
        )  # fmt: skip
        nats, best = cross_entropy_of(model, params, out.hidden[:, :-1], tokens[:, 1:])
        right = ((best == tokens[:, 1:]) & learnt).sum() / total
        tokens = learnt.sum().astype(jnp.float32)
        loss = (nats * learnt).sum() / jnp.maximum(total, 1)
        return loss, {"accuracy": right, "tokens": tokens}
