"""The programs that are planned: those that run, with the shapes and places of their arguments.

decode   one denoising step (or one step of verification) on its state, which is donated
prefill  the state from a prompt, and the first step, which rides on it
train    one step of `training` on two streams: AdamW, every layer computed again
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dllm_jax import training
from dllm_jax.corruption import MaskedBlocks, MaskNoise
from dllm_jax.decode import denoise, verify
from dllm_jax.decode.prompt import BUCKET, Job, Memory, Prompt, chunk_of, edge
from dllm_jax.decode.start import initial
from dllm_jax.losses import Diffusion, DualStream
from dllm_jax.nn.tree import param_axes, param_shapes
from dllm_jax.plan.setting import Setting
from dllm_jax.recipes import Verified
from dllm_jax.sharding import shardings


class Planned(NamedTuple):
    """A function, its arguments by role, and which of them it gives back changed.

    Arguments are flat: lists of arrays, which the function puts together.
    """

    function: Callable[..., Any]
    arguments: dict[str, list[Any]]  # `jax.ShapeDtypeStruct`s that know their places
    donated: tuple[str, ...] = ()  # arguments whose like is what the function returns,
    alone: bool = True  # and nothing else; or the first of two results


def program(setting: Setting, mesh: Mesh) -> Planned:
    """The program of a setting on a mesh.

    Raises:
      ValueError: the recipe is not for the model, or the model is not trained so.
    """
    return {"decode": _decode, "prefill": _prefill, "train": _train}[setting.mode](setting, mesh)


def _decode(setting: Setting, mesh: Mesh) -> Planned:
    model: Any = setting.config.build()
    params, job = _params(setting, mesh), _job(setting, mesh)
    state = _flat(setting, mesh, lambda: _initial(model, _call(setting, job.zeros())))

    def step(*flat):
        own, given, now = (x.whole(y) for x, y in zip((params, job, state), flat, strict=True))
        call = _call(setting, given)
        recipe = call.recipe
        if isinstance(recipe, Verified):
            new = verify.step(model, own, recipe, call.keys, now)
        else:
            wide = not denoise.two_kinds(recipe)
            new = denoise.step(model, own, recipe, call.keys, now, ~now.finished, wide=wide)
        return jax.tree.leaves(new)

    return Planned(step, {"params": params.leaves, "job": job.leaves, "state": state.leaves},
                   ("state",))  # fmt: skip


def _prefill(setting: Setting, mesh: Mesh) -> Planned:
    model: Any = setting.config.build()
    params, job = _params(setting, mesh), _job(setting, mesh)

    def first(*flat):
        own, given = (x.whole(y) for x, y in zip((params, job), flat, strict=True))
        call = _call(setting, given)
        state, recipe = _initial(model, call), call.recipe
        width = call.prompt.tokens.shape[1]
        if isinstance(recipe, Verified):
            new = verify.first_steps(model, own, recipe, call.keys, state, width, call.memory)
        elif recipe.cache in ("none", "prefix", "dual"):
            rows = ~state.finished
            new = denoise.step(model, own, recipe, call.keys, state, rows, wide=True)
        else:
            new = denoise.first_steps(model, own, recipe, call.keys, state, width, call.memory)
        return jax.tree.leaves(new)

    return Planned(first, {"params": params.leaves, "job": job.leaves})


def _train(setting: Setting, mesh: Mesh) -> Planned:
    config: Any = setting.config
    if config.attention == "block_causal":  # a model is trained in its own blocks
        config = dataclasses.replace(config, block_size=setting.block)
    shapes, model = param_shapes(config), config.build()
    names = ("adapter",) if getattr(config, "adapter", None) else tuple(shapes)
    rest = tuple(name for name in shapes if name not in names)
    tx = training.Optimiser().build(1000)
    trainable, frozen = (_params(setting, mesh, own) for own in (names, rest))
    moments = _like(setting, mesh, trainable, tx)
    run = training.make_train_step(model, objective(setting), tx, accumulate=setting.accumulate)
    rows, numbers = (setting.batch, setting.context), (setting.batch,)
    kinds = {"tokens": rows, "lengths": numbers, "prompts": numbers}
    batch = _flat(
        setting, mesh, lambda: {name: jnp.zeros(x, jnp.int32) for name, x in kinds.items()}
    )
    key = _flat(setting, mesh, lambda: (jnp.int32(0), jax.random.key(0)))

    def step(trained, moved, given, data, drawn):
        at, noise = key.whole(drawn)
        state = training.TrainState(at, trainable.whole(trained), moments.whole(moved))
        state, figures = run(state, frozen.whole(given), batch.whole(data), noise)
        return jax.tree.leaves((state.trainable, state.opt_state)), (state.step, figures)

    arguments = {
        "trained": trainable.leaves, "optimiser": moments.leaves, "frozen": frozen.leaves,
        "batch": batch.leaves, "key": key.leaves,
    }  # fmt: skip
    return Planned(step, arguments, ("trained", "optimiser"), alone=False)


def objective(setting: Setting) -> DualStream | Diffusion:
    """What trains the model of a setting: a clean stream, and one that has every position noisy."""
    size = setting.block
    if DualStream.trains(setting.config):
        return DualStream(noise=MaskedBlocks(block_size=size, blocks=-(-setting.context // size)))
    return Diffusion(noise=MaskNoise(block_size=size, counts="independent"))


class Flat(NamedTuple):
    """The arrays of a tree, and how it is put together.

    Trees of shapes are no trees of arrays, which is what the classes of ours are said to hold.
    """

    leaves: list[Any]
    tree: Any

    def whole(self, leaves: Any) -> Any:
        """The tree with other leaves."""
        return jax.tree.unflatten(self.tree, leaves)

    def zeros(self) -> Any:
        """The tree with arrays of zeros, for a trace."""
        return self.whole([jnp.zeros(x.shape, x.dtype) for x in self.leaves])


def _params(setting: Setting, mesh: Mesh, names: tuple[str, ...] | None = None) -> Flat:
    """Those parameters (all by default) where the rules place them."""
    shapes = param_shapes(setting.config)
    places = shardings(param_axes(setting.config), mesh, shapes=shapes)
    own = tuple(shapes) if names is None else names
    pairs = ({name: tree[name] for name in own} for tree in (shapes, places))
    placed = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), *pairs
    )
    return Flat(*jax.tree.flatten(placed))


def _like(setting: Setting, mesh: Mesh, trainable: Flat, tx: Any) -> Flat:
    """The optimiser's state, its moments where the parameters are."""
    flat = _flat(setting, mesh, lambda: tx.init(trainable.zeros()))
    is_moment = lambda node: jax.tree.structure(node) == trainable.tree  # noqa: E731
    nodes = jax.tree.leaves(flat.whole(flat.leaves), is_leaf=is_moment)
    leaves = []
    for node in nodes:
        own = jax.tree.leaves(node)
        places = [x.sharding for x in (trainable.leaves if is_moment(node) else own)]
        leaves += [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
            for x, place in zip(own, places, strict=True)
        ]
    return Flat(leaves, flat.tree)


