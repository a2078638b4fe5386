"""Which positions of a block to write at a denoising step.

A policy is any pytree with a method `commit(view) -> bool[B, T]`; there is no base class. What it
picks outside `view.masked` is ignored. Where it picks nothing at all, the loop writes the most
confident position, so every step makes progress (recipes whose published schedule has idle steps
say so with `progress=False`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp

from dllm_jax.typing import Number

T = TypeVar("T")


class CommitView(NamedTuple):
    """What a policy sees of a block of T positions.

    Its numbers are of the model's own distribution, or of the one that tokens are drawn from
    (`Denoise.confidence`). Of positions that are not `masked` they mean nothing, unless the recipe
    revises, carries, or says itself when a block is done: then those of the whole block are there.
    """

    tokens: jax.Array  # int32[B, T]: the token that would be written
    confidence: jax.Array  # float32[B, T]: its probability
    entropy: jax.Array  # float32[B, T]: nats
    margin: jax.Array  # float32[B, T]: between the two most probable tokens
    masked: jax.Array  # bool[B, T]: positions that may be written
    step: jax.Array  # int32[B]: steps that the block has had before this one
    opened: jax.Array  # int32[B]: positions that were to be written when the block was opened
    uniform: jax.Array | None = None  # float32[B, T] in [0, 1), new at each step; None: no key
    everything: Callable[[], jax.Array] | None = None  # gives `probs`

    @classmethod
    def of(cls, probs, tokens, masked, step, opened, uniform=None) -> "CommitView":
        """The view of blocks whose probabilities float32[B, T, V] are given."""
        confidence = jnp.take_along_axis(probs, tokens[..., None], axis=-1)[..., 0]
        first, second = jnp.moveaxis(jax.lax.top_k(probs, 2)[0], -1, 0)
        return cls(
            tokens, confidence, entropy(probs), first - second, masked, step, opened, uniform,
            lambda: probs,
        )  # fmt: skip

    @property
    def probs(self) -> jax.Array:
        """float32[B, T, V]: all probabilities. They are formed for whoever asks; few need to."""
        if self.everything is None:
            raise ValueError("this view has no probabilities of all tokens")
        return self.everything()

    def rank(self, by: str) -> jax.Array:
        """float32[B, T]: larger is written earlier; -inf outside `masked`.

        Args:
          by: confidence, margin (of the two best), entropy (low first), position (left first) or
            random.
        """
        if by == "confidence":
            score = self.confidence
        elif by == "margin":
            score = self.margin
        elif by == "entropy":
            score = -self.entropy
        elif by == "position":
            score = -jnp.broadcast_to(jnp.arange(self.masked.shape[1], dtype=jnp.float32),
                                      self.masked.shape)  # fmt: skip
        elif by == "random":
            if self.uniform is None:
                raise ValueError("a random order needs a key: generate(..., key=jax.random.key(0))")
            score = self.uniform
        else:
            raise ValueError(
                f"rank={by!r} is none of confidence, margin, entropy, position, random"
            )
        return jnp.where(self.masked, score, -jnp.inf)


def entropy(probs: jax.Array) -> jax.Array:
    """Entropy in nats of distributions [..., V], float32."""
    logs = jnp.log(jnp.maximum(probs, jnp.finfo(jnp.float32).tiny))
    return -(probs * logs).sum(axis=-1)


def best(scores: jax.Array, count: jax.Array) -> jax.Array:
    """The `count` [B] largest of `scores` [B, T], bool; the leftmost of equals, never a -inf."""
    order = jnp.argsort(-scores, axis=-1, stable=True)
    place = jnp.argsort(order, axis=-1, stable=True)
    return (place < jnp.asarray(count)[..., None]) & (scores > -jnp.inf)


def at_least_one(steps: Number) -> None:
    """Raises ValueError on a number of steps below one, where it is known."""
    if isinstance(steps, int) and steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")


def static(*, default: Any) -> Any:
    """A field that is part of the program, not of its arguments."""
    return dataclasses.field(default=default, metadata={"static": True})


@dataclass_transform(frozen_default=True, field_specifiers=(static, dataclasses.field))
def part(cls: type[T]) -> type[T]:
    """A frozen dataclass whose fields are traced, but for those made with `static`."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@part
