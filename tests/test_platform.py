"""Where kernels may stand: programs of one device that has them."""

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

from pallas_kernels.platform import kernels_of


def mesh_of(kind: str, axis_type: AxisType, **axes: int) -> AbstractMesh:
    platform = "tpu" if kind.startswith("TPU") else "gpu"
    device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    sizes, names = tuple(axes.values()), tuple(axes)
    return AbstractMesh(sizes, names, (axis_type,) * len(axes), abstract_device=device)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("kind", "size", "expected"),
    [
        ("TPU v5 lite", 1, "tpu"),
        ("TPU v5 lite", 4, "xla"),
        ("NVIDIA H100 80GB HBM3", 1, "gpu"),
        ("NVIDIA H200", 1, "gpu"),
        ("NVIDIA H200", 2, "xla"),
        ("NVIDIA GH200 480GB", 1, "gpu"),
        ("NVIDIA A100-SXM4-80GB", 1, "xla"),
        ("NVIDIA B200", 1, "xla"),
        ("Tesla T4", 1, "xla"),
    ],
)
def test_a_mesh_says_it(axis_type, kind, size, expected):
    with jax.sharding.use_abstract_mesh(mesh_of(kind, axis_type, data=size)):
        assert kernels_of() == expected


def test_inside_a_shard_map_a_program_is_that_of_one_device():
    seen = []

    def body(x):
        seen.append(kernels_of())
        return x

    whole, part = mesh_of("TPU v6 lite", AxisType.Auto, data=2, tensor=2), PartitionSpec("tensor")
    for axes, expected in (({"data", "tensor"}, "tpu"), ({"tensor"}, "xla")):
        split = jax.shard_map(
            body, mesh=whole, in_specs=part, out_specs=part, axis_names=axes, check_vma=False
        )
        with jax.sharding.use_abstract_mesh(whole):
            jax.eval_shape(split, jax.ShapeDtypeStruct((4,), "float32"))
        assert seen[-1] == expected


def test_without_a_mesh_it_is_this_machine():
    if jax.default_backend() == "cpu" or jax.device_count() > 1:
        assert kernels_of() == "xla"
