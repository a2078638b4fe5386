"""What a program holds on one device, in closed form: bytes by role."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from dllm_jax.roofline.sizes import attentions, cache_bytes, parts, rows

_TILE = 512  # queries, and keys, in `pallas_kernels.block_attention`


def decode_memory(
    config: Any,
    layout: Mapping[str, int],
    *,
    batch: int,
    slots: int,
    entries: int,
    cache_dtype: str | None = None,
    kept: bool = True,
) -> dict[str, int]:
    """Of a pass over `entries` positions a row, behind a cache of `slots` a row.

    Args:
      kept: the keys and values of the entries are cached after it.
    """
    return {
        "weights": weights(config, layout),
        "cache": cache_bytes(config, layout, batch, slots, cache_dtype),
        "activations": activations(config, layout, batch, entries, kept=kept),
    }


def train_memory(
    config: Any, layout: Mapping[str, int], *, batch: int, length: int, accumulate: int = 1
) -> dict[str, int]:
    """Of a step of AdamW on the dual stream, each layer computed again in the backward pass.

    Moments and gradients are of the parameters' dtype; where there is an adapter, of the adapter
    alone. The inputs of every layer are saved, and the keys and values of the clean stream, which
    the backward pass reads in another layout, and has gradients of. What noisy entries make of them
    is computed in tiles of queries and keys. Over `fsdp`, the largest of what is gathered at once:
    a layer, or the vocabulary.
    """
    held = parts(config, layout)
    adapted = getattr(config, "adapter", None) is not None
    trained = sum(p.held * p.size for p in held if not adapted or p.path[0] == "adapter")
    batch = batch // accumulate
    tokens = rows(layout, batch) * length // layout.get("context", 1)
    item = jnp.dtype(config.dtype).itemsize
    streams = 1 if adapted else 2  # with a gradient: masks alone feel an adapter
    return {
        "weights": sum(p.held * p.size for p in held),
        "optimiser": 2 * trained,
        "gradients": trained * (streams + (accumulate > 1)),  # and the sum over parts
        "cache": (1 + streams) * cache_bytes(config, layout, batch, length),
        "saved": streams * tokens * config.dim * config.num_layers * item,
        "activations": activations(config, layout, batch, length, kept=False, gradient=True),
        "scores": scores(config, layout, batch, length),
        "gathered": gathered(config, layout),
    }


def scores(config: Any, layout: Mapping[str, int], batch: int, length: int) -> int:
    """Tiles of scores in the gradient of attention over a cache: one in float32, and one cast.

    The others of a tile's gradient are made and used within a product, as the compiled TPU program
    has it.
    """
    tile = min(length, _TILE)
    heads = max(k.heads for k in attentions(config, layout))
    return rows(layout, batch) * heads * tile * tile * (4 + jnp.dtype(config.dtype).itemsize)


def gathered(config: Any, layout: Mapping[str, int]) -> int:
    """The largest weights that are used as a whole and lie in pieces: of a layer, or one array."""
    if layout.get("fsdp", 1) == 1:
        return 0
    sizes: Counter[str] = Counter()
    for part in parts(config, layout):
        sizes[part.path[0]] += part.used * part.size // part.layers
    return max(sizes.values())


def weights(config: Any, layout: Mapping[str, int]) -> int:
    """Bytes of the parameters on one device."""
    return sum(part.held * part.size for part in parts(config, layout))


def activations(
    config: Any,
    layout: Mapping[str, int],
    batch: int,
    entries: int,
    *,
    kept: bool = True,
    gradient: bool = False,
) -> int:
    """What a pass has beside its arguments at its peak, which is within a layer.

    Hidden states, what the layer makes of them, and the entries' own keys and values of all layers,
    which are stacked before they are packed. Tokens of experts lie once for each expert that they
    chose, before and behind it. Over the `expert` axis a device has a piece of such pairs, about
    its share of them, the tokens of all rows of the axis, and in float32 what is made of them.

    Args:
      kept: the keys and values are cached after the pass.
      gradient: it is a backward pass, in which the tokens of experts lie there thrice.
    """
    item = jnp.dtype(config.dtype).itemsize
    tokens = rows(layout, batch) * entries // layout.get("context", 1)
    own = attentions(config, layout)
    fresh = sum(k.layers * k.kv_heads * 2 * k.size for k in own) if kept else 0
    heads = max((k.heads + 2 * k.kv_heads) * k.size for k in own)
    sizes, routed = config.sizes(), getattr(config, "moe", None) or config
    dense = (sizes.get("F", 0) + sizes.get("s", 0)) // layout.get("tensor", 1)
    chosen, expert = getattr(routed, "experts_per_token", 0), layout.get("expert", 1)
    mixed = chosen * (3 if gradient else 2) * config.dim
    if expert > 1:
        wide = 4 // item
        mixed = mixed * 5 // 4 + expert * config.dim * (2 + 2 * wide if gradient else 1 + wide)
    return tokens * (2 * fresh + 4 * config.dim + max(heads, 3 * dense, mixed)) * item
