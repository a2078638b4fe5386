"""From scores to tokens: filters, probabilities, samples keyed by position."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

from dllm_jax.typing import Key, Number
from pallas_kernels.token_stats.noise import gumbel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn. All numbers are traced: changing one does not compile again."""

    temperature: Number = 0.0  # 0: the most probable token
    top_k: Number = 0  # keep the k most probable tokens; 0: all
    top_p: Number = 1.0  # then the smallest set with this much probability; 1: all
    # The token that crosses top_p is left out, unless it is the only one (BD3-LM's nucleus)
    top_p_below: bool = dataclasses.field(default=False, metadata={"static": True})

    def check(self) -> None:
        """Raises ValueError on a value outside its range (outside jit, where values are known)."""
        if not all(isinstance(x, int | float) for x in (self.temperature, self.top_k, self.top_p)):
            return
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or positive")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be 0 (off) or positive")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]")


def best_token(scores: Float[Array, "*B V"]) -> Int[Array, "*B"]:
    """The first of the largest scores: argmax, by two reductions that XLA vectorises on CPUs."""
    vocab = scores.shape[-1]
    top = scores.max(axis=-1, keepdims=True)
    first = jnp.where(scores == top, jnp.arange(vocab, dtype=jnp.int32), vocab).min(axis=-1)
    return jnp.minimum(first, vocab - 1)  # of scores that are not numbers


def probabilities(logits: Float[Array, "*B V"], sampling: Sampling) -> Float[Array, "*B V"]:
    """The distribution that a sampler draws from: temperature, then top-k, then top-p; float32.

    Temperature 0 gives all mass to the first of the largest scores.
    """
    greedy = jax.nn.one_hot(logits.argmax(axis=-1), logits.shape[-1], dtype=jnp.float32)
    drawn = jax.nn.softmax(shaped(logits, sampling), axis=-1)
    return jnp.where(jnp.asarray(sampling.temperature) <= 0, greedy, drawn)


def shaped(logits: Float[Array, "*B V"], sampling: Sampling) -> Float[Array, "*B V"]:
    """The scores whose softmax is `probabilities`; at temperature 0 they are left as they are."""
    scaled = logits / warmth(sampling)
    return jax.lax.cond(is_filtered(sampling), lambda x: _filter(x, sampling), lambda x: x, scaled)


def is_filtered(sampling: Sampling) -> jax.Array:
    """Whether top-k or top-p takes tokens out, bool[]."""
    on = (jnp.asarray(sampling.top_k) > 0) | (jnp.asarray(sampling.top_p) < 1)
    return on & (jnp.asarray(sampling.temperature) > 0)


def warmth(sampling: Sampling) -> jax.Array:
    """What scores are divided by: the temperature, or 1 where it is 0."""
    temperature = jnp.asarray(sampling.temperature, jnp.float32)
    return jnp.where(temperature <= 0, 1.0, temperature)


def _filter(logits, sampling: Sampling):
    """Sends the scores outside top-k and top-p to minus infinity; equal scores stay together."""
    ranked = jnp.sort(logits, axis=-1, descending=True)
    vocab = logits.shape[-1]
    k = jnp.where(jnp.asarray(sampling.top_k) > 0, sampling.top_k, vocab)
    kth = jnp.take_along_axis(
        ranked, jnp.broadcast_to(jnp.minimum(k, vocab) - 1, (*ranked.shape[:-1], 1)), axis=-1
    )
    share = jax.nn.softmax(jnp.where(ranked >= kth, ranked, -jnp.inf), axis=-1)
    total = jnp.cumsum(share, axis=-1)
    inside = total - share < sampling.top_p  # probability of the tokens ranked higher
    if sampling.top_p_below:
        inside = (total <= sampling.top_p) | (jnp.arange(vocab) == 0)
    kept = inside & (ranked >= kth)
    floor = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= floor, logits, -jnp.inf)


def draw_with(noise: UInt[Array, "*B 2"], probs: Float[Array, "*B V"]) -> Int[Array, "*B"]:
    """One token of each distribution, by the Gumbel-max trick; `noise`: its keys (`keys_at`)."""
    ids = jnp.arange(probs.shape[-1], dtype=jnp.uint32)
    race = jnp.log(probs) + gumbel(noise[..., :1], noise[..., 1:], ids)
    return jnp.argmax(race, axis=-1).astype(jnp.int32)


def keys_at(
    keys: Key, positions: Int[Array, "B Q"], stream: int, step: Int[Array, "B"] | None = None
) -> UInt[Array, "B Q 2"]:
    """The key of the noise at each position, for `draw_with` and `pallas_kernels.token_stats`.

    A function of (the row's key, position, stream, the row's step) only: padding, neighbours and
    the number of positions drawn at once do not change it. Two words: of generators with more
    (rbg), the first two, which are those of threefry.
    """
    return jax.random.key_data(_at(keys, positions, stream, step))[..., :2]


def uniform(
    keys: Key, positions: Int[Array, "B Q"], stream: int, step: Int[Array, "B"] | None = None
) -> Float[Array, "B Q"]:
    """One number in [0, 1) for each row and position, keyed as in `keys_at`."""
    return jax.vmap(jax.vmap(jax.random.uniform))(_at(keys, positions, stream, step))


def _at(keys: Key, positions, stream: int, step):
    if step is not None:
        keys = jax.vmap(jax.random.fold_in)(keys, step)
    fold = lambda key, p: jax.random.fold_in(jax.random.fold_in(key, p), stream)  # noqa: E731
    return jax.vmap(jax.vmap(fold, (None, 0)))(keys, positions)
