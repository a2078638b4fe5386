"""The output projection: the vocabulary's scores, or (mostly) only what is asked of them."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dllm_jax.typing import Params
from pallas_kernels import CrossEntropy, TokenStats, cross_entropy, scores_at, token_stats


class Head(NamedTuple):
    """What every architecture says of its own: scores = cap(hidden @ vectors.T + bias)."""

    vectors: jax.Array  # [V, D]: of each token; a tied head's are the embedding
    bias: jax.Array | None = None  # [V]
    soft_cap: float = 0.0  # c in c * tanh(score / c); 0: none


def head_of(model: nn.Module, params: Params) -> Head:
    """The head of any of our modules."""
    head = model.apply({"params": params}, method="head")
    assert isinstance(head, Head)
    return head


def logits_of(
    model: nn.Module, params: Params, hidden: Float[Array, "*B D"]
) -> Float[Array, "*B V"]:
    """All of the vocabulary's scores, float32. Where numbers about them will do: `stats_of`."""
    head = head_of(model, params)
    scores = jnp.einsum(
        "...d,vd->...v", hidden, head.vectors.astype(hidden.dtype),
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    if head.bias is not None:
        scores = scores + head.bias.astype(jnp.float32)
    return head.soft_cap * jnp.tanh(scores / head.soft_cap) if head.soft_cap else scores


def stats_of(
    model: nn.Module, params: Params, hidden: Float[Array, "*B D"], **options: Any
) -> TokenStats:
    """`pallas_kernels.token_stats` of hidden states; its arrays have their leading axes.

    Args:
      options: `scale`, `temperature` and `active` [*B], `keys` [*B, 2], and the others of
        `token_stats`.
    """
    lead, head = hidden.shape[:-1], head_of(model, params)
    for name in ("scale", "temperature", "active", "keys"):
        if options.get(name) is not None and options[name].ndim:
            options[name] = options[name].reshape(-1, *options[name].shape[len(lead) :])
    found = token_stats(
        hidden.reshape(-1, hidden.shape[-1]), head.vectors, bias=head.bias, soft_cap=head.soft_cap,
        **options,
    )  # fmt: skip
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), found)


def scores_of(
    model: nn.Module,
    params: Params,
    hidden: Float[Array, "*B D"],
    ids: Int[Array, "*B"] | int,
    scale: Float[Array, "*B"] | None = None,
) -> Float[Array, "*B"]:
    """The score of one token at each position."""
    head = head_of(model, params)
    found = scores_at(
        hidden.reshape(-1, hidden.shape[-1]),
        head.vectors,
        jnp.broadcast_to(ids, hidden.shape[:-1]).reshape(-1, 1),
        bias=head.bias,
        scale=None if scale is None else scale.reshape(-1),
        soft_cap=head.soft_cap,
    )
    return found.reshape(hidden.shape[:-1])


def cross_entropy_of(
    model: nn.Module,
    params: Params,
    hidden: Float[Array, "*B D"],
    targets: Int[Array, "*B"],
    forbidden: tuple[int, ...] = (),
) -> CrossEntropy:
    """`pallas_kernels.cross_entropy` of hidden states; its arrays have their leading axes."""
    head = head_of(model, params)
    found = cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]), head.vectors, targets.reshape(-1), bias=head.bias,
        soft_cap=head.soft_cap, forbidden=forbidden,
    )  # fmt: skip
    return jax.tree.map(lambda x: x.reshape(targets.shape), found)


def mask_in_vocabulary(config: Any) -> tuple[int, ...]:
    """The mask token's id, where the head has a score for it: never to be written."""
    mask_id = config.mask_id
    return () if mask_id is None or not 0 <= mask_id < config.vocab_size else (mask_id,)