class Quota:
    """The same number of positions at each of `steps` steps, the remainder in the first ones.

    LLaDA's schedule (`get_num_transfer_tokens`): low-confidence remasking with rank "confidence",
    random remasking with "random". `per="masked"` shares out the positions that the block had to
    write (LLaDA); `per="block"` the block's size, whatever the prompt fills of it (SDAR's static
    and, with rank "position", sequential order).
    """

    steps: Number = 32
    rank: str = static(default="confidence")
    per: str = static(default="masked")

    def __post_init__(self):
        if self.per not in ("masked", "block"):
            raise ValueError(f"per={self.per!r} is neither masked nor block")
        at_least_one(self.steps)

    def count(self, view: CommitView) -> jax.Array:
        """int32[B]: positions to write at this step."""
        size = view.masked.shape[1]
        total = view.opened if self.per == "masked" else jnp.full_like(view.opened, size)
        steps = jnp.asarray(self.steps, jnp.int32)
        return jnp.where(
            view.step < steps, total // steps + (view.step < total % steps), size
        ).astype(jnp.int32)

    def commit(self, view: CommitView) -> jax.Array:
        return best(view.rank(self.rank), self.count(view))


@part
class ConfidenceThreshold:
    """Every position whose token has a probability over the threshold (Fast-dLLM, section 3.3).

    With a quota, at least that many: where too few are over the threshold, the most confident
    (SDAR's dynamic order, LLaDA2.0).
    """

    threshold: Number = 0.9
    quota: Quota | None = None

    def commit(self, view: CommitView) -> jax.Array:
        over = view.masked & (view.confidence > self.threshold)
        if self.quota is None:
            return over
        count = self.quota.count(view)
        enough = over.sum(axis=-1) >= count
        return jnp.where(enough[:, None], over, best(view.rank(self.quota.rank), count))


@part
class Distrust:
    """Tokens that may be written, but whose probability counts as zero when `policy` compares.

    With the end-of-turn ids, LLaDA's `confidence_eos_eot_inf`: ends are written last, so that an
    answer does not end before it has begun.
    """

    tokens: tuple[int, ...] = static(default=())
    policy: Any = Quota()

    def commit(self, view: CommitView) -> jax.Array:
        ids = jnp.asarray(self.tokens, jnp.int32)
        probs = view.probs.at[..., ids].set(0.0)
        share = jnp.maximum(probs.sum(axis=-1), jnp.finfo(jnp.float32).tiny)
        probs = probs / share[..., None]
        first, second = jnp.moveaxis(jax.lax.top_k(probs, 2)[0], -1, 0)
        trusted = (view.tokens[..., None] != ids).all(axis=-1)
        return self.policy.commit(
            view._replace(
                confidence=jnp.where(trusted, view.confidence / share, 0.0),
                entropy=entropy(probs),
                margin=first - second,
                everything=lambda: probs,
            )
        )


@part
class Factor:
    """As many as a bound that tightens with their number allows (Fast-dLLM, theorem 1).

    The n-th most confident of N positions needs a confidence of 1 - factor / (n + 1), the first
    none; the longest run that meets it is written. As in the published code, a run that only the
    last of the N positions would break is written whole.
    """

    factor: Number = 1.0

    def commit(self, view: CommitView) -> jax.Array:
        scores = view.rank("confidence")
        size = scores.shape[1]
        total = view.masked.sum(axis=-1)
        ranked = -jnp.sort(-scores, axis=-1)
        place = jnp.arange(size)
        meets = (ranked >= 1 - self.factor / (place + 2)) | (place == 0)
        run = jnp.cumprod(meets, axis=-1).sum(axis=-1)
        return best(scores, jnp.where(run >= total - 1, total, run))


