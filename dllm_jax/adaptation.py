"""Adaptation: a diffusion mode trained into an autoregressive model, as an adapter that masks feel.

The base model's conversations (`scripts/distill.py`) are the data, the dual stream the objective,
and the base parameters stay as they are.
"""

import dataclasses
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from dllm_jax import distributed, training
from dllm_jax.checkpoint import load, save_adapter
from dllm_jax.corruption import MaskedBlocks
from dllm_jax.data import Conversations
from dllm_jax.losses import DualStream
from dllm_jax.nn.adapters import AdapterConfig, init_adapter
from dllm_jax.nn.transformer import Transformer
from dllm_jax.nn.tree import param_axes, param_shapes
from dllm_jax.sharding import Rules, make_mesh, shardings
from dllm_jax.typing import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapt:
    """A run. The defaults are for a CPU."""

    data: Path
    """Folder that scripts/distill.py filled."""
    run: Path
    """Folder of the checkpoints, the metrics and the adapter."""
    model: str = "smollm2-135m-instruct"
    """The base: anything that `load` takes."""
    init: Path | None = None
    """Start from the adapter in this folder instead of a fresh one; its size wins."""
    adapter: AdapterConfig = AdapterConfig(rank=16)
    """Size and place of a fresh adapter."""
    noise: MaskedBlocks = MaskedBlocks(block_size=4, blocks=48, whole=0.6, decay=0.85)
    """Blocks, and how they are masked."""
    optimiser: training.Optimiser = training.Optimiser(learning_rate=2e-3)
    """AdamW and its schedule."""
    steps: int = 600
    """Of the whole run: the schedule ends there."""
    batch: int = 4
    """Conversations in a step."""
    length: int = 208
    """Longest conversation, in tokens; longer ones are cut."""
    minutes: float | None = None
    """Stop and save after this long; the same command continues."""
    dtype: str = "float32"
    """Of activations: bfloat16 on an accelerator."""
    seed: int = 0
    """Of the order of the data, the noise, and a fresh adapter."""
    save_every: int = 50
    """Steps between checkpoints."""
    evaluate_every: int = 100
    """Steps between looks at the held-out conversations, where there are any."""
    export: Path | None = None
    """Write the adapter here; by default to <run>/adapter at the last step."""
    accumulate: int = 1
    """Parts of a batch that are passed one after the other, for the memory of one."""
    remat: str = "none"
    """What the backward pass computes again: none, dots, dots_no_batch, full, or offload."""
    fsdp: int = 1
    """Devices that the parameters are split over."""
    tensor: int = 1
    """Devices that heads, feed-forward and vocabulary are split over. The batch is split over the
    other devices: all of them, or as many as it divides over where one process has them all."""
    checkpoints: str | None = None
    """Folder of the checkpoints, by default in `run`; a bucket where hosts share no disk."""
    keep_every: int | None = None
    """Checkpoints of steps that it divides are kept, beside the newest two."""


def adapt(config: Adapt) -> None:
    """Trains, or goes on training, and exports; on as many processes as call it together."""
    first = distributed.is_first()
    say = print if first else lambda *_: None
    mesh = _mesh(config)
    base, params = load(config.model, adapter=config.init, mesh=mesh)
    changes: dict[str, Any] = dict(dtype=config.dtype, remat=config.remat)
    if config.init is None:
        changes |= dict(adapter=config.adapter, mask_id=base.config.vocab_size)
        settings = dataclasses.replace(base.config, **changes)
        shapes, key = param_shapes(settings)["adapter"], jax.random.key(config.seed)
        init = partial(init_adapter, key, shapes, config.adapter)
        if mesh is not None:
            homes = shardings(param_axes(settings)["adapter"], mesh, shapes=shapes)
            init = jax.jit(init, out_shardings=homes)
        params["adapter"] = init({"embed": params["embed"]})
    else:
        settings = dataclasses.replace(base.config, **changes)
    model, size = Transformer(settings), settings.adapter
    objective = DualStream(noise=config.noise, frozen_layers=size.first_layer if size else 0)
    tx = config.optimiser.build(config.steps)
    fit = training.Fit(
        steps=config.steps, batch=config.batch, length=config.length, seed=config.seed,
        accumulate=config.accumulate, minutes=config.minutes, save_every=config.save_every,
        keep_every=config.keep_every, checkpoints=config.checkpoints,
        evaluate_every=config.evaluate_every,
    )  # fmt: skip
    source = Conversations(config.data, "train")
    try:
        heldout = Conversations(config.data, "heldout")
    except FileNotFoundError:
        heldout = None
    used = 1 if mesh is None else mesh.size
    device = f"{used} of {jax.device_count()} x {jax.devices()[0].device_kind}"
    say(f"{len(source)} conversations, {source.answer_tokens} answer tokens; {device}")
    state = training.create(params, ("adapter",), tx)
    state = training.fit(config.run, fit, model, params, state, objective, tx, source, heldout)
    step = int(state.step)
    folder = config.export or (config.run / "adapter" if step == config.steps else None)
    if folder is None:
        say(f"step {step} of {config.steps}, saved; the same command continues")
        return
    noisy = config.noise.blocks * config.noise.block_size * config.batch
    before = {"steps": 0, "noisy_tokens_seen": 0}
    if config.init is not None:
        before = json.loads((config.init / "adapter.json").read_text())["meta"]
    meta = {
        "base": config.model,
        "steps": before["steps"] + step,
        "noisy_tokens_seen": before["noisy_tokens_seen"] + step * noisy,
        "init": before if config.init else None,
        "conversations": len(source),
        "answer_tokens": source.answer_tokens,
        "block_size": config.noise.block_size,
        "device": jax.devices()[0].device_kind,
        "settings": _plain(config),
    }
    adapter = _whole(state.trainable["adapter"], mesh)  # all processes take part
    if first:
        save_adapter(folder, settings, adapter, meta)
        say(f"step {step}: the adapter is in {folder}")


def _mesh(config: Adapt) -> Mesh | None:
    """All devices, or as many as a lone process can use; None: one is enough."""
    devices, split = jax.device_count(), config.fsdp * config.tensor
    rows = max(config.batch // config.accumulate // config.fsdp, 1)
    data = -1 if jax.process_count() > 1 else math.gcd(rows, max(devices // split, 1))
    if data * split == 1:
        return None
    return make_mesh(data=data, fsdp=config.fsdp, tensor=config.tensor)


def _whole(tree: Params, mesh: Mesh | None) -> Params:
    """A small tree, whole on every device: one process can read it."""
    if mesh is None:
        return tree
    return jax.jit(lambda tree: tree, out_shardings=shardings((), mesh, Rules()))(tree)


def _plain(config: Adapt) -> dict:
    """The run's settings without its folders, for the record in the adapter."""
    fields = dataclasses.asdict(config)
    left_out = ("data", "run", "export", "init", "minutes", "checkpoints")
    return {k: v for k, v in fields.items() if k not in left_out}
