"""The models whose shapes are timed, and what a call costs in closed form."""

from typing import NamedTuple


class Attention(NamedTuple):
    """The attention of one kind of layer."""

    heads: int
    kv_heads: int
    size: int  # of a head
    window: int = 0


class Vocabulary(NamedTuple):
    """An output projection."""

    tokens: int
    dim: int
    soft_cap: float = 0.0


class Work(NamedTuple):
    """The least that a call moves and computes."""

    bytes: int
    flops: int


ATTENTION = {
    "LLaDA-8B": Attention(32, 32, 128),
    "Fast-dLLM v2 7B": Attention(28, 4, 128),
    "LLaDA2-mini": Attention(16, 4, 128),
    "DiffusionGemma, sliding": Attention(16, 8, 256, window=1024),
    "DiffusionGemma, full": Attention(16, 2, 512),
    "SmolLM2-135M": Attention(9, 3, 64),
}

VOCABULARY = {
    "LLaDA-8B": Vocabulary(126_464, 4096),
    "Fast-dLLM v2 7B": Vocabulary(152_064, 3584),
    "LLaDA2-mini": Vocabulary(157_184, 2048),
    "DiffusionGemma": Vocabulary(262_144, 2816, soft_cap=30.0),
    "SmolLM2-135M": Vocabulary(49_152, 576),
}


def decode_work(own: Attention, entries: int, slots: int, rows: int, item: int) -> Work:
    """`rows` blocks of `entries` queries, against `slots` cached keys in all rows together.

    The slots are those that queries see. Keys and values are read once, queries too; results are
    written. A product and its sum are two operations, of scores and of values.

    Args:
      item: bytes of an element.
    """
    cached = 2 * own.kv_heads * own.size * slots
    passed = 2 * rows * entries * own.size * (own.heads + own.kv_heads)
    pairs = entries * (slots + rows * entries)
    return Work((cached + passed) * item, 4 * own.heads * own.size * pairs)


def training_work(
    own: Attention, entries: int, pairs: int, rows: int, item: int, *, gradient: bool
) -> Work:
    """Attention of sequences over themselves, of `pairs` visible pairs a row.

    The gradient counts two and a half times the products of the forward pass, which is counted
    with it: scores again, and two products each for their two sides.
    """
    each = rows * entries * own.size * item
    flops = 4 * own.heads * own.size * pairs * rows
    if gradient:
        return Work(each * (3 * own.heads + 4 * own.kv_heads), flops * 7 // 2)
    return Work(each * (2 * own.heads + 2 * own.kv_heads), flops)


def vocabulary_work(own: Vocabulary, rows: int, item: int) -> Work:
    """Scores of `rows` hidden states: the vectors are read once, a few numbers a row come out."""
    return Work((own.tokens + rows) * own.dim * item, 2 * rows * own.tokens * own.dim)
