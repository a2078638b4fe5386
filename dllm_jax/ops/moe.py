"""Mixtures of experts: which experts a token goes to, and what they make of it.

Experts run grouped: the tokens that chose an expert lie together and are multiplied by it at once,
so the work is that of the experts chosen, not of all of them.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dllm_jax.ops.grouped import multiply, ragged, tiles
from dllm_jax.sharding import axis_sizes, mapped, spec, split
from pallas_kernels.platform import kernels_of

_TILES_ON_GPU = 16  # of one step: a step of one is launches and little else


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The experts of a layer, and the router that chooses among them."""

    num_experts: int
    experts_per_token: int
    ffn_dim: int  # of one expert
    shared_ffn_dim: int = 0  # of the expert that every token passes; 0: there is none
    first_dense: int = 0  # the layers before this one have a dense feed-forward instead
    score: str = "softmax"  # how the router's logits become scores: softmax | sigmoid
    groups: int = 1  # experts lie in groups of equal size, of which
    top_groups: int = 1  # a token chooses from the best ones only
    expert_bias: bool = False  # a bias is added to the scores before the choice
    biased_weights: bool = False  # and stays in the weights of those chosen
    normalise: bool = False  # the weights of a token's experts sum to 1, before the scale
    scale: float = 1.0  # of the weights

    def __post_init__(self):
        if self.score not in ("softmax", "sigmoid"):
            raise ValueError(f"score={self.score!r} is neither softmax nor sigmoid")
        if self.num_experts % self.groups:
            raise ValueError(
                f"num_experts={self.num_experts} must be a multiple of groups={self.groups}"
            )
        if not 1 <= self.top_groups <= self.groups:
            raise ValueError(f"top_groups={self.top_groups} must be from 1 to {self.groups}")
        within = self.top_groups * (self.num_experts // self.groups)
        if not 1 <= self.experts_per_token <= within:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} must be from 1 to {within}, the"
                " experts that a token may choose from"
            )


def route(
    logits: Float[Array, "T E"], bias: Float[Array, "E"] | None, config: MoEConfig
) -> tuple[Int[Array, "T k"], Float[Array, "T k"]]:
    """Each token's experts and their weights, float32.

    Softmax over all experts and the best of them (Fedus et al. 2022, as in Qwen3-MoE and
    LLaDA-MoE), or sigmoid scores chosen within the best groups (DeepSeek-V3, arXiv 2412.19437,
    equations 13 to 16, as in LLaDA2.0): a group counts by the sum of its two best experts, the bias
    decides who is chosen, and the scores without it are the weights.

    Args:
      bias: added to the scores for the choice; None where `config.expert_bias` is False.
    """
    logits = logits.astype(jnp.float32)
    scores = jax.nn.softmax(logits) if config.score == "softmax" else jax.nn.sigmoid(logits)
    ranked = scores if bias is None else scores + bias.astype(jnp.float32)
    allowed = ranked
    if config.groups > 1:
        grouped = ranked.reshape(len(ranked), config.groups, -1)
        best, _ = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))
        _, kept = jax.lax.top_k(best.sum(axis=-1), config.top_groups)
        open_ = jax.nn.one_hot(kept, config.groups, dtype=jnp.bool_).any(axis=1)
        allowed = jnp.where(open_[..., None], grouped, -jnp.inf).reshape(ranked.shape)
    _, chosen = jax.lax.top_k(allowed, config.experts_per_token)
    source = ranked if config.biased_weights else scores
    weights = jnp.take_along_axis(source, chosen, axis=-1)
    if config.normalise:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return chosen, weights * config.scale


class Stack(NamedTuple):
    """The experts of all layers, and the layer that is meant."""

    layer: jax.Array  # int32[]
    gate: jax.Array  # [Ly, E, D, F]
    up: jax.Array  # [Ly, E, D, F]
    down: jax.Array  # [Ly, E, F, D]


