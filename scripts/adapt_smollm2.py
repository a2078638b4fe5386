"""Trains a diffusion mode into an autoregressive model: an adapter that only mask tokens feel.

    python scripts/distill.py --out runs/smollm2/data --conversations 20000
    python scripts/distill.py --out runs/smollm2/data --conversations 128 --split heldout
    python scripts/adapt_smollm2.py --data runs/smollm2/data --run runs/smollm2/adapt --minutes 60

Give it a budget in minutes; it saves and stops there, or on Ctrl-C or SIGTERM, and the same
command goes on. When it reaches its last step, or with --export at any time, it writes the adapter
for `load(adapter=...)`.
"""

import dataclasses
import json
from pathlib import Path

import jax
import tyro

from dllm_jax import training
from dllm_jax.checkpoint import load, save_adapter
from dllm_jax.corruption import MaskedBlocks
from dllm_jax.data import Conversations
from dllm_jax.losses import DualStream
from dllm_jax.nn.adapters import AdapterConfig, init_adapter
from dllm_jax.nn.transformer import Transformer, param_shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapt:
    """A run. The defaults are for a CPU."""

    data: Path
    """Folder that scripts/distill.py filled."""
    run: Path
    """Folder of the checkpoints, the metrics and the adapter."""
    model: str = "smollm2-135m-instruct"
    init: Path | None = None
    """Start from the adapter in this folder instead of a fresh one; its size wins."""
    adapter: AdapterConfig = AdapterConfig(rank=16)
    noise: MaskedBlocks = MaskedBlocks(block_size=4, blocks=48, whole=0.6, decay=0.85)
    optimiser: training.Optimiser = training.Optimiser()
    steps: int = 600
    batch: int = 4
    length: int = 208
    """Longest conversation, in tokens; longer ones are cut."""
    minutes: float | None = None
    """Stop and save after this long; the same command continues."""
    dtype: str = "float32"
    """Of activations: bfloat16 on an accelerator."""
    seed: int = 0
    save_every: int = 50
    evaluate_every: int = 100
    export: Path | None = None
    """Write the adapter here; by default to <run>/adapter at the last step."""


def main(config: Adapt) -> None:
    """Trains, or goes on training, and exports."""
    base, params = load(config.model, adapter=config.init)
    if config.init is None:
        changes = dict(adapter=config.adapter, mask_id=base.config.vocab_size)
        settings = dataclasses.replace(base.config, **changes, dtype=config.dtype)
        shapes, key = param_shapes(settings)["adapter"], jax.random.key(config.seed)
        params["adapter"] = init_adapter(key, shapes, config.adapter, params)
    else:
        settings = dataclasses.replace(base.config, dtype=config.dtype)
    model, size = Transformer(settings), settings.adapter
    objective = DualStream(noise=config.noise, frozen_layers=size.first_layer if size else 0)
    tx = config.optimiser.build(config.steps)
    fit = training.Fit(
        steps=config.steps, batch=config.batch, length=config.length, seed=config.seed,
        minutes=config.minutes, save_every=config.save_every, evaluate_every=config.evaluate_every,
    )  # fmt: skip
    source = Conversations(config.data, "train")
    try:
        heldout = Conversations(config.data, "heldout")
    except FileNotFoundError:
        heldout = None
    device = jax.devices()[0].device_kind
    print(f"{len(source)} conversations, {source.answer_tokens} answer tokens; {device}")
    state = training.create(params, ("adapter",), tx)
    state = training.fit(config.run, fit, model, params, state, objective, tx, source, heldout)
    step = int(state.step)
    folder = config.export or (config.run / "adapter" if step == config.steps else None)
    if folder is None:
        print(f"step {step} of {config.steps}, saved; the same command continues")
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
    save_adapter(folder, settings, state.trainable["adapter"], meta)
    print(f"step {step}: the adapter is in {folder}")


def _plain(config: Adapt) -> dict:
    """The run's settings without its folders, for the record in the adapter."""
    fields = dataclasses.asdict(config)
    left_out = ("data", "run", "export", "init", "minutes")
    return {k: v for k, v in fields.items() if k not in left_out}


if __name__ == "__main__":
    main(tyro.cli(Adapt, description=__doc__))
