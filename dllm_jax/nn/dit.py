"""The diffusion transformer of BD3-LM: attention in blocks, norms modulated by the noise level.

Arriola et al. 2025, "Block Diffusion" (arXiv 2503.09573); the body is that of MDLM and SEDD, with
the adaptive norms of DiT (Peebles and Xie 2023). Time conditioning is off in the published models,
but their norms are modulated all the same, by the embedding of noise level 0.

`DiT` is called as `nn.transformer.Transformer` is: clean blocks see each other block-causally, and
noisy ones as the `BlockMask` says.
"""

import dataclasses
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dllm_jax.cache import KVCache, allocate
from dllm_jax.nn import remat
from dllm_jax.nn.attention import attend
from dllm_jax.nn.head import Head
from dllm_jax.nn.transformer import Output
from dllm_jax.nn.tree import Entry, init, param_shapes
from dllm_jax.ops.embedding import lookup
from dllm_jax.ops.norm import layer_norm
from dllm_jax.ops.rope import rope_angles, rotate
from dllm_jax.sharding import constrain
from dllm_jax.typing import Params
from pallas_kernels import BlockMask

ROPE_THETA = 10_000.0  # of the rotary positions, and of the waves
_WAVES = 128  # of the embedding of a noise level: as many cosines, and as many sines


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """An architecture of the BD3-LM line."""

    family: str = "bd3lm"  # whose names its published tensors have: a key of `registry.FAMILIES`
    vocab_size: int  # with the mask token
    num_layers: int
    dim: int
    num_heads: int
    cond_dim: int  # of the embedding of the noise level
    max_length: int = 1024
    block_size: int = 16
    norm_eps: float = 1e-5
    mask_id: int
    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0
    # The noise levels that the model was trained on (clipped schedules, section 5 of the paper):
    # they travel with the weights, and no pass reads them.
    noise_min: float = 1e-3
    noise_max: float = 1.0
    dtype: str = "float32"  # activations
    param_dtype: str = "float32"
    remat: str | bool = "none"  # what the backward pass computes again: one of `remat.NAMES`

    def __post_init__(self):
        object.__setattr__(self, "remat", remat.check(self.remat))
        if self.dim % self.num_heads or self.head_dim % 2:
            raise ValueError(
                f"dim={self.dim} must be num_heads={self.num_heads} heads of an even size"
            )
        if not 0 <= self.mask_id < self.vocab_size:
            raise ValueError(f"mask_id={self.mask_id} is outside vocab_size={self.vocab_size}")

    @property
    def attention(self) -> str:
        return "block_causal"

    @property
    def alignment(self) -> str:
        return "same_position"

    @property
    def has_mask(self) -> bool:
        return True

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads

    @property
    def ffn_dim(self) -> int:
        return 4 * self.dim

    def build(self) -> "DiT":
        """The module of this architecture."""
        return DiT(self)

    def tree(self) -> Params:
        """The parameter tree, as `tree.Entry`s."""
        return _tree(self)

    def sizes(self) -> dict[str, int]:
        """The letters in which name maps spell its tensors."""
        return {
            "Ly": self.num_layers, "V": self.vocab_size, "D": self.dim, "N": self.num_heads,
            "H": self.head_dim, "F": self.ffn_dim, "C": self.cond_dim, "c": self.cond_dim,
            "W": 2 * _WAVES,
        }  # fmt: skip

    def mask(self, length: int) -> BlockMask:
        """The mask spec of `length` clean tokens of this architecture."""
        return BlockMask.block_causal(length, self.block_size)


class DiT(nn.Module):
    """The model: hashable, pure. Call it through `transformer.forward` and `nn.head`."""

    config: DiTConfig

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
        carry: None = None,
        sigma: Float[Array, "B"] | None = None,
    ) -> Output:
        """One forward pass over `Q` entries a row.

        Args:
          tokens: ids; `config.mask_id` where nothing is written.
          mask, positions, cache, cache_end, hole, lengths: as in `Transformer.__call__`.
          canvas, carry: of other architectures; this one treats a mask like any token.
          sigma: the noise level of each row, for a model with time conditioning; 0 by default.

        Raises:
          ValueError: a pass behind a cache without the `mask` of its blocks.
        """
        config, tree = self.config, flax.core.unfreeze(self.tree)
        if mask is None:
            if cache is not None:
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
        noise = _noise(tree["sigma"], jnp.zeros(1) if sigma is None else sigma)
        context = _Context(
            config, mask, rope_angles(positions, config.head_dim, ROPE_THETA),
            noise.astype(config.dtype), cache, cache_end, hole, lengths,
        )  # fmt: skip
        hidden = lookup(tree["embed"], tokens).astype(config.dtype)
        hidden = constrain(hidden, "batch", "length")

        def body(hidden, xs):
            number, layer = xs
            return _layer(context, number, layer, hidden)

        body = remat.rematerialised(body, config.remat)
        numbers = jnp.arange(config.num_layers)
        hidden, kv = jax.lax.scan(body, hidden, (numbers, tree["layers"]))
        shift, scale = _modulation(tree["output"], context.noise)
        x = layer_norm(hidden, tree["output"]["norm"], config.norm_eps)
        return Output(constrain(x * (1 + scale) + shift, "batch", "length"), kv)

    def head(self) -> Head:
        """The output projection."""
        return Head(self.tree["head"], self.tree["output"]["head_bias"])

    def cache(self, batch: int, slots: int, dtype: str | None = None) -> KVCache:
        """An empty cache for this architecture, in the dtype of its activations or another."""
        c = self.config
        return allocate(c.num_layers, batch, c.num_heads, slots, c.head_dim, dtype or c.dtype)


