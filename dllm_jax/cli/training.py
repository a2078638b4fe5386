"""Runs as files say, with any field changed on the command line; and their curves."""

import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Any, TypeVar

import tyro

from dllm_jax import adaptation, checkpoint, distributed, pretraining, sources, training
from dllm_jax.bench import ceilings
from dllm_jax.cli import terminal
from dllm_jax.cli.training_options import Adapt, Plot, Train

T = TypeVar("T")


def train(command: Train) -> None:
    """Trains as a file says."""
    config = _changed(command.config, pretraining.Train, command.fields, "train")
    distributed.initialize()
    pretraining.train(_with_peak(config))


def adapt(command: Adapt) -> None:
    """Adapts as a file says."""
    config = _changed(command.config, adaptation.Adapt, command.fields, "adapt")
    distributed.initialize()
    if config.peak_flops is None:
        config = dataclasses.replace(config, peak_flops=_peak(config.dtype))
    adaptation.adapt(config)


def plot(command: Plot) -> None:
    """Draws the curves of runs."""
    curves = training.Curves(
        figures=command.figures or training.Curves().figures, smooth=command.smooth,
        log_x=command.log_x, log_y=command.log_y,
    )  # fmt: skip
    path = training.plot(*command.runs, out=command.out, curves=curves)
    if path is None:
        raise ValueError("plot needs matplotlib: pip install 'dllm-jax[plot]'")
    terminal.note(f"wrote {path}")


def load_config(name: str, kind: type[T]) -> T:
    """What a Python file exports: `config`, or another name after a colon ("FILE.py:gpu").

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it exports no such thing, or one of another kind.
    """
    file, _, chosen = name.partition(":")
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no file {file}; give a Python file that exports `config`")
    spec = importlib.util.spec_from_file_location(f"dllm_jax_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file} is no Python file: give one that exports `config`")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    found = getattr(module, chosen or "config", None)
    if not isinstance(found, kind):
        there = sorted(k for k, v in vars(module).items() if isinstance(v, kind))
        raise ValueError(
            f"{file} exports no {kind.__name__} named {chosen or 'config'}; there are {there}"
        )
    return found


def _with_peak(config: pretraining.Train) -> pretraining.Train:
    """The config with the rate of matrix products that is measured here, where it names none."""
    if config.fit.peak_flops is not None:
        return config
    model: Any = config.model
    if isinstance(model, str):
        model = checkpoint.read_config(sources.resolve(model))
    rate = _peak(config.dtype or model.dtype)
    return dataclasses.replace(config, fit=dataclasses.replace(config.fit, peak_flops=rate))


def _peak(dtype: str) -> float:
    rate = ceilings.rate(dtype, seconds=0.3)
    terminal.note(f"mfu is a share of {rate:.3g} FLOP/s a device, measured on matrix products")
    return rate


def _changed(name: str, kind: type[T], fields: tuple[str, ...], command: str) -> T:
    """The config of a file, with the fields that the command line gives."""
    config: Any = load_config(name, kind)
    # A field that is one of several kinds of thing stays of the kind that the file chose.
    marks = (tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff, tyro.conf.SuppressFixed)
    prog = f"dllm-jax {command} {name}"
    return tyro.cli(kind, default=config, args=list(fields), prog=prog, config=marks)
