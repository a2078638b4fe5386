"""A diffusion mode for SmolLM2, as an adapter that mask tokens alone feel.

    dllm-jax adapt configs/adapt_smollm2.py              # an hour or so on two cores
    dllm-jax adapt configs/adapt_smollm2.py:gpu          # 6000 steps of 32,768 noisy tokens
    dllm-jax adapt configs/adapt_smollm2.py:tpu          # a slice: 1500 steps of 131,072, all hosts

`scripts/distill.py` makes the data. The settings for GPUs and TPUs have not been run yet.
"""

import dataclasses
from pathlib import Path

from dllm_jax.adaptation import Adapt
from dllm_jax.corruption import MaskedBlocks
from dllm_jax.nn.adapters import AdapterConfig
from dllm_jax.training import Optimiser

config = cpu = Adapt(data=Path("runs/smollm2/data"), run=Path("runs/smollm2/adapt-cpu"))

gpu = dataclasses.replace(
    cpu,
    run=Path("runs/smollm2/adapt-gpu"),
    adapter=AdapterConfig(rank=32),
    noise=MaskedBlocks(block_size=8, blocks=64, whole=0.6, decay=0.9),
    optimiser=Optimiser(learning_rate=1e-3, warmup=200),
    steps=6000,
    batch=64,
    length=320,
    dtype="bfloat16",
    save_every=250,
    evaluate_every=500,
)

tpu = dataclasses.replace(
    gpu,
    run=Path("runs/smollm2/adapt-tpu"),
    optimiser=Optimiser(learning_rate=2e-3, warmup=100),
    steps=1500,
    batch=256,
    save_every=100,
    evaluate_every=250,
)
