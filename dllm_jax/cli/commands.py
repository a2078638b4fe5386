"""What each command does, once JAX is there."""

import contextlib
import json
import sys

from dllm_jax import checkpoint, watch
from dllm_jax.cli import answering, terminal
from dllm_jax.cli.answering import Loaded
from dllm_jax.cli.background import background
from dllm_jax.cli.chat import talk
from dllm_jax.cli.describe import describe
from dllm_jax.cli.options import Chat, Command, Convert, Generate, Info, ModelOptions


def run(command: Command) -> None:
    """Does what a command line says."""
    match command:
        case Generate():
            generate(command)
        case Chat():
            chat(command)
        case Convert():
            convert(command)
        case Info():
            info(command)


def generate(command: Generate) -> None:
    """Answers prompts on stdout, or in a live view."""
    prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in command.prompts]
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("a prompt is empty")
    loaded = _load(command.weights)
    loaded.check(command.decoding)
    if command.raw:
        rows = [loaded.tokenizer.encode(prompt) for prompt in prompts]
    else:
        rows = [loaded.prompt(prompt, command.system) for prompt in prompts]
    clock, shown = answering.Clock(), False
    if command.watch:
        view = terminal.view(loaded.tokenizer.decode, len(rows), keeps=not command.json)
        steps = lambda: answering.frames(loaded, rows, command.decoding, clock)  # noqa: E731
        with view, contextlib.closing(background(steps, newest=view.skips)) as frames:
            for frame in frames:
                view.show(frame)
        answers, shown = answering.answers(loaded, frame), view.keeps
    else:
        whole = lambda: [answering.answer(loaded, rows, command.decoding, clock)]  # noqa: E731
        with terminal.status(f"decoding {len(rows)} answers" if len(rows) > 1 else "decoding"):
            (answers,) = background(whole)
    if command.json:
        for prompt, answer in zip(prompts, answers, strict=True):
            print(json.dumps(answering.facts(prompt, answer, clock, command.decoding)))
    elif not shown:
        _print(prompts, [answer.text for answer in answers])
    terminal.note(answering.figures(answers, clock))


def _print(prompts: list[str], texts: list[str]) -> None:
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True), 1):
        if len(prompts) > 1:
            terminal.note(f"[{number}] {' '.join(prompt.split())[:70]}")
        # A terminal would obey escape codes that the model wrote; a file takes the text as it is.
        print(watch.clean(text) if sys.stdout.isatty() else text)
        if number < len(prompts):
            print()


def chat(command: Chat) -> None:
    """A conversation."""
    loaded = _load(command.weights)
    loaded.check(command.decoding)
    talk(loaded, command.decoding, command.system)


def convert(command: Convert) -> None:
    """A model into a folder of ours."""

    def work() -> list[None]:
        return [checkpoint.convert(command.source, command.folder, command.dtype)]

    with terminal.status(f"converting {command.source}"):
        list(background(work))
    terminal.note(f"wrote {command.folder}; use it with --model {command.folder}")


def info(command: Info) -> None:
    """What a model is, and what it needs."""

    def work() -> list[str]:
        return [
            describe(
                command.model, adapter=command.adapter, dtype=command.dtype, batch=command.batch,
                context=command.context, block_size=command.block_size, width=command.width,
            )
        ]  # fmt: skip

    print(*background(work))


def _load(options: ModelOptions) -> Loaded:
    with terminal.status(f"loading {options.model}"):
        (loaded,) = background(lambda: [answering.load(options)])
    return loaded
