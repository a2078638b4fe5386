"""The training step and the loop around it: from an autoregressive model to block diffusion.

A run is a folder:

    <run>/checkpoints/   Orbax: the trained parameters, the optimiser, and the position in the data
    <run>/metrics.jsonl  one line a logged step
    <run>/loss.png       the curve, when matplotlib is there

Interrupted (SIGTERM, SIGINT) it saves and returns; killed, it falls back to the last checkpoint.
Started again on the same folder it continues on the numbers of an uninterrupted run: every step
draws its noise from (seed, step), and the data iterator's position is part of the checkpoint.
"""

import contextlib
import dataclasses
import json
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from orbax.checkpoint import v1 as ocp

from dllm_jax.data import Conversations, batches
from dllm_jax.losses import DualStream
from dllm_jax.models.tensors import leaves
from dllm_jax.nn.transformer import Transformer
from dllm_jax.typing import Key, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes."""

    step: jax.Array  # int32[]
    trainable: Params  # a subset of the parameters' top level, e.g. {"adapter": ...}
    opt_state: Any


def create(params: Params, names: tuple[str, ...], tx: optax.GradientTransformation) -> TrainState:
    """A state that trains the named top-level entries of `params` and leaves the others alone."""
    unknown = [name for name in names if name not in params]
    if unknown:
        raise ValueError(f"nothing named {unknown} to train; the parameters have {sorted(params)}")

    @jax.jit  # all of it where the parameters are: a state of mixed placement compiles a step twice
    def start(given: Params) -> TrainState:
        trainable = jax.tree.map(jnp.copy, given)  # steps donate it
        return TrainState(jnp.int32(0), trainable, tx.init(trainable))

    return start({name: params[name] for name in names})


def make_train_step(
    model: Transformer, objective: DualStream, tx: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """A jitted `step(state, params, batch, key) -> (state, figures)`; `state` is donated.

    `params` are all parameters; those that `state.trainable` holds are taken from the state. The
    noise is drawn from `fold_in(key, state.step)`. The same arguments share one compiled program.
    """
    return partial(_step, model, objective, tx)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _step(model, objective, tx, state: TrainState, params: Params, batch, key: Key):
    def loss(trainable):
        noise = jax.random.fold_in(key, state.step)
        return objective.loss(model, {**params, **trainable}, batch, noise)

    (total, figures), grads = jax.value_and_grad(loss, has_aux=True)(state.trainable)
    updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
    trainable = cast(Params, optax.apply_updates(state.trainable, updates))
    figures = {"loss": total, **figures, "grad_norm": optax.tree.norm(grads)}
    return TrainState(state.step + 1, trainable, opt_state), figures


def evaluate(
    model: Transformer, params: Params, objective: DualStream, source: Conversations, *, batch: int,
    length: int, seed: int = 0, limit: int = 64,
) -> dict[str, float]:  # fmt: skip
    """Mean figures of the objective over `limit` conversations, the same ones for the same seed."""
    batch = min(batch, len(source))
    data = batches(source, batch=batch, length=length, pad_id=model.config.pad_id, seed=seed)
    count = max(1, min(limit, len(source)) // batch)
    key = jax.random.key(seed)
    rows = [
        jax.device_get(_figures(model, objective, params, next(data), jax.random.fold_in(key, i)))
        for i in range(count)
    ]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


@partial(jax.jit, static_argnums=(0, 1))  # compiled once, however often a run evaluates
def _figures(model: Transformer, objective: DualStream, params: Params, batch, key: Key):
    return objective.loss(model, params, batch, key)[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """How long a run lasts, and what it leaves behind."""

    steps: int
    batch: int
    length: int
    seed: int = 0
    minutes: float | None = None
    """Stop after this much time in this process, saved and ready to be continued."""
    save_every: int = 50
    log_every: int = 1
    evaluate_every: int = 100


def fit(
    run: Path,
    config: Fit,
    model: Transformer,
    params: Params,
    state: TrainState,
    objective: DualStream,
    tx: optax.GradientTransformation,
    source: Conversations,
    heldout: Conversations | None = None,
) -> TrainState:
    """Trains until `config.steps`, the time budget, or a signal; continues what the folder holds.

    Args:
      state: a fresh state (`create`); replaced by the folder's newest checkpoint when there is one.

    Returns:
      The last state, which is also on disk when any step was made.

    Raises:
      ValueError: the folder holds a run of other parameters, another optimiser, or another seed,
        batch, length or data. A new number of steps is welcome: the schedule follows it.
    """
    run.mkdir(parents=True, exist_ok=True)
    step = make_train_step(model, objective, tx)
    shape = dict(batch=config.batch, length=config.length)
    data = batches(source, pad_id=model.config.pad_id, seed=config.seed, **shape)
    key = jax.random.key(config.seed)
    budget = float("inf") if config.minutes is None else 60 * config.minutes
    deadline = time.monotonic() + budget
    numbers = {"seed": config.seed, **shape, "conversations": len(source)}
    with _checkpointer(run) as checkpointer, _interrupts() as interrupted:
        state = _restore(checkpointer, state, data, numbers)
        done = int(state.step)
        with _metrics(run / "metrics.jsonl", done) as write, _progress(config.steps, done) as show:
            while done < config.steps and not interrupted() and time.monotonic() < deadline:
                start = time.perf_counter()
                state, figures = step(state, params, next(data), key)
                done += 1
                if done % config.log_every == 0 or done == config.steps:
                    figures = {name: float(v) for name, v in jax.device_get(figures).items()}
                    write({"step": done, **figures, "seconds": time.perf_counter() - start})
                    show(done, figures)
                if (
                    heldout is not None
                    and config.evaluate_every
                    and done % config.evaluate_every == 0
                ):
                    figures = evaluate(
                        model, {**params, **state.trainable}, objective, heldout, **shape
                    )
                    write({"step": done, **{f"heldout_{name}": v for name, v in figures.items()}})
                if done % config.save_every == 0:
                    _save(checkpointer, state, data, numbers)
        _save(checkpointer, state, data, numbers)
    plot(run)
    return state


@contextlib.contextmanager
def _checkpointer(run: Path) -> Iterator[ocp.training.Checkpointer]:
    policies = ocp.training.preservation_policies
    checkpointer = ocp.training.Checkpointer(
        str((run / "checkpoints").absolute()),
        preservation_policy=policies.LatestN(2),  # pyrefly: ignore[bad-argument-type]
        cleanup_tmp_directories=True,  # what a killed process left half written
    )
    try:
        yield checkpointer
    finally:
        checkpointer.close()


def _save(checkpointer, state: TrainState, data, numbers: dict[str, int]) -> None:
    """Writes the state and the data's position, unless this step, or none, is what the disk has."""
    step = int(state.step)
    if step > (checkpointer.latest.step if checkpointer.latest else 0):
        facts = {"data": data.get_state(), "numbers": numbers}
        checkpointer.save(step, _as_dict(state), custom_metadata=facts)


