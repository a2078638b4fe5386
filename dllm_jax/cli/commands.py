"""What each command does, once JAX is there."""

import contextlib
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from dllm_jax import checkpoint, watch
from dllm_jax.cli import answering, table, terminal, training
from dllm_jax.cli.answering import Answer, Clock, Loaded
from dllm_jax.cli.background import background
from dllm_jax.cli.benchmark import benchmark
from dllm_jax.cli.chat import talk
from dllm_jax.cli.choice import Choice, asked, named
from dllm_jax.cli.describe import describe
from dllm_jax.cli.options import (
    Bench,
    Chat,
    Command,
    Convert,
    Decoding,
    Generate,
    Info,
    ModelOptions,
    Plan,
    Recipes,
)
from dllm_jax.cli.planning import planning
from dllm_jax.cli.storing import storing
from dllm_jax.cli.training_options import Adapt, Data, Plot, Train
from dllm_jax.generation_config import save_recipe
from dllm_jax.tokenizer import Tokenizer
from dllm_jax.trajectory import Recorder


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
        case Recipes():
            recipes(command)
        case Bench():
            benchmark(command)
        case Plan():
            planning(command)
        case Data():
            storing(command)
        case Train():
            training.train(command)
        case Adapt():
            training.adapt(command)
        case Plot():
            training.plot(command)


def generate(command: Generate) -> None:
    """Answers prompts on stdout, or in a live view."""
    prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in command.prompts]
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("a prompt is empty")
    loaded, choice = _load(command.weights, command.decoding)
    clock, shown = answering.Clock(), False
    if command.infill:
        blanks = [loaded.blanks(prompt) for prompt in prompts]
        fill = lambda: [answering.fill(loaded, blanks, choice, command.decoding.seed, clock)]  # noqa: E731
        with terminal.status("filling in"):
            (answers,) = background(fill)
    else:
        if command.raw:
            rows = [loaded.tokenizer.encode(prompt) for prompt in prompts]
        else:
            rows = [loaded.prompt(prompt, command.system) for prompt in prompts]
        if command.watch or command.html or command.trajectory:
            answers, shown = _stepwise(command, loaded, choice, rows, clock)
        else:
            whole = lambda: [answering.answer(loaded, rows, choice, command.decoding, clock)]  # noqa: E731
            with terminal.status(f"decoding {len(rows)} answers" if len(rows) > 1 else "decoding"):
                (answers,) = background(whole)
    if command.json:
        for prompt, answer in zip(prompts, answers, strict=True):
            print(json.dumps(answering.facts(prompt, answer, clock, choice)))
    elif not shown:
        _print(prompts, [answer.text for answer in answers])
    terminal.note(answering.figures(answers, clock))


def _stepwise(
    command: Generate, loaded: Loaded, choice: Choice, rows: list[list[int]], clock: Clock
) -> tuple[list[Answer], bool]:
    """The answers, and whether they have been shown; the steps are watched, recorded, or both."""
    recorder, files = None, (command.html, command.trajectory)
    if any(files):
        title = f"{loaded.name} · {choice.name}"
        recorder = Recorder(choice.recipe, eos_ids=loaded.model.config.eos_ids, title=title)
    decode, view, waiting = loaded.tokenizer.decode, watch.View(), contextlib.nullcontext()
    if command.watch:
        view = terminal.view(decode, len(rows), keeps=not command.json)
    else:
        waiting = terminal.status("decoding")

    def steps() -> Iterator[watch.Frame]:
        return answering.frames(loaded, rows, choice, command.decoding, clock, recorder=recorder)

    frame = None
    with waiting, view, contextlib.closing(background(steps, newest=view.skips)) as frames:
        for frame in frames:
            view.show(frame)
    assert frame is not None  # a stream has at least one
    if recorder is not None:
        trajectory = recorder.trajectory()
        if command.html:
            trajectory.html(partial(decode, skip_special=False), Path(command.html).expanduser())
        if command.trajectory:
            trajectory.save(Path(command.trajectory).expanduser())
        terminal.note(f"wrote {' and '.join(filter(None, files))}")
    return answering.answers(loaded, frame), view.keeps


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
    loaded, _ = _load(command.weights, command.decoding)
    talk(loaded, command.decoding, command.system)


def convert(command: Convert) -> None:
    """A model into a folder of ours, or one as its authors publish it."""

    def work() -> list[None]:
        if command.published:
            return [_publish(command.source, command.folder, command.dtype)]
        return [checkpoint.convert(command.source, command.folder, command.dtype)]

    with terminal.status(f"converting {command.source}"):
        list(background(work))
    terminal.note(f"wrote {command.folder}; use it with --model {command.folder}")


def _publish(source: str, folder: str, dtype: str | None) -> None:
    model, params = checkpoint.load(source, dtype=dtype, adapter=None)
    try:
        tokenizer = Tokenizer.load(source)
    except FileNotFoundError:  # some are published without
        tokenizer = None
    checkpoint.export(folder, model, params, tokenizer)


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


def recipes(command: Recipes) -> None:
    """The table of recipes, or one of them."""
    if command.name is None:
        print(table.every(as_json=command.json))
        return
    choice = named(command.name, command.sets)
    if command.save is not None:
        save_recipe(command.save, choice.recipe)
        terminal.note(f"{command.save} is decoded by {choice.name} from now on")
    else:
        print(table.one(command.name, choice, as_json=command.json))


def _load(options: ModelOptions, decoding: Decoding) -> tuple[Loaded, Choice]:
    if decoding.recipe is not None:
        asked(decoding)  # a mistake is told before the weights are read
    with terminal.status(f"loading {options.model}"):
        (loaded,) = background(lambda: [answering.load(options)])
    return loaded, loaded.choose(decoding)
