"""Logical axes onto a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dllm_jax.sharding import AXES as MESH_AXES
from dllm_jax.sharding import (
    EVERY,
    FSDP,
    FSDP_TENSOR,
    TENSOR,
    Rules,
    automatic,
    constrain,
    in_scope,
    make_mesh,
    mesh_of,
    placed,
    shardings,
    split,
)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (8, 1, 1, 1, 1)),
        ({"data": 1, "fsdp": -1}, (1, 8, 1, 1, 1)),
        ({"fsdp": 2, "tensor": 2}, (2, 2, 1, 1, 2)),
        ({"expert": 4, "context": 2}, (1, 1, 4, 2, 1)),
        ({"data": 2}, (2, 1, 1, 1, 1)),
    ],
)
def test_mesh_sizes(sizes: dict[str, int], shape: tuple[int, ...]):
    mesh = make_mesh(**sizes)
    assert mesh.axis_names == ("data", "fsdp", "expert", "context", "tensor")
    assert mesh.devices.shape == shape


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": -1, "fsdp": -1}, "at most once"),
        ({"data": 0}, "positive"),
        ({"tensor": 3}, "does not fit 8 devices"),
        ({"data": 16}, "does not fit 8 devices"),
    ],
)
def test_impossible_meshes_say_why(sizes: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        make_mesh(**sizes)


AXES = {"embed": ("vocab", "embed"), "q": ("layers", "embed", "heads", "head_dim"), "b": (None,)}


@pytest.mark.parametrize(
    ("rules", "embed", "q"),
    [
        (FSDP, P(None, "fsdp"), P(None, "fsdp", None, None)),
        (TENSOR, P("tensor", None), P(None, None, "tensor", None)),
        (FSDP_TENSOR, P("tensor", "fsdp"), P(None, "fsdp", "tensor", None)),
        (Rules(), P(None, None), P(None, None, None, None)),
        (Rules(embed=("data", "fsdp")), P(None, ("data", "fsdp")), None),
    ],
)
def test_rules_become_specs(rules: Rules, embed: P, q: P | None):
    placed = shardings(AXES, make_mesh(fsdp=2, tensor=2), rules)
    assert placed["embed"].spec == embed
    assert q is None or placed["q"].spec == q
    assert placed["b"].spec == P(None)


def test_a_dimension_that_does_not_divide_is_replicated():
    shapes = {
        "embed": jax.ShapeDtypeStruct((10, 8), "float32"),  # 10 is not a multiple of 4
        "q": jax.ShapeDtypeStruct((3, 8, 4, 5), "float32"),
        "b": jax.ShapeDtypeStruct((3,), "float32"),
    }
    mesh = make_mesh(data=1, fsdp=2, tensor=4)
    placed = shardings(AXES, mesh, FSDP_TENSOR, shapes=shapes)
    assert placed["embed"].spec == P(None, "fsdp")
    assert placed["q"].spec == P(None, "fsdp", "tensor", None)
    arrays = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    on_mesh = jax.device_put(arrays, placed)
    assert on_mesh["q"].addressable_shards[0].data.shape == (3, 4, 1, 5)


def test_a_mesh_axis_is_used_once_in_an_array():
    rules = Rules(heads="tensor", head_dim="tensor")
    placed = shardings({"q": ("heads", "head_dim")}, make_mesh(tensor=2), rules)
    assert placed["q"].spec == P("tensor", None)


def test_axes_that_a_mesh_lacks_split_nothing():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    placed = shardings({"w": ("expert", "embed", "ffn"), "x": ("batch", "length")}, mesh, EVERY)
    assert placed["w"].spec == P(None, None, "tensor")
    assert placed["x"].spec == P("data", None)


def test_unknown_names_say_what_is_known():
    mesh = make_mesh()
    with pytest.raises(ValueError, match=r"'rows' has no rule; the axes are \['batch', 'length'"):
        shardings({"x": ("rows",)}, mesh)
    with pytest.raises(ValueError, match="'ffn' on mesh axis 'model', but the mesh has only"):
        shardings(AXES, mesh, Rules(ffn="model"))


def test_sharded_equals_not():
    mesh = make_mesh(fsdp=2, tensor=2)
    x = jnp.arange(32.0).reshape(4, 8)
    w = (jnp.arange(64.0) % 7).reshape(8, 8)  # small integers: sums are exact in any order
    placed = shardings({"x": ("batch", None), "w": ("embed", "ffn")}, mesh)
    with jax.set_mesh(mesh):
        y = jax.jit(jnp.dot)(jax.device_put(x, placed["x"]), jax.device_put(w, placed["w"]))
    np.testing.assert_array_equal(y, x @ w)


def test_activations_are_split_as_far_as_their_sizes_allow():
    assert split("batch", 8) == ()  # there is no mesh
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        assert [split("batch", n) for n in (8, 2, 3, 0)] == [("data", "fsdp"), ("data",), (), ()]
        assert (split("heads", 6), split("heads", 3)) == (("tensor",), ())
        assert split("embed", 8) == ()
    with jax.set_mesh(make_mesh(data=2, context=4)):
        assert [split("length", n) for n in (512, 256, 252)] == [("context",), ("context",), ()]


def test_a_constraint_without_a_mesh_is_nothing():
    x = jnp.ones((4, 4))
    assert constrain(x, "batch", "ffn") is x
    with jax.set_mesh(make_mesh(data=1)):
        assert constrain(x, "batch", "ffn") is x
    with jax.set_mesh(make_mesh(data=4, tensor=2)):
        assert constrain(x, "batch", "ffn").sharding.spec == P("data", "tensor")
        rows = dict(in_specs=P("data"), out_specs=P("data"))
        inside = jax.shard_map(lambda x: constrain(x, "batch"), **rows)
        np.testing.assert_array_equal(inside(x), x)  # whose axes are taken


def test_the_mesh_of_the_parameters_is_in_scope():
    mesh, seen = make_mesh(data=4, tensor=2), []

    @in_scope
    def run(model, params):
        seen.append(jax.sharding.get_abstract_mesh().shape_tuple)
        return params

    far = jax.device_put(jnp.ones(8), jax.sharding.NamedSharding(mesh, P("data")))
    near = jnp.ones(8)
    run(None, {"w": far})
    run(None, {"w": near})
    jax.jit(lambda p: run(None, p))(far)  # of a program, the mesh is its caller's
    assert seen == [mesh.abstract_mesh.shape_tuple, (), ()]
    assert (mesh_of({"w": far}), mesh_of({"w": near})) == (mesh, None)


def test_explicit_axes_are_automatic_inside_and_typed_outside():
    def run(x):
        assert set(jax.sharding.get_abstract_mesh().auto_axes) == set(MESH_AXES)
        return {"y": x @ x.T}

    x = jnp.arange(32.0).reshape(8, 4)
    with jax.set_mesh(make_mesh(data=4, tensor=2, explicit=True)):
        found = jax.jit(lambda x: automatic(run, placed("batch", "vocab"), x))(x)
        assert jax.typeof(found["y"]).sharding.spec == P("data", "tensor")
    np.testing.assert_array_equal(found["y"], x @ x.T)
