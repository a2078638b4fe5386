"""From questions to answers and their figures: what the commands `generate` and `chat` share."""

import threading
import time
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.monitoring
import numpy as np

from dllm_jax import checkpoint, recipes
from dllm_jax.cli.options import Decoding, ModelOptions
from dllm_jax.decode.generate import BUCKET, Prompt, generate, pad, stream
from dllm_jax.decode.state import STOP_REASONS, DecodeState
from dllm_jax.nn.transformer import Transformer
from dllm_jax.recipes import Denoise, Recipe
from dllm_jax.tokenizer import Tokenizer
from dllm_jax.typing import Key, Params
from dllm_jax.watch import Frame


class Loaded(NamedTuple):
    """A model, ready to answer."""

    name: str
    model: Transformer
    params: Params
    tokenizer: Tokenizer

    def prompt(self, messages: str | list[dict[str, Any]], system: str | None) -> list[int]:
        """The ids of a conversation, by the model's chat template."""
        if self.tokenizer.template is None:
            raise ValueError(
                f"{self.name} has no chat template, it is a base model: continue a text with"
                " `dllm-jax generate --raw`"
            )
        return self.tokenizer.chat(messages, system=system)

    def check(self, options: Decoding) -> None:
        """Raises ValueError where the model cannot decode in that way."""
        options.check()
        if options.mode != "ar" and not self.model.config.has_mask:
            raise ValueError(
                f"{self.name} has no diffusion adapter, which --mode {options.mode} needs:"
                " give one with --adapter FOLDER, or use --mode ar"
            )


def load(options: ModelOptions) -> Loaded:
    """Reads the weights and the tokenizer."""
    adapter = None if options.adapter == "none" else options.adapter
    model, params = checkpoint.load(options.model, dtype=options.dtype, adapter=adapter)
    return Loaded(options.model, model, params, Tokenizer.load(options.model))


