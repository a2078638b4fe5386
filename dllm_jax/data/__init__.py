"""Rows of ids, where they come from, and the batches that training reads of them.

source = Conversations("runs/mine/data", "train")  # or any sequence of `Row`s
for batch in batches(source, batch=8, length=256, pad_id=0, seed=0): ...
"""

from dllm_jax.data.batches import batches
from dllm_jax.data.conversations import SPLITS, Conversations, write_part
from dllm_jax.data.rows import Row, Source

__all__ = ["SPLITS", "Conversations", "Row", "Source", "batches", "write_part"]
