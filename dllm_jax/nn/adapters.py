"""Low-rank adapters (LoRA, Hu et al. 2021), on mask tokens only (gated as in I-DLM's R-ISD) or all.

A projection x @ W becomes x @ W + gate * (x @ A) @ B / sqrt(rank) * alpha, where the gate is one
at a mask token and zero elsewhere: tokens that are not masks are processed by the base weights
alone, bit for bit. The mask token has an embedding of its own, so its id may lie outside the base
model's vocabulary. Without a gate every token passes the adapter, and the vocabulary is the base's.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dllm_jax.ops.product import product
from dllm_jax.typing import Key, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Size and place of an adapter."""

    rank: int
    alpha: float = 1.0  # scale: alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023)
    # Layers before this one have none (zeros), and are not differentiated: the mask embedding,
    # which enters below them, then stays as it is.
    first_layer: int = 0
    gated: bool = True  # acts on mask tokens only, and has their embedding

    def __post_init__(self):
        if self.rank < 1 or self.first_layer < 0:
            raise ValueError(f"an adapter needs rank >= 1 and first_layer >= 0, got {self}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank**0.5


def low_rank(
    x: jax.Array,  # [B, Q, I]
    pair: Params | None,  # {"in": [I, R], "out": [R, ...]}
    gate: jax.Array | None,  # bool[B, Q]; None: open
    scale: float,
) -> jax.Array | float:
    """The adapter's share of a projection, zero where the gate is shut; 0.0 without an adapter."""
    if pair is None:
        return 0.0
    inner = product(x, pair["in"].astype(x.dtype))
    delta = product(inner, pair["out"].astype(x.dtype)) * scale
    if gate is None:
        return delta
    return jnp.where(gate.reshape(gate.shape + (1,) * (delta.ndim - 2)), delta, 0)


def merged(params: Params, config: AdapterConfig) -> Params:
    """The parameters with an adapter for every token in the weights: W + scale * A B, in float32.

    Raises:
      ValueError: the adapter is gated, and so no change of the weights.
    """
    if config.gated:
        raise ValueError(
            "mask tokens alone feel this adapter: it cannot be merged into the weights"
        )
    layers = {name: dict(part) for name, part in params["layers"].items()}
    for name, pair in params["adapter"].items():
        part = layers["attention" if name in layers["attention"] else "mlp"]
        weight = part[name]
        out = pair["out"].reshape(*pair["out"].shape[:2], -1).astype(jnp.float32)
        change = jnp.einsum("lir,lro->lio", pair["in"].astype(jnp.float32), out) * config.scale
        wide = weight.astype(jnp.float32) + change.reshape(weight.shape)
        part[name] = wide.astype(weight.dtype)
    return {**{k: v for k, v in params.items() if k != "adapter"}, "layers": layers}


def init_adapter(key: Key, shapes: Params, config: AdapterConfig, params: Params) -> Params:
    """A fresh adapter: `out` is zero, the mask embedding (if any) is the mean of the vocabulary's.

    Args:
      shapes: `param_shapes(config)["adapter"]`.
      params: the base parameters, for the mean embedding.
    """
    leaves, tree = jax.tree.flatten_with_path(shapes)
    keys = jax.random.split(key, len(leaves))
    values = []
    for leaf_key, (path, leaf) in zip(keys, leaves, strict=True):
        if path[-1].key == "mask_embedding":
            value = params["embed"].astype(jnp.float32).mean(axis=0)
        elif path[-1].key == "in":
            value = jax.random.normal(leaf_key, leaf.shape) / leaf.shape[1] ** 0.5
            value = value.at[: config.first_layer].set(0.0)
        else:
            value = jnp.zeros(leaf.shape)
        values.append(value.astype(leaf.dtype))
    return jax.tree.unflatten(tree, values)
