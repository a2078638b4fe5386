"""The output projection: the vocabulary's scores, or (mostly) only what is asked of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dllm_jax.sharding import automatic, axis_sizes, constrain, mapped, placed, spec, split
from dllm_jax.typing import Params
from pallas_kernels import CrossEntropy, TokenStats, cross_entropy, scores_at, token_stats

_ROWS = ("batch", "length")  # logical names of the leading axes of hidden states
_AT_ONCE = 256  # hidden states whose scores over the vocabulary are held at a time


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
    names = *_ROWS[: hidden.ndim - 1], *[None] * (hidden.ndim - 3), "vocab"

    def run(params, hidden):
        head = head_of(model, params)
        scores = jnp.einsum(
            "...d,vd->...v", hidden, head.vectors.astype(hidden.dtype),
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        if head.bias is not None:
            scores = scores + head.bias.astype(jnp.float32)
        scores = constrain(scores, *names)
        return head.soft_cap * jnp.tanh(scores / head.soft_cap) if head.soft_cap else scores

    return automatic(run, placed(*names), params, hidden)


def stats_of(
    model: nn.Module, params: Params, hidden: Float[Array, "*B D"], **options: Any
) -> TokenStats:
    """`pallas_kernels.token_stats` of hidden states; its arrays have their leading axes.

    Args:
      options: `scale`, `temperature` and `active` [*B], `keys` [*B, 2], and the others of
        `token_stats`.
    """
    names = ("scale", "temperature", "active", "keys")
    arrays = {name: options.pop(name) for name in names if options.get(name) is not None}

    def run(head: Head, arrays, axis_name) -> TokenStats:
        return token_stats(
            vocabulary=head.vectors, bias=head.bias, soft_cap=head.soft_cap, axis_name=axis_name,
            **arrays, **options,
        )  # fmt: skip

    return _by_rows(run, model, params, hidden=hidden, **arrays)


def scores_of(
    model: nn.Module,
    params: Params,
    hidden: Float[Array, "*B D"],
    ids: Int[Array, "*B"] | int,
    scale: Float[Array, "*B"] | None = None,
) -> Float[Array, "*B"]:
    """The score of one token at each position."""
    arrays = {"ids": jnp.broadcast_to(ids, hidden.shape[:-1])}
    if scale is not None:
        arrays["scale"] = scale

    def run(head: Head, arrays, axis_name) -> jax.Array:
        return scores_at(
            arrays["hidden"], head.vectors, arrays["ids"][:, None], bias=head.bias,
            scale=arrays.get("scale"), soft_cap=head.soft_cap, axis_name=axis_name,
        )[:, 0]  # fmt: skip

    return _by_rows(run, model, params, hidden=hidden, **arrays)


def cross_entropy_of(
    model: nn.Module,
    params: Params,
    hidden: Float[Array, "*B D"],
    targets: Int[Array, "*B"],
    forbidden: tuple[int, ...] = (),
) -> CrossEntropy:
    """`pallas_kernels.cross_entropy` of hidden states; its arrays have their leading axes."""

    def run(head: Head, arrays, axis_name) -> CrossEntropy:
        return cross_entropy(
            arrays["hidden"], head.vectors, arrays["targets"], bias=head.bias,
            soft_cap=head.soft_cap, forbidden=forbidden, axis_name=axis_name,
        )  # fmt: skip

    return _by_rows(run, model, params, hidden=hidden, targets=targets)


def over_vocabulary(
    model: Any,
    params: Params,
    score: Callable[..., Any],
    hidden: Float[Array, "*B D"],
    *entries: jax.Array,
) -> Any:
    """`score(logits, *entry)` for each hidden state and its entries, [*B, ...].

    `logits` float32[V] have the mask token at minus infinity. They exist for a few hidden states at
    a time, in a gradient too.
    """
    lead = hidden.ndim - 1

    @jax.checkpoint
    def one(xs):
        logits = without_mask(logits_of(model, params, xs[0]), model.config.mask_id)
        return score(logits, *xs[1:])

    flat = tuple(x.reshape(-1, *x.shape[lead:]) for x in (hidden, *entries))
    found = jax.lax.map(one, flat, batch_size=_AT_ONCE)
    return jax.tree.map(lambda x: x.reshape(*hidden.shape[:-1], *x.shape[1:]), found)


def without_mask(logits: jax.Array, mask_id: int | None) -> jax.Array:
    """The scores with those of a mask token inside the vocabulary at minus infinity."""
    if mask_id is None or not 0 <= mask_id < logits.shape[-1]:
        return logits
    return logits.at[..., mask_id].set(-jnp.inf)


def _by_rows(run: Callable[..., Any], model: nn.Module, params: Params, **arrays: jax.Array) -> Any:
    """`run(head, arrays, axis_name)` of flat rows; its results have the leading axes of `hidden`.

    On a mesh, each device has rows of its own, and, over the axis "tensor", tokens of its own:
    `axis_name` then says so.

    Args:
      arrays: `hidden` [*B, D], and others [*B, ...], or scalars.
    """
    lead = arrays["hidden"].ndim - 1

    def flat(head: Head, arrays, axis_name):
        shape = arrays["hidden"].shape[:-1]
        rows = {name: x.reshape(-1, *x.shape[lead:]) if x.ndim else x for name, x in arrays.items()}
        found = run(head, rows, axis_name)
        return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), found)

    def whole(params, arrays):
        head = head_of(model, params)
        if not axis_sizes():
            return flat(head, arrays, None)
        by = split("vocab", len(head.vectors))
        shape = arrays["hidden"].shape[:-1]
        rows = spec(*(split(name, n) for name, n in zip(_ROWS, shape, strict=False)))
        specs = {name: rows if x.ndim else spec() for name, x in arrays.items()}

        def own(vectors, bias, arrays):
            return flat(Head(vectors, bias, head.soft_cap), arrays, by[0] if by else None)

        return mapped(own, (spec(by), spec(by), specs), rows)(head.vectors, head.bias, arrays)

    return automatic(whole, placed(*_ROWS[:lead]), params, arrays)


def mask_in_vocabulary(config: Any) -> tuple[int, ...]:
    """The mask token's id, where the head has a score for it: never to be written."""
    mask_id = config.mask_id
    return () if mask_id is None or not 0 <= mask_id < config.vocab_size else (mask_id,)
