"""Compiling for TPUs without one, by the real compiler (the package libtpu: extra `aot`).

Its errors are those of a chip, and the program says what it will move and hold. What it does not
say is how long it takes.
"""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def has_compiler() -> bool:
    """Whether the TPU compiler is installed."""
    return importlib.util.find_spec("libtpu") is not None


def compile_for(chip: str, function: Callable, *arguments: Any) -> jax.stages.Compiled:
    """The compiled program of a function on one chip of `CHIPS`.

    Args:
      arguments: pytrees of `jax.ShapeDtypeStruct`.
    """
    # Before the compiler is loaded: nobody asks a cloud's metadata server, or for a lock.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip])
    mesh = Mesh(np.array(topology.devices[:1]), ("x",), axis_types=(AxisType.Explicit,))
    whole = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), arguments
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function).trace(*placed).lower(lowering_platforms=("tpu",)).compile()


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """What a program holds beside its arguments and results."""
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes
