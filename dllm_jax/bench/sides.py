"""One way to compute something, and how it is run: once for its result, many times for its time."""

import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from dllm_jax.bench.clock import Program, calls_for

Form = Callable[[Any], dict[str, jax.Array]]

_TIMES_OVER = 256 << 20  # bytes of all variants together: more than a GPU's cache
_MOST_VARIANTS = 4
_NOISE = 1_000_003  # numbers, no power of two: rows of equal keys would hide a mistake


@runtime_checkable
class Side(Protocol):
    """What the suite asks of one."""

    def result(self) -> dict[str, np.ndarray]:
        """What it computes, by name, the same names on every side."""
        ...

    def program(self) -> Program:
        """What to time; asked after the result."""
        ...


class TooLarge(Exception):
    """The memory is not enough."""


class Jax:
    """A function of JAX.

    A call hangs on the one before, so that nothing is computed once for all: it is handed that
    one's output where it can stand for the first argument, else an element of it. Calls take turns
    at several sets of the other arguments, as layers of a model do, lest they stay in a cache.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        first: jax.Array,
        variants: Sequence[tuple],
        form: Form,
        link: Callable[[jax.Array, Any], jax.Array] | None = None,
        least: int = 1,
    ):
        """
        Args:
          run: of `first` and one of the `variants`.
          form: what `run` returns, by name.
          link: the next call's first argument, from this one's and what it returned.
          least: calls of a run: several where `first` is large, as a run begins by copying it.
        """
        self.run, self.first, self.variants, self.form = run, first, list(variants), form
        self.link = link or _touched
        self.least, self.once = least, 0.0

    def result(self) -> dict[str, np.ndarray]:
        program = _compiled(lambda *args: self.form(self.run(*args)), self.first, *self.variants[0])
        jax.block_until_ready(program(self.first, *self.variants[0]))
        start = time.perf_counter()
        found = jax.block_until_ready(program(self.first, *self.variants[0]))
        self.once = time.perf_counter() - start
        return {name: np.asarray(x) for name, x in found.items()}

    def program(self) -> Program:
        rounds = -(-calls_for(self.once, self.least) // len(self.variants))

        def every(first, variants):
            def turn(_, carry):
                first, found = carry[0], []
                for own in variants:
                    found.append(self.run(first, *own))
                    first = self.link(first, found[-1])
                return first, found  # all of it, lest a part be left out

            shapes = jax.eval_shape(lambda: turn(0, (first, None)))
            carry = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[1])
            return jax.lax.fori_loop(0, rounds, turn, (first, carry))

        program = _compiled(every, self.first, self.variants)
        run = lambda: jax.block_until_ready(program(self.first, self.variants))  # noqa: E731
        return Program(run, rounds * len(self.variants))


def _touched(first: jax.Array, out: Any) -> jax.Array:
    """`first` with an element of `out` in its corner."""
    leaf = jax.tree.leaves(out)[0]
    return first.at[(0,) * first.ndim].set(leaf[(0,) * leaf.ndim].astype(first.dtype))


def passed_on(first: jax.Array, out: jax.Array) -> jax.Array:
    """The output as the next call's first argument, where it has its shape."""
    return out.astype(first.dtype)


def _compiled(run: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """The program, if the device holds it.

    Raises:
      TooLarge: it does not.
    """
    program = jax.jit(run).lower(*args).compile()
    memory = program.memory_analysis()
    if memory is not None:
        need, free = memory.temp_size_in_bytes + memory.output_size_in_bytes, room()
        if need > free:
            raise TooLarge(f"needs {need / 2**30:.1f} GiB more where {free / 2**30:.1f} are free")
    return program


def noise(number: int, shape: tuple[int, ...], *, dtype: str, scale: float = 1.0) -> jax.Array:
    """Normal noise, the same for a number; what is large repeats some of it, which is quick."""
    size = math.prod(shape)
    some = scale * jax.random.normal(jax.random.key(number), (min(size, _NOISE),))
    repeats = -(-size // len(some))
    return jax.jit(lambda x: jnp.tile(x.astype(dtype), repeats)[:size].reshape(shape))(some)


def variants_for(size: int) -> int:
    """How many sets of arguments of `size` bytes the calls take turns at."""
    return min(max(-(-_TIMES_OVER // size), 1), _MOST_VARIANTS)


def room() -> int:
    """Bytes that are free on the device; of a CPU's memory, half less what arrays hold."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(0.95 * stats["bytes_limit"]) - stats["bytes_in_use"]
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return whole // 2 - sum(x.nbytes for x in jax.live_arrays())
