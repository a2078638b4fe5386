"""Recipes as plain data, to be saved and read back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dllm_jax import policies
from dllm_jax.ops.sampling import Sampling
from dllm_jax.recipes.row import Denoise, Recipe, Verified


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain data (JSON), for `from_dict`.

    Raises:
      ValueError: it has a part or a number that is not plain data (your own part, a traced value).
    """
    return _plain(recipe)


def from_dict(data: Mapping[str, Any]) -> Recipe:
    """The recipe of `to_dict`'s data.

    Raises:
      ValueError: a part or a field is unknown.
    """
    recipe = _part(data)
    if not isinstance(recipe, Verified | Denoise):
        raise ValueError(f"a recipe is Verified or Denoise, not {data.get('part')!r}")
    return recipe


_PARTS: dict[str, type] = {
    "Verified": Verified,
    "Denoise": Denoise,
    "Sampling": Sampling,
    **{name: getattr(policies, name) for name in policies.__all__
       if dataclasses.is_dataclass(getattr(policies, name))},
}  # fmt: skip


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return [_plain(one) for one in value]
    name = type(value).__name__
    if _PARTS.get(name) is type(value):
        fields = dataclasses.fields(_PARTS[name])
        return {"part": name, **{f.name: _plain(getattr(value, f.name)) for f in fields}}
    number = isinstance(value, jax.Array | np.ndarray | np.generic) and not value.ndim
    if number and not isinstance(value, jax.core.Tracer):
        return np.asarray(value).item()
    raise ValueError(f"{value!r} cannot be written: only parts of dllm_jax and plain numbers can")


def _part(data: Any) -> Any:
    if isinstance(data, list):
        return tuple(_part(one) for one in data)
    if not isinstance(data, Mapping):
        return data
    fields = dict(data)
    name = fields.pop("part", None)
    if name not in _PARTS:
        raise ValueError(f"unknown part {name!r}; known are {', '.join(_PARTS)}")
    known = {f.name for f in dataclasses.fields(_PARTS[name])}
    for field in fields:
        if field not in known:
            raise ValueError(f"part {name} has no field {field!r}; it has {', '.join(known)}")
    return _PARTS[name](**{field: _part(value) for field, value in fields.items()})
