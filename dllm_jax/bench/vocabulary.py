"""Statistics of the vocabulary's scores: streamed, and by way of all of the scores."""

import dataclasses
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp

from dllm_jax.bench import rivals
from dllm_jax.bench.shapes import VOCABULARY, Work, vocabulary_work
from dllm_jax.bench.sides import Jax, Side, noise
from pallas_kernels import TokenStats, token_stats


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """What decoders ask about `rows` positions."""

    model: str  # a key of `VOCABULARY`
    rows: int
    asks: str = "greedy"  # greedy | sampled | top 8
    dtype: str = "bfloat16"

    temperature = 0.8  # of a draw

    @property
    def top(self) -> int:
        return 8 if self.asks == "top 8" else 1

    @property
    def kind(self) -> str:
        return f"vocabulary, {self.asks}"

    @property
    def own(self):
        return VOCABULARY[self.model]

    @property
    def shape(self) -> dict[str, Any]:
        return {"rows": self.rows}

    @property
    def work(self) -> Work:
        return vocabulary_work(self.own, self.rows, jnp.dtype(self.dtype).itemsize)

    @property
    def holds(self) -> int:
        """Bytes of the arguments."""
        return self.own.tokens * self.own.dim * jnp.dtype(self.dtype).itemsize

    @cached_property
    def arrays(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Hidden states, vectors, and the rows' keys. Scores have a deviation of about 4."""
        hidden = noise(0, (self.rows, self.own.dim), dtype=self.dtype)
        scale = 4 * self.own.dim**-0.5
        vectors = noise(1, (self.own.tokens, self.own.dim), dtype=self.dtype, scale=scale)
        return hidden, vectors, jax.random.key_data(jax.random.split(jax.random.key(0), self.rows))

    def sides(self, implementations: tuple[str | None, ...]) -> dict[str, Callable[[], Side]]:
        found = {name or "ours": partial(self._ours, name) for name in implementations}
        return found | rivals.of_scores(self)

    def _ours(self, implementation: str | None) -> Side:
        hidden, vectors, keys = self.arrays
        sampled = self.asks == "sampled"

        def run(hidden, vectors, keys):
            return token_stats(
                hidden, vectors, soft_cap=self.own.soft_cap, top=self.top,
                keys=keys if sampled else None,
                temperature=jnp.float32(self.temperature) if sampled else None,
                implementation=implementation,
            )  # fmt: skip

        return Jax(run, hidden, [(vectors, keys)], self._form)

    def _form(self, found: TokenStats) -> dict[str, jax.Array]:
        """What all sides can agree on: of a draw, which is each side's own, what it is drawn of."""
        common = {"log_z": found.log_z, "entropy": found.entropy, "best": found.scores}
        if found.drawn is not None:
            common |= {"drawn_log_z": found.drawn.log_z, "drawn_entropy": found.drawn.entropy}
        return common
