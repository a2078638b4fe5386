"""PyTorch beside us, where it is installed and has the device: SDPA, FlexAttention, dense scores.

It is never needed: without it these sides are not there. Arrays are handed over, not copied.
"""

import functools
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from dllm_jax.bench.clock import Program, calls_for
from dllm_jax.bench.sides import Side


@functools.cache
def absent() -> str | None:
    """Why PyTorch is not timed on this device, or None."""
    try:
        import torch
    except ImportError:
        return "PyTorch is not installed"
    platform = jax.default_backend()
    if platform == "tpu":
        return "PyTorch has no TPU"
    if platform == "gpu" and not torch.cuda.is_available():
        return "the PyTorch that is installed has no GPU"
    return None


class Torch:
    """A function of PyTorch, of arguments that calls take turns at."""

    def __init__(self, run: Callable[..., dict[str, Any]], variants: list[tuple]):
        self.run, self.variants, self.once = run, variants, 0.0

    def result(self) -> dict[str, np.ndarray]:
        self.run(*self.variants[0])  # the first compiles
        _wait()
        start = time.perf_counter()
        found = self.run(*self.variants[0])
        _wait()
        self.once = time.perf_counter() - start
        return {name: x.detach().float().cpu().numpy() for name, x in found.items()}

    def program(self) -> Program:
        calls = calls_for(self.once)

        def run() -> None:
            for call in range(calls):  # launched ahead of the device, which does not wait
                self.run(*self.variants[call % len(self.variants)])
            _wait()

        return Program(run, calls)


def of_decode(case: Any) -> dict[str, Callable[[], Side]]:
    return {"torch sdpa": partial(_decode, case), "torch flex": partial(_decode, case, flex=True)}


def of_training(case: Any) -> dict[str, Callable[[], Side]]:
    return {
        "torch sdpa": partial(_training, case),
        "torch flex": partial(_training, case, flex=True),
    }


def of_scores(case: Any) -> dict[str, Callable[[], Side]]:
    return {"torch dense": partial(_dense, case)}


def _decode(case: Any, *, flex: bool = False) -> Side:
    import torch

    q, pairs, ends = case.beside
    grouped = case.own.heads != case.own.kv_heads
    q, *keys_values = (_handed(x) for x in (q, *(x for pair in pairs for x in pair)))
    valid = torch.tensor(ends, device=q.device)
    slots = keys_values[0].shape[2]
    if flex:
        attend, masked = _flex()
        sees = masked(
            lambda b, h, i, j: j < valid[b], case.batch, None, case.entries, slots, q.device
        )
        attend = partial(attend, block_mask=sees if case.ragged else None, enable_gqa=grouped)
    else:
        attend = torch.nn.functional.scaled_dot_product_attention
        sees = (torch.arange(slots, device=q.device) < valid[:, None])[:, None, None]
        attend = partial(attend, attn_mask=sees if case.ragged else None, enable_gqa=grouped)

    @torch.no_grad()
    def run(k, v):
        return {"out": attend(q, k, v).transpose(1, 2)}

    return Torch(run, list(zip(keys_values[::2], keys_values[1::2], strict=True)))


def _training(case: Any, *, flex: bool = False) -> Side:
    import torch

    q, k, v, out = (_handed(x) for x in case.arrays)
    grouped = case.own.heads != case.own.kv_heads
    if flex:
        attend, masked = _flex()
        sees = masked(_allowed(case), None, None, case.entries, case.entries, q.device)
        attend = partial(attend, block_mask=sees, enable_gqa=grouped)
    else:
        attend = torch.nn.functional.scaled_dot_product_attention
        sees = _handed(case.mask.dense(case.entries)[None, :, None]) if case.block else None
        attend = partial(attend, attn_mask=sees, is_causal=not case.block, enable_gqa=grouped)
    if not case.gradient:

        @torch.no_grad()
        def run(q, k, v):
            return {"out": attend(q, k, v).transpose(1, 2)}

        return Torch(run, [(q, k, v)])
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def grads():
        found = torch.autograd.grad(attend(*leaves), leaves, out)
        return {name: x.transpose(1, 2) for name, x in zip("qkv", found, strict=True)}

    return Torch(grads, [()])


def _allowed(case: Any) -> Callable[..., Any]:
    """The mask of `BlockMask.dual_stream` or `causal`, as FlexAttention takes it."""
    clean, block = case.length, case.block
    if not block:
        return lambda b, h, i, j: j <= i

    def allowed(b, h, i, j):
        own, other = (i % clean) // block, (j % clean) // block
        noisy = i >= clean
        to_clean = (j < clean) & ((other < own) | (~noisy & (other == own)))
        return to_clean | (noisy & (j >= clean) & (own == other))

    return allowed


def _flex() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """FlexAttention, compiled, and what makes its masks."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()  # or after a few shapes it is not compiled any more
    return torch.compile(flex_attention, dynamic=False), create_block_mask


def _dense(case: Any) -> Side:
    import torch

    hidden, vectors, _ = (_handed(x, heads=False) for x in case.arrays)

    def numbers(scores):
        log_probs = scores.log_softmax(1)
        entropy = -(log_probs.exp() * log_probs).sum(1)
        return {"log_z": scores.logsumexp(1), "entropy": entropy}

    @torch.no_grad()
    def run():
        scores = (hidden @ vectors.T).float()
        if case.own.soft_cap:
            scores = case.own.soft_cap * torch.tanh(scores / case.own.soft_cap)
        found = numbers(scores)
        found["best"] = scores.topk(case.top, dim=1).values
        if case.asks == "sampled":
            warm = scores / case.temperature
            torch.multinomial(warm.softmax(1), 1)
            found |= {f"drawn_{name}": x for name, x in numbers(warm).items()}
        return found

    return Torch(run, [()])


def _handed(x: jax.Array, *, heads: bool = True) -> Any:
    """The array as a tensor of the same memory; [B, Q, N, H] as [B, N, Q, H]."""
    import torch

    x = torch.from_dlpack(x)
    return x.transpose(1, 2) if heads else x


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
