"""Optimisers: each kind against its equations, what is a matrix, schedules, where moments lie."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dllm_jax import distributed, sharding, training
from dllm_jax.nn.dit import DiTConfig
from dllm_jax.nn.tree import param_axes, param_shapes
from dllm_jax.testing import tiny
from dllm_jax.training import optimisers
from dllm_jax.training.optimisers import matrix_axes

MODEL, PARAMS = tiny(qk_norm=True, qkv_bias=True)
PARAMS = {name: PARAMS[name] for name in ("embed", "head", "layers", "final_norm")}
CONFIG = MODEL.config
GRADS = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), PARAMS)
PLAIN = training.Optimiser(learning_rate=0.1, warmup=0, schedule="constant", clip=0.0)
VECTORS = ("norm", "q_norm", "k_norm", "q_bias", "k_bias", "v_bias")


def update_of(optimiser: training.Optimiser, grads=GRADS):
    """The first step along a gradient."""
    tx = optimiser.build(10, CONFIG)
    return jax.jit(lambda grads: tx.update(grads, tx.init(PARAMS), PARAMS)[0])(grads)


def test_what_is_a_matrix_is_read_off_the_axes():
    axes = param_axes(CONFIG)
    attention, mlp = axes["layers"]["attention"], axes["layers"]["mlp"]
    assert matrix_axes(attention["q"]) == ((1,), (2, 3))
    assert matrix_axes(attention["o"]) == ((1, 2), (3,))
    assert matrix_axes(mlp["down"]) == ((1,), (2,))
    assert matrix_axes(("layers", "expert", "embed", "ffn")) == ((2,), (3,))
    assert matrix_axes(axes["adapter"]["q"]["out"]) == ((1,), (2, 3))
    learned = dataclasses.replace(CONFIG, learned_positions=True)
    positions = param_axes(learned)["positions"]
    for vector in (*(axes[name] for name in ("embed", "head", "final_norm")), positions):
        assert matrix_axes(vector) is None


def orthogonal(matrix: np.ndarray) -> np.ndarray:
    """The quintic iteration of Jordan (2024), slowly."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def test_muon_makes_each_matrix_of_a_stack_orthogonal_at_the_size_of_adamw():
    update = update_of(dataclasses.replace(PLAIN, kind="muon"))
    grad, got = (
        np.asarray(tree["layers"]["attention"]["q"], np.float64) for tree in (GRADS, update)
    )
    for layer in range(CONFIG.num_layers):
        expected = orthogonal(grad[layer].reshape(CONFIG.dim, -1))
        expected *= -0.1 * 0.2 * max(expected.shape) ** 0.5
        np.testing.assert_allclose(got[layer].reshape(expected.shape), expected, atol=2e-5)
    plain = update_of(PLAIN)
    for path in (("embed",), ("head",), ("final_norm",), ("layers", "attention", "q_bias")):
        one, other = update, plain
        for name in path:
            one, other = one[name], other[name]
        np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("kind", ["adamw", "lion", "adafactor"])
def test_a_first_update_is_the_learning_rate_and_the_gradients_sign(kind):
    update = update_of(dataclasses.replace(PLAIN, kind=kind))
    for one, grad in zip(*map(jax.tree.leaves, (update, GRADS)), strict=True):
        np.testing.assert_allclose(one, -0.1 * jnp.sign(grad), rtol=2e-2)


@pytest.mark.parametrize(
    ("kind", "tables"),
    [("adamw", False), ("adamw", True), ("muon", False), ("adafactor", False), ("lion", False)],
)
def test_weights_decay_in_matrices_alone(kind, tables):
    """Without a gradient, nothing else moves."""
    optimiser = dataclasses.replace(PLAIN, kind=kind, decay_embeddings=tables, weight_decay=0.5)
    update = update_of(optimiser, jax.tree.map(jnp.zeros_like, GRADS))
    for (path, one), x in zip(
        jax.tree.leaves_with_path(update), jax.tree.leaves(PARAMS), strict=True
    ):
        names = [key.key for key in path]
        vector = names[-1] in (*VECTORS, "final_norm") or (
            names[0] in ("embed", "head") and not tables
        )
        np.testing.assert_allclose(one, 0 * x if vector else -0.1 * 0.5 * x, rtol=1e-5)


