"""Architectures of published models by their names: numbers alone, no weights are there.

A plan needs no more. Figures are those of the published config.json files.
"""

import dataclasses
from typing import NamedTuple

from dllm_jax import checkpoint, sources
from dllm_jax.nn.adapters import AdapterConfig
from dllm_jax.nn.gemma import GemmaConfig
from dllm_jax.nn.transformer import TransformerConfig
from dllm_jax.ops.moe import MoEConfig
from dllm_jax.recipes.table import for_family

AnyConfig = TransformerConfig | GemmaConfig


def architecture(model: str) -> "Architecture":
    """The architecture of a name of `NAMED`, or of anything that `load` takes: its config alone.

    Raises:
      FileNotFoundError, ValueError: it is neither; names are listed.
    """
    if model in NAMED:
        return NAMED[model]
    try:
        config = checkpoint.read_config(sources.resolve(model))
    except (FileNotFoundError, ValueError) as error:
        names = ", ".join(NAMED)
        raise type(error)(f"{error} (a plan also knows the architectures {names})") from error
    if not isinstance(config, AnyConfig):
        raise ValueError(f"{model} is a {config.family}: a plan knows transformers, {AnyConfig}")
    return Architecture(config, for_family(config.family))


class Architecture(NamedTuple):
    """A published model: its numbers, the recipe that it is decoded by, and how far that goes."""

    config: AnyConfig
    recipe: str  # a name of `recipes.TABLE`
    block: int | None = None  # of the recipe, where it is not the recipe's own
    tokens_per_forward: float = 1.0  # reported for the recipe; 1 where none is


_LLADA2_MOE = MoEConfig(
    num_experts=256, experts_per_token=8, ffn_dim=512, shared_ffn_dim=512, first_dense=1,
    score="sigmoid", groups=8, top_groups=4, expert_bias=True, normalise=True, scale=2.5,
)  # fmt: skip
_LLADA2_MINI = TransformerConfig(
    family="llada2_moe", vocab_size=157_184, num_layers=20, dim=2048, num_heads=16, num_kv_heads=4,
    head_dim=128, ffn_dim=5120, rotary_dim=64, rope_theta=600_000.0, norm_eps=1e-6, qk_norm=True,
    max_length=32_768, attention="block_causal", block_size=32, alignment="same_position",
    mask_id=156_895, pad_id=156_892, eos_ids=(156_892,), moe=_LLADA2_MOE,
)  # fmt: skip
_QWEN = dict(
    dim=3584, num_layers=28, num_heads=28, num_kv_heads=4, head_dim=128, ffn_dim=18_944,
    vocab_size=152_064, rope_theta=1_000_000.0, norm_eps=1e-6, qkv_bias=True, max_length=131_072,
)  # fmt: skip

NAMED: dict[str, Architecture] = {
    "llada-8b": Architecture(
        TransformerConfig(
            family="llada", vocab_size=126_464, num_layers=32, dim=4096, num_heads=32,
            num_kv_heads=32, head_dim=128, ffn_dim=12_288, rope_theta=500_000.0,
            attention="bidirectional", alignment="same_position", mask_id=126_336,
            eos_ids=(126_081,), pad_id=126_081,
        ),
        "fast_dllm_dual",
    ),
    "dream-7b": Architecture(
        TransformerConfig(
            family="Dream", attention="bidirectional", mask_id=151_666, eos_ids=(151_643,),
            pad_id=151_643, **_QWEN,
        ),
        "dream_cached",
    ),
    "fast-dllm-v2-7b": Architecture(
        TransformerConfig(
            family="Fast_dLLM_Qwen", attention="block_causal", block_size=32, mask_id=151_665,
            eos_ids=(151_645,), pad_id=151_643, **_QWEN,
        ),
        "fast_dllm_v2",
    ),
    "sdar-8b": Architecture(
        TransformerConfig(
            family="sdar", vocab_size=151_936, num_layers=36, dim=4096, num_heads=32,
            num_kv_heads=8, head_dim=128, ffn_dim=12_288, rope_theta=1_000_000.0, norm_eps=1e-6,
            qk_norm=True, attention="block_causal", block_size=32, alignment="same_position",
            mask_id=151_669, eos_ids=(151_643,), pad_id=151_643, max_length=32_768,
        ),
        "sdar",
        32,
        32 / 15.0,  # 15.0 entries a token in blocks of 32 (FOCUS, arXiv 2601.23278)
    ),
    # 2.60 and 3.08: means over the benchmarks of LLaDA2.0 in the report of 2.1 (arXiv 2602.08676).
    "llada2-mini-16b": Architecture(_LLADA2_MINI, "llada2", tokens_per_forward=2.60),
    "llada2-flash-100b": Architecture(
        dataclasses.replace(
            _LLADA2_MINI, num_layers=32, dim=4096, num_heads=32, ffn_dim=9216,
            moe=dataclasses.replace(_LLADA2_MOE, ffn_dim=1024, shared_ffn_dim=1024),
        ),
        "llada2",
        tokens_per_forward=3.08,
    ),
    "diffusion-gemma-26b": Architecture(
        GemmaConfig(
            vocab_size=262_144, dim=2816, num_heads=16, ffn_dim=2112, num_experts=128,
            experts_per_token=8, expert_dim=704,
            layer_types=(*("sliding",) * 5, "full") * 5, head_dim=256, num_kv_heads=8, window=1024,
            full_head_dim=512, full_num_kv_heads=2,
        ),
        "diffusion_gemma",
        tokens_per_forward=19.7,  # its report, arXiv 2608.00146
    ),
    "smollm2-135m": Architecture(
        TransformerConfig(
            vocab_size=49_152, num_layers=30, dim=576, num_heads=9, num_kv_heads=3, head_dim=64,
            ffn_dim=1536, rope_theta=100_000.0, tied_head=True, eos_ids=(2,), pad_id=2,
            mask_id=49_152, adapter=AdapterConfig(rank=16),
        ),
        "self_speculative",
        tokens_per_forward=1.42,  # of the adapter that ships, width 2 (its model card)
    ),
}  # fmt: skip
"""By name."""
