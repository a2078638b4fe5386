"""One transformer for the Llama line (Llama, Qwen2, Qwen3, LLaDA).

RMSNorm, RoPE, grouped heads, SwiGLU.

`Transformer` is a Linen module that only names parameters. A forward pass takes tokens (and a
cache of the prefix), returns the last hidden states and the tokens' own keys and values; who sees
whom is a `BlockMask`. The layers are stacked on a leading axis and scanned.
"""

import dataclasses
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.cache import KVCache, allocate
from dllm_jax.nn.adapters import AdapterConfig, low_rank
from dllm_jax.nn.tree import Entry, init, param_shapes
from dllm_jax.ops.norm import rms_norm
from dllm_jax.ops.rope import rope_angles, rotate
from dllm_jax.typing import Params
from pallas_kernels import BlockMask, block_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """An architecture of the Llama line, and how its tokens are meant to be read."""

    vocab_size: int
    num_layers: int
    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    max_length: int = 8192
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied_head: bool = False  # the output projection is the embedding, transposed
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3: RMSNorm on each head's query and key
    attention: str = "causal"  # of clean tokens: causal | bidirectional | block_causal
    block_size: int = 1  # of block_causal attention
    alignment: str = "shifted"  # the output at i predicts token i + 1 | same_position: token i
    mask_id: int | None = None  # the token that stands where nothing is written yet
    eos_ids: tuple[int, ...] = ()  # tokens that end an answer
    pad_id: int = 0
    dtype: str = "float32"  # activations
    param_dtype: str = "float32"
    remat: bool = False  # recompute each layer in the backward pass instead of storing it
    adapter: AdapterConfig | None = None

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: RoPE turns planes")
        if self.attention not in ("causal", "bidirectional", "block_causal"):
            raise ValueError(
                f"attention={self.attention!r} is not causal, bidirectional or block_causal"
            )
        if self.alignment not in ("shifted", "same_position"):
            raise ValueError(f"alignment={self.alignment!r} is neither shifted nor same_position")
        if self.adapter and self.adapter.first_layer >= self.num_layers:
            raise ValueError(
                f"first_layer={self.adapter.first_layer} leaves no layer for the adapter"
            )

    def build(self) -> "Transformer":
        """The module of this architecture."""
        return Transformer(self)

    def tree(self) -> Params:
        """The parameter tree, as `tree.Entry`s."""
        return _tree(self)

    @property
    def has_mask(self) -> bool:
        """Whether the mask token has an embedding: the adapter's, or one of the vocabulary's."""
        return self.mask_id is not None and (
            self.adapter is not None or self.mask_id < self.vocab_size
        )

    def mask(self, length: int) -> BlockMask:
        """The mask spec of `length` clean tokens of this architecture."""
        block = {"causal": 1, "bidirectional": max(length, 1), "block_causal": self.block_size}
        return BlockMask.block_causal(length, block[self.attention])


class Output(NamedTuple):
    """What a forward pass returns."""

    hidden: jax.Array  # [B, Q, D], after the final norm
    kv: Any  # [Ly, B, K, Q, 2 * H]: the entries' own keys and values, ready for `cache.append`


def forward(
    model: "Transformer", params: Params, tokens: Int[Array, "B Q"], **options: Any
) -> Output:
    """One forward pass; `options` are those of `Transformer.__call__`."""
    out = model.apply({"params": params}, tokens, **options)
    assert isinstance(out, Output)
    return out


def logits_of(
    model: "Transformer", params: Params, hidden: Float[Array, "*B D"]
) -> Float[Array, "*B V"]:
    """The vocabulary's scores, float32, of the hidden states that are wanted."""
    return jnp.asarray(model.apply({"params": params}, hidden, method="logits"))


