"""Named ways to decode, as data: pytrees whose numbers are traced and whose structure is static.

    recipe = sdar(block_size=8, threshold=0.9)      # a published system, by its name
    recipe = named("sdar", block_size=8)            # the same, from a string
    recipe = dataclasses.replace(recipe, commit=EntropyBound(0.2))

`TABLE` lists them; `to_dict` and `from_dict` write and read any recipe made of the parts here.
"""

from dllm_jax.recipes.data import from_dict, to_dict
from dllm_jax.recipes.row import Denoise, Recipe, Verified
from dllm_jax.recipes.systems import (
    ar,
    bd3lm,
    block_diffusion,
    d2f,
    diffusion_gemma,
    dream,
    dream_cached,
    fast_dllm,
    fast_dllm_dual,
    fast_dllm_prefix,
    fast_dllm_v2,
    llada,
    llada2,
    llada2_edit,
    remdm,
    sdar,
    self_speculative,
)
from dllm_jax.recipes.table import TABLE, Row, for_family, named, options_of

__all__ = [
    "TABLE",
    "Denoise",
    "Recipe",
    "Row",
    "Verified",
    "ar",
    "bd3lm",
    "block_diffusion",
    "d2f",
    "diffusion_gemma",
    "dream",
    "dream_cached",
    "fast_dllm",
    "fast_dllm_dual",
    "fast_dllm_prefix",
    "fast_dllm_v2",
    "for_family",
    "from_dict",
    "llada",
    "llada2",
    "llada2_edit",
    "named",
    "options_of",
    "remdm",
    "sdar",
    "self_speculative",
    "to_dict",
]
