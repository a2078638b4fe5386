"""One run of the command: parse, do, tell what went wrong.

Answers go to stdout, everything else to stderr. JAX is imported when a command runs, so that --help
is quick.
"""

import importlib
import importlib.metadata
import io
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Annotated

import tyro

from dllm_jax.cli import INTERRUPTED
from dllm_jax.cli.background import background, busy
from dllm_jax.cli.options import Bench, Chat, Command, Convert, Generate, Info, Plan, Recipes
from dllm_jax.cli.training_options import Adapt, Data, Plot, Train, with_fields

AnyCommand = (
    Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Chat, tyro.conf.subcommand("chat")]
    | Annotated[Convert, tyro.conf.subcommand("convert")]
    | Annotated[Info, tyro.conf.subcommand("info")]
    | Annotated[Recipes, tyro.conf.subcommand("recipes")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Data, tyro.conf.subcommand("data")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Adapt, tyro.conf.subcommand("adapt")]
    | Annotated[Plot, tyro.conf.subcommand("plot")]
)


def program(argv: Sequence[str] | None) -> int:
    """The body of `main`."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments == ["--version"]:
        print(f"dllm-jax {version()}")
        return 0
    command = with_fields(arguments) or tyro.cli(
        tyro.conf.FlagCreatePairsOff[AnyCommand],
        prog="dllm-jax",
        description="Decode and train diffusion language models. --version prints the version.",
        args=arguments or ["--help"],
    )
    code = _run(command)
    if busy():  # a thread inside XLA cannot be stopped, and an orderly exit would crash around it
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def version() -> str:
    """Of the installed distribution."""
    try:
        return importlib.metadata.version("dllm-jax")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _run(command: Command) -> int:
    debug = command.debug or os.environ.get("DLLM_JAX_DEBUG", "") not in ("", "0")
    _quiet(debug)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="replace"
        )  # an answer is not lost to a terminal without UTF-8
    try:
        command.check()
        (commands,) = background(lambda: [_with_jax()])
        commands.run(command)
        sys.stdout.flush()
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # the terminal has written ^C
        return INTERRUPTED
    except BrokenPipeError:  # `dllm-jax ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if debug:
            raise
        print(f"dllm-jax: {_one_line(error)}", file=sys.stderr)
        if _one_of_many():  # an orderly exit would wait for the others, who wait for this one
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(2)
        return 2
    return 0


def _one_of_many() -> bool:
    """Whether this process trains together with others."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _with_jax() -> ModuleType:
    """The module of the commands. Importing it takes seconds, hence here."""
    commands = importlib.import_module("dllm_jax.cli.commands")
    _keep_compiled()
    return commands


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _quiet(debug: bool) -> None:
    """Keeps the libraries' remarks off stderr; ours go there, one line each."""
    if debug:
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    warnings.simplefilter("ignore")
    logging.basicConfig(format="dllm-jax: %(message)s")
    logging.getLogger().setLevel(logging.ERROR)
    logging.getLogger("absl").setLevel(logging.ERROR)
    logging.getLogger("dllm_jax").setLevel(logging.WARNING)


def _keep_compiled() -> None:
    """Keeps compiled programs on disk, the small ones too; a place that the user set is left."""
    import jax

    from dllm_jax import sources

    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    jax.config.update("jax_compilation_cache_dir", str(sources.cache_folder() / "xla"))
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