class _Context(NamedTuple):
    """What every layer of a pass shares."""

    config: DiTConfig
    mask: BlockMask
    angles: tuple[jax.Array, jax.Array]
    noise: jax.Array  # [B or 1, C]
    cache: KVCache | None
    cache_end: jax.Array | None
    hole: tuple[jax.Array, jax.Array] | None
    lengths: jax.Array | None


def _layer(context: _Context, number, layer: Params, hidden: jax.Array):
    config = context.config
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = _modulation(layer, context.noise)
    p = layer["attention"]
    x = layer_norm(hidden, p["norm"], config.norm_eps) * (1 + scale) + shift
    q, k, v = (jnp.einsum("bqd,dnh->bqnh", x, p[name].astype(x.dtype)) for name in "qkv")
    q, k = rotate(q, *context.angles), rotate(k, *context.angles)
    mixed = attend(
        q, k, v, context.mask, cache=context.cache, layer=number, cache_end=context.cache_end,
        hole=context.hole, lengths=context.lengths,
    )  # fmt: skip
    hidden = hidden + gate * jnp.einsum("bqnh,nhd->bqd", mixed, p["o"].astype(x.dtype))
    hidden = constrain(hidden, "batch", "length")
    p = layer["mlp"]
    x = layer_norm(hidden, p["norm"], config.norm_eps) * (1 + mlp_scale) + mlp_shift
    x = nn.gelu(_linear(p, "up", x), approximate=True)
    hidden = constrain(hidden + mlp_gate * _linear(p, "down", x), "batch", "length")
    return hidden, jnp.moveaxis(jnp.concatenate([k, v], axis=-1), 1, 2)


def _noise(p: Params, sigma: Float[Array, "B"]) -> Float[Array, "B C"]:
    """The embedding of a noise level, float32: waves of it, and two layers over them."""
    frequency = ROPE_THETA ** (-jnp.arange(_WAVES, dtype=jnp.float32) / _WAVES)
    angle = sigma[:, None].astype(jnp.float32) * frequency
    x = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    return nn.silu(_linear(p, "down", nn.silu(_linear(p, "up", x))))


def _modulation(p: Params, noise: jax.Array) -> list[jax.Array]:
    """Shifts, scales and gates [B or 1, 1, D] that the noise level makes."""
    made = jnp.einsum("bc,csd->sbd", noise, p["modulation"].astype(noise.dtype))
    return list((made + p["modulation_bias"].astype(noise.dtype)[:, None])[:, :, None])


def _linear(p: Params, name: str, x: jax.Array) -> jax.Array:
    return x @ p[name].astype(x.dtype) + p[f"{name}_bias"].astype(x.dtype)


def _init(key: jax.Array, shapes: Params | jax.ShapeDtypeStruct) -> Any:
    """As `tree.init`, but modulations are zero: layers start as the identity (adaLN-Zero)."""
    return jax.tree.map_with_path(
        lambda path, x: jnp.zeros_like(x) if path and "modulation" in path[-1].key else x,
        init(key, shapes),
    )


def _tree(c: DiTConfig) -> Params:
    sizes = {
        "layers": c.num_layers, "embed": c.dim, "heads": c.num_heads, "head_dim": c.head_dim,
        "ffn": c.ffn_dim, "vocab": c.vocab_size,
    }  # fmt: skip

    def entry(*axes: str | int) -> Entry:
        """Axes by name, or by size where nothing is split along them."""
        shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in axes)
        return Entry(shape, tuple(axis if isinstance(axis, str) else None for axis in axes))

    heads = entry("layers", "embed", "heads", "head_dim")
    return {
        "embed": entry("vocab", "embed"),
        "sigma": {
            "up": entry(2 * _WAVES, c.cond_dim),
            "up_bias": entry(c.cond_dim),
            "down": entry(c.cond_dim, c.cond_dim),
            "down_bias": entry(c.cond_dim),
        },
        "layers": {
            "modulation": entry("layers", c.cond_dim, 6, "embed"),
            "modulation_bias": entry("layers", 6, "embed"),
            "attention": {
                "norm": entry("layers", "embed"),
                "q": heads,
                "k": heads,
                "v": heads,
                "o": entry("layers", "heads", "head_dim", "embed"),
            },
            "mlp": {
                "norm": entry("layers", "embed"),
                "up": entry("layers", "embed", "ffn"),
                "up_bias": entry("layers", "ffn"),
                "down": entry("layers", "ffn", "embed"),
                "down_bias": entry("layers", "embed"),
            },
        },
        "output": {
            "modulation": entry(c.cond_dim, 2, "embed"),
            "modulation_bias": entry(2, "embed"),
            "norm": entry("embed"),
            "head_bias": entry("vocab"),
        },
        "head": entry("vocab", "embed"),
    }
