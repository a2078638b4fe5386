"""Compiling for TPUs and GPUs without one, by the real compilers.

Their packages are libtpu (extra `aot`) and the CUDA plugin of JAX (extra `aot-cuda`, JAX 0.12 and
later; neither a driver nor NVIDIA's libraries). Their errors are those of a chip, and the program
says what it will move and hold. What it does not say is how long it takes.
"""

import importlib.util
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}

# What the CUDA compiler asks of a device that is not there.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84942979072
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
GPUS = {"h100": _H100}

_LAUNCH = r"threads\(.*?\) in \(%\w+ = %c(\d+).*?dynamic_shared_memory_size %c(\d+)_"


def has_compiler(platform: str) -> bool:
    """Whether the compiler for "tpu" or "cuda" is installed."""
    package = {"tpu": "libtpu", "cuda": "jax_cuda13_plugin"}[platform]
    return importlib.util.find_spec(package) is not None


def compile_for(
    chip: str, function: Callable, *arguments: Any, options: dict[str, Any] | None = None
) -> jax.stages.Compiled:
    """The compiled program of a function on one chip of `CHIPS` or `GPUS`.

    Args:
      arguments: pytrees of `jax.ShapeDtypeStruct`.
      options: of the compiler.
    """
    platform, topology = _topology(chip)
    mesh = Mesh(np.array(topology.devices[:1]), ("x",), axis_types=(AxisType.Explicit,))
    whole = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), arguments
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(function).trace(*placed).lower(lowering_platforms=(platform,))
        return lowered.compile(compiler_options=options)


def _topology(chip: str):
    """The platform of a chip, and the description of a machine that has some."""
    if chip in GPUS:
        return "cuda", topologies.get_topology_desc(
            platform="cuda", topology_name=chip, target_config=GPUS[chip], topology="1x1x1"
        )
    return "tpu", tpu_topology(CHIPS[chip])


def tpu_topology(name: str, **options: Any):
    """The description of a TPU topology ("v5e:2x2"), by libtpu; `options` are those it takes."""
    # Before the compiler is loaded: nobody asks a cloud's metadata server, or for a lock.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # Nor are they missed aloud: what they say is of the machine, not of the topology.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options)


class CudaKernel(NamedTuple):
    """What NVIDIA's assembler made of a kernel that is written in Mosaic GPU."""

    name: str
    registers: int  # of a thread, at launch: warpgroups may trade theirs afterwards
    spilled: int  # bytes of a thread that are stored for want of registers, and loaded again
    shared: int  # bytes of shared memory of a block
    threads: int  # of a block


def compile_for_gpu(
    chip: str, function: Callable, *arguments: Any
) -> tuple[jax.stages.Compiled, list[CudaKernel]]:
    """`compile_for` a chip of `GPUS`, and the Mosaic GPU kernels of the program.

    Raises:
      RuntimeError: a kernel was compiled in this process before; it is not assembled again.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked = {"MOSAIC_GPU_DUMP_TO": folder, "MOSAIC_GPU_DUMP_PTXAS": "1"}
        before = {name: os.environ.get(name) for name in asked}
        os.environ.update(asked)
        try:
            program = compile_for(chip, function, *arguments)
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value
        kernels = [_reported(path) for path in sorted(Path(folder).glob("*.ptxas"))]
    text = program.as_text() or ""
    called = set(re.findall(r'kernel_hash = ("(?:[^"\\]|\\.)*")', text))
    if len(called) > len(kernels):
        raise RuntimeError(f"{len(called) - len(kernels)} kernels were assembled before")
    return program, kernels


def _reported(ptxas: Path) -> CudaKernel:
    """The kernel that the assembler's words are about, and the largest launch of its name."""
    words, name = ptxas.read_text(), ptxas.stem.rpartition("_")[0]
    found = re.search(
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        words, re.DOTALL,
    )  # fmt: skip
    launches = [
        (int(block[2]), int(block[1]))
        for path in ptxas.parent.glob(f"{name}_*.before_layout_inference.txt")
        if (block := re.search(_LAUNCH, path.read_text()))
    ]
    if found is None or not launches:
        raise RuntimeError(f"the assembler reported in another form:\n{words}")
    stores, loads, registers = map(int, found.groups())
    return CudaKernel(name, registers, max(stores, loads), *max(launches))


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """What a program holds beside its arguments and results."""
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes
