"""The transformer of DiffusionGemma, text alone: sliding and full layers, MLPs beside experts.

The tower is that of Gemma 4. The same weights read clean text causally and a canvas in both
directions ("encoder" and "decoder" of the published code); only a scalar at the end of each layer
differs. There is no mask token: a canvas starts as random tokens, and is told, by its `carry`, what
the step before expected.

`Gemma` is called as `nn.transformer.Transformer` is. The clean entries of the mask are causal text,
and the noisy ones are canvases; a pass may hold both. Sliding layers and full layers are two stacks
with their own heads, so the cache is a pair. A sliding layer keeps every slot, and reads those in
its window.
"""

import dataclasses
import itertools
from functools import partial
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dllm_jax.cache import AXES, KVCache, scales
from dllm_jax.nn import remat
from dllm_jax.nn.attention import attend
from dllm_jax.nn.gemma_tree import gemma_tree
from dllm_jax.nn.head import Head
from dllm_jax.nn.transformer import Output
from dllm_jax.nn.tree import init, param_shapes
from dllm_jax.ops.embedding import lookup
from dllm_jax.ops.moe import MoEConfig, Stack, experts, route
from dllm_jax.ops.norm import rms_norm
from dllm_jax.ops.rope import rope_angles, rotate
from dllm_jax.sharding import constrain
from dllm_jax.typing import Params
from pallas_kernels import BlockMask

KINDS = ("sliding", "full")  # of layers, in the order of the cache's arrays


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmaConfig:
    """An architecture of the DiffusionGemma line."""

    family: str = "diffusion_gemma"  # whose names its tensors have: a key of `registry.FAMILIES`
    vocab_size: int
    dim: int
    num_heads: int
    ffn_dim: int  # of the dense MLP
    num_experts: int
    experts_per_token: int
    expert_dim: int
    layer_types: tuple[str, ...]  # "sliding" or "full", one a layer
    head_dim: int  # of sliding layers
    num_kv_heads: int
    rope_theta: float = 10_000.0
    window: int  # a clean token sees itself and the window - 1 before it
    full_head_dim: int  # of full layers, whose values are their keys
    full_num_kv_heads: int
    full_rope_theta: float = 1_000_000.0
    full_rotary_share: float = 0.25  # of a head's planes that RoPE turns: those of high frequency
    canvas_length: int = 256
    soft_cap: float = 30.0  # of the vocabulary's scores
    norm_eps: float = 1e-6
    max_length: int = 262_144
    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0
    dtype: str = "float32"  # activations
    param_dtype: str = "float32"
    remat: str | bool = "none"  # what the backward pass computes again: one of `remat.NAMES`

    def __post_init__(self):
        object.__setattr__(self, "remat", remat.check(self.remat))
        if not self.layer_types or not set(self.layer_types) <= set(KINDS):
            raise ValueError(f"layer_types={self.layer_types} must be of {', '.join(KINDS)}")
        for heads in (self.num_kv_heads, self.full_num_kv_heads):
            if self.num_heads % heads:
                raise ValueError(f"num_heads={self.num_heads} must be a multiple of {heads}")
        if self.window < 1:
            raise ValueError(f"window={self.window} must be positive: a token sees itself")

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    @property
    def attention(self) -> str:
        return "causal"

    @property
    def alignment(self) -> str:
        return "same_position"

    @property
    def mask_id(self) -> None:
        return None

    @property
    def has_mask(self) -> bool:
        return False

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of layers that are there, in the order of the cache's arrays."""
        return tuple(kind for kind in KINDS if kind in self.layer_types)

    def numbers(self, kind: str) -> tuple[int, ...]:
        """The layers of one kind, which lie stacked in this order."""
        return tuple(i for i, own in enumerate(self.layer_types) if own == kind)

    def heads(self, kind: str) -> tuple[int, int]:
        """K/V heads and head size of one kind of layer."""
        if kind == "full":
            return self.full_num_kv_heads, self.full_head_dim
        return self.num_kv_heads, self.head_dim

    def build(self) -> "Gemma":
        """The module of this architecture."""
        return Gemma(self)

    def tree(self) -> Params:
        """The parameter tree, as `tree.Entry`s."""
        return gemma_tree(self)

    def sizes(self) -> dict[str, int]:
        """The letters in which name maps spell its tensors; `k` and `h` are of the full layers."""
        return {
            "Ly": self.num_layers, "V": self.vocab_size, "D": self.dim, "N": self.num_heads,
            "K": self.num_kv_heads, "H": self.head_dim, "k": self.full_num_kv_heads,
            "h": self.full_head_dim, "F": self.ffn_dim, "E": self.num_experts,
            "f": self.expert_dim,
        }  # fmt: skip

    def mask(self, length: int) -> BlockMask:
        """The mask spec of `length` clean tokens of this architecture."""
        return BlockMask.causal(length)