def _flat(setting: Setting, mesh: Mesh, make: Callable[[], Any]) -> Flat:
    """What is made, in shapes: rows over the axes of the batch, the heads of a cache over theirs.

    Everything else is whole.
    """
    trees = []

    def made():
        leaves, tree = jax.tree.flatten(make())
        trees.append(tree)
        return leaves

    def place(x):
        names: list[str | None] = [None] * x.ndim
        if x.ndim == 5 or x.ndim == 4:  # a cache's keys and values, or their scales
            names[1:3] = "batch", "kv_heads"
        elif x.ndim and x.shape[0] in (setting.batch, 2 * setting.batch):
            names[0] = "batch"
        spec = shardings(tuple(names), mesh, shapes=x)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spec)

    leaves = [place(x) for x in jax.eval_shape(made)]
    return Flat(leaves, trees[0])


def _job(setting: Setting, mesh: Mesh) -> Flat:
    """A `Job` but for its size: a checked prompt that leaves room for a block or a bucket."""
    size = getattr(setting.recipe.width, "size", 0) or 1
    width = setting.context - -(-size // BUCKET) * BUCKET
    if width < 1:
        raise ValueError(f"context {setting.context} has no room for a block of {size}")
    shape, budget = (setting.batch, width), setting.context - width

    def call():
        prompt = Prompt(jnp.zeros(shape, jnp.int32), jnp.full(setting.batch, width, jnp.int32))
        key = jax.random.key(0) if setting.draws else None
        return edge(setting.config.build(), prompt, setting.recipe, budget, key)[:4]

    return _flat(setting, mesh, call)


def _call(setting: Setting, given: Any) -> Job:
    """The job of a prompt as long as the context."""
    chunk = chunk_of(setting.recipe, setting.config, setting.context, None)
    return Job._make((*given, setting.context, Memory(chunk, setting.cache_dtype)))


def _initial(model, job: Job):
    return initial(model, job.prompt, job.recipe, job.budget, job.keys, job.size, job.memory)