@part
class EntropyBound:
    """The largest set of low entropy whose joint error is bounded (EB-sampler, 2505.24857).

    Positions in order of entropy are taken while the sum of entropies, less the largest, is at most
    `bound` (nats).
    """

    bound: Number = 0.1

    def commit(self, view: CommitView) -> jax.Array:
        ranked = -jnp.sort(-view.rank("entropy"), axis=-1)  # minus entropies, the lowest first
        spent = jnp.cumsum(jnp.where(ranked > -jnp.inf, -ranked, jnp.inf), axis=-1)
        taken = (spent + ranked <= self.bound) & (ranked > -jnp.inf)
        return best(view.rank("entropy"), taken.sum(axis=-1))


@part
class TimeGrid:
    """Dream's schedule: of m masked positions, int(m * (1 - s / t)) as time falls from t to s.

    Time runs from 1 to `eps` in `steps` equal steps; the last one writes all. The order is by
    confidence (maskgit_plus), margin (topk_margin) or entropy; with `noise` (`alg_temp`), drawn
    without replacement with probabilities softmax(score / noise). A step may write nothing.
    """

    steps: Number = 32
    eps: Number = 1e-3
    rank: str = static(default="entropy")
    noise: Number = 0.0

    def __post_init__(self):
        at_least_one(self.steps)

    def commit(self, view: CommitView) -> jax.Array:
        t, s = grid(view.step, self.steps, self.eps), grid(view.step + 1, self.steps, self.eps)
        left = view.masked.sum(axis=-1)
        count = (left.astype(jnp.float32) * (1 - s / t)).astype(jnp.int32)
        last = view.step >= jnp.asarray(self.steps) - 1
        return best(self._order(view), jnp.where(last, left, count))

    def _order(self, view: CommitView) -> jax.Array:
        score = view.rank(self.rank)
        if view.uniform is None:  # no key: callers have seen that there is no noise
            return score
        noise = jnp.asarray(self.noise, jnp.float32)
        gumbel = -jnp.log(-jnp.log(jnp.maximum(view.uniform, jnp.finfo(jnp.float32).tiny)))
        return jnp.where(noise > 0, score / jnp.where(noise > 0, noise, 1.0) + gumbel, score)


def grid(step: jax.Array, steps: Number, eps: Number) -> jax.Array:
    """Diffusion time before step `step` of `steps`, from 1 down to `eps`, float32.

    Counted from the nearer end, as `linspace` does.
    """
    steps = jnp.asarray(steps, jnp.int32)
    eps = jnp.asarray(eps, jnp.float32)
    width = (eps - 1) / steps.astype(jnp.float32)
    up, down = step.astype(jnp.float32), (steps - step).astype(jnp.float32)
    return jnp.where(step < (steps + 1) // 2, 1 + width * up, eps - width * down)


@part
class Ancestral:
    """Each masked position with probability 1 - s / t as time falls from t to s (D3PM, MDLM).

    BD3-LM's ddpm sampler, and Dream's `origin`. The last step writes all; a step may write nothing.
    """

    steps: Number = 32
    eps: Number = 0.0

    def commit(self, view: CommitView) -> jax.Array:
        t, s = grid(view.step, self.steps, self.eps), grid(view.step + 1, self.steps, self.eps)
        stays = jnp.where(view.step >= jnp.asarray(self.steps) - 1, 0.0, s / t)
        return view.masked & (view.rank("random") >= stays[:, None])


@part
class FirstHitting:
    """One masked position a step, uniformly at random: the exact law of the ancestral sampler's
    changes, without its idle steps (Zheng et al., 2409.02908; BD3-LM's default).
    """

    def commit(self, view: CommitView) -> jax.Array:
        return best(view.rank("random"), jnp.ones(view.masked.shape[0], jnp.int32))
