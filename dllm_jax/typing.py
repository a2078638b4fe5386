"""Names for the arrays that travel between rooms.

Dimension letters: B batch, L sequence, T block (canvas), Q queries of one forward pass, S cache
slots, N query heads, K kv heads, H head size, D model, F feed-forward, V vocabulary, Ly layers, R
adapter rank.
"""

from typing import Any

import jax

Params = dict[str, Any]
"""A nested dict of arrays: what `load` returns and Orbax stores."""

Key = jax.Array
"""A typed PRNG key (`jax.random.key`), or an array of them."""

Number = Any
"""A number, a traced scalar, or whatever JAX puts in their place when it traces."""
