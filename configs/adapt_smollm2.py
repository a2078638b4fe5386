"""A diffusion mode for SmolLM2: as an adapter that mask tokens alone feel, or as another model.

    dllm-jax adapt configs/adapt_smollm2.py              # an hour or so on two cores
    dllm-jax adapt configs/adapt_smollm2.py:gpu          # 6000 steps of 32,768 noisy tokens
    dllm-jax adapt configs/adapt_smollm2.py:tpu          # a slice: 1500 steps of 131,072, all hosts

Or all parameters are trained, or an adapter for every token, merged in the end:

    dllm-jax adapt configs/adapt_smollm2.py:blocks       # block-causal, blocks of 1, 4, then 16
    dllm-jax adapt configs/adapt_smollm2.py:blocks_lora
    dllm-jax adapt configs/adapt_smollm2.py:canvas       # bidirectional
    dllm-jax adapt configs/adapt_smollm2.py:d2f          # and that one distilled into blocks

`scripts/distill.py` makes the data. Of these the first was run to its end, on a CPU; the others are
settings to begin from, tried for a few steps (`tests/test_pretraining.py`).
"""

import dataclasses
from pathlib import Path

from dllm_jax.adaptation import Adapt
from dllm_jax.corruption import MaskedBlocks, MaskNoise
from dllm_jax.losses import Diffusion, Distillation
from dllm_jax.nn.adapters import AdapterConfig
from dllm_jax.training import Optimiser, Phase

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

RESERVED = 4  # <reponame>, which no text has: the mask token

# Fast-dLLM v2's objective (2509.26328) under LLaDA2's curriculum (2512.15745).
blocks = dataclasses.replace(
    cpu,
    run=Path("runs/smollm2/blocks"),
    adapter=None,
    attention="block_causal",
    mask_id=RESERVED,
    objective=Diffusion(
        noise=MaskNoise(block_size=16, counts="independent", weighting="flat"), complementary=True,
        divide="learnt",
    ),
    phases=(
        Phase(until=60, block_size=1), Phase(until=200, block_size=4),
        Phase(until=600, block_size=16),
    ),
    optimiser=Optimiser(learning_rate=1e-4, warmup=30, schedule="wsd"),
)  # fmt: skip

blocks_lora = dataclasses.replace(
    blocks,
    run=Path("runs/smollm2/blocks-lora"),
    adapter=AdapterConfig(rank=16, gated=False),
    optimiser=Optimiser(learning_rate=1e-3, warmup=30, schedule="wsd"),
)

# Dream's way (2508.15487): outputs stay shifted, so that little is to be unlearnt.
canvas = dataclasses.replace(
    blocks,
    run=Path("runs/smollm2/canvas"),
    attention="bidirectional",
    objective=Diffusion(noise=MaskNoise(counts="independent", beta=1e-3)),
    phases=(),
)

d2f = dataclasses.replace(
    blocks_lora,
    run=Path("runs/smollm2/d2f"),
    model=str(canvas.run / "model"),
    attention=None,
    objective=Distillation(block_size=16),
    phases=(),
)
