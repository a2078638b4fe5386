"""Every named recipe with a tiny model that it decodes: for tests of where and how programs run."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dllm_jax import recipes
from dllm_jax.nn.dit import DiTConfig
from dllm_jax.nn.gemma import GemmaConfig
from dllm_jax.nn.tree import param_shapes
from dllm_jax.ops.moe import MoEConfig
from dllm_jax.recipes import Recipe
from dllm_jax.testing import tiny
from dllm_jax.typing import Params


class System(NamedTuple):
    """A recipe, and a model for it: a key of `MODELS`."""

    model: str
    recipe: Recipe
    draws: bool = False  # whether it needs a key


VOCABULARY = 32  # the mask token, where a model has one within, is the last
_MOE = MoEConfig(
    num_experts=4, experts_per_token=2, ffn_dim=16, shared_ffn_dim=16, first_dense=1,
    score="sigmoid", normalise=True, expert_bias=True,
)  # fmt: skip
_INSIDE: dict[str, Any] = {"adapter": False, "mask_id": VOCABULARY - 1}


def _random(config: Any) -> tuple[Any, Params]:
    """A module, and numbers that are all of them felt: a fresh one's modulations are zero."""
    rng = np.random.default_rng(0)
    draw = lambda s: 0.3 * rng.normal(size=s.shape) + (len(s.shape) < 3)  # noqa: E731
    params = jax.tree.map(lambda s: jnp.asarray(draw(s), s.dtype), param_shapes(config))
    return config.build(), params


MODELS: dict[str, Callable[[], tuple[Any, Params]]] = {
    "causal": tiny,
    "llada": lambda: tiny(attention="bidirectional", alignment="same_position", **_INSIDE),
    "dream": lambda: tiny(attention="bidirectional", qkv_bias=True, **_INSIDE),
    "sdar": lambda: tiny(
        attention="block_causal", alignment="same_position", block_size=8, qk_norm=True, **_INSIDE
    ),
    "fast_dllm_v2": lambda: tiny(attention="block_causal", block_size=16, qkv_bias=True, **_INSIDE),
    "llada2": lambda: tiny(
        attention="block_causal", alignment="same_position", block_size=8, moe=_MOE, **_INSIDE
    ),
    "bd3lm": lambda: _random(
        DiTConfig(
            vocab_size=VOCABULARY, num_layers=2, dim=32, num_heads=4, cond_dim=8, max_length=512,
            block_size=4, mask_id=VOCABULARY - 1, eos_ids=(1,),
        )
    ),
    "diffusion_gemma": lambda: _random(
        GemmaConfig(
            vocab_size=VOCABULARY, dim=32, num_heads=4, ffn_dim=48, num_experts=4,
            experts_per_token=2, expert_dim=16, layer_types=("sliding", "full"), head_dim=8,
            num_kv_heads=2, window=6, full_head_dim=16, full_num_kv_heads=2, canvas_length=16,
            max_length=512, eos_ids=(1,),
        )
    ),
}  # fmt: skip

SYSTEMS: dict[str, System] = {
    "ar": System("causal", recipes.ar(temperature=0.7), draws=True),
    "self_speculative": System("causal", recipes.self_speculative(width=2)),
    "block_diffusion": System("causal", recipes.block_diffusion(block_size=4, threshold=0.3)),
    "llada": System("llada", recipes.llada(block_size=16, steps_per_block=8, guidance=0.5)),
    "fast_dllm": System("llada", recipes.fast_dllm(block_size=16, threshold=0.2)),
    "fast_dllm_prefix": System("llada", recipes.fast_dllm_prefix(block_size=8, threshold=0.2)),
    "fast_dllm_dual": System("llada", recipes.fast_dllm_dual(block_size=8, factor=0.8)),
    "dream": System("dream", recipes.dream(steps=8)),
    "dream_cached": System("dream", recipes.dream_cached(cache="dual", block_size=8)),
    "remdm": System("llada", recipes.remdm(steps=8, eta=0.3, schedule="rescale"), draws=True),
    "bd3lm": System("bd3lm", recipes.bd3lm(block_size=4), draws=True),
    "sdar": System("sdar", recipes.sdar(block_size=8, temperature=0.8, top_k=5), draws=True),
    "fast_dllm_v2": System(
        "fast_dllm_v2", recipes.fast_dllm_v2(block_size=16, sub_block=4, block_cache=True)
    ),
    "d2f": System(
        "llada", recipes.d2f(block_size=8, blocks=2, add=0.3, complete=0.6, threshold=0.2)
    ),
    "llada2": System("llada2", recipes.llada2(block_size=8, threshold=0.3)),
    "llada2_edit": System(
        "llada2", recipes.llada2_edit(block_size=8, threshold=0.3, edit_threshold=0.3)
    ),
    "diffusion_gemma": System(
        "diffusion_gemma", recipes.diffusion_gemma(canvas=16, steps=2, bound=2.0, entropy=4.0),
        draws=True,
    ),
}  # fmt: skip
"""By the names of `recipes.TABLE`."""


def prompts(rows: int, longest: int, seed: int = 7) -> list[list[int]]:
    """Ragged rows of ids, the first one the longest."""
    rng = np.random.default_rng(seed)
    lengths = [longest, *rng.integers(3, longest, rows - 1)]
    return [rng.integers(3, VOCABULARY - 2, n).tolist() for n in lengths]
