"""Attention of many queries over the clean keys of their own pass, on a TPU: prefill and training.

The first part of the two-part form: queries of both streams, clean keys alone. What a noisy group
makes of itself is merged with it by the logarithms of the sums. A grid step is a tile of queries
and keys, for the query heads of one or a few kv heads; which tiles, `flash_steps` says.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.block_attention import flash_kernels, flash_steps
from pallas_kernels.block_attention.flash_kernels import (
    LANES,
    LOG2E,
    MOST_SMEM,
    MOST_VMEM,
    Spec,
)
from pallas_kernels.masks import BlockMask

_TILE = 512  # queries, and keys
_PART = 128  # of them in one softmax update
_HEADS = 8  # query heads of a step, about: a step costs time whatever it computes


def over_clean(
    q: Float[Array, "B Q N H"],
    k: Float[Array, "B C K H"],
    v: Float[Array, "B C K H"],
    mask: BlockMask,
    *,
    scale: float,
    lengths: Int[Array, "B"] | None = None,
    segments: Int[Array, "B Q"] | None = None,
    window: int = 0,
    soft_cap: float = 0.0,
    tile_q: int | None = None,
    tile_k: int | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "B Q N H"], Float32[Array, "B Q N"]]:
    """Attention of all Q entries over the clean ones. Its gradient is `over_clean_backward`.

    Args:
      q: queries of the clean entries, and then of the noisy ones.
      k, v: of the `mask.clean` = C clean entries.
      scale, soft_cap: of the scores, as in `pallas_kernels.block_attention`.
      lengths: clean entries of each row that are keys; all by default.
      segments: document of each entry, which sees the keys of its own alone. Clean entries of a
        document are side by side; a noisy one has that of the clean entry that it is made of.
      window: clean query i sees only keys behind i - window; a noisy one counts from the end of the
        clean keys that it sees without. 0: all.
      tile_q, tile_k: queries and keys of a grid step, multiples of 128 on a TPU; `None`: about 512.
      interpret: of `pallas_call`: True or `pltpu.InterpretParams` runs it without a TPU.

    Returns:
      The attention [B, Q, N, H] in the dtype of `q`, and the natural logarithm of each query's sum
      of exponentials, float32 [B, Q, N]. A query that sees nothing gets zeros, and -inf.

    Raises:
      ValueError: the call is not one that the kernel takes (`takes` says why).
    """
    spec, steps = _planned(
        q, k, mask, lengths=lengths, segments=segments, window=window, scale=scale,
        soft_cap=soft_cap, tile_q=tile_q, tile_k=tile_k, gradient=False,
    )  # fmt: skip
    out, lse = flash_kernels.forward(
        spec, steps, _scaled(spec, q), _packed(k, spec.tile_k), _packed(v, spec.tile_k), interpret
    )
    return _unpacked(out, spec.entries), _unpacked(lse[:, :, 0], spec.entries) / LOG2E


def over_clean_backward(
    q: Float[Array, "B Q N H"],
    k: Float[Array, "B C K H"],
    v: Float[Array, "B C K H"],
    out: Float[Array, "B Q N H"],
    lse: Float32[Array, "B Q N"],
    d_out: Float[Array, "B Q N H"],
    d_lse: Float32[Array, "B Q N"],
    mask: BlockMask,
    *,
    scale: float,
    lengths: Int[Array, "B"] | None = None,
    segments: Int[Array, "B Q"] | None = None,
    window: int = 0,
    soft_cap: float = 0.0,
    tile_q: int | None = None,
    tile_k: int | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "B Q N H"], Float[Array, "B C K H"], Float[Array, "B C K H"]]:
    """Gradients of `over_clean` in `q`, `k` and `v`, in their dtypes; summed in float32.

    Args:
      out, lse: what `over_clean` returned for the other arguments.
      d_out, d_lse: gradients in them. `d_lse` of a query that sees nothing does not count.

    Raises:
      ValueError: the call is not one that the kernel takes (`takes` with `gradient` says why).
    """
    spec, steps = _planned(
        q, k, mask, lengths=lengths, segments=segments, window=window, scale=scale,
        soft_cap=soft_cap, tile_q=tile_q, tile_k=tile_k, gradient=True,
    )  # fmt: skip
    common = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(axis=3) - d_lse
    seen = lse > -jnp.inf
    sums = jnp.stack([jnp.where(seen, lse * LOG2E, 0), jnp.where(seen, common, 0)], axis=3)
    sums = jnp.swapaxes(_packed(sums, spec.tile_q), 2, 3)
    dq, dk, dv = flash_kernels.backward(
        spec, steps, _scaled(spec, q), _packed(k, spec.tile_k), _packed(v, spec.tile_k),
        _packed(d_out.astype(q.dtype), spec.tile_q), sums, interpret,
    )  # fmt: skip
    dk = dk * (spec.scale / spec.pre_scale)  # queries were scaled
    return (
        _unpacked(dq, spec.entries),
        _unpacked(dk, spec.keys).astype(k.dtype),
        _unpacked(dv, spec.keys).astype(v.dtype),
    )


def takes(q, k, mask: BlockMask, *, gradient=False, tile_q=None, tile_k=None) -> str | None:
    """Why the kernel cannot run a call, in a line, or None if it can.

    Args:
      q, k, mask, tile_q, tile_k: of the call; arrays, or their `jax.ShapeDtypeStruct`.
      gradient: whether it is `over_clean_backward` that is called.
    """
    size = q.shape[3]
    if not mask.clean:
        return "there are no clean entries"
    if q.dtype.name not in ("float32", "bfloat16") or q.dtype != k.dtype:
        return (
            f"queries and keys must both be float32 or both bfloat16, not {q.dtype} and {k.dtype}"
        )
    if size % 64:
        return f"head size {size} is not a multiple of 64"
    spec = _largest(q, k, mask, tile_q, tile_k, gradient)
    if spec.vmem(gradient) > MOST_VMEM:
        return f"it needs {spec.vmem(gradient)} bytes of vector memory, more than {MOST_VMEM}"
    lists = 4 * spec.steps * (2 * q.shape[0] + 1)
    if lists > MOST_SMEM:
        return f"its steps may need {lists} bytes of scalar memory, more than {MOST_SMEM}"
    return None


def _planned(q, k, mask: BlockMask, *, lengths, segments, window, scale, soft_cap, tile_q, tile_k,
             gradient: bool) -> tuple[Spec, flash_steps.Steps]:  # fmt: skip
    """What is static in a call, and its steps."""
    reason = takes(q, k, mask, gradient=gradient, tile_q=tile_q, tile_k=tile_k)
    if reason is not None:
        raise ValueError(f"the TPU kernel of attention over clean keys cannot run this: {reason}")
    low = bool(window) or segments is not None
    spec = _largest(q, k, mask, tile_q, tile_k, gradient)
    spec = spec._replace(low=low, scale=scale, soft_cap=soft_cap)
    steps = flash_steps.steps(
        mask, spec.entries, spec.tile_q, spec.tile_k, spec.part,
        lengths=lengths, segments=segments, window=window,
    )  # fmt: skip
    return spec, steps


def _largest(q, k, mask: BlockMask, tile_q, tile_k, gradient: bool) -> Spec:
    """The largest step whose vector memory suffices, or the smallest."""
    cuts = list(_cuts(q, k, mask, tile_q, tile_k))
    return next((x for x in cuts if x.vmem(gradient) <= MOST_VMEM), cuts[-1])


def _cuts(q, k, mask: BlockMask, tile_q, tile_k) -> Iterator[Spec]:
    """Steps that could be, the largest first."""
    entries, heads, size = q.shape[1:]
    kv_heads = k.shape[2]
    group = heads // kv_heads
    together = [n for n in range(kv_heads, 1, -1) if not kv_heads % n and n * group <= _HEADS]
    for most in (_TILE, _TILE // 2):
        rows, slots = tile_q or _even(entries, most), tile_k or _even(mask.clean, most)
        for buffers, kv in itertools.product((2, 1), (*together, 1)):
            yield Spec(
                entries=entries, keys=mask.clean, group=group, kv=kv, size=size, tile_q=rows,
                tile_k=slots, part=slots if slots % _PART else _PART, item=q.dtype.itemsize,
                buffers=buffers,
            )  # fmt: skip


def _even(length: int, most: int) -> int:
    """A tile of whole lanes and at most `most`: the fewest tiles of a length, as full as can be."""
    count = -(-length // most)
    return -(-length // (count * LANES)) * LANES


def _scaled(spec: Spec, q) -> jax.Array:
    return _packed((q.astype(jnp.float32) * spec.pre_scale).astype(q.dtype), spec.tile_q)


def _packed(x, tile: int) -> jax.Array:
    """[B, L, N, H] as [B, N, Lp, H], in whole tiles."""
    return jnp.pad(jnp.moveaxis(x, 1, 2), ((0, 0), (0, 0), (0, -x.shape[1] % tile), (0, 0)))


def _unpacked(x, length: int) -> jax.Array:
    """[B, N, Lp, ...] as [B, L, N, ...]."""
    return jnp.moveaxis(x[:, :, :length], 2, 1)
