"""Diffusion language models in JAX: load, decode, watch, train.

import dllm_jax as dj

model, params = dj.load("smollm2-135m-instruct")
tokenizer = dj.Tokenizer.load("smollm2-135m-instruct")
out = dj.generate(
    model, params, [tokenizer.chat("Why is the sky blue?")],
    recipe=dj.recipes.block_diffusion(), max_new_tokens=64,
)
print(tokenizer.decode(out.tokens[0]))
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dllm_jax import (
        corruption,
        data,
        distributed,
        evaluation,
        likelihood,
        losses,
        policies,
        recipes,
        sharding,
        tasks,
        training,
    )
    from dllm_jax.checkpoint import (
        convert,
        export,
        load,
        load_adapter,
        load_part,
        save,
        save_adapter,
    )
    from dllm_jax.decode.generate import Prompt, generate, infill, pad, stream
    from dllm_jax.decode.state import DecodeState, Result, result
    from dllm_jax.generation_config import load_recipe, save_recipe
    from dllm_jax.nn.transformer import Transformer, TransformerConfig
    from dllm_jax.sharding import make_mesh
    from dllm_jax.tokenizer import Tokenizer
    from dllm_jax.trajectory import Trajectory, record

_NAMES = {
    "checkpoint": (
        "convert",
        "export",
        "load",
        "load_adapter",
        "load_part",
        "save",
        "save_adapter",
    ),
    "decode.generate": ("Prompt", "generate", "infill", "pad", "stream"),
    "decode.state": ("DecodeState", "Result", "result"),
    "generation_config": ("load_recipe", "save_recipe"),
    "nn.transformer": ("Transformer", "TransformerConfig"),
    "sharding": ("make_mesh",),
    "tokenizer": ("Tokenizer",),
    "trajectory": ("Trajectory", "record"),
}
_HOME = {name: room for room, names in _NAMES.items() for name in names}
_ROOMS = (
    "corruption", "data", "distributed", "evaluation", "likelihood", "losses", "policies",
    "recipes", "sharding", "tasks", "training",
)  # fmt: skip

__all__ = [
    "DecodeState",
    "Prompt",
    "Result",
    "Tokenizer",
    "Trajectory",
    "Transformer",
    "TransformerConfig",
    "convert",
    "corruption",
    "data",
    "distributed",
    "evaluation",
    "export",
    "generate",
    "infill",
    "likelihood",
    "load",
    "load_adapter",
    "load_part",
    "load_recipe",
    "losses",
    "make_mesh",
    "pad",
    "policies",
    "recipes",
    "record",
    "result",
    "save",
    "save_adapter",
    "save_recipe",
    "sharding",
    "stream",
    "tasks",
    "training",
]


def __getattr__(name: str):
    """Imports a public name at its first use: `import dllm_jax` alone stays instant."""
    if name in _HOME:
        value = getattr(importlib.import_module(f"dllm_jax.{_HOME[name]}"), name)
    elif name in _ROOMS:
        value = importlib.import_module(f"dllm_jax.{name}")
    else:
        raise AttributeError(f"module 'dllm_jax' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
