"""The named systems: each a function that returns its recipe."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dllm_jax.ops.sampling import Sampling
from dllm_jax.policies import (
    AfterSteps,
    Ancestral,
    AnnealedTemperature,
    Blocks,
    ConfidenceThreshold,
    Distrust,
    EntropyBound,
    Factor,
    FirstHitting,
    Forbid,
    Guidance,
    NoEdits,
    Pipeline,
    Quota,
    ReMDM,
    ReNoise,
    Replace,
    SelfConditioning,
    Sliding,
    StableAndConfident,
    TimeGrid,
)
from dllm_jax.recipes.row import Denoise, Verified

# Causal models, with or without a diffusion adapter


def ar(*, temperature=0.0, top_k=0, top_p=1.0) -> Verified:
    """Autoregressive: one token a forward pass."""
    return Verified(sampling=_sampling(temperature, top_k, top_p))


def self_speculative(*, width: int = 2, temperature=0.0, top_k=0, top_p=1.0) -> Verified:
    """The tokens of `ar`, several a pass: drafted by diffusion, checked causally.

    Greedy: the same tokens as `ar`. With a temperature: the same distribution, by acceptance and
    residual resampling (Leviathan et al. 2023; drafts behind every outcome: TiDAR, 2511.08923).
    """
    if width < 1:
        raise ValueError(f"width={width} must be at least 1; recipes.ar() drafts nothing")
    return Verified(width=width, sampling=_sampling(temperature, top_k, top_p))


def block_diffusion(
    *, block_size: int = 4, threshold=0.9, temperature=0.0, top_k=0, top_p=1.0
) -> Denoise:
    """Block diffusion of a causal model, by a confidence threshold, over an exact prefix cache.

    Whatever is gapless goes into the cache in the next pass, and the canvas slides on; at a
    threshold of 1 this is `ar`.
    """
    return Denoise(
        width=Sliding(block_size),
        cache="exact",
        commit=ConfidenceThreshold(_real(threshold)),
        progress=False,
        sampling=_sampling(temperature, top_k, top_p),
    )


# Bidirectional canvases


def llada(
    *,
    block_size: int = 32,
    steps_per_block=None,
    remasking: str = "confidence",
    forbid: tuple[int, ...] = (),
    distrust: tuple[int, ...] = (),
    guidance=0.0,
    temperature=0.0,
    top_k=0,
    top_p=1.0,
) -> Denoise:
    """LLaDA's semi-autoregressive decoding (2502.09992, algorithm 5).

    Args:
      block_size: 0 decodes the whole canvas at once.
      steps_per_block: by default one token a step.
      remasking: "confidence" (low-confidence remasking) or "random".
      forbid: ids that are never written; with the end of text, `logits_eos_inf`.
      distrust: ids that are written last; with those of both ends, `confidence_eos_eot_inf`.
      guidance: scale of classifier-free guidance; 0 is off.
    """
    steps = (block_size or 1 << 20) if steps_per_block is None else steps_per_block
    commit: Any = Quota(steps, remasking)
    return Denoise(
        width=Blocks(block_size),
        commit=Distrust(tuple(distrust), commit) if distrust else commit,
        shape=Forbid(tuple(forbid)) if forbid else None,
        guidance=_guidance(guidance),
        sampling=_sampling(temperature, top_k, top_p),
    )


def fast_dllm(
    *,
    cache: str = "dual",
    block_size: int = 32,
    threshold=0.9,
    factor=None,
    steps_per_block=None,
    guidance=0.0,
    temperature=0.0,
    top_k=0,
    top_p=1.0,
) -> Denoise:
    """Fast-dLLM v1 on LLaDA (2505.22618): parallel decoding over an approximate cache.

    Args:
      cache: "none", "prefix" or "dual".
      threshold: of confidence; unless `factor` or `steps_per_block` (LLaDA's quota) is given.
    """
    if steps_per_block is not None:
        commit: Any = Quota(steps_per_block)
    elif factor is not None:
        commit = Factor(_real(factor))
    else:
        commit = ConfidenceThreshold(_real(threshold))
    return Denoise(
        width=Blocks(block_size),
        cache=cache,
        commit=commit,
        guidance=_guidance(guidance),
        sampling=_sampling(temperature, top_k, top_p),
    )


def fast_dllm_prefix(**options) -> Denoise:
    """`fast_dllm` with the prefix cached."""
    return fast_dllm(cache="prefix", **options)


def fast_dllm_dual(**options) -> Denoise:
    """`fast_dllm` with prefix and suffix cached."""
    return fast_dllm(cache="dual", **options)


_DREAM = {
    "entropy": "entropy",
    "topk_margin": "margin",
    "maskgit_plus": "confidence",
}


def dream(
    *, steps=128, alg: str = "entropy", alg_temp=0.0, eps=1e-3, temperature=0.0, top_k=0, top_p=1.0
) -> Denoise:
    """Dream's diffusion_generate: the whole canvas, on a time grid of `steps` steps (2508.15487).

    Args:
      alg: "entropy", "topk_margin", "maskgit_plus", or "origin" (random; needs a key).
      alg_temp: over 0, the order of positions is drawn (needs a key).
    """
    return Denoise(
        width=Blocks(0),
        commit=_dream_commit(alg, steps, eps, alg_temp),
        progress=False,
        confidence="sampled",
        sampling=_sampling(temperature, top_k, top_p),
    )


def dream_cached(
    *,
    cache: str = "dual",
    block_size: int = 32,
    threshold=0.9,
    alg: str = "confidence_threshold",
    steps_per_block: int | None = None,
    eps=1e-3,
    temperature=0.0,
    top_k=0,
    top_p=1.0,
) -> Denoise:
    """Fast-dLLM's block decoder for Dream: "prefix" or "dual" cache.

    The pass that opens a block writes its first token alone. Other `alg` than confidence_threshold
    follow Dream's time grid, `steps_per_block` steps a block.
    """
    commit: Any = ConfidenceThreshold(_real(threshold))
    if alg != "confidence_threshold":
        commit = _dream_commit(alg, steps_per_block or block_size, eps)
    return Denoise(
        width=Blocks(block_size),
        cache=cache,
        commit=commit,
        first="opening",
        progress=alg == "confidence_threshold",
        confidence="sampled",
        sampling=_sampling(temperature, top_k, top_p),
    )


def remdm(
    *, steps=128, schedule: str = "cap", eta=0.02, by_confidence: bool = False,
    temperature=1.0, top_k=0, top_p=1.0,
) -> Denoise:  # fmt: skip
    """Ancestral sampling with re-masking (ReMDM, 2503.00307) over the whole canvas; needs a key."""
    part = ReMDM(steps, _real(eta), schedule, by_confidence)
    return Denoise(
        width=Blocks(0),
        commit=part,
        revise=part,
        finish=AfterSteps(steps),
        progress=False,
        sampling=_sampling(temperature, top_k, top_p),
    )


# Block-causal models


def bd3lm(
    *, block_size: int = 16, sampler: str = "first_hitting", steps=5000, temperature=1.0,
    top_k=0, top_p=1.0,
) -> Denoise:  # fmt: skip
    """BD3-LM's semi-autoregressive sampling (2503.09573); needs a key.

    Args:
      sampler: "first_hitting", one random position a pass, or "ancestral", `steps` passes a block.
      top_p: of its nucleus, which leaves out the token that crosses it.
    """
    samplers = {"first_hitting": FirstHitting(), "ancestral": Ancestral(steps)}
    return Denoise(
        width=Blocks(block_size),
        cache="exact",
        aligned=True,
        commit=_chosen("sampler", sampler, samplers),
        progress=False,
        sampling=dataclasses.replace(_sampling(temperature, top_k, top_p), top_p_below=True),
    )


def sdar(
    *,
    block_size: int = 4,
    order: str = "dynamic",
    threshold=0.85,
    bound=0.1,
    steps_per_block=None,
    temperature=0.0,
    top_k=0,
    top_p=1.0,
) -> Denoise:
    """SDAR's block diffusion (2510.06303).

    Args:
      order: "dynamic" (over the threshold, and at least the quota), "static" (the quota's most
        confident), "sequential" (left to right) or "entropy_bound" (JetEngine's).
      steps_per_block: of the quota; by default one token a step.
    """
    steps = block_size if steps_per_block is None else steps_per_block
    orders = {
        "dynamic": ConfidenceThreshold(_real(threshold), Quota(steps, per="block")),
        "static": Quota(steps, per="block"),
        "sequential": Quota(steps, "position", per="block"),
        "entropy_bound": EntropyBound(_real(bound)),
    }
    return Denoise(
        width=Blocks(block_size),
        cache="exact",
        aligned=True,
        commit=_chosen("order", order, orders),
        confidence="sampled",
        sampling=_sampling(temperature, top_k, top_p),
    )


def fast_dllm_v2(
    *,
    block_size: int = 32,
    sub_block: int = 8,
    threshold=0.9,
    block_cache: bool = False,
    temperature=0.0,
    top_k=0,
    top_p=0.95,
) -> Denoise:
    """Fast-dLLM v2 (2509.26328): sub-blocks of a block from left to right, shifted outputs.

    The pass that caches a block writes the first token of the next. `block_cache` feeds a sub-block
    alone once its first token is there (its dual cache; approximate).
    """
    return Denoise(
        width=Blocks(block_size, sub_block),
        cache="exact_sub_block" if block_cache else "exact",
        aligned=True,
        first="commit",
        commit=ConfidenceThreshold(_real(threshold)),
        confidence="sampled",
        sampling=_sampling(temperature, top_k, top_p),
    )


def d2f(
    *,
    block_size: int = 32,
    blocks: int = 4,
    add=0.1,
    complete=0.95,
    threshold=0.9,
    temperature=0.0,
    top_k=0,
    top_p=1.0,
) -> Denoise:
    """Discrete diffusion forcing (2508.09192): a pipeline of blocks over an exact cache."""
    return Denoise(
        width=Pipeline(block_size, blocks, _real(add), _real(complete)),
        cache="exact",
        commit=ConfidenceThreshold(_real(threshold)),
        confidence="sampled",
        sampling=_sampling(temperature, top_k, top_p),
    )


def llada2(
    *, block_size: int = 32, threshold=0.95, steps_per_block=None, temperature=0.0, top_k=0,
    top_p=1.0,
) -> Denoise:  # fmt: skip
    """LLaDA2.0: all over the threshold, and at least the quota of the block."""
    steps = block_size if steps_per_block is None else steps_per_block
    return Denoise(
        width=Blocks(block_size),
        cache="exact",
        aligned=True,
        commit=ConfidenceThreshold(_real(threshold), Quota(steps, per="block")),
        confidence="sampled",
        sampling=_sampling(temperature, top_k, top_p),
    )


def llada2_edit(
    *, block_size: int = 32, threshold=0.7, edit_threshold=0.5, max_edit_steps=16,
    temperature=0.0, top_k=0, top_p=1.0,
) -> Denoise:  # fmt: skip
    """LLaDA2.1: as LLaDA2.0, and written tokens of the block are replaced while it is open."""
    return Denoise(
        width=Blocks(block_size),
        cache="exact",
        aligned=True,
        commit=ConfidenceThreshold(_real(threshold)),
        revise=Replace(_real(edit_threshold)),
        finish=NoEdits(max_edit_steps),
        confidence="sampled",
        sampling=_sampling(temperature, top_k, top_p),
    )


def diffusion_gemma(
    *, canvas: int = 256, bound=0.1, steps=48, hot=0.8, cold=0.4, entropy=0.005
) -> Denoise:
    """DiffusionGemma: uniform noise, entropy bound, self-conditioning; needs a key.

    Args:
      canvas: positions of a block; the model's `canvas_length`.
      bound: of the joint error of accepted tokens, in nats.
      hot, cold: temperatures at the first step, and behind the last.
      entropy: a stable canvas whose mean entropy (nats) is below this is done.
    """
    return Denoise(
        width=Blocks(canvas),
        cache="exact",
        commit=EntropyBound(_real(bound)),
        revise=ReNoise(),
        finish=StableAndConfident(_real(entropy), steps),
        carry=SelfConditioning(),
        shape=AnnealedTemperature(_real(hot), _real(cold), steps),
        sampling=Sampling(1.0),
    )


def _chosen(option: str, choice: str, known: Mapping[str, Any]) -> Any:
    if choice not in known:
        raise ValueError(f"{option}={choice!r} is none of {', '.join(known)}")
    return known[choice]


def _dream_commit(alg: str, steps, eps, alg_temp=0.0) -> Any:
    if alg == "origin":
        return Ancestral(steps, _real(eps))
    return TimeGrid(steps, _real(eps), _chosen("alg", alg, _DREAM), _real(alg_temp))


def _guidance(scale) -> Guidance | None:
    return Guidance(_real(scale)) if isinstance(scale, jax.Array) or scale else None


def _sampling(temperature, top_k, top_p) -> Sampling:
    if isinstance(top_k, float | np.floating) and top_k != int(top_k):
        raise ValueError(f"top_k={top_k} must be a whole number")
    whole = top_k if isinstance(top_k, jax.Array) else int(top_k)
    return Sampling(_real(temperature), whole, _real(top_p))


def _real(number):
    """One type for every way to write a number, so that 1 and 1.0 share a compiled program."""
    return number if isinstance(number, jax.Array) else float(number)