def test_biases_of_other_architectures_do_not_decay():
    config = DiTConfig(vocab_size=9, num_layers=2, dim=8, num_heads=1, cond_dim=4, mask_id=8)
    params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), param_shapes(config))
    tx = dataclasses.replace(PLAIN, weight_decay=0.5, kind="muon").build(3, config)
    zeros = jax.tree.map(jnp.zeros_like, params)
    update, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    for path, x in jax.tree.leaves_with_path(update):
        matrix = path[0].key == "layers" and path[-1].key in ("q", "k", "v", "o", "up", "down")
        assert bool(x.any()) == matrix, path


def test_norms_of_bfloat16_are_in_float32():
    """What is clipped is rounded once: not the norm, nor the share of it."""
    values = np.linspace(0.5, 1.7, 3000, dtype=np.float32).astype(jnp.bfloat16)
    wide = values.astype(np.float32)
    norm = np.linalg.norm(wide)
    found = optimisers.global_norm({"a": jnp.asarray(values)})
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, norm, rtol=1e-5)
    clipped = optimisers._clipped(1.0, {"a": jnp.asarray(values)})["a"]
    assert clipped.dtype == jnp.bfloat16
    np.testing.assert_allclose(clipped.astype(jnp.float32), wide / norm, rtol=2**-8)
    np.testing.assert_allclose(optimisers.global_norm({"a": clipped}), 1.0, rtol=1e-3)


def test_gradients_are_clipped_by_their_global_norm():
    norm = float(optax.tree.norm(GRADS))
    sgd_like = dataclasses.replace(PLAIN, b1=0.0, b2=0.0, eps=1e9)  # Adam whose update is g / eps
    free = update_of(sgd_like)
    clipped = update_of(dataclasses.replace(sgd_like, clip=norm / 4))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a / 4, b, rtol=1e-5), free, clipped)


def test_schedules():
    def rates(**changes):
        rate = training.Optimiser(learning_rate=1.0, warmup=10, final=0.1, **changes).rate(100)
        return np.array([float(rate(step)) for step in range(101)])

    for schedule in ("cosine", "linear", "constant", "wsd"):
        found = rates(schedule=schedule)
        np.testing.assert_allclose(found[:11], np.arange(11) / 10, rtol=1e-6)
        assert found.max() == found[10] == 1.0
        assert found[100] == pytest.approx(1.0 if schedule == "constant" else 0.1)
    assert (rates(schedule="constant")[10:] == 1.0).all()
    np.testing.assert_allclose(np.diff(rates(schedule="linear")[10:]), -0.01, rtol=1e-4)
    wsd = rates(schedule="wsd", decay=0.3)
    assert (wsd[10:71] == 1.0).all()
    np.testing.assert_allclose(np.diff(wsd[70:]), -0.03, rtol=1e-4)
    assert rates(schedule="wsd", decay=1.0)[55] == pytest.approx(0.55)  # no more than is left


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(learning_rate=-1.0), "learning_rate=-1.0 must be positive"),
        (dict(decay=2.0), r"decay=2.0 is a share"),
        (dict(b2=1.0), r"b2=1.0 must be in \[0, 1\)"),
    ],
)
def test_settings_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        training.Optimiser(**fields)


def test_matrices_must_be_known():
    for fields in (dict(kind="muon"), dict(weight_decay=0.1)):
        with pytest.raises(ValueError, match=r"needs to know the matrices: build\(steps, model"):
            training.Optimiser(**fields).build(10)


@pytest.mark.parametrize("kind", ["muon", "adafactor"])
def test_moments_lie_where_their_parameters_do(kind):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    homes = sharding.shardings(param_axes(CONFIG), mesh, shapes=param_shapes(CONFIG))
    placed = distributed.place(PARAMS, {name: homes[name] for name in PARAMS})
    tx = training.Optimiser(kind=kind).build(5, CONFIG)
    state = training.create(placed, tuple(PARAMS), tx, ema=True, losses=True)
    split = 0
    for path, moment in jax.tree.leaves_with_path((state.opt_state, state.ema)):
        assert moment.sharding.mesh.size == 8
        for start in range(len(path)):
            owner = dict(jax.tree.leaves_with_path(placed)).get(path[start:])
            if owner is not None and owner.shape == moment.shape:
                assert moment.sharding.is_equivalent_to(owner.sharding, owner.ndim)
                split += not moment.sharding.is_fully_replicated
    assert split > 10
