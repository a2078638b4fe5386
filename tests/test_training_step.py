"""One step: in parts as whole, on a mesh as on one device, and whatever is computed again."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dllm_jax import distributed, sharding, training
from dllm_jax.corruption import MaskedBlocks
from dllm_jax.losses import DualStream
from dllm_jax.nn import remat
from dllm_jax.nn.transformer import Transformer, TransformerConfig
from dllm_jax.nn.tree import param_axes, param_shapes
from dllm_jax.training.loop import Feed
from tests import toy_training
from tests.toy_training import TOY

BATCH, LENGTH = 8, 10
NAMES = ("adapter", "layers", "head")
SGD = optax.sgd(1.0, momentum=0.9)  # the parameters move by the gradient, and it is kept
slow = pytest.mark.slow
OBJECTIVE = DualStream(noise=MaskedBlocks(block_size=2, blocks=3, decay=0.8), ar_weight=0.5)


@cache
def model():
    """The model, and its parameters on one device."""
    one, params = toy_training.model()
    return one, jax.device_put(params, jax.devices()[0])


def batch() -> dict[str, np.ndarray]:
    """Rows of many lengths: the parts of a batch learn different numbers of tokens."""
    random = np.random.default_rng(0)
    lengths = np.array([3, 10, 4, 9, 10, 5, 10, 6], np.int32)
    tokens = random.integers(2, 30, (BATCH, LENGTH)).astype(np.int32)
    tokens *= np.arange(LENGTH) < lengths[:, None]
    return {"tokens": tokens, "lengths": lengths, "prompts": np.full(BATCH, 2, np.int32)}


def after(objective=OBJECTIVE, *, accumulate=1, mesh=None, **changes):
    """The state after one step, and its figures."""
    one, params = model()
    one = Transformer(dataclasses.replace(one.config, **changes))
    given = batch()
    if mesh is not None:
        homes = sharding.shardings(param_axes(one.config), mesh, shapes=param_shapes(one.config))
        params = distributed.place(params, homes)
        given = Feed(BATCH, mesh, sharding.FSDP_TENSOR, parts=accumulate).place(given)
    state = training.create(params, NAMES, SGD)
    step = training.make_train_step(one, objective, SGD, accumulate=accumulate)
    return step(state, params, given, jax.random.key(5))


@cache
def plain():
    return after()


def close(left, right, tolerance: float) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), left, right
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("accumulate", "again", "phases"),
    [(2, "full", 2), (8, "none", 1), (1, "none", 2), (1, "dots", 1), (2, "dots_no_batch", 2)],
)
def test_parts_phases_and_what_is_computed_again_change_no_number(accumulate, again, phases):
    objective = dataclasses.replace(OBJECTIVE, phases=phases)
    state, figures = after(objective, accumulate=accumulate, remat=again)
    expected, said = plain()
    assert figures.keys() == said.keys()
    close(figures, said, 2e-6)  # the loss, and every figure: sums over counts of the whole batch
    close(state.trainable, expected.trainable, 3e-6)


class Whole:
    """An objective that knows no parts."""

    def loss(self, model, params, batch, key):
        raise AssertionError


def test_parts_must_divide_and_the_objective_must_know_them():
    with pytest.raises(ValueError, match="accumulate=3 must divide the batch of 8"):
        after(TOY, accumulate=3)
    one, params = model()
    step = training.make_train_step(one, Whole(), SGD, accumulate=2)
    with pytest.raises(ValueError, match=r"accumulate=2 needs an objective with `draw`.*Whole"):
        step(training.create(params, ("embed",), SGD), params, batch(), jax.random.key(0))


def test_parts_keep_their_sums_in_float32():
    """Eight equal small gradients beside a large one: bfloat16 would lose them."""

    @dataclasses.dataclass(frozen=True)
    class Sums:
        def draw(self, model, batch, key):
            return Rows((batch,))

        def score(self, model, params, drawn):
            return (params["w"].astype(jnp.float32) * drawn.rows[0]["x"]).sum(), {}

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Rows:
        rows: tuple

        def with_rows(self, rows):
            return Rows(rows)

        loss = None

    Sums.loss = lambda self, model, params, batch, key: self.score(model, params, Rows((batch,)))
    params = {"w": jnp.zeros((), jnp.bfloat16)}
    x = jnp.array([256.0, *[1.0] * 15])
    step = training.make_train_step(model()[0], Sums(), SGD, accumulate=16)
    state, _ = step(training.create(params, ("w",), SGD), params, {"x": x}, jax.random.key(0))
    assert float(state.trainable["w"]) == -272.0  # 256 + 1 is 256 in bfloat16


def test_settings_of_recomputation_have_names_and_old_ones_load():
    fields = dataclasses.asdict(model()[0].config) | {"adapter": None, "mask_id": None}
    for old, new in ((True, "full"), (False, "none"), ("dots", "dots")):
        config = TransformerConfig(**{**fields, "remat": old})
        assert config.remat == new
        assert config == TransformerConfig(**{**fields, "remat": new})
    with pytest.raises(ValueError, match="remat='some' is not one of none, dots, dots_no_batch"):
        TransformerConfig(**{**fields, "remat": "some"})
    with pytest.raises(ValueError, match="phases=3 is neither 1 nor 2"):
        DualStream(phases=3)


def test_offloaded_inputs_are_named_in_the_program():
    """No CPU has another memory to offload to: what is asked of the compiler can be seen."""
    body = remat.rematerialised(lambda hidden, w: (jnp.sin(hidden @ w), None), "offload")

    def loss(x, ws):
        return jax.lax.scan(body, x, ws)[0].sum()

    text = str(jax.make_jaxpr(jax.grad(loss, argnums=1))(jnp.ones((2, 4)), jnp.ones((3, 4, 4))))
    assert "layer_input" in text
    assert "Host" in text or "pinned_host" in text


@pytest.mark.parametrize(
    "objective", [TOY, pytest.param(OBJECTIVE, marks=slow)], ids=["toy", "dual stream"]
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_on_a_mesh_is_that_of_one_device(objective, accumulate):
    """Parameters over fsdp and tensor, the batch over data and fsdp; the momentum lies as they."""
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    state, figures = after(objective, mesh=mesh, accumulate=accumulate)
    expected, said = after(objective)
    close(figures, said, 2e-6)
    close(state.trainable, expected.trainable, 1e-5)
    split = [x for x in jax.tree.leaves(state.trainable) if not x.sharding.is_fully_replicated]
    assert len(split) > 10
    momentum = state.opt_state[0].trace
    for x, moment in zip(*map(jax.tree.leaves, (state.trainable, momentum)), strict=True):
        assert moment.sharding.is_equivalent_to(x.sharding, x.ndim)
        assert x.sharding.mesh.size == 8


def test_rows_of_a_batch_go_where_their_devices_are():
    given = batch()
    for data, fsdp, tensor in ((8, 1, 1), (2, 2, 2), (1, 1, 8), (4, 1, 1)):
        mesh = sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor)
        feed = Feed(BATCH, mesh, sharding.FSDP_TENSOR)
        np.testing.assert_array_equal(feed.rows, np.arange(BATCH))  # one process has all devices
        placed = feed.place(given)
        for name, x in placed.items():
            np.testing.assert_array_equal(x, given[name])
            assert x.addressable_shards[0].data.shape[0] == BATCH // (data * fsdp)
    mesh = sharding.make_mesh(data=4, fsdp=2)
    for size, parts, message in (
        (6, 1, "batch=6 in 1 part does not divide"),
        (8, 2, "batch=8 in 2 parts does not divide .*'data': 4"),
        (8, 3, "accumulate=3 must divide batch=8"),
    ):
        with pytest.raises(ValueError, match=message):
            Feed(size, mesh, sharding.FSDP_TENSOR, parts=parts)
    whole = Feed(6, mesh, sharding.FSDP_TENSOR, whole=True)  # held-out rows may be few
    assert whole.place({"lengths": np.arange(6)})["lengths"].is_fully_replicated
