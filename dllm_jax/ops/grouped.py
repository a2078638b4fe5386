"""Rows times the matrix of each, grouped: tiles of rows that share a matrix, in a loop.

What `lax.ragged_dot` does on TPU, in plain JAX. XLA's form of that for CPUs and GPUs multiplies
every row by every matrix. Here a matrix that no row asks for is not read, and one that few ask for
costs one small product.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Tiles(NamedTuple):
    """Which rows lie together: `n` tiles of `m` rows, of which the first `used` hold any."""

    source: jax.Array  # int32[n, m]: the token in each row; one past the last where it is empty
    slot: jax.Array  # int32[T, k]: the row of each token and choice, counted through the tiles
    group: jax.Array  # int32[n]: what all rows of a tile chose
    used: jax.Array  # int32[]


def rows_per_tile(pairs: int, groups: int) -> int:
    """How many rows a tile has, given how many there are to share out: a power of 2, 4 to 32.

    About twice as many as a group has on average: a tile costs the reading of its matrix, an empty
    row a multiplication. Fewer than 4 are no faster on a CPU, and a row alone would be summed in
    another order there than one among others.
    """
    wanted = max(2 * pairs // groups, 1)
    return min(max(1 << (wanted - 1).bit_length(), 4), 32)


def tiles(chosen: Int[Array, "T k"], groups: int, at_once: int) -> Tiles:
    """The tiles of tokens that chose `k` of so many groups each.

    Args:
      chosen: a number that no group has is nobody's: it has no row, and a slot past the last.
      at_once: the number of tiles is a multiple of it.
    """
    pairs, size = chosen.size, rows_per_tile(chosen.size, groups)
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat)  # stable: tokens of one group stay in their order
    sizes = jnp.bincount(flat, length=groups)
    place = jnp.arange(pairs, dtype=jnp.int32)
    rank = jnp.zeros(pairs, jnp.int32).at[order].set(place)
    rank = rank - (jnp.cumsum(sizes) - sizes)[flat]
    filled = -(-sizes // size)
    ends = jnp.cumsum(filled)
    slot = (ends - filled)[flat] * size + rank
    most = min(pairs, (pairs + groups * (size - 1)) // size)
    most = -(-most // at_once) * at_once
    slot = jnp.where(flat < groups, slot, most * size + place)
    tokens = place // chosen.shape[1]
    source = jnp.full(most * size, len(chosen), jnp.int32).at[slot].set(tokens, unique_indices=True)
    group = (jnp.arange(most)[:, None] >= ends).sum(axis=1)
    return Tiles(
        source.reshape(most, size),
        slot.reshape(chosen.shape).astype(jnp.int32),
        jnp.minimum(group, groups - 1).astype(jnp.int32),
        ends[-1].astype(jnp.int32),
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def multiply(
    at_once: int,
    rows: Float[Array, "n m I"],
    own: Float[Array, "G I O"],
    stack: Float[Array, "Ly G I O"],
    layer: Int[Array, ""],
    group: Int[Array, "n"],
    used: Int[Array, ""],
) -> Float[Array, "n m O"]:
    """The rows of each tile times its matrix, in the rows' dtype; zeros in tiles not used.

    Args:
      at_once: tiles of one step: 1 where a step costs little, more where it is many launches.
      own: the matrices. None of them is read: gradients go here.
      stack: where they are read, as `stack[layer]`, one matrix after another.
      group, used: see `Tiles`.
    """
    return _loop(at_once, "gmi,gio->gmo", rows, stack, layer, group, used)


def _forward(at_once, *args):
    return multiply(at_once, *args), args


def _backward(at_once, saved, grad):
    rows, own, stack, layer, group, used = saved
    d_rows = _loop(at_once, "gmo,gio->gmi", grad, stack, layer, group, used)

    def step(i, total):
        take = partial(jax.lax.dynamic_slice_in_dim, start_index=i * at_once, slice_size=at_once)
        outer = jnp.einsum(
            "gmi,gmo->gio", take(rows), take(grad), preferred_element_type=jnp.float32
        )
        return total.at[take(group)].add(outer, mode="promise_in_bounds")

    total = jax.lax.fori_loop(0, -(-used // at_once), step, jnp.zeros(own.shape, jnp.float32))
    return d_rows, total.astype(own.dtype), None, None, None, None


multiply.defvjp(_forward, _backward)


def _loop(at_once, contract, rows, stack, layer, group, used):
    """A product for each tile in use. Matrices are cast one by one: a cast of all reads all."""
    columns = stack.shape[-1 if contract.endswith("o") else -2]
    flat = stack.reshape(-1, *stack.shape[2:])
    group = group + layer * stack.shape[1]

    def step(i, out):
        take = partial(jax.lax.dynamic_slice_in_dim, start_index=i * at_once, slice_size=at_once)
        matrices = flat.at[take(group)].get(mode="promise_in_bounds").astype(rows.dtype)
        made = jnp.einsum(contract, take(rows), matrices)
        return jax.lax.dynamic_update_slice_in_dim(out, made, i * at_once, 0)

    out = jnp.zeros((*rows.shape[:2], columns), rows.dtype)
    return jax.lax.fori_loop(0, -(-used // at_once), step, out)


@jax.custom_vjp
def ragged(
    rows: Float[Array, "n I"],
    own: Float[Array, "G I O"],
    stack: Float[Array, "Ly G I O"],
    layer: Int[Array, ""],
    sizes: Int[Array, "G"],
) -> Float[Array, "n O"]:
    """`lax.ragged_dot` of rows in the order of their groups, for TPUs, where it is grouped.

    Args:
      own: the matrices. None of them is read in the forward pass: gradients go here.
      stack: where they are read, as those of all layers, of which the others have no rows: a layer
        taken out of it is a copy, as the kernel is given whole arrays.
      sizes: rows of each group.
    """
    if stack.dtype != rows.dtype:  # a cast reads all that it is given
        return jax.lax.ragged_dot(rows, stack[layer].astype(rows.dtype), sizes)
    flat = stack.reshape(-1, *stack.shape[2:])
    every = jnp.zeros(len(flat), sizes.dtype)
    every = jax.lax.dynamic_update_slice(every, sizes, (layer * len(sizes),))
    return jax.lax.ragged_dot(rows, flat, every)


def _ragged_forward(rows, own, stack, layer, sizes):
    return ragged(rows, own, stack, layer, sizes), (rows, own, sizes)


def _ragged_backward(saved, grad):
    rows, own, sizes = saved

    def run(rows, own):
        return jax.lax.ragged_dot(rows, own.astype(rows.dtype), sizes)

    return *jax.vjp(run, rows, own)[1](grad), None, None, None


ragged.defvjp(_ragged_forward, _ragged_backward)
