"""Where TPU kernels may stand: programs of one TPU."""

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

from pallas_kernels.platform import is_tpu


def mesh_of(kind: str, axis_type: AxisType, **axes: int) -> AbstractMesh:
    platform = "tpu" if kind.startswith("TPU") else "gpu"
    device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    sizes, names = tuple(axes.values()), tuple(axes)
    return AbstractMesh(sizes, names, (axis_type,) * len(axes), abstract_device=device)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("kind", "size", "expected"),
    [("TPU v5 lite", 1, True), ("TPU v5 lite", 4, False), ("NVIDIA H100", 1, False)],
)
def test_a_mesh_says_it(axis_type, kind, size, expected):
    with jax.sharding.use_abstract_mesh(mesh_of(kind, axis_type, data=size)):
        assert is_tpu() is expected


def test_inside_a_shard_map_a_program_is_that_of_one_device():
    seen = []

    def body(x):
        seen.append(is_tpu())
        return x

    whole, part = mesh_of("TPU v6 lite", AxisType.Auto, data=2, tensor=2), PartitionSpec("tensor")
    for axes, expected in (({"data", "tensor"}, True), ({"tensor"}, False)):
        split = jax.shard_map(
            body, mesh=whole, in_specs=part, out_specs=part, axis_names=axes, check_vma=False
        )
        with jax.sharding.use_abstract_mesh(whole):
            jax.eval_shape(split, jax.ShapeDtypeStruct((4,), "float32"))
        assert seen[-1] is expected


def test_without_a_mesh_it_is_this_machine():
    assert is_tpu() is (jax.default_backend() == "tpu" and jax.device_count() == 1)
