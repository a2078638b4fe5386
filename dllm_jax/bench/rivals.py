"""What a user would reach for instead, in JAX: XLA's attention, cuDNN's, Splash; dense scores."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dllm_jax.bench import torch_rivals
from dllm_jax.bench.sides import Jax, Side, passed_on

Sides = dict[str, Callable[[], Side]]

_SPLASH_TILE = 512  # of keys, as Splash has it by default


def absent() -> dict[str, str]:
    """Which are not timed on this device at all, and why."""
    here, found = jax.default_backend(), {}
    if here != "gpu":
        found["cudnn"] = f"runs on NVIDIA GPUs, not on this {here.upper()}"
    if here != "tpu":
        found["splash"] = f"runs on TPUs, not on this {here.upper()}"
    reason = torch_rivals.absent()
    return found | ({"torch": reason} if reason else {})


def of_decode(case: Any) -> Sides:
    """Of a `decode.Decode`."""
    missing = absent()
    found: Sides = {"jax": partial(_decode_jax, case, "xla")}
    if "cudnn" not in missing:
        found["cudnn"] = partial(_decode_jax, case, "cudnn")
    if "splash" not in missing:
        found["splash"] = partial(_decode_splash, case)
    if "torch" not in missing:
        found |= torch_rivals.of_decode(case)
    return found


def of_training(case: Any) -> Sides:
    """Of a `training.Training`."""
    missing = absent()
    found: Sides = {"jax": partial(_training_jax, case, "xla")}
    if "cudnn" not in missing:
        found["cudnn"] = partial(_training_jax, case, "cudnn")
    if "splash" not in missing:
        found["splash"] = partial(_training_splash, case)
    if "torch" not in missing:
        found |= torch_rivals.of_training(case)
    return found


def of_scores(case: Any) -> Sides:
    """Of a `vocabulary.Scores`."""
    found: Sides = {"dense": partial(_dense, case)}
    if "torch" not in absent():
        found |= torch_rivals.of_scores(case)
    return found


def _decode_jax(case: Any, implementation: Any) -> Side:
    q, pairs, ends = case.beside
    valid = jnp.asarray(ends, jnp.int32) if case.ragged else None

    def run(q, k, v, valid):
        return jax.nn.dot_product_attention(
            q, k, v, key_value_seq_lengths=valid, implementation=implementation
        )

    return Jax(run, q, [(*pair, valid) for pair in pairs], lambda out: {"out": out}, passed_on)


def _training_jax(case: Any, implementation: Any) -> Side:
    attend = partial(jax.nn.dot_product_attention, implementation=implementation)
    if not case.block:
        return case.side(partial(attend, is_causal=True))
    mask = case.mask.dense(case.entries)[None, None]
    return case.side(lambda q, k, v, mask: attend(q, k, v, mask=mask), mask)


def _decode_splash(case: Any, interpret: bool = False) -> Side:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    q, pairs, ends = case.beside
    entries, slots = _padded(case.entries, 128), _padded(pairs[0][0].shape[1], _SPLASH_TILE)
    mask = splash.MultiHeadMask([splash.FullMask((entries, slots))] * case.own.heads)
    kernel: Any = splash.make_splash_mha_single_device(mask=mask, interpret=interpret)
    valid = jnp.arange(slots) < jnp.asarray(ends)[:, None]
    segments = splash.SegmentIds(
        q=jnp.ones((case.batch, entries), jnp.int32), kv=valid.astype(jnp.int32)
    )

    def run(q, k, v, segments):
        q = jnp.pad(q * case.own.size**-0.5, _at_the_end(q, entries)).astype(q.dtype)
        q = jnp.moveaxis(q, 1, 2)
        out = jax.vmap(kernel)(q, k, v, segments)
        return jnp.moveaxis(out, 2, 1)[:, : case.entries]

    @jax.jit
    def laid_out(x):
        return jnp.moveaxis(jnp.pad(x, _at_the_end(x, slots)), 1, 2)

    variants = [(*map(laid_out, pair), segments) for pair in pairs]
    return Jax(run, q, variants, lambda out: {"out": out}, passed_on)


def _training_splash(case: Any, interpret: bool = False) -> Side:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    whole = case.entries, case.entries
    if case.block:
        mask = splash.NumpyMask(np.asarray(case.mask.dense(case.entries)))
    else:
        mask = splash.CausalMask(whole)
    mask = splash.MultiHeadMask([mask] * case.own.heads)
    kernel: Any = splash.make_splash_mha_single_device(mask=mask, interpret=interpret)

    def attend(q, k, v):
        q = (q * case.own.size**-0.5).astype(q.dtype)
        q, k, v = (jnp.moveaxis(x, 1, 2) for x in (q, k, v))
        return jnp.moveaxis(jax.vmap(kernel)(q, k, v), 2, 1)

    return case.side(attend)


def _padded(count: int, step: int) -> int:
    return -(-count // step) * step


def _at_the_end(x: jax.Array, length: int) -> list[tuple[int, int]]:
    """Padding that makes axis 1 so long."""
    return [(0, length - x.shape[1] if axis == 1 else 0) for axis in range(x.ndim)]


def _dense(case: Any) -> Side:
    """Scores of all tokens in float32, and the same numbers of them."""
    hidden, vectors, _ = case.arrays
    key = jax.random.key_data(jax.random.key(0))

    def run(hidden, vectors, key):
        scores = jnp.einsum("rd,vd->rv", hidden, vectors, preferred_element_type=jnp.float32)
        if case.own.soft_cap:
            scores = case.own.soft_cap * jnp.tanh(scores / case.own.soft_cap)
        found = _numbers(scores)
        if case.asks == "top 8":
            found["best"], found["ids"] = jax.lax.top_k(scores, case.top)
        else:
            found["ids"] = scores.argmax(axis=1)[:, None]
            found["best"] = scores.max(axis=1, keepdims=True)
        if case.asks == "sampled":
            warm = scores / case.temperature
            found["drawn"] = jax.random.categorical(jax.random.wrap_key_data(key), warm)
            found |= {f"drawn_{name}": x for name, x in _numbers(warm).items()}
        return found

    def form(found):
        return {name: x for name, x in found.items() if name not in ("ids", "drawn")}

    return Jax(run, hidden, [(vectors, key)], form)


def _numbers(scores: jax.Array) -> dict[str, jax.Array]:
    log_probs = jax.nn.log_softmax(scores)
    return {
        "log_z": jax.nn.logsumexp(scores, axis=1),
        "entropy": -(jnp.exp(log_probs) * log_probs).sum(axis=1),
    }
