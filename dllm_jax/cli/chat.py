"""A conversation at a terminal, or through a pipe: questions in, answers out, a few commands."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any, get_args

from dllm_jax.cli import terminal
from dllm_jax.cli.answering import Clock, Loaded, answers, figures, frames
from dllm_jax.cli.background import background
from dllm_jax.cli.options import Decoding, Mode
from dllm_jax.watch import Frame, TextView, View

_HELP = """\
/reset          forget the conversation
/system TEXT    set the system message; without TEXT, drop it
/mode NAME      decode by diffusion, speculative or ar
/recipe NAME    decode by another recipe; behind it, option=value ...
/seed N         seed of the draw, where the temperature is above 0
/help           this list
/quit           leave (so does Ctrl-D)
Ctrl-C stops an answer and keeps what is written."""


def talk(loaded: Loaded, options: Decoding, system: str | None) -> None:
    """Reads questions until there are no more. Returns when the person leaves."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (arrow keys and history in input())
        name = loaded.choose(options).name
        terminal.note(f"{loaded.name}, {name}. /help lists the commands, Ctrl-D leaves.")
    conversation = _Conversation(loaded, options, system)
    for line in _lines():
        try:
            if line.startswith("/"):
                if not conversation.command(line):
                    return
            elif line:
                conversation.ask(line)
        except ValueError as error:
            terminal.note(f"dllm-jax: {error}")
        except KeyboardInterrupt:  # between the answer and the next line
            print()


def _lines() -> Iterator[str]:
    """What is typed or piped in, a line at a time; Ctrl-C empties the line."""
    typed = sys.stdin.isatty()
    while True:
        try:
            if typed and sys.stdout.isatty():
                line = input("> ")
            else:
                line = sys.stdin.readline()
                if not line:
                    return
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            if not typed:
                raise
            print()
            terminal.note("Ctrl-D or /quit leaves.")
            continue
        yield line.strip()


class _Conversation:
    """The conversation so far."""

    def __init__(self, loaded: Loaded, options: Decoding, system: str | None):
        self._loaded, self._options, self._system = loaded, options, system
        self._choice = loaded.choose(options)
        self._messages: list[dict[str, Any]] = []
        self._turn = 0

    def command(self, line: str) -> bool:
        """Does what a line with a slash says; False leaves the chat."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        match name:
            case "/quit" | "/exit":
                return False
            case "/help":
                terminal.note(_HELP)
            case "/reset":
                self._messages, self._turn = [], 0
                terminal.note("forgotten")
            case "/system":
                self._system = rest or None
                terminal.note(f"system: {self._system or 'none of yours'}")
            case "/mode":
                if rest not in get_args(Mode):
                    raise ValueError(f"/mode {rest}: the modes are {', '.join(get_args(Mode))}")
                self._change(mode=rest, recipe=None, sets=())
                terminal.note(f"mode: {rest}")
            case "/recipe":
                name, *sets = rest.split() or [""]
                other = dict.fromkeys(("mode", "block_size", "threshold", "width"))
                self._change(recipe=name, sets=tuple(sets), **other)
                terminal.note(f"recipe: {self._choice.name}")
            case "/seed":
                if not rest.isdecimal():
                    raise ValueError(f"/seed {rest}: give a whole number")
                self._change(seed=int(rest))
                terminal.note(f"seed: {int(rest)}")
            case _:
                raise ValueError(f"{name} is no command; /help lists them")
        return True

    def _change(self, **fields: Any) -> None:
        options = dataclasses.replace(self._options, **fields)
        self._choice = self._loaded.choose(options)
        self._options = options

    def ask(self, question: str) -> None:
        """Shows the answer as it is written, and remembers both; Ctrl-C ends the answer early."""
        messages = [*self._messages, {"role": "user", "content": question}]
        row = self._loaded.prompt(messages, self._system)
        room = self._loaded.model.config.max_length - len(row)
        if room < 1:
            raise ValueError("the conversation fills the model's context: /reset begins a new one")
        budget = min(self._options.max_new_tokens, room)
        options = dataclasses.replace(self._options, max_new_tokens=budget)
        clock, frame = Clock(), None

        def steps() -> Iterator[Frame]:
            return frames(self._loaded, [row], self._choice, options, clock, turn=self._turn)

        view = self._view()
        with contextlib.suppress(KeyboardInterrupt), view:
            with contextlib.closing(background(steps, newest=view.skips)) as shown:
                for frame in shown:
                    view.show(frame)
        if frame is None:  # stopped before the first token
            return
        (answer,) = answers(self._loaded, frame)
        self._messages = [*messages, {"role": "assistant", "content": answer.text}]
        self._turn += 1
        terminal.note(figures([answer], clock))

    def _view(self) -> View:
        decode = self._loaded.tokenizer.decode
        if terminal.is_terminal(sys.stdout):
            return terminal.view(decode, 1, keeps=True)
        return TextView(sys.stdout, decode)
