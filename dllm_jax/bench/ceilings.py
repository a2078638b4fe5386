"""What the device reaches on large arrays: the ceilings that everything else is held against."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dllm_jax.bench.clock import timed
from dllm_jax.bench.shapes import Work
from dllm_jax.bench.sides import Jax, passed_on, room


class Ceilings(NamedTuple):
    """Measured here, now."""

    bandwidth: float  # bytes/s of a copy, read and written
    rates: dict[str, float]  # FLOP/s of a product of large square matrices, by dtype

    def seconds(self, work: Work, dtype: str) -> float:
        """The least time of a call that only moves its bytes, or only computes."""
        return max(work.bytes / self.bandwidth, work.flops / self.rates[dtype])


def measured(dtypes: tuple[str, ...], seconds: float = 1.0) -> Ceilings:
    """A copy of an array of up to 1 GiB, and products of matrices, each for about `seconds`.

    Products are at JAX's default precision, which in float32 is less than full on GPUs and TPUs.
    """
    large = jax.default_backend() != "cpu"
    size = min(1 << 30 if large else 1 << 27, room() // 8) // 4
    most = lambda x: {"most": x.max()}  # noqa: E731
    copy = Jax(lambda x: x + 1, jnp.zeros(size), [()], most, passed_on, least=16)
    copy.result()
    bandwidth = 8 * size / timed([copy.program()], seconds)[0].median
    return Ceilings(bandwidth, {dtype: rate(dtype, seconds) for dtype in dtypes})


def rate(dtype: str, seconds: float = 1.0) -> float:
    """FLOP/s of products of large square matrices, for about so long."""
    most = lambda x: {"most": x.max()}  # noqa: E731
    wide = 8192 if jax.default_backend() != "cpu" else 2048
    right = jnp.full((wide, wide), 1 / wide, dtype)
    product = Jax(jnp.matmul, right, [(right,)], most, passed_on, least=2)
    product.result()
    return 2 * wide**3 / timed([product.program()], seconds)[0].median
