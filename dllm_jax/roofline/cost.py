"""The work of a pass on one device, and the least time that it takes there.

    work = forward_work(config, layout, decode_pass(batch=8, entries=32, context=4096))
    time = time_of(work, CHIPS["v5e"])

Whatever a mesh axis does not divide is done whole by each of its devices. A layout is the size of
each mesh axis: data, fsdp, expert, context, tensor.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from dllm_jax.roofline.chips import Chip
from dllm_jax.roofline.sizes import attentions, parts, rows, touched


class Work(NamedTuple):
    """What one device does."""

    flops: float
    bytes: float  # between its memory and its cores, the least
    sent: float  # bytes, to other devices

    def __add__(self, other: Any) -> "Work":
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, flops: float, read: float, sent: float) -> "Work":
        """So many times the FLOPs, the bytes and what is sent."""
        return Work(flops * self.flops, read * self.bytes, sent * self.sent)


class Pass(NamedTuple):
    """The entries of a forward pass."""

    batch: int  # rows
    entries: int  # of a row
    context: float  # cached keys that each entry sees, on average
    pairs: float  # of entries of a row that see each other
    scored: int  # entries of a row that the vocabulary is asked about


class Time(NamedTuple):
    """Seconds at the chip's peaks; they overlap, so the largest is the least that a pass takes."""

    compute: float
    memory: float
    network: float

    @property
    def least(self) -> float:
        return max(self)

    @property
    def bound(self) -> str:
        """By what: "compute", "memory" or "network"."""
        return self._fields[self.index(max(self))]


def time_of(work: Work, chip: Chip, *, int8: bool = False) -> Time:
    """The roofline: each part of the work at its ceiling."""
    peak = chip.int8 if int8 else chip.bf16
    return Time(work.flops / peak, work.bytes / chip.bandwidth, work.sent / chip.network)


def decode_pass(*, batch: int, entries: int, context: int) -> Pass:
    """A block, or drafts, of `entries` positions a row behind so many cached tokens."""
    return Pass(batch, entries, context, entries * entries, entries)


def prefill_pass(config: Any, *, batch: int, prompt: int, riding: int) -> Pass:
    """A prompt, and the canvas that rides on its pass."""
    seen = {"causal": prompt / 2, "block_causal": (prompt + config_block(config)) / 2}
    pairs = prompt * seen.get(config.attention, prompt) + riding * (prompt + riding)
    return Pass(batch, prompt + riding, 0, pairs, riding)


def train_work(
    config: Any,
    layout: Mapping[str, int],
    *,
    batch: int,
    length: int,
    block: int,
    accumulate: int = 1,
) -> Work:
    """A step on the dual stream: `length` clean and as many noisy entries a row.

    Each layer runs forward twice, as it is computed again, and backward once, at twice the price.
    Gradients, parameters and the moments of AdamW are read and written, weights gathered for the
    three passes of each stream, and gradients summed over the devices that share them; weights and
    gradients for each part of the batch anew. Where there is an adapter it alone is trained: the
    clean stream runs forward once, and the backward pass of the noisy one costs as much again.
    """
    part = batch // accumulate
    clean = Pass(part, length, 0, length * length / 2, 0)
    noisy = Pass(part, length, length / 2, length * block, length)
    total = Work(0.0, 0.0, 0.0)
    adapted = getattr(config, "adapter", None) is not None
    clean_costs, noisy_costs = ((1, 1, 1), (3, 3, 3)) if adapted else ((4, 3, 3), (4, 3, 3))
    for stream, costs in (clean, clean_costs), (noisy, noisy_costs):
        total += forward_work(config, layout, stream).times(*map(float, costs))
    trained = [p for p in parts(config, layout) if not adapted or p.path[0] == "adapter"]
    held = sum(p.held for p in trained)
    item = jnp.dtype(config.param_dtype).itemsize
    used = sum(p.used for p in trained) * item
    summed = used * _ring(layout.get("fsdp", 1)) + 2 * held * item * _ring(layout.get("data", 1))
    total += Work(0.0, 0.0, summed)
    every = float(accumulate)
    return total.times(every, every, every) + Work(12 * held, 7 * held * item, 0.0)


def forward_work(
    config: Any, layout: Mapping[str, int], own: Pass, *, cache_dtype: str | None = None
) -> Work:
    """A forward pass on one device, behind a cache of activations' dtype or another."""
    tensor, expert, fsdp = (layout.get(axis, 1) for axis in ("tensor", "expert", "fsdp"))
    row = rows(layout, own.batch)
    item = jnp.dtype(config.dtype).itemsize
    tokens = row * own.entries / layout.get("context", 1)
    share = touched(config, 1)
    chosen = touched(config, round(tokens * expert))
    flops = read = gathered = 0.0
    tied = "head" not in config.tree()
    for part in parts(config, layout):
        looked_up = part.path[0] == "embed"
        is_head = part.path[0] == "head" or (looked_up and tied)
        if is_head:
            multiplied = row * own.scored
        else:
            multiplied = tokens * (share * expert if part.is_expert else 1)
        if part.dims > 1 and (is_head or not looked_up):
            flops += 2 * part.used * multiplied
            read += part.used * part.size * (chosen if part.is_expert else 1)
        gathered += part.used * min(part.size, item)  # cast before they travel
    cached = 0.0
    for kind in attentions(config, layout):
        context = min(own.context, kind.window) if kind.window else own.context
        pairs = own.pairs if not kind.window else min(own.pairs, own.entries * kind.window)
        seen = own.entries * context + pairs
        flops += 4 * row * kind.layers * kind.heads * kind.size * seen / layout.get("context", 1)
        stored = jnp.dtype(cache_dtype or config.dtype).itemsize
        cached += row * context * kind.layers * kind.kv_heads * 2 * kind.size * stored
    hidden = tokens * config.dim * item
    moved = read + cached + 12 * config.num_layers * hidden  # in and out of each part of a layer
    sent = gathered * _ring(fsdp)
    sent += (2 * config.num_layers + 1) * 2 * hidden * _ring(tensor)
    if expert > 1:
        sent += 2 * config.num_layers * hidden * expert * _ring(expert)
    if layout.get("context", 1) > 1:
        keys = sum(k.layers * k.kv_heads * 2 * k.size for k in attentions(config, layout))
        sent += row * own.entries * keys * item * _ring(layout["context"])
    return Work(flops, moved, sent)


def config_block(config: Any) -> int:
    """The block of a block-causal model; 1 of others."""
    return getattr(config, "block_size", 1)


def _ring(devices: int) -> float:
    """What a device of a ring sends of an array that is gathered or scattered: its share."""
    return (devices - 1) / devices
