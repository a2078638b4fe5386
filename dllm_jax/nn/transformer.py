"""One transformer for the Llama line (Llama, Qwen, LLaDA, Dream, SDAR and their like).

RMSNorm, RoPE, grouped heads, SwiGLU, and a mixture of experts in its place where there is one.

`Transformer` is a Linen module that only names parameters. A forward pass takes tokens (and a
cache of the prefix), returns the last hidden states and the tokens' own keys and values; who sees
whom is a `BlockMask`. The layers are stacked on a leading axis and scanned: all of them in one
stack, or in two where the first ones are dense and the others are mixtures of experts.
"""

import dataclasses
import itertools
from functools import partial
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.cache import AXES, KVCache, allocate
from dllm_jax.nn import remat
from dllm_jax.nn.adapters import AdapterConfig, low_rank
from dllm_jax.nn.attention import attend
from dllm_jax.nn.head import Head
from dllm_jax.nn.transformer_tree import transformer_tree
from dllm_jax.nn.tree import init, param_shapes
from dllm_jax.ops.embedding import lookup
from dllm_jax.ops.moe import MoEConfig, Stack, experts, route
from dllm_jax.ops.norm import rms_norm
from dllm_jax.ops.product import product
from dllm_jax.ops.rope import RopeScaling, rope_angles, rotate
from dllm_jax.sharding import automatic, constrain, spec_of
from dllm_jax.typing import Params
from pallas_kernels import BlockMask


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """An architecture of the Llama line, and how its tokens are meant to be read."""

    family: str = "llama"  # whose names its published tensors have: a key of `registry.FAMILIES`
    vocab_size: int
    num_layers: int
    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    max_length: int = 8192
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None  # for texts longer than those of the first training
    learned_positions: bool = False  # beside RoPE a vector for each of max_length positions (GPT-2)
    rotary_dim: int = 0  # RoPE turns the first ones of each head; 0: the whole head
    norm_eps: float = 1e-5
    tied_head: bool = False  # the output projection is the embedding, transposed
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3: RMSNorm on each head's query and key
    moe: MoEConfig | None = None
    attention: str = "causal"  # of clean tokens: causal | bidirectional | block_causal
    block_size: int = 1  # of block_causal attention
    alignment: str = "shifted"  # the output at i predicts token i + 1 | same_position: token i
    mask_id: int | None = None  # the token that stands where nothing is written yet
    eos_ids: tuple[int, ...] = ()  # tokens that end an answer
    pad_id: int = 0
    dtype: str = "float32"  # activations
    param_dtype: str = "float32"
    remat: str | bool = "none"  # what the backward pass computes again: one of `remat.NAMES`
    adapter: AdapterConfig | None = None

    def __post_init__(self):
        object.__setattr__(self, "remat", remat.check(self.remat))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: RoPE turns planes")
        if self.rotary_dim % 2 or not 0 <= self.rotary_dim <= self.head_dim:
            raise ValueError(
                f"rotary_dim={self.rotary_dim} must be even, and at most head_dim={self.head_dim}"
            )
        if self.moe and not 0 <= self.moe.first_dense < self.num_layers:
            raise ValueError(f"first_dense={self.moe.first_dense} leaves no layer for the experts")
        if self.moe and self.adapter:
            raise ValueError("a model with experts takes no adapter: none is made for experts")
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
        return transformer_tree(self)

    def sizes(self) -> dict[str, int]:
        """The letters in which name maps spell its tensors."""
        sizes = {
            "Ly": self.num_layers, "V": self.vocab_size, "D": self.dim, "N": self.num_heads,
            "K": self.num_kv_heads, "H": self.head_dim, "F": self.ffn_dim,
            "h": self.head_dim // 2,  # one of the two halves that RoPE turns into each other
        }  # fmt: skip
        if self.moe:
            sizes |= {
                "E": self.moe.num_experts,
                "f": self.moe.ffn_dim,
                "s": self.moe.shared_ffn_dim,
            }
        return sizes

    @property
    def has_mask(self) -> bool:
        """Whether the mask token has an embedding: the adapter's, or one of the vocabulary's."""
        own = self.adapter is not None and self.adapter.gated
        return self.mask_id is not None and (own or self.mask_id < self.vocab_size)

    def mask(self, length: int) -> BlockMask:
        """The mask spec of `length` clean tokens of this architecture."""
        block = {"causal": 1, "bidirectional": max(length, 1), "block_causal": self.block_size}
        return BlockMask.block_causal(length, block[self.attention])


