"""Chips as data: what one can compute, hold, read and send. Figures are the vendors' own."""

from typing import NamedTuple


class Chip(NamedTuple):
    """One device, as JAX counts them: of a chip with two cores (v7x) the half."""

    name: str
    bf16: float  # FLOP/s at most, of dense matrices in bfloat16
    int8: float  # operations/s in 8 bits: of integers, or where there are none, of floats
    hbm: float  # bytes of memory that a program may use
    bandwidth: float  # bytes/s between memory and cores
    # bytes/s that a chip sends in a ring along one axis of the mesh: two links of a TPU, one way;
    # half of the published NVLink figure, which counts both ways, of a GPU.
    network: float
    cores: int = 1  # devices of a chip


_GIB = float(1 << 30)

# TPUs: cloud.google.com/tpu/docs, the pages of each version ("peak compute", "HBM bandwidth",
# "interchip interconnect BW", here over the 4 or 6 links of a chip). v7x is named TPU7x there; its
# 8-bit figure is of floats. What a program may use of the HBM is what the compiler of JAX 0.10.2
# says when a program asks for more ("exceeds available HBM").
# GPUs: NVIDIA's data sheets of the SXM modules, without sparsity; 95 % of their memory, for what
# the driver and the libraries hold.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 275e12, 30.75 * _GIB, 1228e9, 100e9),
        Chip("v5e", 197e12, 394e12, 15.75 * _GIB, 819e9, 100e9),
        Chip("v5p", 459e12, 918e12, 95.74 * _GIB, 2765e9, 200e9),
        Chip("v6e", 918e12, 1836e12, 31.25 * _GIB, 1640e9, 200e9),
        Chip("v7x", 2307e12 / 2, 4614e12 / 2, 94.75 * _GIB, 7380e9 / 2, 200e9 / 2, cores=2),
        Chip("a100", 312e12, 624e12, 0.95 * 80e9, 2039e9, 300e9),
        Chip("h100", 989e12, 1979e12, 0.95 * 80e9, 3350e9, 450e9),
        Chip("h200", 989e12, 1979e12, 0.95 * 141e9, 4800e9, 450e9),
        Chip("b200", 2250e12, 4500e12, 0.95 * 180e9, 8000e9, 900e9),
    )
}
"""By name. Peaks are never reached: expect half to nine tenths of what they promise."""
