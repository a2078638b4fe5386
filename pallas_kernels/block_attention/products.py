"""What the XLA forms of block attention share: products in float32, scores, and merging results."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

NEG = -0.7 * float(jnp.finfo(jnp.float32).max)  # of scores that count nothing


class Scores(NamedTuple):
    """How products of queries and keys become scores."""

    scale: float
    soft_cap: float

    def made(self, products: jax.Array) -> jax.Array:
        """What `times` makes scores."""
        if not self.soft_cap:
            return products
        return self.soft_cap * jnp.tanh(self.scale / self.soft_cap * products)

    @property
    def times(self) -> float:
        """Applied once the maximum is off, at no cost: it is part of the exponential."""
        return 1.0 if self.soft_cap else self.scale

    def slope(self, grad: jax.Array, made: jax.Array) -> jax.Array:
        """The gradient of the products over `scale`, from that of the scores."""
        return grad * (1 - (made / self.soft_cap) ** 2) if self.soft_cap else grad


def einsum(contract: str, a, b) -> jax.Array:
    """A product accumulated in float32. XLA has no such bfloat16 product on CPUs: widened there."""

    def native(a, b):
        return jnp.einsum(contract, a, b, preferred_element_type=jnp.float32)

    def widened(a, b):
        return jnp.einsum(contract, a.astype(jnp.float32), b.astype(jnp.float32))

    if a.dtype == jnp.float32:
        return native(a, b)
    return jax.lax.platform_dependent(a, b, cpu=widened, default=native)


def merged(parts: list[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """Attention over several sets of keys from that over each, float32 [..., H] and its log-sum."""
    top = jnp.max(jnp.stack([lse for _, lse in parts]), axis=0)
    top = jax.lax.stop_gradient(jnp.where(top > NEG, top, 0.0))
    weights = [jnp.exp(lse - top) for _, lse in parts]
    total = sum(weights)
    out = sum(
        w[..., None] * x.astype(jnp.float32) for w, (x, _) in zip(weights, parts, strict=True)
    )
    some = total > 0
    total = jnp.where(some, total, 1.0)
    return out / total[..., None], jnp.where(some, top + jnp.log(total), -jnp.inf)
