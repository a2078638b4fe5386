"""Which shapes are timed, the most telling ones first, as time may end."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from dllm_jax.bench.decode import Decode
from dllm_jax.bench.shapes import ATTENTION, VOCABULARY
from dllm_jax.bench.training import Training
from dllm_jax.bench.vocabulary import Scores

PARTS = ("decode", "vocabulary", "training")


def cases(parts: Sequence[str], dtype: str, *, quick: bool) -> list[Any]:
    """Those of the parts asked for, taking turns, so that a short run has some of each."""
    every = _quick(dtype) if quick else _whole(dtype)
    turns = itertools.zip_longest(*(every[part] for part in parts))
    return [case for turn in turns for case in turn if case is not None]


def _whole(dtype: str) -> dict[str, list[Any]]:
    """For an accelerator: about ninety."""
    models = list(ATTENTION)
    decode: list[dict[str, Any]] = [dict(entries=32, slots=32_768, batch=8)]
    decode += [
        dict(entries=32, slots=32_768, batch=8, ragged=True),
        dict(entries=32, slots=4096, batch=1),
        dict(entries=32, slots=4096, batch=16),
        dict(entries=4, slots=32_768, batch=8),
        dict(entries=256, slots=32_768, batch=8),
        dict(entries=1, slots=32_768, batch=8),
        dict(entries=32, slots=512, batch=64),
        dict(entries=32, slots=131_072, batch=1),
        dict(entries=256, slots=4096, batch=1),
        dict(entries=8, slots=4096, batch=64),
        dict(entries=128, slots=131_072, batch=4),
    ]
    return {
        "decode": [
            Decode(model=model, dtype=dtype, **shape) for shape in decode for model in models
        ],
        "vocabulary": [
            Scores(model=model, rows=rows, asks=asks, dtype=dtype)
            for rows, asks in (
                (32, "greedy"),
                (256, "sampled"),
                (256, "greedy"),
                (32, "top 8"),
                (2048, "greedy"),
                (1, "greedy"),
                (512, "top 8"),
                (32, "sampled"),
                (2048, "sampled"),
            )
            for model in VOCABULARY
        ],
        "training": [
            Training(
                model=model, length=length, batch=batch, block=block, gradient=gradient, dtype=dtype
            )
            for (length, batch), (block, gradient), model in itertools.product(
                ((2048, 2), (8192, 1)),
                ((32, True), (32, False), (0, False), (0, True)),
                ("LLaDA-8B", "Fast-dLLM v2 7B", "SmolLM2-135M"),
            )
        ],
    }


def _quick(dtype: str) -> dict[str, list[Any]]:
    """For a laptop's CPU: real models where they fit, short caches, few rows."""

    def decode(model: str, shapes: Iterable[tuple[int, int, int]]) -> list[Any]:
        return [
            Decode(model=model, entries=entries, slots=slots, batch=batch, dtype=dtype)
            for entries, slots, batch in shapes
        ]

    return {
        "decode": [
            *decode("SmolLM2-135M", [(32, 4096, 1), (4, 4096, 4)]),
            *decode("Fast-dLLM v2 7B", [(32, 2048, 1)]),
            Decode(
                model="SmolLM2-135M", entries=32, slots=2048, batch=4, ragged=True, dtype=dtype
            ),
            *decode("LLaDA2-mini", [(32, 2048, 1), (1, 4096, 1)]),
            *decode("DiffusionGemma, sliding", [(32, 2048, 1)]),
            *decode("LLaDA-8B", [(32, 1024, 1)]),
            *decode("DiffusionGemma, full", [(32, 1024, 1)]),
        ],
        "vocabulary": [
            Scores(model="SmolLM2-135M", rows=rows, asks=asks, dtype=dtype)
            for rows, asks in ((32, "greedy"), (32, "sampled"), (32, "top 8"), (256, "greedy"))
        ],
        "training": [
            Training(
                model="SmolLM2-135M", length=256, batch=1, block=block, gradient=gradient,
                dtype=dtype,
            )
            for block, gradient in ((32, True), (32, False), (0, False))
        ],
    }  # fmt: skip
