"""Lower bounds of a text's likelihood: how well a model restores it from noise, averaged.

The bound holds for the model itself, whatever the order of decoding. With masks it is the mean
over random orders of the log-likelihood in that order.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dllm_jax.corruption import MaskNoise, Noise, NoisyText, UniformNoise
from dllm_jax.decode.prompt import BUCKET
from dllm_jax.likelihood.texts import Texts, pack
from dllm_jax.losses import views
from dllm_jax.losses.diffusion import check
from dllm_jax.nn.head import over_vocabulary
from dllm_jax.nn.transformer import forward
from dllm_jax.ops.sampling import uniform
from dllm_jax.sharding import automatic, in_scope, placed
from dllm_jax.typing import Key, Params
from pallas_kernels import BlockMask

_TIME, _TURN, _NOISE = 0, 1, 2  # streams of noise; the last of the noise process, and those behind

_CAUSAL_BLOCK = 4


class Bound(NamedTuple):
    """A Monte Carlo estimate of a lower bound of log p(answer | prompt), in nats."""

    mean: jax.Array  # float32[B]
    stderr: jax.Array  # float32[B]: of the mean; on average not too small. nan for one sample


@in_scope
def bound(
    model: Any,
    params: Params,
    prompt: Sequence,
    answer: Sequence,
    *,
    key: Key,
    noise: Noise | None = None,
    samples: int = 128,
    times: str = "stratified",
    chunk: int = 8,
) -> Bound:
    """The evidence lower bound of log p(answer | prompt), from draws of noise over the answer.

    * A bidirectional model restores the whole answer at once (LLaDA, MDLM, UDLM).
    * A block-causal or causal one restores each block behind the clean ones before it (BD3-LM).
      Blocks begin at multiples of their size in the first, where the answer does in the second.
      Positions behind the text in its last block are all noise, as in `log_likelihood`.

    Args:
      prompt, answer: as in `log_likelihood`.
      key: one for the batch, row r then uses `fold_in(key, r)`, or one for each row. Sample s of a
        row depends on (its key, s), and on the number of samples where times are stratified.
      noise: by default `MaskNoise`, or `UniformNoise` for a model without a mask token, in the
        model's own blocks (4 for a causal model with a mask token, as `recipes.block_diffusion`).
      samples: draws of noise, each of which takes a pass.
      times: how noise levels are spread over the samples: "stratified" (each of its own part of
        [0, 1]), "antithetic" (in pairs u, 1 - u) or "independent".
      chunk: samples in a pass; memory depends on it, the estimate does not.

    Raises:
      ValueError: the noise is not the model's, or the samples are too few or odd; or as `pack`.
    """
    noise = _fitting(model.config, noise)
    if samples < 1 or chunk < 1:
        raise ValueError(f"samples={samples} and chunk={chunk} must be at least 1")
    if times not in ("stratified", "antithetic", "independent"):
        raise ValueError(f"times={times!r} is none of stratified, antithetic, independent")
    if times == "antithetic" and samples % 2:
        raise ValueError(f"samples={samples} must be even: antithetic times come in pairs")
    texts = pack(prompt, answer, model.config)
    start, blocks = _layout(model.config, noise.block_size, texts)
    values = _values(
        model, params, texts, _keys(key, len(start)), noise, start, blocks=blocks, times=times,
        samples=samples, chunk=min(chunk, samples),
    )  # fmt: skip
    return Bound(values.mean(axis=0), _stderr(values, times))


def _stderr(values: Float[Array, "S B"], times: str) -> Float[Array, "B"]:
    """Of the mean over samples; squared it is on average not too small."""
    if times == "antithetic":  # the two of a pair depend on each other
        values = values.reshape(-1, 2, values.shape[1]).mean(axis=1)
    count = len(values)
    if count == 1:
        return jnp.full(values.shape[1], jnp.nan)
    if times == "stratified":
        # Successive differences (Wolter, Introduction to Variance Estimation, chapter 8): those of
        # samples next to each other (`_levels`), where the spread of all of them is mostly that of
        # the strata's means, which the mean over all strata does not have.
        steps = values - jnp.roll(values, 1, axis=0)
        return jnp.sqrt((steps**2).sum(axis=0) / 2) / count
    return values.std(axis=0, ddof=1) / count**0.5


def _keys(key: Key, batch: int) -> Key:
    """A key for each row."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise ValueError(
            "the key is an old-style array of numbers; make it with jax.random.key(...)"
        )
    if key.ndim == 0:
        return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(batch))
    if key.shape != (batch,):
        raise ValueError(f"{key.shape} keys for {batch} rows: give one key, or one for each row")
    return key


