"""What a program holds on one device, in closed form: bytes by role."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from dllm_jax.roofline.sizes import attentions, cache_bytes, parts, rows


def decode_memory(
    config: Any,
    layout: Mapping[str, int],
    *,
    batch: int,
    slots: int,
    entries: int,
    cache_dtype: str | None = None,
) -> dict[str, int]:
    """Of a pass over `entries` positions a row, behind a cache of `slots` a row."""
    return {
        "weights": weights(config, layout),
        "cache": cache_bytes(config, layout, batch, slots, cache_dtype),
        "activations": activations(config, layout, batch, entries),
    }


def prefill_memory(
    config: Any, layout: Mapping[str, int], *, batch: int, slots: int, entries: int
) -> dict[str, int]:
    """Of a pass over a prompt of `entries` tokens a row, which fills a cache of `slots`."""
    return decode_memory(config, layout, batch=batch, slots=slots, entries=entries)


def train_memory(
    config: Any, layout: Mapping[str, int], *, batch: int, length: int
) -> dict[str, int]:
    """Of a step of AdamW on the dual stream, each layer computed again in the backward pass.

    Moments and gradients are of the parameters' dtype; the inputs of every layer are saved, and
    the keys and values of the clean stream.
    """
    held = weights(config, layout)
    row = rows(layout, batch)
    item = jnp.dtype(config.dtype).itemsize
    saved = 2 * row * length // layout.get("context", 1) * config.dim * config.num_layers * item
    return {
        "weights": held,
        "optimiser": 2 * held,
        "gradients": held,
        "cache": cache_bytes(config, layout, batch, length),
        "saved": saved,
        "activations": activations(config, layout, batch, length),
    }


def weights(config: Any, layout: Mapping[str, int]) -> int:
    """Bytes of the parameters on one device."""
    return sum(part.held * part.size for part in parts(config, layout))


def activations(config: Any, layout: Mapping[str, int], batch: int, entries: int) -> int:
    """What a pass has beside its arguments at its peak, which is within a layer.

    Hidden states, the layer's feed-forward states, and the entries' own keys and values of all
    layers, which are stacked before they are packed.
    """
    item = jnp.dtype(config.dtype).itemsize
    tokens = rows(layout, batch) * entries // layout.get("context", 1)
    own = attentions(config, layout)
    fresh = sum(k.layers * k.kv_heads * 2 * k.size for k in own)
    heads = max((k.heads + 2 * k.kv_heads) * k.size for k in own)
    inner = 3 * inner_width(config, layout)
    return tokens * (2 * fresh + 4 * config.dim + max(heads, inner)) * item


def inner_width(config: Any, layout: Mapping[str, int]) -> int:
    """Feed-forward width of a layer for one token on one device: dense, shared, of its experts."""
    sizes = config.sizes()
    routed = getattr(config, "moe", None) or config
    experts = getattr(routed, "experts_per_token", 0) * sizes.get("f", 0)
    return (sizes.get("F", 0) + sizes.get("s", 0) + experts) // layout.get("tensor", 1)
