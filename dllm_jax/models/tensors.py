"""Published tensors and ours: the row that maps one to the other, exactly, in both directions.

A family's name map is a tuple of rows. A row's layout spells the axes in the letters of the house,
the published tensor on the left and ours on the right; parentheses join axes into one, and a number
is an axis of that size:

    TensorMap("model.layers.{layer}.self_attn.q_proj.weight",
              "layers/attention/q", "(N H) D -> D N H")

Where one published tensor packs several of ours along an axis, the row has several paths:

    TensorMap("model.layers.{layer}.attention.query_key_value.weight",
              ("layers/attention/q", "layers/attention/k", "layers/attention/v"),
              ("(N H) D -> D N H", "(K H) D -> D K H", "(K H) D -> D K H"))
"""

import dataclasses
import itertools
import math
import re
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped

from dllm_jax.nn.tree import Config


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """One published tensor (or one a layer, or one an expert), and where it lives in our tree.

    The sizes of the letters are `config.sizes()`, where "Ly" counts the layers and "E" the experts.
    """

    name: str  # published; "{layer}" and "{expert}" stand for numbers
    path: str | tuple[str, ...]  # ours; an array stacked by layer, then by expert, where named so
    layout: str | tuple[str, ...]  # "published axes -> ours" of one layer and expert, for each path
    layers: tuple[int, ...] | None = None  # the published numbers of the stacked layers; None: all
    axis: int = 0  # of the published tensor, along which several paths are packed

    @property
    def paths(self) -> tuple[str, ...]:
        """Our arrays, in the order in which the published tensor packs them."""
        return (self.path,) if isinstance(self.path, str) else self.path

    def entries(self, config: Config) -> list[tuple[tuple[int, ...], str]]:
        """The published names, each with its index in our stacked array: () where none is."""
        sizes, numbers = config.sizes(), {}
        if "{layer}" in self.name:
            numbers["layer"] = range(sizes["Ly"]) if self.layers is None else self.layers
        if "{expert}" in self.name:
            numbers["expert"] = range(sizes["E"])
        indices = itertools.product(*(range(len(found)) for found in numbers.values()))
        chosen = itertools.product(*numbers.values())
        return [
            (index, self.name.format(**dict(zip(numbers, choice, strict=True))))
            for index, choice in zip(indices, chosen, strict=True)
        ]

    def published_shape(self, config: Config) -> tuple[int, ...]:
        """The shape of one published tensor."""
        first, *others = self._shapes(config.sizes())
        whole = list(first)
        for shape in others:
            whole[self.axis] += shape[self.axis]
        return tuple(whole)

    def ours(
        self, config: Config, tensor: Shaped[np.ndarray, "..."], path: str | None = None
    ) -> Shaped[np.ndarray, "..."]:
        """A published tensor as we hold it (one layer and expert of it); a view where possible.

        Args:
          path: which of `paths`; needed only where there are several.
        """
        sizes = config.sizes()
        part = 0 if path is None else self.paths.index(path)
        shapes = self._shapes(sizes)
        if len(shapes) > 1:
            ends = np.cumsum([shape[self.axis] for shape in shapes])
            tensor = np.split(tensor, ends[:-1], axis=self.axis)[part]
        source, target = self._layouts()[part]
        return _turn(tensor, source, target, sizes)

    def halves(
        self, config: Config, a: Shaped[np.ndarray, "r I"], b: Shaped[np.ndarray, "O r"]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The two factors of a published matrix b @ a [O, I] as those of ours: [I, r], [r, ...]."""
        sizes, (source, target) = config.sizes(), self._layouts()[0]
        outer, inner = re.findall(r"\([^)]*\)|\S+", source)
        want = [letter for letter in _letters(target) if letter not in _letters(inner)]
        return (
            np.ascontiguousarray(a.T),
            np.moveaxis(
                _turn(b, f"{outer} r", " ".join([*want, "r"]), {**sizes, "r": b.shape[1]}), -1, 0
            ),
        )

    def published(
        self, config: Config, *arrays: Shaped[np.ndarray, "..."]
    ) -> Shaped[np.ndarray, "..."]:
        """The inverse of `ours`, given the array of every path."""
        sizes = config.sizes()
        parts = [
            _turn(array, target, source, sizes)
            for array, (source, target) in zip(arrays, self._layouts(), strict=True)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, self.axis)

    def _layouts(self) -> list[tuple[str, str]]:
        layouts = (self.layout,) if isinstance(self.layout, str) else self.layout
        halves = [layout.split("->") for layout in layouts]
        return [(source, target) for source, target in halves]

    def _shapes(self, sizes: dict[str, int]) -> list[tuple[int, ...]]:
        return [_joined(source, sizes) for source, _ in self._layouts()]


def leaves(tree: Any) -> list[tuple[str, Any]]:
    """("layers/attention/q", leaf) for each leaf of a nested dict, in JAX's order."""
    flat = jax.tree.leaves_with_path(tree)
    return [("/".join(str(key.key) for key in keys), leaf) for keys, leaf in flat]


def _size(letter: str, sizes: dict[str, int]) -> int:
    return int(letter) if letter.isdigit() else sizes[letter]


def _letters(side: str) -> list[str]:
    """The axes of one side, one by one; those of size 1 hold nothing and are left out."""
    letters = side.replace("(", " ").replace(")", " ").split()
    return [letter for letter in letters if letter != "1"]


def _joined(side: str, sizes: dict[str, int]) -> tuple[int, ...]:
    """The shape that one side of a layout spells: a product for each pair of parentheses."""
    parts = re.findall(r"\(([^)]*)\)|([^\s()]+)", side)
    return tuple(math.prod(_size(x, sizes) for x in (group or one).split()) for group, one in parts)


def _turn(array: np.ndarray, source: str, target: str, sizes: dict[str, int]) -> np.ndarray:
    have, want = _letters(source), _letters(target)
    apart = array.reshape([_size(letter, sizes) for letter in have])
    turned = apart.transpose([have.index(letter) for letter in want])
    return turned.reshape(_joined(target, sizes))
