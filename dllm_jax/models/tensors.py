"""Published tensors and ours: the row that maps one to the other, exactly, in both directions.

A family's name map is a tuple of rows. A row's layout spells the axes in the letters of the house,
the published tensor on the left and ours on the right; parentheses join axes into one:

    TensorMap("model.layers.{layer}.self_attn.q_proj.weight",
              "layers/attention/q", "(N H) D -> D N H")
"""

import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped

from dllm_jax.nn.transformer import TransformerConfig


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """One published tensor (or one a layer), where it lives in our tree, and how its axes lie."""

    name: str  # published; "{layer}" stands for the layer's number
    path: str  # ours, "layers/attention/q"; the stacked array where the name has a layer
    layout: str  # "published axes -> ours", of one layer

    def names(self, config: TransformerConfig) -> list[str]:
        """The published names: one for each layer, in order, or the only one."""
        if "{layer}" not in self.name:
            return [self.name]
        return [self.name.format(layer=layer) for layer in range(config.num_layers)]

    def published_shape(self, config: TransformerConfig) -> tuple[int, ...]:
        """The shape of one published tensor."""
        return _joined(self.layout.split("->")[0], _sizes(config))

    def ours(
        self, config: TransformerConfig, tensor: Shaped[np.ndarray, "..."]
    ) -> Shaped[np.ndarray, "..."]:
        """A published tensor as we hold it (one layer of it). A view where that is possible."""
        source, target = self.layout.split("->")
        return _turn(tensor, source, target, _sizes(config))

    def published(
        self, config: TransformerConfig, array: Shaped[np.ndarray, "..."]
    ) -> Shaped[np.ndarray, "..."]:
        """The inverse of `ours`."""
        source, target = self.layout.split("->")
        return _turn(array, target, source, _sizes(config))


def leaves(tree: Any) -> list[tuple[str, Any]]:
    """("layers/attention/q", leaf) for each leaf of a nested dict, in JAX's order."""
    flat = jax.tree.leaves_with_path(tree)
    return [("/".join(str(key.key) for key in keys), leaf) for keys, leaf in flat]


def _sizes(config: TransformerConfig) -> dict[str, int]:
    return {
        "V": config.vocab_size,
        "D": config.dim,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "F": config.ffn_dim,
        # H = 2 * h: the two halves that RoPE turns into each other
        "2": 2,
        "h": config.head_dim // 2,
    }


def _letters(side: str) -> list[str]:
    return side.replace("(", " ").replace(")", " ").split()


def _joined(side: str, sizes: dict[str, int]) -> tuple[int, ...]:
    """The shape that one side of a layout spells: a product for each pair of parentheses."""
    parts = re.findall(r"\(([^)]*)\)|([^\s()]+)", side)
    return tuple(math.prod(sizes[x] for x in (group or one).split()) for group, one in parts)


def _turn(array: np.ndarray, source: str, target: str, sizes: dict[str, int]) -> np.ndarray:
    have, want = _letters(source), _letters(target)
    apart = array.reshape([sizes[letter] for letter in have])
    turned = apart.transpose([have.index(letter) for letter in want])
    return turned.reshape(_joined(target, sizes))
