"""Block attention against a cache, as a denoising pass calls it, and what else could do it."""

import dataclasses
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp

from dllm_jax.bench import rivals
from dllm_jax.bench.shapes import ATTENTION, Work, decode_work
from dllm_jax.bench.sides import Jax, Side, noise, passed_on, variants_for
from pallas_kernels import BlockMask, block_attention

_Layer = tuple[jax.Array, jax.Array, jax.Array]  # its cache, and the block's keys and values
_Pair = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode:
    """A block of `entries` in each of `batch` rows behind its cache, all of the block noisy."""

    model: str  # a key of `ATTENTION`
    entries: int
    slots: int
    batch: int
    ragged: bool = False  # rows hold from a quarter of the slots to all of them
    dtype: str = "bfloat16"

    kind = "block attention"

    @property
    def own(self):
        return ATTENTION[self.model]

    @property
    def shape(self) -> dict[str, Any]:
        return {
            "entries": self.entries, "slots": self.slots, "batch": self.batch,
            "ragged": self.ragged,
        }  # fmt: skip

    @property
    def ends(self) -> list[int]:
        """Valid slots of each row."""
        if not self.ragged:
            return [self.slots] * self.batch
        least, steps = self.slots // 4, max(self.batch - 1, 1)
        return [least + (self.slots - least) * row // steps for row in range(self.batch)]

    @property
    def work(self) -> Work:
        seen = self.ends
        if self.own.window:  # a block stands behind its context: of that, all see window - 1
            seen = [min(end, self.own.window - 1) for end in seen]
        item = jnp.dtype(self.dtype).itemsize
        return decode_work(self.own, self.entries, sum(seen), self.batch, item)

    @property
    def cache_bytes(self) -> int:
        """Of one layer."""
        item = jnp.dtype(self.dtype).itemsize
        return 2 * self.batch * self.own.kv_heads * self.slots * self.own.size * item

    @property
    def holds(self) -> int:
        """Bytes of all arguments, ours and a rival's."""
        return 2 * variants_for(self.cache_bytes) * self.cache_bytes

    @cached_property
    def _arrays(self) -> tuple[jax.Array, list[_Layer]]:
        """Queries, and several layers."""
        own, make = self.own, partial(noise, dtype=self.dtype)
        across = self.batch, self.entries
        layers: list[_Layer] = []
        for layer in range(variants_for(self.cache_bytes)):
            cache = make(layer, (self.batch, own.kv_heads, self.slots, 2 * own.size))
            k, v = (make(100 + 2 * layer + i, (*across, own.kv_heads, own.size)) for i in (0, 1))
            layers.append((cache, k, v))
        return make(99, (*across, own.heads, own.size)), layers

    def sides(self, implementations: tuple[str | None, ...]) -> dict[str, Callable[[], Side]]:
        found = {name or "ours": partial(self._ours, name) for name in implementations}
        return found | rivals.of_decode(self)

    def _ours(self, implementation: str | None) -> Side:
        mask, (q, layers) = BlockMask.block_diagonal(self.entries), self._arrays

        def run(q, cache, k, v, end):
            return block_attention(
                q, k, v, mask, cache=cache, cache_end=end, window=self.own.window,
                implementation=implementation,
            )  # fmt: skip

        end = jnp.asarray(self.ends, jnp.int32)
        variants = [(*layer, end) for layer in layers]
        return Jax(run, q, variants, lambda out: {"out": out}, passed_on)

    @cached_property
    def beside(self) -> tuple[jax.Array, list[_Pair], list[int]]:
        """What others are given: queries, keys and values [B, S, K, H], and each row's valid ones.

        The block's own keys lie behind the cached ones already, and a window is cut out: that an
        engine without such a cache has to move them is not counted.
        """
        q, layers = self._arrays
        keep = min(self.slots, self.own.window - 1) if self.own.window else self.slots
        ends = jnp.asarray(self.ends, jnp.int32)
        joined = jax.jit(partial(_joined, keep=keep))
        pairs: list[_Pair] = [joined(*layer, ends) for layer in layers]
        return q, pairs, [min(end, keep) + self.entries for end in self.ends]


def _joined(cache, k, v, ends, *, keep: int) -> _Pair:
    """Keys and values [B, keep + Q, K, H]: a row's last `keep` cached ones, and its own."""

    def row(cached, own, end):
        recent = jax.lax.dynamic_slice_in_dim(cached, jnp.maximum(end - keep, 0), keep, axis=1)
        room = jnp.pad(recent, ((0, 0), (0, own.shape[1]), (0, 0)))
        return jax.lax.dynamic_update_slice(room, own, (0, jnp.minimum(end, keep), 0))

    own = jnp.moveaxis(jnp.concatenate([k, v], axis=-1), 1, 2)
    whole = jnp.moveaxis(jax.vmap(row)(cache, own, ends), 2, 1)
    return whole[..., : k.shape[-1]], whole[..., k.shape[-1] :]
