"""BD3-LM (Arriola et al. 2025, arXiv 2503.09573): names and fields of the published models.

Their tensors are named in the Hugging Face models as here; the authors' own checkpoints lack the
"backbone." (`published_name` adds it). Beside the weights lie three constants: the frequencies of
the rotary positions, and the two ends of the noise levels, which config.json has too.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from dllm_jax.models.published import eos_ids, needed, pad_id, refuse, special_ids
from dllm_jax.models.tensors import TensorMap
from dllm_jax.nn.dit import ROPE_THETA, DiTConfig

_GPT2 = 50257  # tokens, of which the last ends a text (and begins one); the mask comes behind them


def config_from_published(fields: Mapping[str, Any]) -> DiTConfig:
    """The config of a published config.json with model_type bd3lm.

    Raises:
      ValueError: a field is missing, or asks for something that the model does not do.
    """
    refuse(fields, "causal", False)
    refuse(fields, "adaln", True)
    refuse(fields, "cross_attn", True)
    refuse(fields, "time_conditioning", False)
    vocab = needed(fields, "vocab_size")
    if not eos_ids(fields) and vocab == _GPT2 + 1:
        fields = {**fields, "eos_token_id": _GPT2 - 1}
    mask = fields.get("mask_token_id")
    return DiTConfig(
        vocab_size=vocab,
        num_layers=needed(fields, "n_blocks"),
        dim=needed(fields, "hidden_dim"),
        num_heads=needed(fields, "n_heads"),
        cond_dim=needed(fields, "cond_dim"),
        max_length=needed(fields, "model_length"),
        block_size=needed(fields, "block_size"),
        mask_id=vocab - 1 if mask is None else mask,
        eos_ids=eos_ids(fields),
        pad_id=pad_id(fields),
        noise_min=float(fields.get("sampling_eps_min", 1e-3)),
        noise_max=float(fields.get("sampling_eps_max", 0.999)),
    )


def config_to_published(config: DiTConfig) -> dict[str, Any]:
    """The inverse of `config_from_published`: a config.json that the authors' code reads."""
    return {
        "model_type": "bd3lm",
        "architectures": ["BD3LM"],
        "vocab_size": config.vocab_size,
        "n_blocks": config.num_layers,
        "hidden_dim": config.dim,
        "n_heads": config.num_heads,
        "cond_dim": config.cond_dim,
        "model_length": config.max_length,
        "block_size": config.block_size,
        "causal": False,
        "adaln": True,
        "cross_attn": True,
        "time_conditioning": False,
        "var_min": True,
        "sampling_eps_min": config.noise_min,
        "sampling_eps_max": config.noise_max,
        "attn_backend": "sdpa",
        **special_ids(config),
    }


def tensor_maps(config: DiTConfig) -> tuple[TensorMap, ...]:
    """The published names."""
    layer, noise, last = (
        "backbone." + part for part in ("blocks.{layer}.", "sigma_map.mlp.", "output_layer.")
    )
    return (
        TensorMap("backbone.vocab_embed.embedding", "embed", "V D -> V D"),
        TensorMap(noise + "0.weight", "sigma/up", "C W -> W C"),
        TensorMap(noise + "0.bias", "sigma/up_bias", "C -> C"),
        # a square matrix: published as "out in", ours is "in out"
        TensorMap(noise + "2.weight", "sigma/down", "c C -> C c"),
        TensorMap(noise + "2.bias", "sigma/down_bias", "C -> C"),
        TensorMap(layer + "adaLN_modulation.weight", "layers/modulation", "(6 D) C -> C 6 D"),
        TensorMap(layer + "adaLN_modulation.bias", "layers/modulation_bias", "(6 D) -> 6 D"),
        TensorMap(layer + "norm1.weight", "layers/attention/norm", "D -> D"),
        TensorMap(
            layer + "attn_qkv.weight",
            ("layers/attention/q", "layers/attention/k", "layers/attention/v"),
            ("(N H) D -> D N H",) * 3,
        ),
        TensorMap(layer + "attn_out.weight", "layers/attention/o", "D (N H) -> N H D"),
        TensorMap(layer + "norm2.weight", "layers/mlp/norm", "D -> D"),
        TensorMap(layer + "mlp.0.weight", "layers/mlp/up", "F D -> D F"),
        TensorMap(layer + "mlp.0.bias", "layers/mlp/up_bias", "F -> F"),
        TensorMap(layer + "mlp.2.weight", "layers/mlp/down", "D F -> F D"),
        TensorMap(layer + "mlp.2.bias", "layers/mlp/down_bias", "D -> D"),
        TensorMap(last + "adaLN_modulation.weight", "output/modulation", "(2 D) C -> C 2 D"),
        TensorMap(last + "adaLN_modulation.bias", "output/modulation_bias", "(2 D) -> 2 D"),
        TensorMap(last + "norm_final.weight", "output/norm", "D -> D"),
        TensorMap(last + "linear.weight", "head", "V D -> V D"),
        TensorMap(last + "linear.bias", "output/head_bias", "V -> V"),
    )


_FREQUENCIES = "backbone.rotary_emb.inv_freq"
_NOISE = {"sampling_eps_min": "noise_min", "sampling_eps_max": "noise_max"}


def constants(config: DiTConfig) -> dict[str, np.ndarray]:
    """Published tensors that are no weights: the config says them."""
    planes = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    # In the steps of the published code, each of them rounded to float32.
    waves = np.power(ROPE_THETA, planes.astype(np.float64)).astype(np.float32)
    found = {_FREQUENCIES: np.float32(1) / waves}
    return found | {name: np.array(getattr(config, own), "f4") for name, own in _NOISE.items()}


def with_constants(config: DiTConfig, stored: Mapping[str, np.ndarray]) -> DiTConfig:
    """The config of a folder that has some of its `constants`.

    Noise levels are those of the tensors, as in the published code: training moves them, and
    config.json stays behind.

    Raises:
      ValueError: the rotary frequencies are others than the model's.
    """
    expected, levels = constants(config), {}
    for name, value in stored.items():
        wanted, value = expected[name], value.astype(np.float32)
        if name in _NOISE and value.size == 1:
            if value != wanted:  # else config.json's own number stays, which has more digits
                levels[_NOISE[name]] = float(value.item())
        elif value.shape != wanted.shape or not np.allclose(value, wanted, rtol=1e-2, atol=0):
            raise ValueError(
                f"tensor {name!r} is {_brief(value)}, but this architecture has {_brief(wanted)}:"
                " the weights belong to another model"
            )
    return dataclasses.replace(config, **levels)


def _brief(value: np.ndarray) -> str:
    return np.array2string(value, precision=4, threshold=4, edgeitems=2)


def ignored(config: DiTConfig) -> tuple[str, ...]:
    """Patterns of published tensors that are no weights."""
    return tuple(re.escape(name) for name in constants(config))


def published_name(name: str) -> str:
    """A tensor's name as the Hugging Face models have it, given theirs or the authors' own."""
    return name if name.startswith(("backbone.", "sampling_eps_")) else f"backbone.{name}"
