"""Which file knows which architecture: the only dict of names.

A family is a module with `config_from_published`, `tensor_maps` and `ignored`; one that llama.cpp
stores too has `config_from_gguf` and `gguf_tensor_maps`.
"""

from types import ModuleType

from dllm_jax.models import llada, llama

FAMILIES: dict[str, ModuleType] = {
    "llada": llada,
    "llama": llama,
    "qwen2": llama,
    "qwen3": llama,
}
"""The `model_type` of a published config.json."""

GGUF_FAMILIES: dict[str, ModuleType] = {"llama": llama, "qwen2": llama, "qwen3": llama}
"""The `general.architecture` of a GGUF file."""


def family(model_type: str | None) -> ModuleType:
    """The module of a published model_type; an unknown one is a ValueError that lists the known."""
    if model_type not in FAMILIES:
        raise ValueError(
            f"config.json has model_type={model_type!r}, which is not known;"
            f" known are {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def gguf_family(architecture: str | None) -> ModuleType:
    """The module of a GGUF architecture; an unknown one is a ValueError that lists the known."""
    if architecture not in GGUF_FAMILIES:
        raise ValueError(
            f"the GGUF file has architecture {architecture!r}, which is not known;"
            f" known are {', '.join(GGUF_FAMILIES)}"
        )
    return GGUF_FAMILIES[architecture]
