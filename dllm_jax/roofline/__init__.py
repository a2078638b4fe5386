"""What a pass costs in closed form: chips as data, and bytes, FLOPs and time of a configuration.

    layout = {"tensor": 8}
    work = forward_work(config, layout, decode_pass(batch=8, entries=32, context=4096))
    print(time_of(work, CHIPS["v5e"]).least, peak(decode_memory(config, layout, ...)))

A config is any architecture: of `nn.transformer` or `nn.gemma`. A layout is the size of each axis
of the mesh: data, fsdp, expert, context, tensor; those left out are 1.
"""

from dllm_jax.roofline.chips import CHIPS, Chip
from dllm_jax.roofline.cost import (
    Pass,
    Time,
    Work,
    decode_pass,
    forward_work,
    prefill_pass,
    time_of,
    train_work,
)
from dllm_jax.roofline.memory import decode_memory, train_memory
from dllm_jax.roofline.sizes import Parameters, cache_bytes, parameters

__all__ = [
    "CHIPS", "Chip", "Parameters", "Pass", "Time", "Work", "cache_bytes", "decode_memory",
    "decode_pass", "forward_work", "parameters", "prefill_pass", "time_of",
    "train_memory", "train_work",
]  # fmt: skip