class Output(NamedTuple):
    """What a forward pass returns."""

    hidden: jax.Array  # [B, Q, D], after the final norm
    kv: Any  # [Ly, B, K, Q, 2 * H]: the entries' own keys and values, ready for `cache.append`


_TREES = (jax.Array, KVCache, tuple)  # what is traced among the options of a pass


def forward(model: nn.Module, params: Params, tokens: Int[Array, "B Q"], **options: Any) -> Output:
    """One forward pass of any of our modules; `options` are those of its `__call__`."""
    arrays = {name: x for name, x in options.items() if isinstance(x, _TREES)}
    static = {name: x for name, x in options.items() if name not in arrays}

    def run(params, tokens, arrays):
        out = model.apply({"params": params}, tokens, **arrays, **static)
        assert isinstance(out, Output)
        return out

    def place(path, shape):
        return spec_of(shape, *(AXES if ".kv" in path else ("batch", "length")))

    return automatic(run, place, params, tokens, arrays)


class Transformer(nn.Module):
    """The model: hashable, pure. Call it through `forward`, and `head` through `nn.head`."""

    config: TransformerConfig

    def setup(self):
        c, shapes = self.config, param_shapes(self.config)
        # Layers write less the more there are (GPT-2), into vectors not much smaller than what they
        # write: where random layers drown the tokens, recall is not learnt. With vectors of 1, or
        # layers that write a fifth of this, rules over letters are learnt later.
        stream = 0.02 if c.tied_head else 0.2
        writes = (2 * c.num_layers) ** -0.5
        self.tree = {
            name: self.param(
                name,
                partial(init, vectors=0.02 if name == "head" else stream, writes=writes),
                sub,
            )
            for name, sub in shapes.items()
        }

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
        segments: Int[Array, "B Q"] | None = None,
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
          segments: the document of each entry, which sees its own alone; without a cache.
          canvas: False says that no entry is a mask token, and skips an adapter that acts on them.
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
        gate, adapter = None, config.adapter
        if adapter and adapter.gated:
            if not canvas or config.mask_id is None:
                adapter = None
            else:
                gate = jnp.equal(tokens, config.mask_id)
        angles = rope_angles(
            positions, config.rotary_dim or config.head_dim, config.rope_theta,
            config.rope_scaling, config.max_length,
        )  # fmt: skip
        context = _Context(
            config, mask, angles, adapter, gate, cache, cache_end, hole, lengths, segments
        )
        hidden = embed(tree, config, tokens, gate)
        if config.learned_positions:
            at = jnp.minimum(positions, config.max_length - 1)
            hidden = hidden + lookup(tree["positions"], at).astype(config.dtype)
        hidden, kv = _run(context, tree, hidden, frozen_layers)
        hidden = rms_norm(hidden, tree["final_norm"], config.norm_eps)
        return Output(constrain(hidden, "batch", "length"), kv)

    def head(self) -> Head:
        """The output projection."""
        return Head(self.tree["embed" if self.config.tied_head else "head"])

    def cache(self, batch: int, slots: int, dtype: str | None = None) -> KVCache:
        """An empty cache for this architecture, in the dtype of its activations or another."""
        c = self.config
        return allocate(c.num_layers, batch, c.num_kv_heads, slots, c.head_dim, dtype or c.dtype)


def embed(
    tree: Params,
    config: TransformerConfig,
    tokens: Int[Array, "B Q"],
    gate: Bool[Array, "B Q"] | None,
) -> Float[Array, "B Q D"]:
    """Token embeddings; a mask token's, where the gate is open, is the adapter's."""
    hidden = lookup(tree["embed"], tokens).astype(config.dtype)
    if gate is not None:
        own = tree["adapter"]["mask_embedding"].astype(config.dtype)
        hidden = jnp.where(gate[..., None], own, hidden)
    return constrain(hidden, "batch", "length")


class _Context(NamedTuple):
    """What every layer of a pass shares."""

    config: TransformerConfig
    mask: BlockMask
    angles: tuple[jax.Array, jax.Array]
    adapter: AdapterConfig | None  # that this pass runs through
    gate: jax.Array | None  # bool[B, Q]: the entries that it acts on; None: all
    cache: KVCache | None
    cache_end: jax.Array | None
    hole: tuple[jax.Array, jax.Array] | None
    lengths: jax.Array | None
    segments: jax.Array | None


