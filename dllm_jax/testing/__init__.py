"""Tiny models for tests, ours and yours: real code, random weights, milliseconds."""

from typing import Any

import jax
import jax.numpy as jnp

from dllm_jax.nn.adapters import AdapterConfig
from dllm_jax.nn.transformer import Transformer, TransformerConfig
from dllm_jax.typing import Params


def tiny(
    *,
    vocab_size: int = 32,
    seed: int = 0,
    sharpness: float = 20.0,
    adapter: bool | AdapterConfig = True,
    **changes,
) -> tuple[Transformer, Params]:
    """A two-layer model with grouped heads and, by default, a gated adapter that has an effect.

    Args:
      sharpness: scales the head, so that greedy choices are not decided by rounding.
      changes: fields of `TransformerConfig` to replace.
    """
    fields: dict[str, Any] = dict(
        vocab_size=vocab_size, num_layers=2, dim=32, num_heads=4, num_kv_heads=2, head_dim=8,
        ffn_dim=48, max_length=512, tied_head=False, mask_id=vocab_size, eos_ids=(1,), pad_id=0,
        adapter=AdapterConfig(rank=4) if adapter is True else adapter or None,
    )  # fmt: skip
    config = TransformerConfig(**{**fields, **changes})
    model = Transformer(config)
    params: Any = model.init(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))["params"]
    if "head" in params:
        params["head"] = params["head"] * sharpness
    if config.adapter:
        params["adapter"] = _stir(jax.random.key(seed + 1), params["adapter"])
    return model, params


def _stir(key, adapter: Params) -> Params:
    """Random numbers in place of the zeros that a fresh adapter has."""
    leaves, tree = jax.tree.flatten(adapter)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        tree,
        [0.3 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)],
    )
