"""Which file knows which architecture: the only dicts of names.

A family is a module with `config_from_published` and its inverse `config_to_published`,
`tensor_maps` and `ignored`; one that llama.cpp stores too has `config_from_gguf` and
`gguf_tensor_maps`. Its configs name it: `config.family` is its key here.

A family whose folders hold constants beside the weights has `constants` (their names and values,
given the config) and `with_constants` (the config, given those that a folder has). One whose
tensors go by several names has `published_name`.
"""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from dllm_jax.models import bd3lm, diffusion_gemma, llada, llada2, llada_moe, llama
from dllm_jax.nn.dit import DiTConfig
from dllm_jax.nn.gemma import GemmaConfig
from dllm_jax.nn.transformer import TransformerConfig
from dllm_jax.nn.tree import Config

FAMILIES: dict[str, ModuleType] = {
    **dict.fromkeys(llama.KINDS, llama),
    "bd3lm": bd3lm,
    "diffusion_gemma": diffusion_gemma,
    "llada": llada,
    "llada_moe": llada_moe,
    "llada2_moe": llada2,
}
"""The `model_type` of a published config.json."""

ALIASES: dict[str, str] = {"lladamoe": "llada_moe", llada_moe.ARCHITECTURE: "llada_moe"}
"""Other names of a family: a model_type, or one of the `architectures` where that is shared."""

GGUF_FAMILIES: dict[str, ModuleType] = {"llama": llama, "qwen2": llama, "qwen3": llama}
"""The `general.architecture` of a GGUF file."""

CONFIGS: dict[str, type] = {
    "transformer": TransformerConfig,
    "dit": DiTConfig,
    "gemma": GemmaConfig,
}
"""The config classes, by the name that a folder of ours gives them."""


def family(fields: Mapping[str, Any]) -> ModuleType:
    """The module of a published config.json; an unknown kind is a ValueError that lists the known.

    It is told by the `model_type`, and by `architectures` where several share one.
    """
    kind = fields.get("model_type")
    names = [*(fields.get("architectures") or ()), kind]
    name = next((ALIASES[name] for name in names if name in ALIASES), kind)
    if name not in FAMILIES:
        raise ValueError(
            f"config.json has model_type={kind!r}, which is not known;"
            f" known are {', '.join(sorted(FAMILIES, key=str.lower))}"
        )
    return FAMILIES[name]


def family_of(config: Config) -> ModuleType:
    """The module of a config of ours, by its `family`."""
    name = getattr(config, "family", None)
    if name not in FAMILIES:
        raise ValueError(f"family={name!r} is not known; known are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def gguf_family(architecture: str | None) -> ModuleType:
    """The module of a GGUF architecture; an unknown one is a ValueError that lists the known."""
    if architecture not in GGUF_FAMILIES:
        raise ValueError(
            f"the GGUF file has architecture {architecture!r}, which is not known;"
            f" known are {', '.join(GGUF_FAMILIES)}"
        )
    return GGUF_FAMILIES[architecture]
