"""The parameters of a `GemmaConfig`: their names, shapes and logical axes.

The layers lie in two stacks, "sliding" and "full", in the order of their numbers. A full layer has
no "v": its values are its keys.
"""

from typing import Any

from dllm_jax.nn.tree import Entry
from dllm_jax.typing import Params


def gemma_tree(c: Any) -> Params:
    """The entries of a config's parameters, by name."""
    sizes = {
        "vocab": c.vocab_size, "embed": c.dim, "heads": c.num_heads, "ffn": c.ffn_dim,
        "expert": c.num_experts,
    }  # fmt: skip

    def entry(*axes: str, **more: int) -> Entry:
        known = {**sizes, **more}
        return Entry(tuple(known[axis] for axis in axes), axes)

    return {
        "embed": entry("vocab", "embed"),
        "conditioning": {
            "norm": entry("embed"),
            "gate": entry("embed", "ffn"),
            "up": entry("embed", "ffn"),
            "down": entry("ffn", "embed"),
        },
        "layers": {kind: _stack(c, kind, entry) for kind in c.kinds},
        "final_norm": entry("embed"),
    }


def _stack(c: Any, kind: str, entry) -> Params:
    """The layers of one kind."""
    kv_heads, size = c.heads(kind)
    own = dict(layers=len(c.numbers(kind)), kv_heads=kv_heads, head_dim=size)

    def layered(*axes: str, **more: int) -> Entry:
        return entry("layers", *axes, **own, **more)

    attention = {
        "norm": layered("embed"),
        "q": layered("embed", "heads", "head_dim"),
        "k": layered("embed", "kv_heads", "head_dim"),
        "o": layered("heads", "head_dim", "embed"),
        "q_norm": layered("head_dim"),
        "k_norm": layered("head_dim"),
        "post_norm": layered("embed"),
    }
    if kind == "sliding":
        attention["v"] = layered("embed", "kv_heads", "head_dim")
    mlp = {
        "norm": layered("embed"),
        "gate": layered("embed", "ffn"),
        "up": layered("embed", "ffn"),
        "down": layered("ffn", "embed"),
        "post_norm": layered("embed"),
    }
    moe = {
        "router_norm": layered("embed"),
        # Routers are small, and whole wherever a token asks them.
        "router": layered("embed", "expert")._replace(axes=("layers", "embed", None)),
        "expert_scale": layered("expert")._replace(axes=("layers", None)),
        "norm": layered("embed"),
        "gate": layered("expert", "embed", "ffn", ffn=c.expert_dim),
        "up": layered("expert", "embed", "ffn", ffn=c.expert_dim),
        "down": layered("expert", "ffn", "embed", ffn=c.expert_dim),
        "post_norm": layered("embed"),
    }
    return {
        "attention": attention,
        "mlp": mlp,
        "moe": moe,
        "post_norm": layered("embed"),
        "clean_scale": layered(),
        "canvas_scale": layered(),
    }
