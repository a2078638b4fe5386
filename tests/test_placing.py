"""Arrays that come onto their devices in pieces."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from dllm_jax.models.placing import placed
from dllm_jax.sharding import make_mesh

SPECS = [
    (), ("fsdp",), (None, "fsdp"), (None, None, "tensor"), (("fsdp", "tensor"),),
    ("tensor", None, "fsdp"), (None, ("fsdp", "tensor")),
]  # fmt: skip


@given(
    st.sampled_from(SPECS), st.integers(1, 400), st.sampled_from(["float32", "bfloat16", "int8"])
)
def test_any_piece_gives_the_array(spec, piece, dtype):
    values = np.random.default_rng(0).normal(size=(8, 8, 4)).astype(np.float32) * 9
    sharding = NamedSharding(make_mesh(fsdp=4, tensor=2), PartitionSpec(*spec))
    largest = 0

    def read(index):
        nonlocal largest
        part = values[index]
        largest = max(largest, part.size)
        return part

    array = placed(values.shape, dtype, sharding, read, piece=piece)
    assert array.sharding == sharding
    assert array.dtype == dtype
    np.testing.assert_array_equal(array, values.astype(dtype))
    assert largest * array.dtype.itemsize <= max(piece, array.dtype.itemsize)


@pytest.mark.parametrize("shape", [(), (1,), (7,)])
def test_small_arrays(shape):
    values = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    sharding = jax.numpy.zeros(()).sharding
    array = placed(shape, "float32", sharding, lambda index: values[index], piece=8)
    np.testing.assert_array_equal(array, values)


def test_a_part_is_read_once_for_all_who_hold_it():
    sharding = NamedSharding(make_mesh(data=4, tensor=2), PartitionSpec("tensor"))
    values, asked = np.arange(8.0), []
    placed(values.shape, "float32", sharding, lambda index: asked.append(index) or values[index])
    assert asked == [(slice(0, 4),), (slice(4, 8),)]