def experts(
    x: Float[Array, "*T D"],
    chosen: Int[Array, "*T k"],
    weights: Float[Array, "*T k"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
    *,
    stack: Stack | None = None,
) -> Float[Array, "*T D"]:
    """The weighted sum of each token's experts, down(activation(gate(x)) * up(x)).

    The matrices multiply in the dtype of `x`; the sum over a token's experts is in float32. The
    backward pass computes the experts again, and keeps nothing but the arguments.

    TPUs multiply by `lax.ragged_dot`, which is grouped there, CPUs and GPUs by `grouped.multiply`.

    On a mesh, each device runs its own experts (axis "expert"), or its own columns of them
    ("tensor"). Tokens that lie along the expert axis, as rows of a batch do, are gathered for that,
    and what the devices made of them is added up where they came from.

    Args:
      x, chosen, weights: of tokens, or of rows of them: [B, T, ...].
      stack: where `gate`, `up` and `down` lie among those of other layers. A loop over experts
        reads them there, so that a scan which hands the layers round copies none of them.
        Gradients go to the matrices alone: put the stack in `stop_gradient` before the scan.
    """
    own = gate, up, down
    sizes = axis_sizes()
    if not sizes:
        return _of_tokens(activation, x, chosen, weights, own, stack)
    rows = split("batch", len(x)), *(split("length", n) for n in x.shape[1:2] if x.ndim > 2)
    by, columns = split("expert", len(gate)), split("ffn", gate.shape[2])
    lie = spec(by, None, columns), spec(by, None, columns), spec(by, columns)
    arrays: dict[str, Any] = {"x": x, "chosen": chosen, "weights": weights, "own": own}
    specs: dict[str, Any] = {**dict.fromkeys(arrays, spec(*rows)), "own": lie}
    if stack is not None and "fsdp" not in sizes:  # over it, all layers would be gathered
        arrays["stack"] = stack
        specs["stack"] = jax.tree.unflatten(
            jax.tree.structure(stack), (spec(), *(spec(None, *each) for each in lie))
        )

    def run(arrays):
        travels = by and by[0] in rows[0]
        x, chosen, weights = arrays["x"], arrays["chosen"], arrays["weights"]
        if travels:
            x, chosen, weights = jax.lax.all_gather((x, chosen, weights), *by, tiled=True)
        if by:
            count = len(arrays["own"][0])
            chosen = chosen - jax.lax.axis_index(*by) * count
            here = (chosen >= 0) & (chosen < count)
            chosen, weights = jnp.where(here, chosen, count), jnp.where(here, weights, 0)
        parts = math.prod(sizes[axis] for axis in by)
        stack = arrays.get("stack")
        made = _of_tokens(activation, x, chosen, weights, arrays["own"], stack, parts)
        if columns:
            made = jax.lax.psum(made, columns)
        if travels:
            return jax.lax.psum_scatter(made, *by, tiled=True)
        return jax.lax.psum(made, by) if by else made

    return mapped(run, (specs,), specs["x"])(arrays)


def _of_tokens(activation, x, chosen, weights, own, stack, parts=1) -> jax.Array:
    """`experts` of one device.

    Args:
      parts: devices that share the experts; pairs of the others have a number that none has here.
    """
    if stack is None:
        stack = Stack(jnp.int32(0), *(matrices[None] for matrices in jax.lax.stop_gradient(own)))
    flat = (y.reshape(-1, y.shape[-1]) for y in (x, chosen, weights))
    return _experts(activation, parts, *flat, own, stack).reshape(x.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _experts(activation, parts, *args):
    def run(way, *args):
        return way(activation, *args)

    return _on_platform(parts, run, *args)


def _forward(activation, parts, *args):
    return _experts(activation, parts, *args), args


def _backward(activation, parts, saved, grad):
    def pull(way, x, chosen, weights, own, stack, grad):
        if isinstance(way, _Pieces):
            return way.pull(activation, x, chosen, weights, own, stack, grad)

        def run(x, weights, own):
            return way(activation, x, chosen, weights, own, stack)

        return jax.vjp(run, x, weights, own)[1](grad)

    x, weights, own = _on_platform(parts, pull, *saved, grad)
    return x, None, weights, own, None


_experts.defvjp(_forward, _backward)


def _on_platform(parts, run, *args):
    """`run` with the way to multiply of the platform that the program is compiled for."""
    # Over several devices the stack would be gathered as a whole, not layer by layer.
    stacked = kernels_of() == "tpu"
    ragged_way = partial(_ragged, stacked) if parts == 1 else _Pieces(stacked, parts)
    return jax.lax.platform_dependent(
        *args,
        cpu=partial(run, partial(_tiled, 1)),
        cuda=partial(run, partial(_tiled, _TILES_ON_GPU)),
        default=partial(run, ragged_way),
    )


def _tiled(at_once, activation, x, chosen, weights, own, stack):
    lie = tiles(chosen, len(own[0]), at_once)

    def product(rows, own, matrices):
        return multiply(at_once, rows, own, matrices, stack.layer, lie.group, lie.used)

    gate, up, down = zip(own, stack[1:], strict=True)
    rows = x.at[lie.source].get(mode="fill", fill_value=0)
    out = product(activation(product(rows, *gate)) * product(rows, *up), *down)
    out = out.reshape(-1, out.shape[-1]).at[lie.slot].get(mode="fill", fill_value=0)
    return _summed(out, weights).astype(x.dtype)


def _ragged(stacked, activation, x, chosen, weights, own, stack):
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat)  # stable: pairs of one expert stay in the order of their tokens
    sizes = jnp.bincount(flat, length=len(own[0])).astype(jnp.int32)
    rows = x[order // chosen.shape[1]]
    out = _multiplied(stacked, activation, rows, own, stack, sizes)
    out = jnp.zeros_like(out).at[order].set(out, unique_indices=True)
    return _summed(out.reshape(*chosen.shape, -1), weights).astype(x.dtype)


def _multiplied(stacked, activation, rows, own, stack, sizes):
    """What their experts make of rows that lie in the order of experts."""

    def product(rows, own, matrices):
        if not stacked:
            return jax.lax.ragged_dot(rows, own.astype(rows.dtype), sizes)
        return ragged(rows, own, matrices, stack.layer, sizes)

    gate, up, down = zip(own, stack[1:], strict=True)
    return product(activation(product(rows, *gate)) * product(rows, *up), *down)


class _Pieces(NamedTuple):
    """As `_ragged`, of those pairs alone that have an expert here, a piece of them at a time.

    A device then holds about its share of the pairs, not all of them; of an uneven choice it takes
    more pieces than one, as many as it needs.
    """

    stacked: bool
    parts: int  # devices that share the experts

    def __call__(self, activation, x, chosen, weights, own, stack):
        lie = _Lie.of(chosen, len(own[0]), self.parts)

        def step(i, total):
            made = self._made(activation, lie, i, x, weights, own, stack)
            return total.at[lie.pairs(i) // chosen.shape[1]].add(made)

        total = jax.lax.fori_loop(0, lie.pieces, step, jnp.zeros(x.shape, jnp.float32))
        return total.astype(x.dtype)

    def pull(self, activation, x, chosen, weights, own, stack, grad):
        """The gradients of `x`, `weights` and `own`."""
        lie, given = _Lie.of(chosen, len(own[0]), self.parts), (x, weights, own)

        def step(i, sums):
            def run(x, weights, own):
                return self._made(activation, lie, i, x, weights, own, stack)

            own_grad = grad[lie.pairs(i) // chosen.shape[1]].astype(jnp.float32)
            found = jax.vjp(run, *given)[1](own_grad)
            return jax.tree.map(lambda total, y: total + y.astype(total.dtype), sums, found)

        sums = jax.tree.map(lambda y: jnp.zeros(y.shape, jnp.float32), given)
        sums = jax.lax.fori_loop(0, lie.pieces, step, sums)
        return jax.tree.map(lambda total, y: total.astype(y.dtype), sums, given)

    def _made(self, activation, lie: "_Lie", i, x, weights, own, stack) -> jax.Array:
        """What the experts make of the pairs of a piece, by their weights, float32."""
        pairs, there = lie.pairs(i), lie.there(i)[:, None]
        rows = jnp.where(there, x[pairs // weights.shape[1]], 0)
        out = _multiplied(self.stacked, activation, rows, own, stack, lie.sizes_of(i))
        # No group has the rows behind the last pair: what is there is nothing's product.
        return jnp.where(there, out, 0).astype(jnp.float32) * weights.reshape(-1)[pairs][:, None]


class _Lie(NamedTuple):
    """Where the pairs of a device lie: in the order of their experts, those of others last."""

    order: jax.Array  # int32[n * P]
    ends: jax.Array  # int32[E]: of each expert's pairs
    size: int  # P, of a piece

    @classmethod
    def of(cls, chosen, experts: int, parts: int) -> "_Lie":
        flat = chosen.reshape(-1)
        size = min(-(-5 * flat.size // (4 * parts * 8)) * 8, flat.size)  # a quarter above its share
        order = jnp.argsort(flat).astype(jnp.int32)
        order = jnp.pad(order, (0, -flat.size % size))
        return cls(order, jnp.cumsum(jnp.bincount(flat, length=experts)).astype(jnp.int32), size)

    @property
    def pieces(self) -> jax.Array:
        """How many hold a pair of this device's."""
        return -(-self.ends[-1] // self.size)

    def pairs(self, i) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(self.order, i * self.size, self.size)

    def there(self, i) -> jax.Array:
        """Which of a piece's pairs are this device's."""
        return i * self.size + jnp.arange(self.size) < self.ends[-1]

    def sizes_of(self, i) -> jax.Array:
        """Pairs of each expert in a piece."""
        ends = jnp.clip(self.ends - i * self.size, 0, self.size)
        return jnp.diff(ends, prepend=0)


def _summed(out: Float[Array, "T k D"], weights: Float[Array, "T k"]) -> Float[Array, "T D"]:
    """The weighted sum over a token's experts, float32."""
    wide = out.astype(jnp.float32)
    return jnp.einsum("tkd,tk->td", wide, weights, precision="highest")