def _restore(checkpointer, state: TrainState, data, numbers: dict[str, int]) -> TrainState:
    """The newest checkpoint, with `data` set to its position; without one, the given state."""
    latest = checkpointer.latest
    if latest is None:
        return state
    saved = checkpointer.metadata(latest)
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _as_dict(state)
    )
    _check(saved.metadata, target, latest.step)
    for name, value in saved.custom_metadata["numbers"].items():
        if value != numbers[name]:
            raise ValueError(
                f"the run of this folder was started with {name}={value}, here it is "
                f"{numbers[name]}: its data and noise would not go on as they were; give the old "
                "value, or choose another folder"
            )
    loaded = checkpointer.load(latest, target)
    data.set_state(saved.custom_metadata["data"])
    optimiser = jax.tree.structure(state.opt_state)
    return TrainState(
        loaded["step"],
        loaded["trainable"],
        jax.tree.unflatten(optimiser, jax.tree.leaves(loaded["opt_state"])),
    )


def _check(saved: Params, target: Params, step: int) -> None:
    """Raises ValueError when a checkpoint's arrays are not those of this run."""

    def shapes(tree: Params) -> dict[str, str]:
        return {name: f"{x.dtype}{list(x.shape)}" for name, x in leaves(tree)}

    theirs, ours = shapes(saved), shapes(target)
    for name in sorted(theirs.keys() | ours.keys(), reverse=True):  # parameters first
        if theirs.get(name) != ours.get(name):
            raise ValueError(
                f"the checkpoint of step {step} does not fit this run: its {name} is "
                f"{theirs.get(name, 'missing')}, here it is {ours.get(name, 'missing')}; continue "
                "it with the settings it was started with, or choose another folder"
            )


