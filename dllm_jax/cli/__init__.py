"""The command `dllm-jax`.

generate, chat, convert, info, recipes, bench, plan; data, train, adapt, plot.
"""

from collections.abc import Sequence

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (`sys.argv` by default) and returns its exit code.

    0: done. 1: the reader of the output went away. 2: a mistake in what was asked for, told in one
    line. 130: Ctrl-C. A command line that cannot be parsed, and --help, exit from here.
    """
    try:
        # Importing takes a moment, in which Ctrl-C may come too.
        from dllm_jax.cli.program import program

        return program(argv)
    except KeyboardInterrupt:
        return INTERRUPTED
