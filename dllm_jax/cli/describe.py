"""What a model is and what it needs, from its config alone: no weights are read."""

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

import dllm_jax
from dllm_jax import checkpoint, sources
from dllm_jax.models.adapters import read_adapter
from dllm_jax.nn.transformer import TransformerConfig
from dllm_jax.nn.tree import param_shapes

ROLES = ("embedding", "attention", "mlp", "norms", "head", "adapter")


def describe(
    source: str,
    *,
    adapter: str = "auto",
    dtype: str | None = None,
    batch: int = 1,
    context: int = 2048,
    block_size: int = 4,
    width: int = 2,
) -> str:
    """A page about a model: architecture, parameters and memory by role, devices, versions.

    Args:
      adapter: "auto", "none" or a folder, as on the command line.
      dtype: of weights, cache and activations; None as stored.
      batch, context: rows, and tokens of each in the cache.
      block_size, width: of block diffusion and self-speculation.

    Raises:
      FileNotFoundError, ValueError: as `checkpoint.load`; a size is below 1.
    """
    sizes = {"batch": batch, "context": context, "block-size": block_size, "width": width}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"--{name} {size} must be at least 1")
    found = sources.resolve(source)
    config = checkpoint.read_config(found)
    own = config.adapter is not None  # part of a folder of ours
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


def counts(config: TransformerConfig) -> dict[str, int]:
    """Parameters by role."""
    found = dict.fromkeys(ROLES, 0)
    for path, leaf in jax.tree.flatten_with_path(param_shapes(config))[0]:
        keys = [key.key for key in path]
        if keys[0] == "adapter":
            role = "adapter"
        elif "norm" in keys[-1]:
            role = "norms"
        elif keys[0] == "layers":
            role = keys[1]
        else:
            role = {"embed": "embedding", "head": "head"}[keys[0]]
        found[role] += leaf.size
    return found


def cache_bytes(config: TransformerConfig, batch: int, context: int) -> int:
    """Keys and values of every layer, of `context` tokens a row."""
    entry = 2 * config.num_kv_heads * config.head_dim
    return config.num_layers * batch * context * entry * jnp.dtype(config.dtype).itemsize


def activation_bytes(config: TransformerConfig, batch: int, context: int, entries: int) -> int:
    """What one pass of `entries` tokens a row holds beside weights, cache and logits, at its peak.

    The entries' keys and values of all layers; and of the layer at hand the hidden and feed-forward
    states, its share of the cache, and scores and weights of attention in float32. Within a quarter
    of what XLA allocates on a CPU, where it also copies one layer's weights.
    """
    size = jnp.dtype(config.dtype).itemsize
    fresh = cache_bytes(config, batch, entries)
    states = batch * entries * (2 * config.dim + 3 * config.ffn_dim) * size
    layer = cache_bytes(config, batch, context) // config.num_layers
    scores = 2 * batch * config.num_heads * entries * (context + entries) * 4
    return fresh + states + layer + scores


def logits_bytes(config: TransformerConfig, batch: int, rows: int) -> int:
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


def _architecture(source: str, found: sources.Source, c: TransformerConfig) -> Iterator[str]:
    kind = {"gguf": "GGUF file", "published": "published folder", "orbax": "converted folder"}
    heads = f"{c.num_heads} of {c.head_dim}, {c.num_kv_heads} of keys and values"
    extras = ", biases" * c.qkv_bias + ", norms on queries and keys" * c.qk_norm
    mask = c.mask_id if c.has_mask else None
    attention, alignment = (x.replace("_", " ") for x in (c.attention, c.alignment))
    yield source
    yield from _rows(
        ("from", f"{kind[found.kind]} {found.path}"),
        ("layers", f"{c.num_layers} of width {c.dim}, feed-forward {c.ffn_dim}"),
        ("heads", heads + extras),
        ("positions", f"{c.max_length}, rotary with base {c.rope_theta:g}"),
        ("vocabulary", f"{c.vocab_size}{', head tied to the embedding' * c.tied_head}"),
        ("reads", f"{attention} attention, {alignment} outputs"),
        ("ids", f"mask {mask}, end {' '.join(map(str, c.eos_ids)) or None}, pad {c.pad_id}"),
    )


def _adapter(config: TransformerConfig, folder: Path | None) -> Iterator[str]:
    a = config.adapter
    if a is None:
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


def _parameters(config: TransformerConfig) -> Iterator[str]:
    size = jnp.dtype(config.param_dtype).itemsize
    found = counts(config)
    yield f"{'parameters':<16}{'count':>16}{config.param_dtype:>14}"
    for role, count in found.items():
        if role == "head" and config.tied_head:
            yield f"  {role:<14}{'tied':>16}{'-':>14}"
        elif count or role != "adapter":
            yield f"  {role:<14}{count:>16,}{_bytes(count * size):>14}"
    total = sum(found.values())
    yield f"  {'all':<14}{total:>16,}{_bytes(total * size):>14}"


def _memory(
    c: TransformerConfig, batch: int, context: int, block_size: int, width: int
) -> Iterator[str]:
    held = sum(counts(c).values()) * jnp.dtype(c.param_dtype).itemsize
    cache = cache_bytes(c, batch, context)
    rows = [("ar", 1, 1)]
    if c.has_mask:
        # The pass that caches a finished block holds the next one too.
        rows += [(f"diffusion, block {block_size}", 2 * block_size, block_size)]
        rows += [(f"speculative, width {width}", (width + 1) ** 2, width + 1)]
    yield f"memory of batch {batch}, context {context}, {c.dtype}"
    yield f"  {'weights':<44}{_bytes(held):>14}"
    yield f"  {'KV cache':<44}{_bytes(cache):>14}"
    yield f"  {'one pass':<24}{'entries':>8}{'activations':>14}{'logits':>12}{'all':>12}"
    for name, entries, seen in rows:
        active = activation_bytes(c, batch, context, entries)
        logits = logits_bytes(c, batch, seen)
        total = held + cache + active + logits
        yield (
            f"  {name:<24}{batch * entries:>8}{_bytes(active):>14}{_bytes(logits):>12}"
            f"{_bytes(total):>12}"
        )


def _machine() -> Iterator[str]:
    kinds = [device.device_kind for device in jax.devices()]
    devices = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    names = ("dllm-jax", "jax", "jaxlib", "flax", "orbax-checkpoint", "tokenizers")
    yield from _rows(
        ("devices", devices),
        ("mesh", "none: the weights go to the first device"),
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
