"""Three steps of a tiny model on a task, and of one that is there: configs as users write them."""

import dataclasses
from pathlib import Path

from dllm_jax import recipes
from dllm_jax.corruption import MaskNoise
from dllm_jax.losses import Autoregressive, Diffusion
from dllm_jax.nn.transformer import TransformerConfig
from dllm_jax.pretraining import TaskAccuracy, TaskData, Train
from dllm_jax.tasks import Addition
from dllm_jax.training import Fit, Optimiser, Phase

TASK = Addition(digits=2)

config = Train(
    run=Path("runs/toy"),
    data=TaskData(task=TASK, rows=64, heldout=8),
    model=TransformerConfig(
        vocab_size=TASK.vocabulary.size, num_layers=1, dim=16, num_heads=2, num_kv_heads=1,
        head_dim=8, ffn_dim=24, attention="causal", mask_id=TASK.vocabulary.mask_id,
        eos_ids=(TASK.vocabulary.eos_id,), pad_id=TASK.vocabulary.pad_id,
    ),
    objective=Autoregressive(),
    optimiser=Optimiser(learning_rate=1e-2, warmup=0),
    fit=Fit(steps=3, batch=8, length=TASK.length, evaluate_every=2, peak_flops=1e10),
    evaluations={"addition": TaskAccuracy(recipe=recipes.ar(), count=4)},
    recipe=recipes.ar(),
)  # fmt: skip

blocks = dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, attention="block_causal", block_size=2,
                              alignment="same_position"),
    objective=Diffusion(noise=MaskNoise(block_size=2)),
    evaluations={},
    recipe=None,
)  # fmt: skip

tuned = dataclasses.replace(  # the second phase chooses its interval of noise
    blocks,
    data=dataclasses.replace(config.data, heldout=24),
    objective=Diffusion(noise=MaskNoise(block_size=2, counts="independent")),
    phases=(Phase(until=2, block_size=2), Phase(until=3, block_size=2, tune=3)),
)
