"""What a model is and what it needs, from its config alone: no weights are read."""

import dataclasses
import importlib.metadata
import json
import math
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

import dllm_jax
from dllm_jax import checkpoint, sources
from dllm_jax.models.adapters import read_adapter
from dllm_jax.nn.tree import Entry

_CANVAS_BLOCK = 32  # that published decoders of bidirectional models have

ROLES = ("embedding", "attention", "mlp", "experts", "norms", "head", "adapter", "other")


def describe(
    source: str,
    *,
    adapter: str = "auto",
    dtype: str | None = None,
    batch: int = 1,
    context: int = 2048,
    block_size: int | None = None,
    width: int = 2,
) -> str:
    """A page about a model: architecture, parameters and memory by role, devices, versions.

    Args:
      adapter: "auto", "none" or a folder, as on the command line.
      dtype: of weights, cache and activations; None as stored.
      batch, context: rows, and tokens of each in the cache.
      block_size: of block diffusion; None is the model's, or 4.
      width: of self-speculation.

    Raises:
      FileNotFoundError, ValueError: as `checkpoint.load`; a size is below 1.
    """
    sizes = {"batch": batch, "context": context, "block-size": block_size, "width": width}
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"--{name} {size} must be at least 1")
    found = sources.resolve(source)
    config = checkpoint.read_config(found)
    own = getattr(config, "adapter", None) is not None  # part of a folder of ours
    folder = _adapter_folder(found, adapter)
    if folder is not None:
        config, _ = read_adapter(folder, config)
    elif adapter == "none" and own:
        config = dataclasses.replace(config, adapter=None)
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    lines = [
        *_architecture(source, found, config),
        *_adapter(config, folder),
        "",
        *_parameters(config),
        "",
        *_memory(config, batch, context, block_size, width),
        "",
        *_machine(),
    ]
    return "\n".join(lines)


class Share(NamedTuple):
    """The parameters of one role."""

    count: int = 0
    bytes: int = 0


def counts(config: Any) -> dict[str, Share]:
    """Parameters by role, of any architecture."""
    found = dict.fromkeys(ROLES, Share())
    entries = jax.tree.leaves_with_path(config.tree(), is_leaf=lambda x: isinstance(x, Entry))
    for keys, entry in entries:
        role = _role([key.key for key in keys], entry)
        count = math.prod(entry.shape)
        size = count * jnp.dtype(entry.dtype or config.param_dtype).itemsize
        found[role] = Share(found[role].count + count, found[role].bytes + size)
    return found


def _role(path: list[str], entry: Entry) -> str:
    if path[0] == "adapter":
        return "adapter"
    if "norm" in path[-1]:
        return "norms"
    if "expert" in entry.axes:
        return "experts"
    role = {"embed": "embedding", "head": "head"}.get(path[0])
    return role or next((key for key in path if key in ("attention", "mlp")), "other")


def cache_bytes(config: Any, batch: int, context: int) -> int:
    """Keys and values of every layer, of `context` tokens a row."""
    arrays = jax.eval_shape(lambda: config.build().cache(batch, context).kv)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))


def activation_bytes(config: Any, batch: int, context: int, entries: int) -> int:
    """What one pass of `entries` tokens a row holds beside weights, cache and logits, at its peak.

    The entries' keys and values of all layers; and of the layer at hand the hidden and feed-forward
    states, its share of the cache, and scores and weights of attention in float32. Within a quarter
    of what XLA allocates on a CPU, where it also copies one layer's weights.
    """
    size = jnp.dtype(config.dtype).itemsize
    fresh = cache_bytes(config, batch, entries)
    states = batch * entries * (2 * config.dim + 3 * _inner_width(config)) * size
    layer = cache_bytes(config, batch, context) // config.num_layers
    scores = 2 * batch * config.num_heads * entries * (context + entries) * 4
    return fresh + states + layer + scores


def _inner_width(config: Any) -> int:
    """Feed-forward width of a layer for one token: dense, shared, and of its experts."""
    sizes = config.sizes()
    routed = getattr(config, "moe", None) or config
    experts = getattr(routed, "experts_per_token", 0) * sizes.get("f", 0)
    return sizes.get("F", 0) + sizes.get("s", 0) + experts


def logits_bytes(config: Any, batch: int, rows: int) -> int:
    """Scores of the vocabulary in float32, of `rows` entries of each row."""
    return batch * rows * config.vocab_size * 4


def _adapter_folder(found: sources.Source, adapter: str) -> Path | None:
    """The folder of the adapter that `load` would attach, if it is one of its own."""
    if adapter == "none":
        return None
    if adapter != "auto":
        return Path(adapter)
    shipped = Path(dllm_jax.__file__).parent / "assets" / (found.name or "")
    return shipped if found.name and (shipped / "adapter.json").exists() else None


def _architecture(source: str, found: sources.Source, c: Any) -> Iterator[str]:
    kind = {"gguf": "GGUF file", "published": "published folder", "orbax": "converted folder"}
    heads = f"{c.num_heads} of {c.head_dim}, {c.num_kv_heads} of keys and values"
    extras = [("qkv_bias", ", biases"), ("qk_norm", ", norms on queries and keys")]
    heads += "".join(words for name, words in extras if getattr(c, name, False))
    attention, alignment = (x.replace("_", " ") for x in (c.attention, c.alignment))
    block = f" in blocks of {c.block_size}" if c.attention == "block_causal" else ""
    scaling = getattr(c, "rope_scaling", None)
    stretched = f", stretched {scaling.factor:g} times ({scaling.kind})" if scaling else ""
    theta = getattr(c, "rope_theta", 10_000)
    yield source
    yield from _rows(
        ("from", f"{kind[found.kind]} {found.path}"),
        ("family", c.family),
        ("layers", f"{c.num_layers} of width {c.dim}, feed-forward {_feed_forward(c)}"),
        ("heads", heads),
        ("positions", f"{c.max_length}, rotary with base {theta:g}{stretched}"),
        ("vocabulary", f"{c.vocab_size}{', head tied to the embedding' * _is_tied(c)}"),
        ("reads", f"{attention} attention{block}, {alignment} outputs"),
        (
            "ids",
            f"mask {c.mask_id if c.has_mask else None},"
            f" end {' '.join(map(str, c.eos_ids)) or None}, pad {c.pad_id}",
        ),
    )


