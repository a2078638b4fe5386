"""Diffusion losses: a text under noise, restored."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dllm_jax.corruption import MaskNoise, MixedNoise, Noise, NoisyText, UniformNoise
from dllm_jax.losses import views
from dllm_jax.losses.objective import (
    Drawn,
    answers,
    by_level,
    check_packed,
    check_whole_blocks,
    follows,
    learnable,
    level_figures,
)
from dllm_jax.nn.head import cross_entropy_of, mask_in_vocabulary, over_vocabulary, stats_of
from dllm_jax.nn.transformer import forward
from dllm_jax.sharding import automatic, placed
from dllm_jax.typing import Key, Params
from pallas_kernels import BlockMask


class Rows(NamedTuple):
    """A batch under noise, row by row."""

    batch: dict[str, jax.Array]
    index: jax.Array  # int32[B, Q]: positions of the entries
    scored: jax.Array  # bool[B, Q]: to be learnt
    noisy: NoisyText  # arrays [B, N, Q]: N samples
    share: jax.Array  # float32[B]: of each row's nats in the loss
    conditioned: jax.Array  # bool[B]: rows that are told what a first pass expects


class _Entries(NamedTuple):
    """The entries of a batch, in G blocks of T."""

    index: jax.Array  # int32[B, G * T]: their positions
    tokens: jax.Array  # int32[B, G, T]: clean
    scored: jax.Array  # bool[B, G, T]: to be learnt
    behind: jax.Array  # bool[B, G, T]: behind the text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diffusion:
    """Of each noisy entry the weighted nats of its clean token.

        loss = sum(weight * nats) / divisor,  nats = -noise.score(...)

    The model says how the noisy text is read:

    * a bidirectional model restores all of it at once (`noise.block_size` 0: LLaDA, MDLM, MD4);
    * a block-causal or causal one restores all blocks in one pass, each behind the clean blocks
      before it (BD3-LM, 2503.09573, equation 8; SDAR; LLaDA2; shifted: Fast-dLLM v2). Blocks begin
      at multiples of their size in the first, where the answer does in the second.

    The noise says what is restored and with which weights; with those of the bound and divisor
    "tokens" the loss is the negative evidence lower bound a token, of one sample (`bound`).

    Named settings: LLaDA's pretraining is `MaskNoise(counts="independent", beta=1e-3)` (2502.09992,
    equation 3; with `predict_mask`), its fine-tuning the same with divisor "rows" (equation 5: a
    row's loss over its answer's length); MDLM `MaskNoise(counts="independent")`, MD4 that with a
    schedule; BD3-LM `MaskNoise(block_size=4, counts="independent", beta=0.3, omega=0.8)`; LLaDA2's
    fine-tuning that with `weighting="flat"` and divisor "learnt"; Fast-dLLM v2 besides
    `complementary`; GIDD `MixedNoise()`; DiffusionGemma `UniformNoise(block_size=256,
    weighting="flat")` with `self_conditioning=0.5` and `ar_weight=1`; a joint model of two modes
    any with `ar_weight`.
    """

    noise: Noise = MaskNoise()
    divide: str = "tokens"  # by those to be learnt | "rows": each row by its own | "learnt": noisy
    # Each text twice, noisy where its twin is not: every token is learnt in every step.
    complementary: bool = False
    ar_weight: float = 0.0  # of the autoregressive loss on the clean text, for causal models
    # CAP (LLaDA2, 2512.15745): of the entropy where the best token is right already, a learnt one.
    confidence_weight: float = 0.0
    # MGDM's weight of a token (2410.14157, after the focal loss of 1708.02002), and an option of
    # Dream's training (2508.15487): each cost times (1 - p)^focus, p the probability of the clean
    # token, so that what is known already counts little. Theirs is 1 or 2, and a constant factor.
    focus: float = 0.0
    # Share of rows whose noisy text is read twice, the second time beside what the first expected
    # (Analog Bits, 2208.04202), for models that can be told; the first read has no gradient.
    self_conditioning: float = 0.0
    predict_mask: bool = False  # True: the mask token is in the softmax, as in LLaDA's
    # Tokens of the longest answer, where prompts are long: so many are noised behind a prompt, in
    # whole blocks, and none behind them is learnt. 0: as many as a row has.
    longest: int = 0
    stratified: bool = True  # noise levels of a batch spread over [0, 1], as MDLM and BD3-LM do

    def __post_init__(self):
        if self.divide not in ("tokens", "rows", "learnt"):
            raise ValueError(f"divide={self.divide!r} is none of tokens, rows, learnt")
        if self.complementary and not isinstance(self.noise, MaskNoise):
            raise ValueError("complementary=True is of masks: give a MaskNoise")
        for name in ("ar_weight", "confidence_weight", "focus", "longest"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.self_conditioning <= 1:
            raise ValueError(f"self_conditioning={self.self_conditioning} is a share of rows")
        if (self.self_conditioning or self.longest) and not self.noise.block_size:
            raise ValueError("self_conditioning and longest are of noise in blocks")
        if self.focus and not self.noise.cross_entropy:
            raise ValueError(f"focus={self.focus} weighs cross-entropies: give a MaskNoise")
        if self.predict_mask and (self.confidence_weight or not self.noise.cross_entropy):
            raise ValueError("predict_mask=True is of the cross-entropy alone")
        if self.ar_weight and not self.noise.block_size:
            raise ValueError(
                f"ar_weight={self.ar_weight} needs a clean text beside the noisy one: give the"
                " noise a block_size, and train a causal model"
            )

    def loss(
        self, model: Any, params: Params, batch: dict[str, jax.Array], key: Key
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The loss of a batch (`data.batches`), in nats, and figures about it.

        Returns:
          The loss, and a dict of scalars: `diffusion` (its noisy part), `ar` and `entropy` (where
          they are weighted, before it), `accuracy` on entries that are learnt, `level_0`, ... their
          mean cost by noise level before its weight (nats of the clean token; of the bounds of
          `UniformNoise` and `MixedNoise` the rate of the divergence), both NaN where there are
          none, and `tokens` (to be learnt).

        Raises:
          ValueError: the noise is not for the model.
        """

        def run(params: Params, batch: dict[str, jax.Array], key: Key):
            return self.score(model, params, self.draw(model, batch, key))

        return automatic(run, placed(), params, batch, key)

    def entries(self, batch: int, length: int) -> float:
        """Positions that a step computes, forward and backward; the clean text's are some."""
        return self._noisy(batch, length) + (batch * length if self.noise.block_size else 0)

    def outputs(self, batch: int, length: int) -> float:
        """Those of them that the output head is applied to; the clean text's with `ar_weight`."""
        return self._noisy(batch, length) + (batch * (length - 1) if self.ar_weight else 0)

    def _noisy(self, batch: int, length: int) -> float:
        noisy = batch * (1 + self.complementary) * self._span(length)
        return noisy * (4 / 3 if self.self_conditioning else 1.0)  # a third: a forward pass alone

    def draw(self, model: Any, batch: dict[str, jax.Array], key: Key) -> Drawn:
        """The noise of a batch, with the batch: what `score` takes, whole or in parts."""
        self._check(model, batch)
        entries = self._entries(model.config, batch)
        rows, count, _ = shape = entries.tokens.shape

        def chance(stream: int) -> jax.Array:
            return jax.random.uniform(jax.random.fold_in(key, stream), shape)

        level_key, own_key = (jax.random.fold_in(key, stream) for stream in (100, 101))
        given = (*entries[1:], model.config)
        samples = [self.noise.draw(chance, self._levels(level_key, rows, count), *given)]
        if self.complementary:
            assert isinstance(self.noise, MaskNoise)
            samples.append(self.noise.complement(samples[0], *given))
        noisy = NoisyText(*(jnp.stack(x, axis=1) for x in zip(*samples, strict=True)))
        conditioned = jax.random.uniform(own_key, (rows,)) < self.self_conditioning
        return self.given(model, batch, noisy, conditioned)

    def given(
        self,
        model: Any,
        batch: dict[str, jax.Array],
        noisy: NoisyText,
        conditioned: Bool[Array, "B"] | None = None,
    ) -> Drawn:
        """The batch with noise of one's own, as `draw` with that of `noise`.

        Args:
          noisy: arrays [B, N, Q], N samples of Q entries: the text's positions from 0 on (in blocks
            of a causal model: from the end of the prompt), up to whole blocks.
          conditioned: rows that are told what a first pass expects; none by default.
        """
        entries = self._entries(model.config, batch)
        rows, samples, _ = noisy.tokens.shape
        learnt, own = noisy.weights > 0, entries.scored.sum(axis=(1, 2))
        divisor = {
            "tokens": own.sum() * samples,
            "rows": rows * own * samples,
            "learnt": learnt.sum(),
        }[self.divide]
        share = jnp.broadcast_to(1 / jnp.maximum(divisor, 1), (rows,)).astype(jnp.float32)
        totals = {
            "learnt": learnt.sum(),  # 0: the figure is NaN, here and below
            "levels": jnp.array([x.sum() for x in by_level(learnt, noisy.times)]),
        }
        if self.ar_weight:
            totals["scored"] = jnp.maximum(answers(batch).sum(), 1)
        if conditioned is None:
            conditioned = jnp.zeros(rows, bool)
        scored = entries.scored.reshape(rows, -1)
        return Drawn(Rows(batch, entries.index, scored, noisy, share, conditioned), totals)

    def _entries(self, config: Any, batch: dict[str, jax.Array]) -> "_Entries":
        """What is noised of a batch, in blocks."""
        tokens = batch["tokens"]
        rows, length = tokens.shape
        size = self.noise.block_size or length
        span = length if "segments" in batch else self._span(length)
        count = -(-span // size)
        start = jnp.zeros(rows, jnp.int32)
        if self.noise.block_size and "segments" not in batch:
            start = batch["prompts"]
            start = start // size * size if config.attention == "block_causal" else start
        index = start[:, None] + jnp.arange(count * size)
        behind = index >= batch["lengths"][:, None]
        inside = jnp.minimum(index, length - 1)
        scored = learnable(batch)
        if config.alignment == "shifted":
            scored &= follows(batch)
        if config.mask_id is not None and not self.predict_mask:
            scored &= tokens != config.mask_id  # outside the softmax: no cost of it has a bound
        tokens, scored = (jnp.take_along_axis(x, inside, axis=1) for x in (tokens, scored))
        fold = lambda x: x.reshape(rows, count, size)  # noqa: E731
        return _Entries(index, fold(tokens), fold(scored & ~behind), fold(behind))

    def score(
        self, model: Any, params: Params, drawn: Drawn
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The loss and the figures; of a part of a batch, what it adds to those of the whole."""
        (batch, index, scored, noisy, share, _), totals = drawn
        tokens, shown = batch["tokens"], noisy.tokens.shape
        hidden, clean = self._read(model, params, drawn.rows)
        inside = jnp.minimum(index, tokens.shape[1] - 1)
        targets = jnp.take_along_axis(tokens, inside, axis=1)
        targets = jnp.broadcast_to(targets[:, None], shown)
        nats, best, entropy = self._nats(model, params, hidden, targets, noisy)
        learnt = noisy.weights > 0
        # Where nothing is restored the nats may be anything.
        costs = jnp.where(learnt, noisy.weights * nats, 0.0)
        loss = diffusion = (costs.sum(axis=(1, 2)) * share).sum()
        if self.focus:
            known = jnp.where(learnt, jnp.exp(-nats), 0.0)
            costs = costs * jnp.maximum(1 - known, 1e-6) ** self.focus
            loss = (costs.sum(axis=(1, 2)) * share).sum()
        right = learnt & (best == targets)
        figures = {
            "diffusion": diffusion,
            "accuracy": right.sum() / totals["learnt"],
            "tokens": scored.sum().astype(jnp.float32),
        }
        figures |= level_figures(nats, by_level(learnt, noisy.times), totals["levels"])
        if self.confidence_weight:
            assert entropy is not None
            some = jnp.maximum(totals["learnt"], 1)
            figures["entropy"] = jnp.where(right, entropy, 0.0).sum() / some
            loss = loss + self.confidence_weight * figures["entropy"]
        if self.ar_weight:
            assert clean is not None
            ar, _ = cross_entropy_of(model, params, clean[:, :-1], tokens[:, 1:])
            figures["ar"] = (ar * answers(batch)).sum() / totals["scored"]
            loss = loss + self.ar_weight * figures["ar"]
        return loss, figures

    def _check(self, model: Any, batch: dict[str, jax.Array]) -> None:
        """Raises ValueError where the objective is not for a model, or for rows like these."""
        check(model.config, self.noise)
        packed, size = check_packed(model, batch), self.noise.block_size
        if packed:
            check_whole_blocks(batch["tokens"].shape[1], size)
        blocks = getattr(model.config, "block_size", size)
        if model.config.attention == "block_causal" and size != blocks:
            raise ValueError(
                f"the noise has block_size={size}, and the model's attention {blocks}, by which it"
                " will be decoded: they must be the same"
            )
        if self.ar_weight and model.config.attention != "causal":
            raise ValueError(
                f"ar_weight={self.ar_weight}: an autoregressive loss is of a causal model; this"
                f" one's clean text is read {model.config.attention}"
            )
        if self.self_conditioning and (packed or not hasattr(model, "soft_embed")):
            raise ValueError(
                f"self_conditioning={self.self_conditioning}: a {type(model).__name__} cannot be"
                " told what a pass before expected, nor can rows of several documents"
            )

    def _span(self, length: int) -> int:
        """Noisy entries of a row: whole blocks, one more where an answer begins within one."""
        size = self.noise.block_size
        if not size:
            return length
        whole = -(-length // size) * size
        return min(whole, (-(-self.longest // size) + 1) * size) if self.longest else whole

    def _levels(self, key: Key, rows: int, count: int) -> Float[Array, "B G"]:
        if not self.stratified:
            return jax.random.uniform(key, (rows, count))
        # One of each stratum, in a random order.
        turn, own = jax.random.split(key)
        order = jax.random.permutation(turn, rows * count).reshape(rows, count)
        return (order + jax.random.uniform(own, (rows, count))) / (rows * count)

    def _read(self, model, params, rows: Rows):
        """What predicts each entry, [B, N, Q, D], and the outputs of the clean text, if any."""
        batch, size = rows.batch, self.noise.block_size
        noisy = jnp.moveaxis(rows.noisy.tokens, 1, 0)
        tokens, lengths = batch["tokens"], batch["lengths"]
        packed = "segments" in batch
        if size and packed:
            hidden, clean = views.packed(model, params, noisy, batch, size)
        elif size:
            seen = size if model.config.attention == "block_causal" else 1
            out = forward(
                model, params, tokens, mask=BlockMask.block_causal(tokens.shape[1], seen),
                lengths=lengths, canvas=False,
            )  # fmt: skip

            def read(**options):
                return views.blocks(model, params, noisy, rows.index, out, lengths, size, **options)

            hidden, clean = self._told(model, params, rows, read), out.hidden
        else:
            options = {"segments": jnp.tile(batch["segments"], (len(noisy), 1))} if packed else {}
            hidden, clean = views.canvases(model, params, noisy, lengths, **options), None
        return jnp.moveaxis(hidden, 0, 1), clean

    def _told(self, model, params, rows: Rows, read) -> jax.Array:
        """What is read, some rows with what a first read expects beside the noise."""
        if not self.self_conditioning:
            return read()
        first = jax.lax.stop_gradient(read())  # [1, B, Q, D]
        mean = stats_of(model, jax.lax.stop_gradient(params), first[0], soft="exact").soft
        carry = model.apply({"params": params}, mean, method="soft_embed")
        carry = jnp.where(rows.conditioned[:, None, None], carry, 0)
        return read(carry=jax.lax.stop_gradient(carry))

    def _nats(self, model, params, hidden, targets, noisy: NoisyText):
        """Of each entry its nats, the model's best token, and (if weighted) its entropy."""
        forbidden = () if self.predict_mask else mask_in_vocabulary(model.config)
        if self.noise.cross_entropy and not self.confidence_weight:
            flat = lambda x: x.reshape(len(x), -1, *x.shape[3:])  # noqa: E731
            nats, best = cross_entropy_of(model, params, flat(hidden), flat(targets), forbidden)
            return nats.reshape(targets.shape), best.reshape(targets.shape), None

        def one(logits, target, shown, time):
            logs = jax.nn.log_softmax(logits)
            spread = -jnp.where(logs > -jnp.inf, jnp.exp(logs) * jnp.maximum(logs, -1e9), 0.0).sum()
            return -self.noise.score(logits, target, shown, time), logits.argmax(), spread

        return over_vocabulary(model, params, one, hidden, targets, noisy.tokens, noisy.times)


def check(config: Any, noise: Noise) -> None:
    """Raises ValueError where a noise is not for a model."""
    if isinstance(noise, UniformNoise) != (config.mask_id is None):
        raise ValueError(f"{noise} is not for this model, whose mask_id is {config.mask_id}")
    if config.mask_id is not None and not config.has_mask:
        raise ValueError(
            f"this model has no mask token: mask_id={config.mask_id} has no embedding; load it with"
            " a diffusion adapter, set it within the vocabulary, or use it autoregressively"
        )
    if isinstance(noise, MixedNoise) and config.mask_id >= config.vocab_size:
        raise ValueError(
            f"{noise} needs a mask token within the vocabulary: mask_id={config.mask_id} of"
            f" {config.vocab_size} ids is outside"
        )
    if (config.attention == "bidirectional") == bool(noise.block_size):
        raise ValueError(
            f"block_size={noise.block_size}: a bidirectional model restores the whole text (0), a"
            f" causal or block-causal one block after block; this one is {config.attention}"
        )