def recipe(options: Decoding) -> Recipe:
    """The recipe of the options."""
    draw = dict(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    if options.mode == "ar":
        return recipes.ar(**draw)
    if options.mode == "speculative":
        return recipes.self_speculative(width=options.width, **draw)
    return recipes.block_diffusion(
        block_size=options.block_size, threshold=options.threshold, **draw
    )


class Answer(NamedTuple):
    """One row's answer and its cost."""

    ids: list[int]  # the end-of-turn token included
    text: str
    stop: str  # "end_of_turn" | "length" | "running", where it was interrupted
    nfe: int
    queries: int


def answer(
    loaded: Loaded, rows: list[list[int]], options: Decoding, clock: "Clock"
) -> list[Answer]:
    """The answers of a batch, from one compiled loop."""
    with clock:
        result = generate(
            loaded.model, loaded.params, rows, recipe=recipe(options),
            max_new_tokens=options.max_new_tokens, key=_key(options),
        )  # fmt: skip
        tokens, lengths, *costs = jax.device_get(
            (result.tokens, result.lengths, result.stop, result.nfe, result.queries)
        )
    ids = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
    return _answers(loaded, ids, *costs)


def frames(
    loaded: Loaded, rows: list[list[int]], options: Decoding, clock: "Clock", turn: int = 0
) -> Iterator[Frame]:
    """The same answers step by step.

    Args:
      turn: of a chat: each has noise of its own.
    """
    how, config = recipe(options), loaded.model.config
    states = stream(
        loaded.model, loaded.params, _padded(rows), recipe=how,
        max_new_tokens=options.max_new_tokens, key=_key(options, turn),
    )  # fmt: skip
    size = how.width.size if isinstance(how, Denoise) else 0
    while True:
        with clock:
            state = next(states, None)
            if state is None:
                return
            frame = _frame(state, size, config.eos_ids)
        yield frame


def answers(loaded: Loaded, frame: Frame) -> list[Answer]:
    """The answers as far as a frame has them."""
    ids = [frame.answer(row).tolist() for row in range(len(frame.stop))]
    return _answers(loaded, ids, frame.stop, frame.nfe, frame.queries)


def figures(answers: Sequence[Answer], clock: "Clock") -> str:
    """One line on what the answers cost. Run time leaves compilation out."""
    tokens = sum(len(a.ids) for a in answers)
    reasons = [a.stop if a.stop != "running" else "interrupted" for a in answers]
    stops = [f"{reasons.count(r)} {r}" if len(reasons) > 1 else r for r in dict.fromkeys(reasons)]
    return (
        f"{tokens} tokens in {clock.run:.2f} s ({tokens / max(clock.run, 1e-9):.1f} a second),"
        f" {tokens / max(sum(a.nfe for a in answers), 1):.2f} tokens per forward,"
        f" overhead {sum(a.queries for a in answers) / max(tokens, 1):.2f},"
        f" stop: {', '.join(stops)}; compiled in {clock.compile:.2f} s"
    )


def facts(prompt: str, answer: Answer, clock: "Clock", options: Decoding) -> dict[str, Any]:
    """One answer and its figures, for JSON. The seconds are those of its batch."""
    tokens = len(answer.ids)
    return {
        "prompt": prompt,
        "text": answer.text,
        "ids": answer.ids,
        "tokens": tokens,
        "stop": answer.stop,
        "mode": options.mode,
        "forwards": answer.nfe,
        "queries": answer.queries,
        "tokens_per_forward": tokens / max(answer.nfe, 1),
        "overhead": answer.queries / max(tokens, 1),
        "run_seconds": clock.run,
        "compile_seconds": clock.compile,
    }


def _answers(loaded: Loaded, ids, stop, nfe, queries) -> list[Answer]:
    return [
        Answer(row, loaded.tokenizer.decode(row), STOP_REASONS[int(s)], int(n), int(q))
        for row, s, n, q in zip(ids, stop, nfe, queries, strict=True)
    ]


def _key(options: Decoding, turn: int = 0) -> Key | None:
    if not options.temperature:
        return None
    key = jax.random.key(options.seed)
    return jax.random.fold_in(key, turn) if turn else key


def _padded(rows: list[list[int]]) -> Prompt:
    """Prompts in buckets that double: a growing chat compiles a few times, not every 64 tokens."""
    bucket = BUCKET
    while bucket < max(map(len, rows)):
        bucket *= 2
    return pad(rows, bucket)


def _frame(state: DecodeState, size: int, eos_ids: tuple[int, ...]) -> Frame:
    small = (state.tokens, state.prompt, state.written, state.limit, state.drafts, state.stop,
             state.nfe, state.queries)  # fmt: skip
    tokens, prompt, written, limit, drafts, stop, nfe, queries = jax.device_get(small)
    ends = np.minimum(written + size, limit)
    return Frame(tokens, prompt, written, ends, drafts, stop, nfe, queries, state.mask_id, eos_ids)


class Clock:
    """A context manager that adds up seconds of work, and apart from them those spent compiling.

    What JAX reports as tracing, lowering and compiling (or reading a compiled program from disk) is
    compiling. Reports overlap, as one trace calls another, so it is their union that counts.
    """

    def __init__(self):
        self.run = 0.0
        self.compile = 0.0

    def __enter__(self) -> "Clock":
        _listen()
        _reports.spans = []
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        end = time.perf_counter()
        compiling, reached = 0.0, self._start
        for begin, finish in sorted(_reports.spans):
            compiling += max(finish - max(begin, reached), 0.0)
            reached = max(finish, reached)
        self.compile += compiling
        self.run += end - self._start - compiling


_reports = threading.local()  # spans: (begin, end) of each report in this thread


@cache
def _listen() -> None:
    def report(event: str, duration_secs: float, **_: str | int) -> None:
        spans = getattr(_reports, "spans", None)
        if spans is not None and event.startswith("/jax/core/compile/"):
            now = time.perf_counter()
            spans.append((now - duration_secs, now))

    jax.monitoring.register_event_duration_secs_listener(report)
