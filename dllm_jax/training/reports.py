"""Where the figures of a run go besides its metrics: TensorBoard, Weights & Biases, Trackio."""

import contextlib
import importlib
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dllm_jax import distributed

Write = Callable[[int, dict[str, float]], None]

PACKAGES = {
    "tensorboard": ("tensorboardX", "tensorboard"),  # one of them
    "wandb": ("wandb",),
    "trackio": ("trackio",),
}


@contextlib.contextmanager
def reports(run: Path, names: tuple[str, ...], settings: dict[str, Any]) -> Iterator[Write]:
    """A function that passes the figures of a step on to every writer that is named.

    Of many processes the first writes. A run that goes on does so under the id that its folder
    keeps (`report-id`), so that another run of the same name is another one there too.

    Raises:
      ValueError: there is no such writer.
      ModuleNotFoundError: its package is not installed.
    """
    modules = [_module(name) for name in names]
    with contextlib.ExitStack() as stack:
        writers: list[Write] = []
        if distributed.is_first():
            for name, module in zip(names, modules, strict=True):
                write, close = _open(name, module, run, settings)
                stack.callback(close)
                writers.append(write)

        def write_all(step: int, figures: dict[str, float]) -> None:
            for write in writers:
                write(step, figures)

        yield write_all


def _module(name: str) -> Any:
    if name not in PACKAGES:
        raise ValueError(f"report={name!r} is not one of {', '.join(PACKAGES)}")
    for package in PACKAGES[name]:
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(package)
    raise ModuleNotFoundError(
        f"report={name!r} needs the package {' or '.join(PACKAGES[name])}: "
        f"pip install {PACKAGES[name][0]}, or leave it out; metrics.jsonl is written anyway"
    )


def _open(
    name: str, module: Any, run: Path, settings: dict[str, Any]
) -> tuple[Write, Callable[[], Any]]:
    """A writer, and what closes it."""
    if name == "tensorboard":
        if module.__name__ == "tensorboardX":
            board = module.SummaryWriter(str(run / "tensorboard"))
        else:
            board = importlib.import_module("tensorboard.summary").Writer(str(run / "tensorboard"))

        def write(step: int, figures: dict[str, float]) -> None:
            for figure, value in figures.items():
                board.add_scalar(figure, value, step)

        return write, board.close
    project, config = run.absolute().parent.name or "dllm-jax", settings
    known = run / "report-id"
    if not known.exists():
        known.write_text(uuid.uuid4().hex[:8])
    own = known.read_text()
    if name == "wandb":
        session = module.init(
            project=project, name=run.name, id=own, resume="allow", dir=str(run), config=config
        )
        # Its own count of steps never goes back; a run that goes on from an older checkpoint does.
        session.define_metric("*", step_metric="step")
        return (lambda step, figures: session.log({"step": step, **figures})), session.finish
    session = module.init(project=project, name=f"{run.name}-{own}", config=config, resume="allow")
    return (lambda step, figures: session.log(figures, step=step)), session.finish