class Gemma(nn.Module):
    """The model: hashable, pure. Call it through `transformer.forward` and `nn.head`."""

    config: GemmaConfig

    def setup(self):
        shapes = param_shapes(self.config)
        self.tree = {name: self.param(name, _init, sub) for name, sub in shapes.items()}

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
        carry: Float[Array, "B C D"] | None = None,
    ) -> Output:
        """One forward pass over `Q` entries a row, of which the last `C` are of canvases.

        Args:
          tokens: ids; random ones where nothing is written.
          mask: how the entries see each other. Its clean entries are causal text, to be cached; the
            others are canvases, which see all the clean context that the mask gives them (in
            sliding layers the last `window - 1` of it) and themselves.
          positions, cache, cache_end, hole, lengths: as in `Transformer.__call__`.
          canvas: of other architectures; here the mask says which entries are canvases.
          carry: what the step before expected of each canvas entry: `soft_embed` of its
            probabilities. None, or zeros, at the first step.

        Only the `kv` of clean entries may be cached: a finished canvas is read again, causally.
        """
        config, tree = self.config, flax.core.unfreeze(self.tree)
        mask = config.mask(tokens.shape[1]) if mask is None else mask
        if cache is not None and cache_end is None:
            cache_end = cache.lengths
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
            if cache is not None:
                positions = positions + cache.lengths[:, None]
        hidden = _embed(tree, config, tokens)
        if tokens.shape[1] > mask.clean:
            own = hidden[:, mask.clean :]
            if carry is not None:
                own = own + _conditioning(tree["conditioning"], config, carry)
            own = rms_norm(own, None, config.norm_eps)
            hidden = jnp.concatenate([hidden[:, : mask.clean], own], axis=1)
        angles = {kind: _angles(config, kind, positions) for kind in config.kinds}
        context = _Context(config, mask, angles, cache, cache_end, hole, lengths)
        hidden, kv = _run(context, tree["layers"], constrain(hidden, "batch", "length"))
        hidden = rms_norm(hidden, tree["final_norm"], config.norm_eps)
        return Output(constrain(hidden, "batch", "length"), kv)

    def head(self) -> Head:
        """The output projection."""
        return Head(self.tree["embed"], soft_cap=self.config.soft_cap)

    def soft_embed(self, mean: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The embedding that a canvas's next step expects: `carry`.

        Args:
          mean: of the tokens' vectors, under the softmax of the scores of the step before over its
            temperature (`token_stats(soft="exact")`).
        """
        return _scaled(self.config, mean.astype(self.config.dtype))

    def cache(self, batch: int, slots: int, dtype: str | None = None) -> KVCache:
        """An empty cache for this architecture: an array for each of `config.kinds`.

        In the dtype of its activations, or another.
        """
        c, kv = self.config, []
        for kind in c.kinds:
            kv_heads, size = c.heads(kind)
            shape = (len(c.numbers(kind)), batch, kv_heads, slots, 2 * size)
            kv.append(constrain(jnp.zeros(shape, dtype or c.dtype), *AXES))
        scale = tuple(scales(x) for x in kv) if kv[0].dtype == jnp.int8 else None
        return KVCache(tuple(kv), jnp.zeros(batch, jnp.int32), scale)


class _Context(NamedTuple):
    """What every layer of a pass shares."""

    config: GemmaConfig
    mask: BlockMask
    angles: dict[str, tuple[jax.Array, jax.Array]]  # of each kind of layer
    cache: KVCache | None
    cache_end: jax.Array | None
    hole: tuple[jax.Array, jax.Array] | None
    lengths: jax.Array | None


def _run(context: _Context, layers: Params, hidden: jax.Array) -> tuple[jax.Array, Any]:
    """Every layer: hidden states, and keys and values, one array for each kind.

    A scan over the periods of `layer_types` (five sliding layers and a full one, say), and within a
    period a scan over each run of equal layers: one compiled body a run, however deep the model.
    """
    config = context.config
    period = _period(config.layer_types)
    runs = [(kind, len(list(run))) for kind, run in itertools.groupby(period)]

    def body(hidden, repeat):
        found: dict[str, list] = {kind: [] for kind in config.kinds}
        first = {kind: repeat * period.count(kind) for kind in config.kinds}
        for kind, count in runs:
            one = partial(_layer, context, kind, layers[kind])
            one = remat.rematerialised(one, config.remat)
            hidden, kv = jax.lax.scan(one, hidden, first[kind] + jnp.arange(count))
            found[kind].append(kv)
            first[kind] += count
        return hidden, tuple(jnp.concatenate(found[kind]) for kind in config.kinds)

    hidden, kv = jax.lax.scan(body, hidden, jnp.arange(config.num_layers // len(period)))
    return hidden, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), kv)


def _period(types: tuple[str, ...]) -> tuple[str, ...]:
    """The shortest beginning whose repetition is all of it."""
    count = len(types)
    sizes = (size for size in range(1, count + 1) if count % size == 0)
    return types[: next(size for size in sizes if types[:size] * (count // size) == types)]


def _layer(context: _Context, kind: str, stack: Params, hidden: jax.Array, number: jax.Array):
    """The layer at `number` in the stack of its kind.

    The stack is closed over, as the cache is: handed through two scans, every layer would be copied
    on its way into the inner one.
    """
    config = context.config
    layer = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False), stack)
    mixed, kv = _attention(context, kind, number, layer["attention"], hidden)
    hidden = constrain(hidden + mixed, "batch", "length")
    dense = _normed_mlp(layer["mlp"], config, hidden)
    mixture = _mixture(layer["moe"], stack["moe"], number, config, hidden)
    hidden = hidden + rms_norm(dense + mixture, layer["post_norm"], config.norm_eps)
    noisy = (jnp.arange(hidden.shape[1]) >= context.mask.clean)[:, None]
    scalar = jnp.where(noisy, layer["canvas_scale"], layer["clean_scale"])
    return constrain(hidden * scalar.astype(hidden.dtype), "batch", "length"), kv


def _attention(context: _Context, kind: str, number, p: Params, hidden: jax.Array):
    """The attention's share of a layer, normed, and the entries' own keys and values."""
    config, angles = context.config, context.angles[kind]
    x = rms_norm(hidden, p["norm"], config.norm_eps)
    q, k = (jnp.einsum("bqd,dnh->bqnh", x, p[name].astype(x.dtype)) for name in "qk")
    v = jnp.einsum("bqd,dnh->bqnh", x, p["v"].astype(x.dtype)) if "v" in p else k
    q = rotate(rms_norm(q, p["q_norm"], config.norm_eps), *angles)
    k = rotate(rms_norm(k, p["k_norm"], config.norm_eps), *angles)
    v = rms_norm(v, None, config.norm_eps)
    mixed = attend(
        q, k, v, context.mask, cache=context.cache, layer=number, part=config.kinds.index(kind),
        cache_end=context.cache_end, hole=context.hole, lengths=context.lengths,
        window=config.window if kind == "sliding" else 0, scale=1.0,
    )  # fmt: skip
    mixed = jnp.einsum("bqnh,nhd->bqd", mixed, p["o"].astype(x.dtype))
    kv = jnp.moveaxis(jnp.concatenate([k, v], axis=-1), 1, 2)
    return rms_norm(mixed, p["post_norm"], config.norm_eps), kv


def _normed_mlp(p: Params, config: GemmaConfig, hidden: jax.Array) -> jax.Array:
    x = _mlp(p, rms_norm(hidden, p["norm"], config.norm_eps))
    return rms_norm(x, p["post_norm"], config.norm_eps)


def _mixture(
    p: Params, stack: Params, number: jax.Array, config: GemmaConfig, hidden: jax.Array
) -> jax.Array:
    """What the experts make of each token, normed. The router has a norm of its own.

    `p` is the layer at `number` in the stack, where the experts are read.
    """
    flat = hidden.reshape(-1, config.dim)
    routing = rms_norm(flat, p["router_norm"], config.norm_eps) * config.dim**-0.5
    # A rounding of the logits is another choice of experts: they are float32 in full.
    wide = routing.astype(jnp.float32), p["router"].astype(jnp.float32)
    logits = jnp.einsum("td,de->te", *wide, precision="highest")
    moe = MoEConfig(
        num_experts=config.num_experts, experts_per_token=config.experts_per_token,
        ffn_dim=config.expert_dim, normalise=True,
    )  # fmt: skip
    chosen, weights = route(logits, None, moe)
    weights = weights * p["expert_scale"].astype(jnp.float32)[chosen]
    x = rms_norm(flat, p["norm"], config.norm_eps)
    own, every = ([tree[name] for name in ("gate", "up", "down")] for tree in (p, stack))
    stacked = Stack(number, *jax.lax.stop_gradient(every))
    x, chosen, weights = (y.reshape(*hidden.shape[:-1], -1) for y in (x, chosen, weights))
    x = experts(x, chosen, weights, *own, activation=_gelu, stack=stacked)
    return rms_norm(x, p["post_norm"], config.norm_eps)


def _conditioning(p: Params, config: GemmaConfig, carry: jax.Array) -> jax.Array:
    """What is added to a canvas's embeddings; exactly zero where `carry` is."""
    return _mlp(p, rms_norm(carry.astype(config.dtype), p["norm"], config.norm_eps))


def _mlp(p: Params, x: jax.Array) -> jax.Array:
    gate, up, down = (p[name].astype(x.dtype) for name in ("gate", "up", "down"))
    return (_gelu(x @ gate) * (x @ up)) @ down


def _gelu(x: jax.Array) -> jax.Array:
    return nn.gelu(x, approximate=True)


def _embed(tree: Params, config: GemmaConfig, tokens: jax.Array) -> jax.Array:
    return _scaled(config, lookup(tree["embed"], tokens).astype(config.dtype))


def _scaled(config: GemmaConfig, embedded: jax.Array) -> jax.Array:
    """Embeddings as the layers take them; the factor is rounded to their dtype, as published."""
    return embedded * jnp.asarray(config.dim**0.5, embedded.dtype)


def _angles(config: GemmaConfig, kind: str, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The rotations of one kind of layer. In full layers the slow planes stand still."""
    _, size = config.heads(kind)
    if kind == "sliding":
        return rope_angles(positions, size, config.rope_theta)
    cos, sin = rope_angles(positions, size, config.full_rope_theta)
    turned = jnp.arange(size // 2) < int(config.full_rotary_share * size // 2)
    return jnp.where(turned, cos, 1.0), jnp.where(turned, sin, 0.0)


def _init(key: jax.Array, shapes: Params | jax.ShapeDtypeStruct) -> Any:
    """As `tree.init`, but scales are ones."""
    return jax.tree.map_with_path(
        lambda path, x: jnp.ones_like(x) if path and "scale" in path[-1].key else x,
        init(key, shapes),
    )