def _run(context: _Context, tree: Params, hidden: jax.Array, frozen: int):
    """Every layer: hidden states, and keys and values. Those below `frozen` pass no gradient."""
    config = context.config
    dense = config.moe.first_dense if config.moe else 0
    stops = sorted({0, dense, min(frozen, config.num_layers), config.num_layers})
    kv = []
    for first, last in itertools.pairwise(stops):
        stack, start = ("dense_layers", 0) if last <= dense else ("layers", dense)
        layers = {"base": tree[stack]}
        if context.adapter:
            layers["adapter"] = {k: v for k, v in tree["adapter"].items() if k != "mask_embedding"}
        hidden, own = _scan(context, layers, hidden, first, last, start)
        if last <= frozen:
            hidden, own = jax.lax.stop_gradient((hidden, own))
        kv.append(own)
    return hidden, kv[0] if len(kv) == 1 else jnp.concatenate(kv)


def _scan(context: _Context, layers: Params, hidden: jax.Array, first: int, last: int, start: int):
    """Layers first..last out of a stack whose first layer has the number `start`.

    Experts are closed over besides: handed to a layer, all of them would be copied for it.
    """
    mlp, every = layers["base"]["mlp"], None
    if "router" in mlp:
        every = jax.lax.stop_gradient(tuple(mlp[name] for name in ("gate", "up", "down")))
    if jax.tree.leaves(layers)[0].shape[0] != last - first:
        layers = jax.tree.map(lambda x: x[first - start : last - start], layers)

    def body(hidden, xs):
        number, layer = xs
        stack = None if every is None else Stack(number - start, *every)
        return _layer(context, number, layer["base"], layer.get("adapter", {}), stack, hidden)

    body = remat.rematerialised(body, context.config.remat)
    return jax.lax.scan(body, hidden, (jnp.arange(first, last), layers))


def _layer(
    context: _Context,
    number: jax.Array,
    base: Params,
    adapter: Params,
    stack: Stack | None,
    hidden: jax.Array,
):
    config, gate = context.config, context.gate
    scale = context.adapter.scale if context.adapter else 0.0

    def project(x, weight, name):
        y = product(x, weight.astype(x.dtype))
        return y + low_rank(x, adapter.get(name), gate, scale)

    p = base["attention"]
    x = rms_norm(hidden, p["norm"], config.norm_eps)
    q, k, v = (project(x, p[name], name) for name in ("q", "k", "v"))
    if config.qkv_bias:
        q, k, v = (y + p[f"{n}_bias"].astype(y.dtype) for y, n in ((q, "q"), (k, "k"), (v, "v")))
    if config.qk_norm:
        q, k = (rms_norm(y, p[f"{n}_norm"], config.norm_eps) for y, n in ((q, "q"), (k, "k")))
    q, k = rotate(q, *context.angles), rotate(k, *context.angles)
    mixed = attend(
        q, k, v, context.mask, cache=context.cache, layer=number, cache_end=context.cache_end,
        hole=context.hole, lengths=context.lengths, segments=context.segments,
    )  # fmt: skip
    mixed = mixed.reshape(*mixed.shape[:2], -1)
    hidden = hidden + project(mixed, p["o"].reshape(-1, config.dim), "o")
    hidden = constrain(hidden, "batch", "length")
    p = base["mlp"]
    x = rms_norm(hidden, p["norm"], config.norm_eps)
    if config.moe and "router" in p:
        hidden = hidden + _mixture(config.moe, p, stack, x)
    else:
        gated = nn.silu(project(x, p["gate"], "gate"))
        gated = gated * project(x, p["up"], "up")
        hidden = hidden + project(gated, p["down"], "down")
    hidden = constrain(hidden, "batch", "length")
    kv = jnp.concatenate([k, v], axis=-1)  # [B, Q, K, 2 * H]
    return hidden, jnp.moveaxis(kv, 1, 2)


def _mixture(config: MoEConfig, p: Params, stack: Stack | None, x: jax.Array) -> jax.Array:
    """What the experts make of each token [B, Q, D], with the one that all tokens share."""
    flat = x.reshape(-1, x.shape[-1])
    # A rounding of the logits is another choice of experts: they are float32 in full.
    wide = flat.astype(jnp.float32), p["router"].astype(jnp.float32)
    logits = jnp.einsum("td,de->te", *wide, precision="highest")
    chosen, weights = route(logits, p.get("router_bias"), config)
    chosen, weights = (y.reshape(*x.shape[:-1], -1) for y in (chosen, weights))
    mixed = experts(x, chosen, weights, p["gate"], p["up"], p["down"], stack=stack)
    if config.shared_ffn_dim:
        gate, up, down = (p[f"shared_{name}"].astype(x.dtype) for name in ("gate", "up", "down"))
        mixed = mixed + (nn.silu(x @ gate) * (x @ up)) @ down
    return mixed
