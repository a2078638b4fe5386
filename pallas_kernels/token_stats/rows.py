"""Rows that need an answer, packed to the front: the others cost nothing."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def packing(active: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """How rows move to the front: their order, where each row went, and how many are active.

    Args:
      active: bool[R].

    Returns:
      `order` int32[R]: the active rows, in their order, then the others. `place` int32[R]: where in
      it an active row is (that of a row that is not means nothing). Their number, int32[].
    """
    order = jnp.argsort(~active, stable=True)
    place = jnp.maximum(jnp.cumsum(active) - 1, 0)
    return order, place, active.sum(dtype=jnp.int32)


def over_active(
    run: Callable[[Any], Any], rows: Any, active: jax.Array, sizes: tuple[int, ...]
) -> Any:
    """`run` of the active rows only, in as many pieces as they need.

    Args:
      run: from arrays [size, ...] to arrays [size, ...], row by row.
      rows: arrays [R, ...].
      active: bool[R].
      sizes: that a piece may have, ascending: all pieces have the largest, but for the last one,
        which is as small as holds what is left.

    Returns:
      Arrays [R, ...]; those of rows that are not active mean nothing.
    """
    order, place, total = packing(active)
    count, most = len(active), sizes[-1]
    room = lambda x: jnp.pad(x[order], ((0, most), *[(0, 0)] * (x.ndim - 1)))  # noqa: E731
    packed = jax.tree.map(room, rows)
    found = jax.eval_shape(run, jax.tree.map(lambda x: x[:most], packed))
    found = jax.tree.map(lambda x: jnp.zeros((count + most, *x.shape[1:]), x.dtype), found)

    def piece(size: int, start, found):
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size)  # noqa: E731
        put = lambda x, own: jax.lax.dynamic_update_slice_in_dim(x, own, start, 0)  # noqa: E731
        return start + size, jax.tree.map(put, found, run(jax.tree.map(cut, packed)))

    def step(state):
        which = (total - state[0] > jnp.asarray(sizes[:-1], jnp.int32)).sum()
        return jax.lax.switch(which, [lambda *s, n=n: piece(n, *s) for n in sizes], *state)

    _, found = jax.lax.while_loop(lambda state: state[0] < total, step, (jnp.int32(0), found))
    return jax.tree.map(lambda x: x[place], found)
