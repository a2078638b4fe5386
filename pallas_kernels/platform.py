"""What a program that is being traced is for, and whether it can hold TPU kernels."""

import functools
import logging

import jax


def is_tpu() -> bool:
    """Whether the program is for one TPU: kernels are not split over several by the compiler.

    What counts is the mesh in scope: one of a single TPU, which need not be there (ahead-of-time
    compilation), or the inside of a `shard_map`, where a program is that of one device. Where no
    mesh says so, this machine's one and only TPU. Elsewhere XLA's forms run, which it can split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device
    kind = device.device_kind if device else jax.default_backend()
    if not kind.lower().startswith("tpu"):
        return False
    if mesh.empty:
        return jax.device_count() == 1
    return mesh.size == 1 or set(mesh.manual_axes) == set(mesh.axis_names)


def device_kind() -> str:
    """The kind of device that is compiled for: of the mesh in scope, or the one that is here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else jax.devices()[0].device_kind


@functools.cache
def note(line: str) -> None:
    """Logs a line once."""
    logging.getLogger("pallas_kernels").warning(line)
