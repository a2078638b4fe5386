"""Which device a program is traced for."""

import functools
import logging

import jax


def is_tpu() -> bool:
    """Whether the program may run on a TPU: the mesh in scope is of TPUs, or the default device is.

    A mesh of devices that are not there (ahead-of-time compilation) counts. Where no mesh says so,
    a program that is traced on another machine is compiled without TPU kernels.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    kind = device.device_kind if device else jax.default_backend()
    return kind.lower().startswith("tpu")


@functools.cache
def note(line: str) -> None:
    """Logs a line once."""
    logging.getLogger("pallas_kernels").warning(line)
