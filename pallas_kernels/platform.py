"""What a program that is being traced is for, and which kernels it can hold."""

import functools
import logging
import re

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


def check_implementation(name: str | None) -> None:
    """Raises ValueError if there is no implementation of this name."""
    if name not in (None, "xla", *PLATFORMS):
        raise ValueError(f"implementation={name!r} is none of None, 'xla', 'tpu', 'gpu'")


def device_kind() -> str:
    """The kind of device that is compiled for: of the mesh in scope, or the one that is here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else jax.devices()[0].device_kind


@functools.cache
def note(line: str) -> None:
    """Logs a line once."""
    logging.getLogger("pallas_kernels").warning(line)
