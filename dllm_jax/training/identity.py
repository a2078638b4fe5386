"""What a run is of, in words: what a checkpoint keeps, so that no other run goes on from it."""

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any


def described(thing: Any, without: Collection[str] = ()) -> str:
    """A settings object in words that are the same in every process, and in later versions.

    Of a dataclass, the fields that are not as they are by default: one that is added later changes
    no description of an older run. What has an `identity` says itself what it is.

    Args:
      without: fields of `thing` that are not told.
    """
    kind = type(thing)
    if hasattr(thing, "identity"):
        return f"{kind.__name__}({thing.identity()})"
    if dataclasses.is_dataclass(thing):
        fields = [
            f"{f.name}={described(getattr(thing, f.name))}"
            for f in _changed(thing)
            if f.name not in without
        ]
        return f"{kind.__name__}({', '.join(fields)})"
    if kind.__repr__ is object.__repr__:  # it would tell an address in memory
        return f"{kind.__name__}()"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(thing))


def check_same(saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raises ValueError where a run is not what its checkpoint says, of what both say."""
    for name, value in saved.items():
        if name in here and value != here[name]:
            raise ValueError(
                f"the run of this folder was started with {name}={value}, here it is "
                f"{here[name]}: its data and noise would not go on as they were; give the "
                "old value, or choose another folder"
            )


def _changed(thing: Any) -> list[Any]:
    found = []
    for field in dataclasses.fields(thing):
        usual = field.default
        if field.default_factory is not dataclasses.MISSING:
            usual = field.default_factory()
        if field.repr and getattr(thing, field.name) != usual:
            found.append(field)
    return found
