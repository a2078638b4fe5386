"""From questions to answers and their figures: what the commands `generate` and `chat` share."""

import re
import threading
import time
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple, cast

import jax
import jax.monitoring

from dllm_jax import checkpoint
from dllm_jax.cli.choice import Choice, choose
from dllm_jax.cli.options import Decoding, ModelOptions, mesh_sizes
from dllm_jax.decode.generate import BUCKET, Prompt, generate, infill, pad, stream
from dllm_jax.decode.state import STOP_REASONS, Result
from dllm_jax.sharding import AXES, make_mesh
from dllm_jax.tokenizer import Tokenizer
from dllm_jax.trajectory import Recorder
from dllm_jax.typing import Params
from dllm_jax.watch import Frame, frame


class Loaded(NamedTuple):
    """A model, ready to answer."""

    name: str
    model: Any  # of any architecture
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

    def choose(self, options: Decoding) -> Choice:
        """The recipe of the options; ValueError where the model cannot decode in that way."""
        options.check()
        return choose(options, self.model.config, self.name)

    def blanks(self, text: str) -> list[int | None]:
        """The ids of a text to fill in; None for each token of its [MASK]s."""
        row: list[int | None] = []
        for number, piece in enumerate(re.split(r"(\[MASK(?::\d+)?\])", text)):
            if number % 2:
                row += [None] * int(piece[6:-1] or 1)
            else:  # a start token, of models that have one, begins the text
                encode = self.tokenizer.backend.encode
                row += encode(piece, add_special_tokens=number == 0).ids
        if None not in row:
            raise ValueError("--infill: the text has no [MASK] to fill in")
        return row


def load(options: ModelOptions) -> Loaded:
    """Reads the weights and the tokenizer."""
    adapter, mesh = None if options.adapter == "none" else options.adapter, None
    if options.mesh is not None:
        sizes: dict[str, Any] = mesh_sizes(options.mesh)
        if unknown := sizes.keys() - set(AXES):
            raise ValueError(f"--mesh {options.mesh}: {sorted(unknown)} are none of {AXES}")
        mesh = make_mesh(**cast(Any, sizes))
    model, params = checkpoint.load(options.model, dtype=options.dtype, adapter=adapter, mesh=mesh)
    return Loaded(options.model, model, params, Tokenizer.load(options.model))


class Answer(NamedTuple):
    """One row's answer and its cost."""

    ids: list[int]  # the end-of-turn token included; of an infilled text, all of it
    text: str
    tokens: int  # how many of them were written
    stop: str  # "end_of_turn" | "length" | "running", where it was interrupted
    nfe: int
    queries: int


def answer(
    loaded: Loaded, rows: list[list[int]], choice: Choice, options: Decoding, clock: "Clock"
) -> list[Answer]:
    """The answers of a batch, from one compiled loop."""
    with clock:
        result = generate(
            loaded.model, loaded.params, rows, recipe=choice.recipe,
            max_new_tokens=options.max_new_tokens, key=choice.key(options.seed),
        )  # fmt: skip
        return _results(loaded, result)


def fill(
    loaded: Loaded, rows: list[list[int | None]], choice: Choice, seed: int, clock: "Clock"
) -> list[Answer]:
    """Texts with their blanks filled in."""
    with clock:
        result = infill(
            loaded.model, loaded.params, rows, recipe=choice.recipe, key=choice.key(seed)
        )
        found = _results(loaded, result)
    return [
        answer._replace(tokens=row.count(None)) for answer, row in zip(found, rows, strict=True)
    ]


def frames(
    loaded: Loaded,
    rows: list[list[int]],
    choice: Choice,
    options: Decoding,
    clock: "Clock",
    *,
    turn: int = 0,
    recorder: Recorder | None = None,
) -> Iterator[Frame]:
    """The same answers step by step.

    Args:
      turn: of a chat: each has noise of its own.
      recorder: is told every step.
    """
    states = stream(
        loaded.model, loaded.params, _padded(rows), recipe=choice.recipe,
        max_new_tokens=options.max_new_tokens, key=choice.key(options.seed, turn),
    )  # fmt: skip
    while True:
        with clock:
            state = next(states, None)
            if state is None:
                return
            shown = frame(state, choice.recipe, loaded.model.config.eos_ids)
        if recorder is not None:
            recorder.add(state)
        yield shown


def answers(loaded: Loaded, frame: Frame) -> list[Answer]:
    """The answers as far as a frame has them."""
    ids = [frame.answer(row).tolist() for row in range(len(frame.stop))]
    return _answers(loaded, ids, frame.stop, frame.nfe, frame.queries)


def figures(answers: Sequence[Answer], clock: "Clock") -> str:
    """One line on what the answers cost. Run time leaves compilation out."""
    tokens = sum(a.tokens for a in answers)
    reasons = [a.stop if a.stop != "running" else "interrupted" for a in answers]
    stops = [f"{reasons.count(r)} {r}" if len(reasons) > 1 else r for r in dict.fromkeys(reasons)]
    return (
        f"{tokens} tokens in {clock.run:.2f} s ({tokens / max(clock.run, 1e-9):.1f} a second),"
        f" {tokens / max(sum(a.nfe for a in answers), 1):.2f} tokens per forward,"
        f" overhead {sum(a.queries for a in answers) / max(tokens, 1):.2f},"
        f" stop: {', '.join(stops)}; compiled in {clock.compile:.2f} s"
    )


def facts(prompt: str, answer: Answer, clock: "Clock", choice: Choice) -> dict[str, Any]:
    """One answer and its figures, for JSON. The seconds are those of its batch."""
    tokens = answer.tokens
    return {
        "prompt": prompt,
        "text": answer.text,
        "ids": answer.ids,
        "tokens": tokens,
        "stop": answer.stop,
        "recipe": choice.name,
        "forwards": answer.nfe,
        "queries": answer.queries,
        "tokens_per_forward": tokens / max(answer.nfe, 1),
        "overhead": answer.queries / max(tokens, 1),
        "run_seconds": clock.run,
        "compile_seconds": clock.compile,
    }


def _results(loaded: Loaded, result: Result) -> list[Answer]:
    tokens, lengths, *costs = jax.device_get(
        (result.tokens, result.lengths, result.stop, result.nfe, result.queries)
    )
    ids = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
    return _answers(loaded, ids, *costs)


def _answers(loaded: Loaded, ids, stop, nfe, queries) -> list[Answer]:
    decode = loaded.tokenizer.decode
    return [
        Answer(row, decode(row), len(row), STOP_REASONS[int(s)], int(n), int(q))
        for row, s, n, q in zip(ids, stop, nfe, queries, strict=True)
    ]


def _padded(rows: list[list[int]]) -> Prompt:
    """Prompts in buckets that double: a growing chat compiles a few times, not every 64 tokens."""
    bucket = BUCKET
    while bucket < max(map(len, rows)):
        bucket *= 2
    return pad(rows, bucket)


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