def _fitting(config, noise: Noise | None) -> Noise:
    """The noise, by default the model's own; ValueError where it is for another one."""
    if noise is None:
        kind = UniformNoise if config.mask_id is None else MaskNoise
        size = getattr(config, "canvas_length", 0)
        if config.attention == "block_causal":
            size = config.block_size
        elif config.attention == "causal" and kind is MaskNoise:
            size = _CAUSAL_BLOCK
        noise = kind(block_size=size)
    check(config, noise)
    if noise.weighting != "bound" or getattr(noise, "clamp", 0):
        raise ValueError(f"{noise} is an objective, and no bound: leave its weights as they are")
    if isinstance(noise, MaskNoise) and noise.block_size != 1:
        ends = noise.beta, noise.omega
        if all(isinstance(x, int | float) for x in ends) and ends != (0, 1):
            raise ValueError(
                f"the clipped schedule {ends} is an objective, and no bound, but in blocks of one"
            )
    return noise


def _layout(config, size: int, texts: Texts) -> tuple[Int[Array, "B"], int]:
    """Where each row's blocks begin, and how many there are."""
    if not size:
        return jnp.zeros(len(texts.lengths), jnp.int32), 1
    first, lengths = np.asarray(texts.at)[:, 0], np.asarray(texts.lengths)
    start = first // size * size if config.attention == "block_causal" else first
    span = -(-int((lengths - start).max()) // BUCKET) * BUCKET
    return jnp.asarray(start), -(-span // size)


@partial(jax.jit, static_argnames=("model", "blocks", "times", "samples", "chunk"))
def _values(
    model, params, texts: Texts, keys, noise, start, *, blocks, times, samples, chunk
) -> Float[Array, "S B"]:
    """What each sample adds to the bound's mean."""
    run = partial(_sampled, model, blocks, times, samples, chunk)
    return automatic(run, placed(None, "batch"), params, texts, keys, noise, start)


def _sampled(model, blocks, times, samples, chunk, params, texts: Texts, keys, noise, start):
    batch, width = texts.tokens.shape
    size = noise.block_size or width
    index = start[:, None] + jnp.arange(blocks * size)  # positions of the entries, [B, Q]
    behind = index >= texts.lengths[:, None]
    fold = lambda x: x.reshape(batch, blocks, size)  # noqa: E731
    inside = jnp.minimum(index, width - 1)
    tokens, scored = (jnp.take_along_axis(x, inside, axis=1) for x in (texts.tokens, texts.scored))
    clean = None
    if noise.block_size:
        seen = size if model.config.attention == "block_causal" else 1
        clean = forward(
            model, params, texts.tokens, mask=BlockMask.block_causal(width, seen),
            lengths=texts.lengths, canvas=False,
        )  # fmt: skip

    def drawn(sample) -> NoisyText:
        step = jnp.full(batch, sample)
        levels = _levels(times, keys, step, samples, blocks)
        chance = lambda stream: fold(uniform(keys, index, _NOISE + stream, step))  # noqa: E731
        return noise.draw(
            chance, levels, fold(tokens), fold(scored & ~behind), fold(behind), model.config
        )

    def values(numbers) -> Float[Array, "C B"]:
        noisy = jax.vmap(drawn)(numbers)
        if clean is None:
            hidden = views.canvases(model, params, noisy.tokens, texts.lengths)
        else:
            hidden = views.blocks(model, params, noisy.tokens, index, clean, texts.lengths, size)
        at = jnp.broadcast_to(texts.at - start[:, None], (chunk, *texts.at.shape))
        shown, level, weights = (jnp.take_along_axis(x, at, axis=2) for x in noisy)
        nats = over_vocabulary(
            model, params, noise.score, jnp.take_along_axis(hidden, at[..., None], axis=2),
            jnp.broadcast_to(texts.targets, at.shape), shown, level,
        )  # fmt: skip
        # Where nothing is restored the score may be anything, minus infinity too.
        return jnp.where(texts.there & (weights > 0), weights * nats, 0.0).sum(axis=2)

    chunks = -(-samples // chunk)
    numbers = jnp.arange(chunks * chunk).reshape(chunks, chunk)
    return jax.lax.map(values, numbers).reshape(-1, batch)[:samples]


def _levels(times: str, keys, sample, samples: int, blocks: int) -> Float[Array, "B G"]:
    """Numbers in [0, 1] for the blocks of sample `sample` [B]: uniform, and spread as `times`."""
    place = jnp.broadcast_to(jnp.arange(blocks), (len(sample), blocks))
    if times == "antithetic":
        level = uniform(keys, place, _TIME, sample // 2)
        return jnp.where(sample[:, None] % 2, 1 - level, level)
    level = uniform(keys, place, _TIME, sample)
    if times == "stratified":
        # Blocks go round a circle of strata from places of their own, up the even ones and down the
        # odd ones, so that samples next to each other are everywhere of levels near each other.
        turn = (uniform(keys, place, _TURN) * samples).astype(jnp.int32)
        at = (sample[:, None] + turn) % samples
        return (jnp.where(2 * at < samples, 2 * at, 2 * (samples - at) - 1) + level) / samples
    return level
