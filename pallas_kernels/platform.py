"""What a program that is being traced is for, and which kernels it can hold."""

import functools
import logging
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

# Names of kernels, and what JAX calls the platforms that run them.
PLATFORMS = {"tpu": "tpu", "gpu": "cuda"}

_HOPPER = re.compile(r"\bG?H(100|200|800|20)\b")


def kernels_of() -> str:
    """Whose kernels the program can hold: "tpu", "gpu" (Hopper) or, of neither, "xla".

    The compiler does not split kernels over several devices. What counts is the mesh in scope: one
    of a single device, which need not be there (ahead-of-time compilation), or the inside of a
    `shard_map`, where a program is that of one device. Where no mesh says so, this machine's one
    and only device. Elsewhere XLA's forms run, which it can split.
    """
    kind = device_kind()
    if kind.startswith("TPU"):
        found = "tpu"
    elif _HOPPER.search(kind):
        found = "gpu"
    else:
        return "xla"
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        alone = jax.device_count() == 1
    else:
        alone = mesh.size == 1 or set(mesh.manual_axes) == set(mesh.axis_names)
    return found if alone else "xla"


class Choice(NamedTuple):
    """Whose implementation runs."""

    name: str  # "xla", or a key of `PLATFORMS`
    asked: bool  # by name: whatever the program is compiled for


def choose(what: str, implementation: str | None, refusal: Callable[[str], str | None]) -> Choice:
    """Whose implementation of `what` runs: the one asked for, else that of the device.

    Args:
      refusal: of "tpu" or "gpu", why its kernel does not take the call, in a line; None: it does.

    Raises:
      ValueError: there is no such implementation, or it does not take the call.
    """
    name = implementation or kernels_of()
    if name not in ("xla", *PLATFORMS):
        raise ValueError(f"implementation={name!r} is none of None, 'xla', 'tpu', 'gpu'")
    reason = None if name == "xla" else refusal(name)
    if reason is None:
        return Choice(name, implementation is not None)
    if implementation is not None:
        raise ValueError(f"the {name.upper()} kernel does not take this: {reason}")
    note(f"{what} runs in XLA, not in the {name.upper()} kernel: {reason}")
    return Choice("xla", False)


def run(choice: Choice, functions: dict[str, Callable[..., Any]], *arrays: Any) -> Any:
    """The chosen function of some arrays; XLA's if the program turns out to be for other devices.

    Args:
      functions: by the name of the implementation, "xla" among them.
    """
    own = functions[choice.name]
    if choice.asked or choice.name == "xla":
        return own(*arrays)
    kernel = {PLATFORMS[choice.name]: own}
    return jax.lax.platform_dependent(*arrays, **kernel, default=functions["xla"])


def device_kind() -> str:
    """The kind of device that is compiled for: of the mesh in scope, or the one that is here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else jax.devices()[0].device_kind


@functools.cache
def note(line: str) -> None:
    """Logs a line once."""
    logging.getLogger("pallas_kernels").warning(line)