class Transformer(nn.Module):
    """The model: hashable, pure. Call it through `forward` and `logits_of`."""

    config: TransformerConfig

    def setup(self):
        shapes = param_shapes(self.config)
        self.tree = {name: self.param(name, init, sub) for name, sub in shapes.items()}

    def __call__(
        self,
        tokens: Int[Array, "B Q"],
        *,
        mask: BlockMask | None = None,
        positions: Int[Array, "B Q"] | None = None,
        cache: KVCache | None = None,
        cache_end: Int[Array, "B"] | Int[Array, "B Q"] | None = None,
        hole: tuple[Int[Array, "B"], Int[Array, "B"]] | None = None,
        lengths: Int[Array, "B"] | None = None,
        canvas: bool = True,
        frozen_layers: int = 0,
    ) -> Output:
        """One forward pass over `Q` entries a row.

        Args:
          tokens: ids; `config.mask_id` where nothing is written.
          mask: how the entries see each other; the architecture's own over all of them by default.
          positions: rotary positions; by default they follow the cache, or start at 0.
          cache: the prefix, read only. `cache_end` defaults to its lengths.
          hole: slots [first, second) of the cache that are not read: the entries stand in for them.
          lengths: valid clean entries of a row; later ones are padding that no one sees.
          canvas: False says that no entry is a mask token, and skips the adapter.
          frozen_layers: layers below are not differentiated (their backward pass is not run).
        """
        config, tree = self.config, flax.core.unfreeze(self.tree)
        if mask is None:
            if cache is not None and config.attention == "block_causal":
                raise ValueError(
                    "behind a cache, a block-causal pass needs the `mask` of its blocks"
                )
            mask = config.mask(tokens.shape[1])
        if cache is not None and cache_end is None:
            cache_end = cache.lengths
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
            if cache is not None:
                positions = positions + cache.lengths[:, None]
        gate = None
        if canvas and config.mask_id is not None:
            gate = tokens == config.mask_id
        context = _Context(
            config, mask, rope_angles(positions, config.head_dim, config.rope_theta), gate,
            cache, cache_end, hole, lengths,
        )  # fmt: skip
        hidden = embed(tree, config, tokens, gate)
        layers = {"base": tree["layers"]}
        if gate is not None and config.adapter:
            layers["adapter"] = {k: v for k, v in tree["adapter"].items() if k != "mask_embedding"}
        hidden, kv = _scan(context, layers, hidden, 0, frozen_layers)
        if frozen_layers:
            hidden = jax.lax.stop_gradient(hidden)
            hidden, upper = _scan(context, layers, hidden, frozen_layers, config.num_layers)
            kv = jnp.concatenate([jax.lax.stop_gradient(kv), upper])
        return Output(rms_norm(hidden, tree["final_norm"], config.norm_eps), kv)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """The vocabulary's scores, float32, of the hidden states that are wanted."""
        if self.config.tied_head:
            table, contract = self.tree["embed"], "...d,vd->...v"
        else:
            table, contract = self.tree["head"], "...d,dv->...v"
        return jnp.einsum(
            contract, hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32
        )

    def cache(self, batch: int, slots: int) -> KVCache:
        """An empty cache for this architecture."""
        c = self.config
        return allocate(c.num_layers, batch, c.num_kv_heads, slots, c.head_dim, c.dtype)


def embed(
    tree: Params,
    config: TransformerConfig,
    tokens: Int[Array, "B Q"],
    gate: Bool[Array, "B Q"] | None,
) -> Float[Array, "B Q D"]:
    """Token embeddings; a mask token's is the adapter's, where there is an adapter."""
    hidden = jnp.take(tree["embed"], tokens, axis=0, mode="clip").astype(config.dtype)
    if gate is not None and config.adapter:
        own = tree["adapter"]["mask_embedding"].astype(config.dtype)
        hidden = jnp.where(gate[..., None], own, hidden)
    return hidden


class _Context(NamedTuple):
    """What every layer of a pass shares."""

    config: TransformerConfig
    mask: BlockMask
    angles: tuple[jax.Array, jax.Array]
    gate: jax.Array | None
    cache: KVCache | None
    cache_end: jax.Array | None
    hole: tuple[jax.Array, jax.Array] | None
    lengths: jax.Array | None


