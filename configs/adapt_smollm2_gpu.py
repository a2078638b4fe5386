"""For one accelerator: 6000 steps of 32,768 noisy tokens in bfloat16. Not run yet on a device."""

from pathlib import Path

from dllm_jax.adaptation import Adapt
from dllm_jax.corruption import MaskedBlocks
from dllm_jax.nn.adapters import AdapterConfig
from dllm_jax.training import Optimiser

config = Adapt(
    data=Path("runs/smollm2/data"),
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
