"""The programs that are planned: those that run, with the shapes and places of their arguments.

    decode   one denoising step (or one step of verification) on its state, which is donated
    prefill  the state from a prompt, and the first step, which rides on it
    train    one step of `training` on the dual stream: AdamW, every layer computed again
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dllm_jax import training
from dllm_jax.corruption import MaskedBlocks
from dllm_jax.decode import denoise, verify
from dllm_jax.decode.prompt import BUCKET, Prompt, edge
from dllm_jax.decode.start import initial
from dllm_jax.losses import DualStream
from dllm_jax.nn.tree import param_axes, param_shapes
from dllm_jax.plan.setting import Setting
from dllm_jax.recipes import Verified
from dllm_jax.sharding import Rules, shardings

RULES = Rules(
    batch=("data", "fsdp", "expert"), vocab="tensor", heads="tensor", kv_heads="tensor",
    ffn="tensor", embed="fsdp", expert="expert",
)  # fmt: skip


class Planned(NamedTuple):
    """A function, its arguments by role, and which of them it gives back changed."""

    function: Callable[..., Any]
    arguments: dict[str, Any]  # trees of `jax.ShapeDtypeStruct`s that know their places
    donated: str | None  # an argument, whose like is the first result


def program(setting: Setting, mesh: Mesh) -> Planned:
    """The program of a setting on a mesh.

    Raises:
      ValueError: the recipe is not for the model, or the model is not trained so.
    """
    return {"decode": _decode, "prefill": _prefill, "train": _train}[setting.mode](setting, mesh)


def _decode(setting: Setting, mesh: Mesh) -> Planned:
    model, place = setting.config.build(), partial(_placed, setting, mesh)
    job = _job(setting)
    state = place(jax.eval_shape(lambda job: _initial(model, job, setting.context), job))

    def step(params, job, state):
        if isinstance(job.recipe, Verified):
            return verify.step(model, params, job.recipe, job.keys, state)
        wide = not denoise.two_kinds(job.recipe)
        return denoise.step(
            model, params, job.recipe, job.keys, state, ~state.finished, wide=wide
        )

    arguments = {"params": _params(setting, mesh), "job": place(job), "state": state}
    return Planned(step, arguments, "state")


def _prefill(setting: Setting, mesh: Mesh) -> Planned:
    model, job = setting.config.build(), _job(setting)

    def first(params, job):
        state = _initial(model, job, setting.context)
        if isinstance(job.recipe, Verified):
            width = job.prompt.tokens.shape[1]
            return verify.first_steps(model, params, job.recipe, job.keys, state, width)
        if job.recipe.cache in ("none", "prefix", "dual"):
            rows = ~state.finished
            return denoise.step(model, params, job.recipe, job.keys, state, rows, wide=True)
        width = job.prompt.tokens.shape[1]
        return denoise.first_steps(model, params, job.recipe, job.keys, state, width)

    arguments = {"params": _params(setting, mesh), "job": _placed(setting, mesh, job)}
    return Planned(first, arguments, None)


def _train(setting: Setting, mesh: Mesh) -> Planned:
    config, place = setting.config, partial(_placed, setting, mesh)
    model, params = config.build(), _params(setting, mesh)
    names = ("adapter",) if getattr(config, "adapter", None) else tuple(params)
    trainable = {name: params.pop(name) for name in names}
    tx = training.Optimiser().build(1000)
    opt_state = _like(trainable, jax.eval_shape(tx.init, trainable), place)
    state = training.TrainState(place(jax.ShapeDtypeStruct((), jnp.int32)), trainable, opt_state)
    step = training.make_train_step(model, objective(setting), tx)
    rows, numbers = (setting.batch, setting.context), (setting.batch,)
    batch = {
        name: jax.ShapeDtypeStruct(shape, jnp.int32)
        for name, shape in (("tokens", rows), ("lengths", numbers), ("prompts", numbers))
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    arguments = {"state": state, "params": params, "batch": place(batch), "key": place(key)}
    return Planned(step, arguments, "state")


def objective(setting: Setting) -> DualStream:
    """The dual stream of a setting: every position is noisy once; with an adapter, as it ships."""
    noise = MaskedBlocks(block_size=setting.block, blocks=-(-setting.context // setting.block))
    return DualStream(noise=noise)


def _like(trainable: Any, opt_state: Any, place: Callable[[Any], Any]) -> Any:
    """The optimiser's state with its moments where the parameters are."""
    tree = jax.tree.structure(trainable)
    is_moment = lambda node: jax.tree.structure(node) == tree  # noqa: E731

    def one(node):
        if not is_moment(node):
            return place(node)
        return jax.tree.map(
            lambda own, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own.sharding),
            trainable, node,
        )  # fmt: skip

    return jax.tree.map(one, opt_state, is_leaf=is_moment)


def _params(setting: Setting, mesh: Mesh) -> Any:
    shapes = param_shapes(setting.config)
    places = shardings(param_axes(setting.config), mesh, RULES, shapes=shapes)
    return jax.tree.map(
        lambda x, own: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own), shapes, places
    )


def _placed(setting: Setting, mesh: Mesh, tree: Any) -> Any:
    """Rows over the axes of the batch, a cache's heads over `tensor`, everything else whole."""

    def one(x):
        names: list[str | None] = [None] * x.ndim
        if x.ndim >= 5:
            names[1:3] = "batch", "kv_heads"
        elif x.ndim and x.shape[0] in (setting.batch, 2 * setting.batch):
            names[0] = "batch"
        spec = shardings(tuple(names), mesh, RULES, shapes=x)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spec)

    return jax.tree.map(one, tree)


def _job(setting: Setting):
    """A checked call of `generate`: a prompt that leaves room for a block or a bucket."""
    size = getattr(getattr(setting.recipe, "width", None), "size", 0) or 1
    width = setting.context - -(-size // BUCKET) * BUCKET
    if width < 1:
        raise ValueError(f"context {setting.context} has no room for a block of {size}")
    shape = (setting.batch, width)

    def call():
        prompt = Prompt(jnp.zeros(shape, jnp.int32), jnp.full(setting.batch, width, jnp.int32))
        key = jax.random.key(0) if setting.draws else None
        return edge(
            setting.config.build(), prompt, setting.recipe, setting.context - width, key
        )._replace(size=None)  # a number, which every program has in its own text

    return jax.eval_shape(call)


def _initial(model, job, size: int):
    return initial(model, job.prompt, job.recipe, job.budget, job.keys, size)
