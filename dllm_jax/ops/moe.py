"""Mixtures of experts: which experts a token goes to, and what they make of it.

Experts run grouped: the pairs of a token and its expert are sorted by expert and every expert
multiplies its own rows once, so the work is that of the experts chosen, not of all of them.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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


def experts(
    x: Float[Array, "T D"],
    chosen: Int[Array, "T k"],
    weights: Float[Array, "T k"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    activation=jax.nn.silu,
) -> Float[Array, "T D"]:
    """The weighted sum of each token's experts, down(activation(gate(x)) * up(x)).

    The matrices multiply in the dtype of `x`; the sum over a token's experts is in float32.

    `lax.ragged_dot` multiplies grouped on TPU. JAX's lowering for the CPU, and for the GPU unless
    `jax_ragged_dot_use_gpu_pallas_triton_lowering` is set, lets every expert see every row.
    """
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat)  # stable: pairs of one expert stay in the order of their tokens
    sizes = jnp.bincount(flat, length=gate.shape[0]).astype(jnp.int32)
    rows = x[order // chosen.shape[1]]

    def grouped(rows, matrices):
        return jax.lax.ragged_dot(rows, matrices.astype(rows.dtype), sizes)

    out = grouped(activation(grouped(rows, gate)) * grouped(rows, up), down)
    out = jnp.zeros_like(out).at[order].set(out, unique_indices=True)
    out = out.reshape(*chosen.shape, -1).astype(jnp.float32)
    return jnp.einsum("tkd,tk->td", out, weights, precision="highest").astype(x.dtype)