def _feed_forward(c: Any) -> str:
    sizes, routed = c.sizes(), getattr(c, "moe", None) or c
    if "E" not in sizes:
        return str(sizes["F"])
    experts = f"{routed.experts_per_token} of {sizes['E']} experts of {sizes['f']}"
    beside = sizes.get("s") or (sizes["F"] if routed is c else 0)
    return f"{experts}, and {beside} for every token" if beside else experts


def _is_tied(c: Any) -> bool:
    return "head" not in c.tree()


def _adapter(config: Any, folder: Path | None) -> Iterator[str]:
    a = getattr(config, "adapter", None)
    if a is None:
        if config.attention == "causal" and config.alignment == "shifted" and not config.has_mask:
            yield from _rows(("adapter", "none: no diffusion, no drafts"))
        return
    where = f"layers {a.first_layer} to {config.num_layers - 1}"
    yield from _rows(("adapter", f"rank {a.rank}, alpha {a.alpha:g}, {where}"))
    if folder is not None:
        yield from _rows(("", str(folder)), *(("", line) for line in _card(folder)))


def _card(folder: Path) -> Iterator[str]:
    """The first paragraph of the adapter's model card, and the plain facts of its making."""
    card = epath.Path(folder) / "README.md"
    if card.exists():
        text = card.read_text(encoding="utf-8")
        if text.startswith("---\n"):  # front matter
            text = text.partition("\n---\n")[2]
        for paragraph in text.split("\n\n"):
            if paragraph.strip() and not paragraph.lstrip().startswith(("#", "|", "<", "```")):
                yield " ".join(paragraph.split())
                break
    meta: dict[str, Any] = json.loads((folder / "adapter.json").read_text("utf-8")).get("meta", {})
    plain = {k: v for k, v in meta.items() if isinstance(v, str | int | float) and len(str(v)) < 80}
    if plain:
        yield ", ".join(f"{key} {value}" for key, value in plain.items())


def _parameters(config: Any) -> Iterator[str]:
    found = counts(config)
    yield f"{'parameters':<16}{'count':>16}{config.param_dtype:>14}"
    for role, share in found.items():
        if role == "head" and _is_tied(config):
            yield f"  {role:<14}{'tied':>16}{'-':>14}"
        elif share.count:
            yield f"  {role:<14}{share.count:>16,}{_bytes(share.bytes):>14}"
    total = sum(share.count for share in found.values())
    yield f"  {'all':<14}{total:>16,}{_bytes(_held(found)):>14}"


def _held(found: dict[str, Share]) -> int:
    return sum(share.bytes for share in found.values())


def _memory(c: Any, batch: int, context: int, block_size: int | None, width: int) -> Iterator[str]:
    held = _held(counts(c))
    cache = cache_bytes(c, batch, context)
    yield f"memory of batch {batch}, context {context}, {c.dtype}"
    yield f"  {'weights':<44}{_bytes(held):>14}"
    yield f"  {'KV cache':<44}{_bytes(cache):>14}"
    yield f"  {'one pass':<24}{'entries':>8}{'activations':>14}{'logits':>12}{'all':>12}"
    for name, entries, seen in _passes(c, context, block_size, width):
        active = activation_bytes(c, batch, context, entries)
        logits = logits_bytes(c, batch, seen)
        total = held + cache + active + logits
        yield (
            f"  {name:<24}{batch * entries:>8}{_bytes(active):>14}{_bytes(logits):>12}"
            f"{_bytes(total):>12}"
        )


def _passes(
    c: Any, context: int, block_size: int | None, width: int
) -> Iterator[tuple[str, int, int]]:
    """The widest pass of each way to decode: its name, its entries, and those that are scored."""
    if c.attention == "bidirectional":
        block = block_size or _CANVAS_BLOCK
        yield f"canvas, block {block}", context, block
        return
    if c.attention == "causal" and c.alignment == "shifted":
        yield "ar", 1, 1
        if c.has_mask:
            yield f"speculative, width {width}", (width + 1) ** 2, width + 1
    if c.has_mask or not c.alignment == "shifted":
        own = c.block_size if c.attention == "block_causal" else getattr(c, "canvas_length", 4)
        block = block_size or own
        # The pass that caches a finished block holds the next one too.
        yield f"diffusion, block {block}", 2 * block, block


def _machine() -> Iterator[str]:
    kinds = [device.device_kind for device in jax.devices()]
    devices = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    names = ("dllm-jax", "jax", "jaxlib", "flax", "orbax-checkpoint", "tokenizers")
    yield from _rows(
        ("devices", devices),
        ("mesh", "none: the weights go to the first device, without --mesh"),
        ("versions", ", ".join(filter(None, map(_version, names)))),
        ("python", platform.python_version()),
    )


def _version(name: str) -> str:
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return ""


def _rows(*rows: tuple[str, str]) -> Iterator[str]:
    for name, value in rows:
        yield f"  {name:<12}{value}"


def _bytes(count: int) -> str:
    amount = float(count)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.4g} {unit}"
        amount /= 1024
    return f"{amount:.2f} GiB"
