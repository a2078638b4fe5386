"""Attention of whole sequences over themselves: prefill, and the two streams of training."""

import dataclasses
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp

from dllm_jax.bench import rivals
from dllm_jax.bench.shapes import ATTENTION, Work, training_work
from dllm_jax.bench.sides import Jax, Side, noise, passed_on
from pallas_kernels import BlockMask, block_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """`length` clean tokens, causal; or as many noisy ones besides, in blocks (BD3-LM's mask)."""

    model: str  # a key of `ATTENTION`
    length: int
    batch: int
    block: int = 0  # of the noisy stream; 0: there is none
    gradient: bool = False
    dtype: str = "bfloat16"

    @property
    def kind(self) -> str:
        return f"{'two streams' if self.block else 'causal'}{', gradient' if self.gradient else ''}"

    @property
    def own(self):
        return ATTENTION[self.model]

    @property
    def shape(self) -> dict[str, Any]:
        return {"length": self.length, "batch": self.batch, "block": self.block}

    @property
    def entries(self) -> int:
        return 2 * self.length if self.block else self.length

    @property
    def mask(self) -> BlockMask:
        if not self.block:
            return BlockMask.causal(self.length)
        return BlockMask.dual_stream(self.length, self.block, clean_block=self.block)

    @property
    def pairs(self) -> int:
        """Visible pairs of a row: a block sees the clean ones up to its own, noisy or clean."""
        if not self.block:
            return self.length * (self.length + 1) // 2
        return self.length * (self.length + self.block)

    @property
    def work(self) -> Work:
        item = jnp.dtype(self.dtype).itemsize
        return training_work(
            self.own, self.entries, self.pairs, self.batch, item, gradient=self.gradient
        )

    @property
    def holds(self) -> int:
        """Bytes of the arguments."""
        heads = 2 * self.own.heads + 2 * self.own.kv_heads
        item = jnp.dtype(self.dtype).itemsize
        return self.batch * self.entries * heads * self.own.size * item

    @cached_property
    def arrays(self) -> tuple[jax.Array, ...]:
        """Queries, keys, values [B, Q, ., H], and the output's cotangent."""
        own = self.own
        heads = own.heads, own.kv_heads, own.kv_heads, own.heads
        shape = self.batch, self.entries
        return tuple(noise(i, (*shape, n, own.size), dtype=self.dtype) for i, n in enumerate(heads))

    def sides(self, implementations: tuple[str | None, ...]) -> dict[str, Callable[[], Side]]:
        found = {name or "ours": partial(self._ours, name) for name in implementations}
        return found | rivals.of_training(self)

    def _ours(self, implementation: str | None) -> Side:
        return self.side(partial(block_attention, mask=self.mask, implementation=implementation))

    def side(self, attend: Callable[..., jax.Array], *constant: jax.Array) -> Side:
        """A side that attends so: of q, k, v [B, Q, ., H] and the constants."""
        q, k, v, out = self.arrays
        if not self.gradient:
            return Jax(attend, q, [(k, v, *constant)], lambda out: {"out": out}, passed_on)

        def run(q, k, v, out, *constant):
            return jax.vjp(lambda q, k, v: attend(q, k, v, *constant), q, k, v)[1](out)

        return Jax(
            run, q, [(k, v, out, *constant)], lambda found: dict(zip("qkv", found, strict=True)),
            lambda first, found: passed_on(first, found[0]),
        )  # fmt: skip
