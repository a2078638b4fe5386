"""The parameters of a `TransformerConfig`: their names, shapes and logical axes.

Arrays of the layers are stacked on a leading axis. With experts there are two stacks: the leading
dense layers, where there are any, are `dense_layers`.
"""

from typing import Any

import jax

from dllm_jax.nn.tree import Entry
from dllm_jax.ops.moe import MoEConfig
from dllm_jax.typing import Params


def transformer_tree(c: Any) -> Params:
    """The entries of a config's parameters, by name."""
    sizes = {
        "layers": c.num_layers, "embed": c.dim, "heads": c.num_heads, "kv_heads": c.num_kv_heads,
        "head_dim": c.head_dim, "ffn": c.ffn_dim, "vocab": c.vocab_size,
    }  # fmt: skip

    def entry(*axes, **more):
        known = {**sizes, **more}
        return Entry(tuple(known[axis] for axis in axes), axes)

    tree = {
        "embed": entry("vocab", "embed"),
        "layers": {"attention": _attention_tree(c, entry), "mlp": _mlp_tree(entry)},
        "final_norm": entry("embed"),
    }
    if c.moe:
        dense = c.moe.first_dense
        if dense:
            tree["dense_layers"] = _cut(tree["layers"], dense)
        tree["layers"]["mlp"] = _moe_tree(c.moe, entry)
        tree["layers"] = _cut(tree["layers"], c.num_layers - dense)
    if c.learned_positions:
        tree["positions"] = Entry((c.max_length, c.dim), (None, "embed"))
    if not c.tied_head:
        tree["head"] = entry("vocab", "embed")
    if c.adapter:
        tree["adapter"] = _adapter_tree(c.num_layers, c.adapter.rank, entry)
        if c.adapter.gated:
            tree["adapter"]["mask_embedding"] = entry("embed")
    return tree


def _attention_tree(c: Any, entry) -> Params:
    attention = {
        "norm": entry("layers", "embed"),
        "q": entry("layers", "embed", "heads", "head_dim"),
        "k": entry("layers", "embed", "kv_heads", "head_dim"),
        "v": entry("layers", "embed", "kv_heads", "head_dim"),
        "o": entry("layers", "heads", "head_dim", "embed"),
    }
    if c.qkv_bias:
        attention["q_bias"] = entry("layers", "heads", "head_dim")
        attention["k_bias"] = attention["v_bias"] = entry("layers", "kv_heads", "head_dim")
    if c.qk_norm:
        attention["q_norm"] = attention["k_norm"] = entry("layers", "head_dim")
    return attention


def _mlp_tree(entry, **sizes: int) -> Params:
    return {
        "norm": entry("layers", "embed"),
        "gate": entry("layers", "embed", "ffn", **sizes),
        "up": entry("layers", "embed", "ffn", **sizes),
        "down": entry("layers", "ffn", "embed", **sizes),
    }


def _moe_tree(c: MoEConfig, entry) -> Params:
    own = dict(expert=c.num_experts, ffn=c.ffn_dim)
    mlp = {
        "norm": entry("layers", "embed"),
        # The router is small, is whole wherever a token asks it, and is published in float32 beside
        # weights in bfloat16.
        "router": entry("layers", "embed", "expert", **own)._replace(
            axes=("layers", "embed", None), dtype="float32"
        ),
        "gate": entry("layers", "expert", "embed", "ffn", **own),
        "up": entry("layers", "expert", "embed", "ffn", **own),
        "down": entry("layers", "expert", "ffn", "embed", **own),
    }
    if c.expert_bias:
        bias = entry("layers", "expert", **own)
        mlp["router_bias"] = bias._replace(axes=("layers", None), dtype="float32")
    if c.shared_ffn_dim:
        shared = _mlp_tree(entry, ffn=c.shared_ffn_dim)
        mlp |= {f"shared_{name}": shared[name] for name in ("gate", "up", "down")}
    return mlp


def _cut(layers: Params, count: int) -> Params:
    """The same entries, of a stack of `count` layers."""
    return jax.tree.map(
        lambda entry: entry._replace(shape=(count, *entry.shape[1:])),
        layers,
        is_leaf=lambda x: isinstance(x, Entry),
    )


def _adapter_tree(layers: int, rank: int, entry) -> Params:
    def pair(inputs: tuple[str, ...], outputs: tuple[str, ...]):
        wide = entry(*inputs)
        flat = 1
        for size in wide.shape:
            flat *= size
        narrow = entry(*outputs)
        axis = inputs[0] if len(inputs) == 1 else None
        return {
            "in": Entry((layers, flat, rank), ("layers", axis, None)),
            "out": Entry((layers, rank, *narrow.shape), ("layers", None, *narrow.axes)),
        }

    return {
        "q": pair(("embed",), ("heads", "head_dim")),
        "k": pair(("embed",), ("kv_heads", "head_dim")),
        "v": pair(("embed",), ("kv_heads", "head_dim")),
        "o": pair(("heads", "head_dim"), ("embed",)),
        "gate": pair(("embed",), ("ffn",)),
        "up": pair(("embed",), ("ffn",)),
        "down": pair(("ffn",), ("embed",)),
    }
