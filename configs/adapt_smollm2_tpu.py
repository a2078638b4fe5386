"""For a TPU slice, on all hosts: 1500 steps of 131,072 noisy tokens in bfloat16. Not run yet."""

from pathlib import Path

from dllm_jax.adaptation import Adapt
from dllm_jax.corruption import MaskedBlocks
from dllm_jax.nn.adapters import AdapterConfig
from dllm_jax.training import Optimiser

config = Adapt(
    data=Path("runs/smollm2/data"),
    run=Path("runs/smollm2/adapt-tpu"),
    adapter=AdapterConfig(rank=32),
    noise=MaskedBlocks(block_size=8, blocks=64, whole=0.6, decay=0.9),
    optimiser=Optimiser(learning_rate=2e-3, warmup=100),
    steps=1500,
    batch=256,
    length=320,
    dtype="bfloat16",
    save_every=100,
    evaluate_every=250,
)
