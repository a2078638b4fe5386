"""Every recipe by its name, what it is published for, and its options."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from dllm_jax.recipes import systems
from dllm_jax.recipes.row import Recipe


class Row(NamedTuple):
    """A line of the table of recipes."""

    make: Callable[..., Recipe]
    families: tuple[str, ...]  # of `model_type`s that it is published for
    noise: str
    attention: str
    logits: str  # the position whose output predicts position i


_LLADA = ("llada", "llada_moe")
_CAUSAL = ("llama", "qwen2", "qwen3", "qwen3_moe")

TABLE: dict[str, Row] = {
    "ar": Row(systems.ar, _CAUSAL, "-", "causal", "i-1"),
    "self_speculative": Row(systems.self_speculative, _CAUSAL, "masked", "causal, canvas", "i-1"),
    "block_diffusion": Row(systems.block_diffusion, _CAUSAL, "masked", "causal, canvas", "i-1"),
    "llada": Row(systems.llada, _LLADA, "masked", "bidirectional", "i"),
    "fast_dllm": Row(systems.fast_dllm, _LLADA, "masked", "bidirectional", "i"),
    "fast_dllm_prefix": Row(systems.fast_dllm_prefix, _LLADA, "masked", "bidirectional", "i"),
    "fast_dllm_dual": Row(systems.fast_dllm_dual, _LLADA, "masked", "bidirectional", "i"),
    "dream": Row(systems.dream, ("Dream",), "masked", "bidirectional", "i-1"),
    "dream_cached": Row(systems.dream_cached, ("Dream",), "masked", "bidirectional", "i-1"),
    "remdm": Row(systems.remdm, (*_LLADA, "Dream"), "masked", "bidirectional", "as trained"),
    "bd3lm": Row(systems.bd3lm, ("bd3lm",), "masked", "block-causal", "i"),
    "sdar": Row(systems.sdar, ("sdar", "sdar_moe"), "masked", "block-causal", "i"),
    "fast_dllm_v2": Row(systems.fast_dllm_v2, ("Fast_dLLM_Qwen",), "masked", "block-causal", "i-1"),
    "d2f": Row(systems.d2f, (*_LLADA, "Dream"), "masked", "block-causal", "as trained"),
    "llada2": Row(systems.llada2, ("llada2_moe",), "masked", "block-causal", "i"),
    "llada2_edit": Row(systems.llada2_edit, ("llada2_moe",), "masked", "block-causal", "i"),
    "diffusion_gemma": Row(
        systems.diffusion_gemma, ("diffusion_gemma",), "uniform", "causal, canvas", "i"
    ),
}  # fmt: skip
"""Every recipe by its name."""


def named(name: str, **options: Any) -> Recipe:
    """A recipe by its name.

    Raises:
      ValueError: no such recipe, or it has no such option.
    """
    if name not in TABLE:
        raise ValueError(f"no recipe {name!r}; there are {', '.join(TABLE)}")
    make = TABLE[name].make
    known = options_of(name)
    for option in options:
        if option not in known:
            raise ValueError(f"recipe {name} has no option {option!r}; it has {', '.join(known)}")
    return make(**options)


def options_of(name: str) -> dict[str, Any]:
    """The options of a recipe, with their defaults."""
    found = {}
    for parameter in inspect.signature(TABLE[name].make).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:  # a variant: what its original takes
            found.update({k: v for k, v in options_of("fast_dllm").items() if k != "cache"})
        else:
            found[parameter.name] = parameter.default
    return found


def for_family(family: str) -> str:
    """The name of the recipe that a family's published code uses.

    Raises:
      ValueError: no recipe is published for it.
    """
    first = {
        row_family: name for name, row in reversed(TABLE.items()) for row_family in row.families
    }
    if family not in first:
        raise ValueError(f"no recipe is known for {family!r}; give one of {', '.join(TABLE)}")
    return first[family]
