"""Topologies by their names, and the mesh that a program is planned on."""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import AxisType, Mesh

from dllm_jax.roofline import CHIPS, Chip
from dllm_jax.sharding import AXES
from dllm_jax.testing.aot import has_compiler, tpu_topology


class Topology(NamedTuple):
    """A slice of a pod, or a host of GPUs."""

    name: str
    chip: Chip
    chips: int

    @property
    def devices(self) -> int:
        return self.chips * self.chip.cores

    @property
    def is_tpu(self) -> bool:
        return self.chip.name.startswith("v")


def topology_of(name: str) -> Topology:
    """A topology by its name: "v5e:16x16", "v5p:4x8x8", "v7x:2x2x1", or GPUs by number, "h100:8".

    Raises:
      ValueError: it is none.
    """
    chip, _, shape = name.lower().replace("tpu7x", "v7x").partition(":")
    known = ", ".join(CHIPS)
    if chip not in CHIPS:
        raise ValueError(f"topology {name!r}: {chip!r} is none of the chips {known}")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){0,2}", shape):
        example = "16x16" if chip in ("v5e", "v6e") else "2x2x2" if chip[0] == "v" else "8"
        raise ValueError(f"topology {name!r} names no shape; write one as in {chip}:{example}")
    sizes = [int(size) for size in shape.split("x")]
    dimensions = {"v5e": 2, "v6e": 2, "v4": 3, "v5p": 3, "v7x": 3}.get(chip, 1)
    if len(sizes) != dimensions:
        raise ValueError(f"topology {name!r}: {chip} is wired in {dimensions} dimensions")
    return Topology(f"{chip}:{shape}", CHIPS[chip], math.prod(sizes))


def layout(own: Topology, asked: Mapping[str, int]) -> dict[str, int]:
    """The sizes of all axes of a mesh.

    Raises:
      ValueError: an axis is unknown, or the sizes are not as many as the devices.
    """
    found = dict.fromkeys(AXES, 1) | dict(asked)
    if unknown := sorted(set(found) - set(AXES)):
        raise ValueError(f"mesh axes {unknown} are none of {AXES}")
    if any(size < 1 for size in found.values()) or math.prod(found.values()) != own.devices:
        spelled = " x ".join(f"{axis}={size}" for axis, size in found.items() if size != 1)
        raise ValueError(
            f"a mesh of {spelled or 'one device'} is not the {own.devices} devices of {own.name}"
        )
    return found


def default_layouts(config: Any, mode: str, own: Topology, batch: int) -> list[dict[str, int]]:
    """Meshes that may suit a model, of which the one that needs least memory is taken.

    Training: everything in shards that are gathered layer by layer, but experts, which may have an
    axis of their own, to which tokens travel; `tensor` where there are more devices than rows.
    Decoding and prefill: as many shards of heads as there are key/value heads, then experts, then
    rows.
    """
    devices = own.devices
    experts = getattr(getattr(config, "moe", None) or config, "num_experts", 1)
    if mode == "train":
        tensor = math.gcd(devices // math.gcd(devices, batch), config.num_kv_heads)
        rest = devices // tensor
        most = math.gcd(rest, experts)
        return [
            {"fsdp": rest // expert, "expert": expert, "tensor": tensor}
            for expert in range(1, most + 1)
            if most % expert == 0
        ]
    tensor = math.gcd(devices, config.num_kv_heads)
    expert = math.gcd(devices // tensor, experts)
    return [{"data": devices // tensor // expert, "expert": expert, "tensor": tensor}]


def mesh_of(own: Topology, sizes: Mapping[str, int]) -> Mesh:
    """A mesh of the devices of a TPU topology, which need not be there."""
    shape = [sizes[axis] for axis in AXES]
    devices = np.array(tpu_devices(own)).reshape(shape)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def tpu_devices(own: Topology) -> list[Any]:
    """Its devices, by the TPU compiler.

    Raises:
      RuntimeError: the compiler is not installed.
    """
    if not has_compiler("tpu"):
        raise RuntimeError("the TPU compiler is not installed: pip install 'dllm-jax[aot]'")
    chip, _, shape = own.name.partition(":")
    options: dict[str, Any] = {"chip_config_name": "megacore"} if chip == "v4" else {}
    if own.chips == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    return tpu_topology(f"{chip.replace('v7x', 'tpu7x')}:{shape}", **options).devices