def _scan(context: _Context, layers: Params, hidden: jax.Array, first: int, last: int):
    """Layers first..last (all when last is 0): hidden states, and keys and values."""
    if (first, last) != (0, 0):
        layers = jax.tree.map(lambda x: x[first:last], layers)

    def body(hidden, xs):
        number, layer = xs
        return _layer(context, number, layer["base"], layer.get("adapter", {}), hidden)

    if context.config.remat:
        body = jax.checkpoint(body, prevent_cse=False)
    numbers = first + jnp.arange(jax.tree.leaves(layers)[0].shape[0])
    return jax.lax.scan(body, hidden, (numbers, layers))


def _layer(context: _Context, number, base: Params, adapter: Params, hidden: jax.Array):
    config, gate = context.config, context.gate
    scale = config.adapter.scale if config.adapter else 0.0

    def project(x, weight, name, contract):
        y = jnp.einsum(contract, x, weight.astype(x.dtype))
        return y + low_rank(x, adapter.get(name), gate, scale)

    p = base["attention"]
    x = rms_norm(hidden, p["norm"], config.norm_eps)
    q, k, v = (project(x, p[name], name, "bqd,dnh->bqnh") for name in ("q", "k", "v"))
    if config.qkv_bias:
        q, k, v = (y + p[f"{n}_bias"].astype(y.dtype) for y, n in ((q, "q"), (k, "k"), (v, "v")))
    if config.qk_norm:
        q, k = (rms_norm(y, p[f"{n}_norm"], config.norm_eps) for y, n in ((q, "q"), (k, "k")))
    q, k = rotate(q, *context.angles), rotate(k, *context.angles)
    cached = None
    if context.cache is not None:
        cached = jax.lax.dynamic_index_in_dim(context.cache.kv, number, keepdims=False)
        cached = cached.astype(q.dtype)
    mixed = block_attention(
        q, k, v, context.mask, cache=cached, cache_end=context.cache_end, hole=context.hole,
        lengths=context.lengths,
    )  # fmt: skip
    mixed = mixed.reshape(*mixed.shape[:2], -1)
    hidden = hidden + project(mixed, p["o"].reshape(-1, config.dim), "o", "bqi,id->bqd")
    p = base["mlp"]
    x = rms_norm(hidden, p["norm"], config.norm_eps)
    gated = nn.silu(project(x, p["gate"], "gate", "bqd,df->bqf"))
    gated = gated * project(x, p["up"], "up", "bqd,df->bqf")
    hidden = hidden + project(gated, p["down"], "down", "bqf,fd->bqd")
    kv = jnp.concatenate([k, v], axis=-1)  # [B, Q, K, 2 * H]
    return hidden, jnp.moveaxis(kv, 1, 2)


def _tree(c: TransformerConfig) -> Params:
    sizes = {
        "layers": c.num_layers, "embed": c.dim, "heads": c.num_heads, "kv_heads": c.num_kv_heads,
        "head_dim": c.head_dim, "ffn": c.ffn_dim, "vocab": c.vocab_size,
    }  # fmt: skip

    def entry(*axes):
        return Entry(tuple(sizes[axis] for axis in axes), axes)

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
    mlp = {
        "norm": entry("layers", "embed"),
        "gate": entry("layers", "embed", "ffn"),
        "up": entry("layers", "embed", "ffn"),
        "down": entry("layers", "ffn", "embed"),
    }
    tree = {
        "embed": entry("vocab", "embed"),
        "layers": {"attention": attention, "mlp": mlp},
        "final_norm": entry("embed"),
    }
    if not c.tied_head:
        tree["head"] = entry("embed", "vocab")
    if c.adapter:
        tree["adapter"] = _adapter_tree(c.num_layers, c.adapter.rank, entry)
    return tree


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
        "mask_embedding": entry("embed"),
        "q": pair(("embed",), ("heads", "head_dim")),
        "k": pair(("embed",), ("kv_heads", "head_dim")),
        "v": pair(("embed",), ("kv_heads", "head_dim")),
        "o": pair(("heads", "head_dim"), ("embed",)),
        "gate": pair(("embed",), ("ffn",)),
        "up": pair(("embed",), ("ffn",)),
        "down": pair(("ffn",), ("embed",)),
    }