def _as_dict(state: TrainState) -> Params:
    """Plain containers, the optimiser's leaves in order: a checkpoint outlives its classes."""
    return {
        "step": state.step,
        "trainable": state.trainable,
        "opt_state": {f"{i:04d}": leaf for i, leaf in enumerate(jax.tree.leaves(state.opt_state))},
    }


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Turns SIGTERM and SIGINT into a question: the loop ends its step, saves, and leaves."""
    asked = []
    names = (signal.SIGTERM, signal.SIGINT)
    before = {name: signal.signal(name, lambda *_: asked.append(True)) for name in names}
    try:
        yield lambda: bool(asked)
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


@contextlib.contextmanager
def _metrics(path: Path, done: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Appends JSON lines; lines of steps that the checkpoint does not know are dropped first."""
    if path.exists():
        kept = [row for row in read_metrics(path) if row["step"] <= done]
        rewritten = path.with_suffix(".partial")
        rewritten.write_text("".join(json.dumps(row) + "\n" for row in kept))
        rewritten.rename(path)  # whole or not at all: a kill here loses no line
    with path.open("a", buffering=1) as file:
        yield lambda row: print(json.dumps(row), file=file)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line that a crash cut short is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


@contextlib.contextmanager
def _progress(steps: int, done: int) -> Iterator[Callable[[int, dict[str, float]], None]]:
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns) as bar:
        task = bar.add_task("training", total=steps, completed=done)

        def show(done: int, figures: dict[str, float]) -> None:
            loss = f"loss {figures['loss']:.3f}"
            if "accepted" in figures:
                loss += f"  accepted {figures['accepted']:.2f}"
            bar.update(task, completed=done, description=loss)

        yield show


def plot(run: Path) -> Path | None:
    """Draws `<run>/loss.png` from the metrics; None when matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_metrics(run / "metrics.jsonl")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for axis, names in (
        (left, ("loss", "heldout_diffusion")),
        (right, ("accepted", "heldout_accepted")),
    ):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                axis.plot(
                    *zip(*points, strict=True), label=name, marker="o" if "heldout" in name else ""
                )
        axis.set_xlabel("step")
        if axis.lines:
            axis.legend()
    left.set_ylabel("nats per learnt token")
    right.set_ylabel("drafts that a greedy check would pass")
    figure.tight_layout()
    figure.savefig(run / "loss.png", dpi=120)
    pyplot.close(figure)
    return run / "loss.png"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimiser:
    """AdamW with warm-up and cosine decay, gradients clipped by their global norm."""

    learning_rate: float = 1e-3
    warmup: int = 20
    final: float = 0.05  # of the learning rate, at the last step
    weight_decay: float = 0.0
    clip: float = 1.0

    def build(self, steps: int) -> optax.GradientTransformation:
        """The optax transformation for a run of `steps`."""
        schedule = optax.warmup_cosine_decay_schedule(
            0.0,
            self.learning_rate,
            min(self.warmup, steps - 1),
            steps,
            self.learning_rate * self.final,
        )
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.adamw(schedule, b2=0.99, weight_decay=self.weight_decay),
        )
